import asyncio
import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

import pytest
from harness.clouds import Aws, Azure, Gcp, scheduled_event, serving

from kervan.errors import ConfigError
from kervan.notices import watcher as watching
from kervan.notices.aws import AwsSource
from kervan.notices.azure import AzureSource
from kervan.notices.events import Notice
from kervan.notices.gcp import GcpSource
from kervan.notices.metadata import Metadata, SourceError
from kervan.notices.operator import OperatorSource
from kervan.notices.signals import SigtermSource
from kervan.notices.source import NoticeSource
from kervan.notices.watcher import Watcher

PERIOD_S = 0.01


def notice(event_id: str = "e1", *, deadline_s: float | None = 100.0) -> Notice:
    return Notice(
        kind="preemption",
        source="aws",
        node="n1",
        event_id=event_id,
        deadline_s=deadline_s,
        seen_s=0.0,
        is_certain=True,
    )


class Scripted:
    """A source that says what it is given, step by step, and then the last again."""

    name = "scripted"
    period_s = 0.0

    def __init__(self, *steps: Sequence[Notice] | Exception, polls_to_withdraw: int = 1):
        self.steps = list(steps)
        self.polls_to_withdraw = polls_to_withdraw
        self.is_through = asyncio.Event()

    async def poll(self) -> Sequence[Notice]:
        if not self.steps:
            self.is_through.set()
            await asyncio.Event().wait()
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    async def acknowledge(self, notice: Notice) -> bool:
        return False


class Heard:
    """Takes calls of a watcher and waits for them."""

    def __init__(self) -> None:
        self.notices: asyncio.Queue[Notice] = asyncio.Queue()
        self.withdrawn: asyncio.Queue[Notice] = asyncio.Queue()

    async def next(self) -> Notice:
        async with asyncio.timeout(10):
            return await self.notices.get()

    async def next_withdrawn(self) -> Notice:
        async with asyncio.timeout(10):
            return await self.withdrawn.get()

    def all(self) -> list[Notice]:
        return [self.notices.get_nowait() for _ in range(self.notices.qsize())]


@contextlib.asynccontextmanager
async def running(*sources: NoticeSource, heard: Heard) -> AsyncIterator[Watcher]:
    watcher = Watcher(
        sources,
        heard.notices.put,
        on_withdrawn=heard.withdrawn.put,
        first_backoff_s=PERIOD_S,
        max_backoff_s=2 * PERIOD_S,
    )
    task = asyncio.create_task(watcher.run())
    try:
        yield watcher
    finally:
        assert not task.done(), "the watcher ended by itself"
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


# ---- what is told


@pytest.mark.parametrize(
    ("deadlines_s", "told_s"),
    [
        pytest.param([100.0, 100.0, 100.0], [100.0], id="once"),
        pytest.param([100.0, 60.0, 60.0], [100.0, 60.0], id="again when it comes nearer"),
        pytest.param([60.0, 100.0], [60.0], id="not when it goes away"),
        pytest.param([None, 100.0], [None, 100.0], id="a deadline for what had none"),
        pytest.param([100.0, 99.8], [100.0], id="not for rounding"),
    ],
)
async def test_a_notice_is_told(deadlines_s: list[float | None], told_s: list[float | None]) -> None:
    heard, source = Heard(), Scripted(*([notice(deadline_s=s)] for s in deadlines_s))
    async with running(source, heard=heard) as watcher:
        assert [(await heard.next()).deadline_s for _ in told_s] == told_s
        await source.is_through.wait()
        assert heard.notices.empty()
        assert [one.deadline_s for one in watcher.pending] == [told_s[-1]]
        assert watcher.soonest == watcher.pending[0]


async def test_a_notice_that_is_taken_back_may_be_told_again() -> None:
    heard, source = Heard(), Scripted([notice()], [], [notice(deadline_s=500.0)])
    async with running(source, heard=heard):
        assert (await heard.next()).deadline_s == 100
        assert (await heard.next_withdrawn()).deadline_s == 100
        assert (await heard.next()).deadline_s == 500


async def test_a_server_that_forgets_for_a_moment_takes_nothing_back() -> None:
    heard = Heard()
    source = Scripted([notice()], [], [notice()], [], [], polls_to_withdraw=2)
    async with running(source, heard=heard) as watcher:
        await heard.next_withdrawn()
        assert heard.all() == [notice()]
        assert watcher.pending == []


