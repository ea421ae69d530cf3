import asyncio
from typing import Any

import pytest
from harness.clouds import Answer, Asked, Gcp, forever, serving
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.notices import gcp
from kervan.notices.gcp import GcpSource, Key
from kervan.notices.metadata import Metadata, MetadataResponse, SourceError

NOW_S = 1_000.0


def source(
    metadata: Metadata, url: str, *, key: Key = "instance/preempted", wait_s: float = 60.0, timeout_s: float = 10.0
) -> GcpSource:
    lead_s = 30.0 if key == gcp.PREEMPTED else 60.0
    return GcpSource(
        metadata, key=key, url=url, node="n1", lead_s=lead_s, wait_s=wait_s, timeout_s=timeout_s, wall=lambda: NOW_S
    )


async def test_a_preemption_is_told_when_the_value_changes() -> None:
    cloud = Gcp()
    async with serving(cloud) as server, Metadata() as metadata:
        watched = source(metadata, server.url)
        assert await watched.poll() == []  # at once
        waiting = asyncio.create_task(watched.poll())
        await server.was_asked(2)
        assert not waiting.done()
        cloud.set("instance/preempted", "TRUE")
        (notice,) = await waiting
        first, second = server.asked
    assert (notice.kind, notice.source, notice.is_certain, notice.deadline_s) == ("preemption", "gcp", True, 1_030.0)
    assert first.query == {}
    assert second.query["wait_for_change"] == "true"
    assert second.query["timeout_sec"] == "60"
    assert second.query["last_etag"]


class Limits(Metadata):
    """Notes how long each request might take."""

    def __init__(self) -> None:
        super().__init__()
        self.timeouts_s: list[float] = []

    async def request(self, method: str, url: str, *, timeout_s: float, **rest: Any) -> MetadataResponse:
        self.timeouts_s.append(timeout_s)
        return await super().request(method, url, timeout_s=timeout_s, **rest)


async def test_a_long_poll_may_take_longer_than_other_answers() -> None:
    cloud = Gcp()
    cloud.waits = False
    async with serving(cloud) as server, Limits() as metadata:
        watched = source(metadata, server.url)
        await watched.poll()
        await watched.poll()
        assert metadata.timeouts_s == [10.0, 70.0]


async def test_a_change_between_two_polls_is_not_missed() -> None:
    cloud = Gcp()
    async with serving(cloud) as server, Metadata() as metadata:
        watched = source(metadata, server.url)
        await watched.poll()
        cloud.set("instance/preempted", "TRUE")  # nobody asks at this moment
        async with asyncio.timeout(5):
            assert len(await watched.poll()) == 1


async def test_a_server_without_etags_still_works() -> None:
    cloud = Gcp()
    cloud.has_etag = False
    async with serving(cloud) as server, Metadata() as metadata:
        watched = source(metadata, server.url)
        await watched.poll()
        waiting = asyncio.create_task(watched.poll())
        await server.was_asked(2)
        cloud.set("instance/preempted", "TRUE")
        assert len(await waiting) == 1
        assert "last_etag" not in server.asked[1].query


async def test_the_deadline_counts_from_the_first_look() -> None:
    cloud = Gcp()
    cloud.set("instance/preempted", "TRUE")
    cloud.waits = False
    now_s = NOW_S
    async with serving(cloud) as server, Metadata() as metadata:
        watched = GcpSource(
            metadata, key="instance/preempted", url=server.url, node="n1", lead_s=30, wall=lambda: now_s
        )
        (first,) = await watched.poll()
        now_s += 10
        (second,) = await watched.poll()
        assert first == second


@pytest.mark.parametrize(
    ("value", "kind", "is_certain"),
    [
        ("TERMINATE_ON_HOST_MAINTENANCE", "maintenance", True),
        ("SHUTDOWN_ON_HOST_MAINTENANCE", "maintenance", True),
        ("MIGRATE_ON_HOST_MAINTENANCE", "pause", False),
    ],
)
async def test_maintenance(value: str, kind: str, is_certain: bool) -> None:
    cloud = Gcp()
    cloud.set("instance/maintenance-event", value)
    async with serving(cloud) as server, Metadata() as metadata:
        (notice,) = await source(metadata, server.url, key="instance/maintenance-event").poll()
    assert (notice.kind, notice.is_certain, notice.deadline_s) == (kind, is_certain, NOW_S + 60)


async def test_a_server_that_has_no_maintenance_key_has_no_maintenance() -> None:
    cloud = Gcp()
    del cloud.values["instance/maintenance-event"]
    async with serving(cloud) as server, Metadata() as metadata:
        assert await source(metadata, server.url, key="instance/maintenance-event").poll() == []


@pytest.mark.parametrize("status", [404, 500, 503])
async def test_after_trouble_the_value_is_asked_for_without_waiting(status: int) -> None:
    cloud = Gcp()
    async with serving(cloud) as server, Metadata() as metadata:
        watched = source(metadata, server.url)
        await watched.poll()
        cloud.status = status
        cloud.waits = False
        with pytest.raises(SourceError, match=f"HTTP {status}"):
            await watched.poll()
        cloud.status = 0
        cloud.set("instance/preempted", "TRUE")
        assert len(await watched.poll()) == 1
        assert server.asked[-1].query == {}


async def test_a_server_that_hangs_is_left() -> None:
    class Hangs(Gcp):
        async def answer(self, asked: Asked) -> Answer:
            await forever()
            raise AssertionError("not reached")

    async with serving(Hangs()) as server, Metadata() as metadata:
        with pytest.raises(SourceError, match="no answer"):
            await source(metadata, server.url, timeout_s=0.05).poll()


@pytest.mark.parametrize("value", ["", "true", "TRUE TRUE", "<html>TRUE</html>", "UNKNOWN"])
async def test_other_values_are_no_preemption(value: str) -> None:
    cloud = Gcp()
    cloud.set("instance/preempted", value)
    async with serving(cloud) as server, Metadata() as metadata:
        with pytest.raises(SourceError, match="neither TRUE nor FALSE"):
            await source(metadata, server.url).poll()


DOCUMENTED = {
    gcp.PREEMPTED: {"TRUE": "preemption", "FALSE": None},
    gcp.MAINTENANCE: {
        "NONE": None,
        "MIGRATE_ON_HOST_MAINTENANCE": "pause",
        "TERMINATE_ON_HOST_MAINTENANCE": "maintenance",
        "SHUTDOWN_ON_HOST_MAINTENANCE": "maintenance",
    },
}
WORDS = st.sampled_from([word for words in DOCUMENTED.values() for word in words])


@settings(deadline=None)
@given(st.sampled_from([gcp.PREEMPTED, gcp.MAINTENANCE]), st.text() | WORDS)
def test_any_text_means_something_only_if_it_is_documented(key: Key, value: str) -> None:
    try:
        kind = gcp.meaning(key, value)
    except SourceError:
        assert value not in DOCUMENTED[key]
        return
    assert kind == DOCUMENTED[key][value]
