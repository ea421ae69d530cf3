"""The command line within the test's process, as `kervan` and `python -m kervan` run it."""

import json
import sys
from typing import Any

import pytest

from kervan import cli


class Kervan:
    """`command`: the words that come before those of each call, such as `plan`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *command: str) -> None:
        self._monkeypatch, self._capsys, self._command = monkeypatch, capsys, command

    def run(self, *words: object) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        self._monkeypatch.setattr(sys, "argv", ["kervan", *self._command, *map(str, words)])
        self._capsys.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        captured = self._capsys.readouterr()
        assert isinstance(code, int), code
        return code, captured.out, captured.err

    def json(self, *words: object) -> dict[str, Any]:
        """What a command that succeeds prints with `--json`."""
        code, out, err = self.run(*words, "--json")
        assert (code, err) == (0, "")
        found: dict[str, Any] = json.loads(out)
        return found

    def fails(self, *words: object, status: int = 2) -> str:
        """The one line of a failure."""
        code, out, err = self.run(*words)
        assert (code, out) == (status, ""), err
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
        return err.strip()