async def test_moments_apart_do_not_add_up() -> None:
    heard = Heard()
    source = Scripted([notice()], [], [notice()], [], [notice()], polls_to_withdraw=2)
    async with running(source, heard=heard) as watcher:
        await source.is_through.wait()
        assert (watcher.pending, heard.withdrawn.empty()) == ([notice()], True)


async def test_a_source_takes_back_its_own_notices_only() -> None:
    heard, source, other = Heard(), Scripted([notice()]), Scripted([], [], [])
    other.name = "other"
    async with running(source, other, heard=heard) as watcher:
        await source.is_through.wait()
        await other.is_through.wait()
        assert watcher.pending == [notice()]


async def test_a_failure_takes_nothing_back() -> None:
    heard, source = Heard(), Scripted([notice()], SourceError("gone"), SourceError("gone"), [notice()])
    async with running(source, heard=heard) as watcher:
        await source.is_through.wait()
        assert watcher.pending == [notice()]
        assert heard.withdrawn.empty()


async def test_a_call_that_fails_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[Notice] = []
    is_done = asyncio.Event()

    async def fail_twice(one: Notice) -> None:
        calls.append(one)
        if len(calls) < 3:
            raise RuntimeError("no")
        is_done.set()

    watcher = Watcher([Scripted([notice()])], fail_twice, first_backoff_s=0.001)
    task = asyncio.create_task(watcher.run())
    async with asyncio.timeout(10):
        await is_done.wait()
    task.cancel()
    assert calls == [notice()] * 3
    assert "telling of preemption e1 failed (2 of 5)" in caplog.text


# ---- trouble with sources


async def test_trouble_is_logged_when_it_changes_and_hides_no_other_source(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bad = Scripted(*[SourceError("gone")] * 3, SourceError("HTTP 500"), SourceError("HTTP 500"), [], [notice()])
    good = Scripted([], [notice("e2")])
    good.name = "good"
    heard = Heard()
    async with running(bad, good, heard=heard) as watcher:
        assert {(await heard.next()).event_id, (await heard.next()).event_id} == {"e1", "e2"}
        health = watcher.health["scripted"]
        assert (health.failures, health.failures_in_a_row, health.problem) == (5, 0, "")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "notices: scripted cannot be read: gone",
        "notices: scripted cannot be read: HTTP 500",
        "notices: scripted answers again",
    ]


async def test_a_fault_in_a_source_does_not_end_the_watcher(caplog: pytest.LogCaptureFixture) -> None:
    heard, source = Heard(), Scripted(KeyError("x"), KeyError("x"), [notice()])
    async with running(source, heard=heard):
        assert await heard.next() == notice()
    assert caplog.text.count("Traceback") == 1


async def test_pauses_after_failures_grow_to_a_bound() -> None:
    watcher = Watcher([Scripted()], Heard().notices.put, first_backoff_s=1.0, max_backoff_s=10.0)
    health = watcher.health["scripted"]
    assert [watcher._failed("scripted", health, "gone") for _ in range(6)] == [1, 2, 4, 8, 10, 10]


async def test_a_source_that_never_waits_lets_others_work() -> None:
    heard, busy = Heard(), Scripted(*[[notice()]] * 200)
    other = Scripted([notice("e2")])
    other.name = "other"
    async with running(busy, other, heard=heard):
        assert {(await heard.next()).event_id, (await heard.next()).event_id} == {"e1", "e2"}


# ---- with clouds


