"""The process that asks Ray for `kervan top`: what it answers, and when it ends so that another one takes its place."""

import io
import os
import select
from collections.abc import Iterator

import msgspec
import pytest

from kervan.cli.live import feed
from kervan.cli.live.feed import LENGTH, LOOK, LOOK_WITH_GPUS, Feed, Frame
from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError, FleetError
from kervan.fleet.directory import ReplicaEntry, Snapshot
from kervan.serve.status import FleetStatus, fleet_status

CONFIG = FleetConfig(model="org/model")
READY = ReplicaEntry("a", "on-demand", "127.0.0.9", 7, "ready")


class Watched:
    """A fleet whose looks go as is written down: a status, or an error."""

    def __init__(self, *outcomes: Exception | None, attaching: Exception | None = None) -> None:
        self.outcomes: Iterator[Exception | None] = iter(outcomes)
        self.attaching = attaching

    def __call__(self, name: str, address: str | None) -> "Watched":
        if self.attaching is not None:
            raise self.attaching
        return self

    def look(self) -> FleetStatus:
        if (error := next(self.outcomes)) is not None:
            raise error
        return fleet_status(CONFIG, Snapshot(1, [READY], [], []))

    @staticmethod
    def here() -> str:
        return "127.0.0.1"


def answers(monkeypatch: pytest.MonkeyPatch, watched: Watched, *requests: bytes) -> list[Frame]:
    monkeypatch.setattr(feed, "FleetWatch", watched)
    out = io.BytesIO()
    feed.main("chat", None, io.BytesIO(b"".join(requests)), out)
    data, found = out.getvalue(), []
    while data:
        (length,) = LENGTH.unpack_from(data)
        found.append(msgspec.msgpack.decode(data[LENGTH.size : LENGTH.size + length], type=Frame))
        data = data[LENGTH.size + length :]
    return found


def test_each_request_has_a_frame_and_gpus_if_it_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, with_gpus = answers(monkeypatch, Watched(None, None), LOOK, LOOK_WITH_GPUS)
    assert plain.status().snapshot.replicas == [READY] and plain.status().config == CONFIG
    assert plain.gpus is None
    assert with_gpus.gpus is not None and set(with_gpus.gpus) == {"127.0.0.1", "127.0.0.9"}


def test_a_directory_that_is_away_is_told_and_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = answers(monkeypatch, Watched(None, FleetError("it does not answer"), None), LOOK, LOOK, LOOK)
    assert [frame.error for frame in frames] == ["", "it does not answer", ""]
    with pytest.raises(FleetError, match="does not answer"):
        frames[1].status()


def test_a_fleet_that_cannot_be_joined_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    (frame,) = answers(monkeypatch, Watched(attaching=ConfigError("--address 'x' is no HOST:PORT")), LOOK, LOOK, LOOK)
    with pytest.raises(ConfigError, match="HOST:PORT"):
        frame.status()


def test_the_end_of_the_process_is_noticed(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERVAN_HOME", str(tmp_path))  # no fleet was started from there
    asked = Feed("nobody", None)
    try:
        asked.request(with_gpus=False)
        frame = None
        while frame is None and not asked.is_over:
            feed_is_ready(asked)
            frame = asked.read()
        assert frame is not None and "no fleet 'nobody' was started from this machine" in frame.error
        while not asked.is_over:
            feed_is_ready(asked)
            asked.read()
    finally:
        asked.close()


def feed_is_ready(asked: Feed) -> None:
    assert select.select([asked], [], [], 60)[0], "nothing came"
