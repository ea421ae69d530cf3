"""`kervan keys`, keys in the environment, and what ps shows."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from harness.command_line import Kervan

from kervan.cli import options, secret_words
from kervan.cli.up import _settings
from kervan.config import key_file, reach
from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KERVAN_API_KEY", "KERVAN_API_KEYS", "KERVAN_API_KEYS_FILE", "KERVAN_NEW_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KERVAN_HOME", str(tmp_path / "home"))


@pytest.fixture
def kervan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kervan:
    return Kervan(monkeypatch, capsys)


def prints(kervan: Kervan, *words: str) -> str:
    code, out, err = kervan.run(*words)
    assert code == 0, err
    return out


def test_a_key_is_printed_once_and_kept_as_its_digest(kervan: Kervan, tmp_path: Path) -> None:
    key = prints(
        kervan, "keys", "add", "web", "--requests-per-minute", "60", "--models", "a,b", "--expires", "30d"
    ).strip()
    path = tmp_path / "home" / "keys.yaml"
    (entry,) = key_file.read(path)
    assert entry.digest == hashlib.sha256(key.encode()).hexdigest()
    assert (entry.name, entry.requests_per_minute, entry.models) == ("web", 60, ("a", "b"))
    assert entry.expires_s == pytest.approx(time.time() + 30 * 86400, abs=60)
    assert key not in path.read_text()
    told = json.loads(prints(kervan, "keys", "list", "--json"))["keys"]
    assert [(one["name"], one["requests_per_minute"], one["streams"]) for one in told] == [("web", 60, 0)]
    assert "2" in prints(kervan, "keys", "list")
    prints(kervan, "keys", "limit", "web", "--streams", "4", "--models", "all", "--expires", "never")
    (changed,) = key_file.read(path)
    assert (changed.requests_per_minute, changed.streams, changed.models, changed.expires_s) == (60, 4, (), 0)
    assert changed.digest == entry.digest
    prints(kervan, "keys", "revoke", "web")
    assert key_file.read(path) == []


def test_a_key_that_was_made_elsewhere_comes_from_the_environment(
    kervan: Kervan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KERVAN_NEW_KEY", "made elsewhere")
    path = tmp_path / "keys.yaml"
    told = json.loads(prints(kervan, "keys", "add", "web", "--file", str(path), "--json"))
    assert told == {"name": "web", "key": None, "file": str(path)}
    assert key_file.read(path)[0].digest == hashlib.sha256(b"made elsewhere").hexdigest()
    assert "has the key of KERVAN_NEW_KEY already" in kervan.fails("keys", "add", "two", "--file", str(path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("add", "a b"), "'a b' is no name of a key"),
        (("add", "web"), "has a key web already; kervan keys limit web changes its limits"),
        (("add", "x", "--expires", "30"), "'30' has no unit; write for example 30d for days, 12h or never"),
        (("add", "x", "--expires", "soon"), "'soon' is no time from 1 s to 100 years; write for example 30d"),
        (("add", "x", "--models", "a,,b"), "has an empty name; write for example a,b, or all"),
        (("add", "x", "--streams", "-1"), "-1 is not a whole number"),
        (("limit", "web"), "give a limit to change"),
        (("limit", "wep", "--streams", "1"), "has no key 'wep'; did you mean web?"),
        (("revoke", "other"), "kervan keys list --file"),
        (("list", "--file", "/nowhere/keys.yaml"), "/nowhere/keys.yaml: no such file of API keys"),
        (("add", "x", "--file", "/proc/keys.yaml"), "the API keys cannot be written"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(kervan: Kervan, words: tuple[str, ...], message: str) -> None:
    prints(kervan, "keys", "add", "web")
    assert message in kervan.fails("keys", *words)


def test_keys_of_the_fleet_come_from_options_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options.api_keys(()) == ()
    assert options.client_key(None) is None
    monkeypatch.setenv("KERVAN_API_KEYS", "web:k1,batch:k2")
    assert [one.partition("=")[0] for one in options.api_keys(())] == ["web", "batch"]
    assert options.client_key(None) == "k1"
    monkeypatch.setenv("KERVAN_API_KEY", "k3")
    assert [one.partition("=")[0] for one in options.api_keys(())] == ["web", "batch", "default"]
    assert (options.client_key(None), options.client_key("k4")) == ("k3", "k4")
    assert [one.partition("=")[0] for one in options.api_keys(("k5", "k6"))] == ["key-1", "key-2"]
    assert "k5" not in str(options.api_keys(("k5",)))
    with pytest.raises(ConfigError, match="--api-key is empty"):
        options.client_key(" ")


def test_up_takes_the_file_of_keys_by_its_whole_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    empty = ("api_keys", "engine_args", "env", "twin", "pools", "schedule")
    given = {**dict.fromkeys(empty, ()), **dict.fromkeys(("gateways", "replicas", "slo"))}
    settings = _settings(None, {**given, "name": "f", "model": "m", "api_keys_file": Path("keys.yaml")})
    assert settings["api_keys_file"] == str(tmp_path / "keys.yaml")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["up", "m", "--api-key", "k", "--api-key=k2"], ["up", "m", "--api-key", "***", "--api-key=***"]),
        (["up", "--api-keys", "file"], ["up", "--api-keys", "file"]),
        (["bench", "--header", "a: b"], ["bench", "--header", "a: b"]),
    ],
)
def test_keys_are_taken_out_of_a_command_line(words: list[str], shown: list[str]) -> None:
    assert secret_words.without(words) == shown


def test_ps_does_not_show_the_key_of_a_command() -> None:
    code = (
        "import sys; from kervan.cli import secret_words; secret_words.hide(); print('hidden', flush=True); "
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, "up", "m", "--api-key", "kv-secret"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hidden\n"
        shown = " ".join(psutil.Process(process.pid).cmdline())
        process.communicate()
    assert "kv-secret" not in shown
    assert "--api-key ***" in shown


@pytest.mark.parametrize("words", [("limit", "web", "--streams", "1"), ("revoke", "web")], ids=" ".join)
def test_a_change_of_a_missing_file_leaves_nothing(kervan: Kervan, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert "no such file of API keys" in kervan.fails("keys", *words, "--file", str(tmp_path / "more" / "keys.yaml"))
    assert not (tmp_path / "more").exists()


def test_list_warns_of_a_file_that_others_may_write(kervan: Kervan, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    prints(kervan, "keys", "add", "web", "--file", str(path))
    assert kervan.run("keys", "list", "--file", str(path))[2] == ""
    path.chmod(0o666)
    code, _, err = kervan.run("keys", "list", "--file", str(path))
    assert code == 0
    assert "has mode 666" in err


def test_the_help_shows_values_as_they_are_taken(kervan: Kervan) -> None:
    shown = prints(kervan, "keys", "add", "--help")
    assert "--expires 30d" in shown
    assert "--models a,b" in shown


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "on the nodes with a gateway alone (127.0.0.1), without a key; --host 0.0.0.0 lets other machines in"),
        ({"host": "::1"}, "alone (::1)"),
        ({"host": "localhost", "api_keys": ("k",)}, "alone (localhost), with an API key"),
        ({"host": "0.0.0.0"}, "warning: port 8000 answers on every address of the nodes with a gateway, and whoever"),
        ({"host": "10.0.0.7"}, "warning: port 8000 answers on 10.0.0.7, and whoever reaches it may use the fleet"),
        ({"host": "0.0.0.0", "api_keys_file": "f"}, "with an API key; /health, /metrics and /docs need none"),
    ],
)
def test_up_says_who_can_reach_the_fleet(settings: dict[str, object], told: str) -> None:
    assert told in reach.described(FleetConfig(model="m", **settings))  # type: ignore[arg-type]