async def test_a_cloud_that_goes_and_comes_back() -> None:
    cloud, heard = Aws(), Heard()
    end_s = time.time() + 100
    async with serving(cloud) as server, Metadata() as metadata:
        source = AwsSource(metadata, url=server.url, node="n1", period_s=PERIOD_S)
        async with running(source, heard=heard) as watcher:
            await server.was_asked(3)
            await server.stop()
            for _ in range(1000):
                if watcher.health["aws"].problem:
                    break
                await asyncio.sleep(PERIOD_S)
            assert watcher.health["aws"].problem
            end = datetime.fromtimestamp(end_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            cloud.items["spot/instance-action"] = json.dumps({"action": "terminate", "time": end})
            await server.start()
            told = await heard.next()
            assert told.deadline_s == int(end_s)
            assert not await watcher.acknowledge(told)  # AWS takes none


async def test_a_preemption_on_google_cloud_is_told_at_once() -> None:
    cloud, heard = Gcp(), Heard()
    async with serving(cloud) as server, Metadata() as metadata:
        source = GcpSource(metadata, key="instance/preempted", url=server.url, node="n1", lead_s=30, period_s=PERIOD_S)
        async with running(source, heard=heard):
            await server.was_asked(2)
            cloud.set("instance/preempted", "TRUE")
            assert (await heard.next()).kind == "preemption"


async def test_an_acknowledgement_reaches_azure_and_the_end_is_told() -> None:
    cloud, heard = Azure(), Heard()
    async with serving(cloud) as server, Metadata() as metadata:
        source = AzureSource(metadata, url=server.url, node="n1", period_s=PERIOD_S)
        async with running(source, heard=heard) as watcher:
            cloud.events = [scheduled_event("freeze", "Freeze")]
            told = await heard.next()
            assert (told.kind, watcher.soonest) == ("pause", None)
            assert await watcher.acknowledge(told)
            assert cloud.approved == ["freeze"]
            cloud.events = []
            assert (await heard.next_withdrawn()).event_id == "freeze"
            assert not await watcher.acknowledge(told)  # it is over


async def test_an_acknowledgement_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Refuses(Scripted):
        async def acknowledge(self, notice: Notice) -> bool:
            raise SourceError("HTTP 400")

    heard = Heard()
    async with running(Refuses([notice()]), heard=heard) as watcher:
        assert not await watcher.acknowledge(await heard.next())
    assert "the acknowledgement of preemption e1 failed: HTTP 400" in caplog.text


# ---- signals and operators


async def test_sigterm_is_a_notice() -> None:
    heard, source = Heard(), SigtermSource(node="n1", lead_s=25, wall=lambda: 1000.0)
    before = signal.getsignal(signal.SIGTERM)
    async with running(source, heard=heard):
        with source.installed():
            os.kill(os.getpid(), signal.SIGTERM)
            told = await heard.next()
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(PERIOD_S)
        assert (told.kind, told.source, told.deadline_s, told.is_certain) == ("sigterm", "signal", 1025.0, True)
        assert heard.notices.empty()  # the second one changes nothing
    assert signal.getsignal(signal.SIGTERM) is before


async def test_the_time_counts_from_the_first_sigterm() -> None:
    now_s = 1000.0
    source = SigtermSource(node="n1", lead_s=25, wall=lambda: now_s)
    source.notify()
    now_s = 1010.0
    source.notify()
    assert [one.deadline_s for one in await source.poll()] == [1025.0]


async def test_sigterm_outside_of_the_main_thread_says_what_to_do() -> None:
    caught: list[Exception] = []

    async def install() -> None:
        with SigtermSource(node="n1").installed():
            pass

    def run() -> None:
        try:
            asyncio.run(install())
        except ConfigError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    await asyncio.to_thread(thread.join)
    assert "call notify()" in str(caught[0])


async def test_an_operator_announces_hurries_and_takes_back() -> None:
    heard, source = Heard(), OperatorSource(node="n1", wall=lambda: 1000.0)
    async with running(source, heard=heard) as watcher:
        drain = source.announce(why="new kernel")
        assert await heard.next() == drain
        assert (drain.kind, drain.deadline_s, drain.detail) == ("operator", None, "new kernel")
        source.announce(remaining_s=60, event_id=drain.event_id)
        assert (await heard.next()).deadline_s == 1060
        assert len(watcher.pending) == 1
        assert source.withdraw(drain.event_id)
        assert (await heard.next_withdrawn()).event_id == drain.event_id
        assert not source.withdraw(drain.event_id)


@pytest.mark.parametrize("remaining_s", [-1.0, float("nan"), float("inf")])
def test_an_operators_time_must_be_one(remaining_s: float) -> None:
    with pytest.raises(ConfigError, match="leave it out for no deadline"):
        OperatorSource(node="n1").announce(remaining_s=remaining_s)


def test_the_backoff_leaves_most_of_the_shortest_notice() -> None:
    assert watching.MAX_BACKOFF_S <= 30 / 3
