"""What a record tells of its machine."""

from pathlib import Path

import pytest

from kervan import autogroups
from kervan.bench import records


@pytest.mark.parametrize(("written", "told"), [("1\n", True), ("0\n", False), (None, False)])
def test_a_record_tells_whether_sessions_are_groups(
    written: str | None, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = tmp_path / "sched_autogroup_enabled"
    if written is not None:
        switch.write_text(written)
    monkeypatch.setattr(autogroups, "SWITCH", switch)
    assert records.environment()["hardware"]["sched_autogroup"] is told
