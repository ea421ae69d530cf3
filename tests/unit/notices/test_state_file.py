import builtins
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.errors import ConfigError
from kervan.notices import state_file
from kervan.notices.events import Notice
from kervan.notices.state_file import NodeState

NOTICE = Notice(
    kind="preemption", source="gcp", node="n1", event_id="e", deadline_s=1030.0, seen_s=1000.0, is_certain=True
)
STATE = NodeState(
    node="n1",
    since_s=10.0,
    written_s=1001.0,
    requests_served=5_000,
    streams_in_flight=64,
    streams_moved=12,
    notice=NOTICE,
)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_was_written_is_read(tmp_path: Path, scheme: str) -> None:
    place = f"{scheme}{tmp_path}/new/state.json"
    state_file.write(STATE, place)
    assert state_file.read(place) == STATE
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["state.json"]
    assert json.loads((tmp_path / "new/state.json").read_text())["requests_served"] == 5000


def test_there_may_be_none(tmp_path: Path) -> None:
    assert state_file.read(str(tmp_path / "no.json")) is None


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"{}",
        b"[" * 10_000,
        b"\xff\xfe",
        json.dumps({**json.loads(json.dumps({"node": "n1"})), "since_s": "yesterday"}).encode(),
        b"x" * (state_file.MAX_BYTES + 1),
    ],
)
def test_a_damaged_file_is_told_and_is_no_state(tmp_path: Path, raw: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(raw)
    assert state_file.read(str(path)) is None
    assert "damaged or not a state" in caplog.text


def test_a_file_of_another_version_is_no_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state.json"
    state_file.write(STATE, str(path))
    path.write_text(path.read_text().replace('"version":1', '"version":2'))
    assert state_file.read(str(path)) is None
    assert "version 2, this is version 1" in caplog.text


def test_a_directory_in_its_place_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert state_file.read(str(tmp_path)) is None
    assert "cannot be read" in caplog.text


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_without_an_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(raw)
    assert state_file.read(str(path)) is None


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    place = str(tmp_path / "state.json")
    state_file.write(STATE, place)
    seen: list[NodeState | None] = []
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            seen.append(state_file.read(place))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        state_file.write(STATE, place)
    is_over.set()
    reader.join()
    assert seen
    assert all(state == STATE for state in seen)


def test_a_failed_write_leaves_the_old_state_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(tmp_path / "state.json")
    state_file.write(STATE, place)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        state_file.write(STATE, place)
    assert state_file.read(place) == STATE
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_a_url_goes_through_fsspec() -> None:
    place = "memory://kervan/state.json"
    assert state_file.read("memory://kervan/none.json") is None
    state_file.write(STATE, place)
    assert state_file.read(place) == STATE


@pytest.mark.parametrize("place", ["nosuch://bucket/state.json"])
def test_a_url_that_fsspec_does_not_know_says_what_to_do(place: str) -> None:
    with pytest.raises(ConfigError, match="or give a local path"):
        state_file.write(STATE, place)
    with pytest.raises(ConfigError, match="or give a local path"):
        state_file.read(place)


def test_without_fsspec_a_url_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "fsspec":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="pip install fsspec"):
        state_file.write(STATE, "s3://bucket/state.json")
