"""Loads a fleet that is disturbed and checks every token, from the first stream to the report."""

import abc
import asyncio
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from kervan.bench import eventloop
from kervan.bench.endpoint import Probe, first_look
from kervan.bench.load import Endpoint
from kervan.bench.load_client import LoadClient, RequestObserver
from kervan.bench.prompts import Alphabet
from kervan.chaos import effects
from kervan.chaos.checked_load import SAMPLING, ExpectedTokens, StreamObserver, tokens_of_twins
from kervan.chaos.effects import Disruption
from kervan.chaos.fleet_under_test import FleetUnderTest
from kervan.chaos.plans import DisruptionPlan, ReplayPlan
from kervan.chaos.report import ChaosReport, NodeHistory
from kervan.chaos.schedule import DisruptionKind
from kervan.chaos.stream_checks import StreamChecks
from kervan.config.fleet import FleetConfig
from kervan.errors import FleetError
from kervan.fleet.directory import Snapshot
from kervan.twin import settings as twins

Say = Callable[[str], None]

LOOK_S = 1.0
BEAT_S = 1.5  # after which all gateways have told what they moved
RECOVERY_S = 300.0  # beyond the stall timeout


@dataclass(frozen=True, slots=True)
class KnownPrompts:
    """Prompts whose responses are known. `numbers`: those to choose from, all if empty."""

    endpoint: Endpoint
    alphabet: Alphabet
    expected: ExpectedTokens
    numbers: tuple[int, ...] = ()


async def probe(endpoint: Endpoint) -> tuple[Endpoint, Probe]:
    """The endpoint with its model, and what it says of itself. Raises: ConfigError."""
    return await asyncio.to_thread(first_look, replace(endpoint, sampling=SAMPLING))


def known_prompts_of_twins(config: FleetConfig, endpoint: Endpoint) -> KnownPrompts:
    """All prompts are, as the responses of twins are computed."""
    limits = twins.settings(config).limits
    alphabet = Alphabet(vocab_size=limits.last_token + 1, first_id=limits.first_token)
    return KnownPrompts(endpoint, alphabet, tokens_of_twins(limits))


class CheckedRun(abc.ABC):
    """One run: the prompts, the load, the watch on the fleet and the report. What disturbs it is a subclass's.

    `kinds`: of the disruptions to come.
    """

    def __init__(
        self,
        fleet: FleetUnderTest,
        config: FleetConfig,
        plan: DisruptionPlan | ReplayPlan,
        kinds: Sequence[DisruptionKind],
        say: Say,
    ) -> None:
        self._fleet, self._config, self._say = fleet, config, say
        self._requested_plan = plan
        self._disruptions: list[Disruption] = []
        self._skipped: dict[DisruptionKind, int] = dict.fromkeys(kinds, 0)
        self._snapshot = Snapshot(-1, [], [], [])
        self._moved: dict[str, tuple[int, int]] = {}
        self._is_stopped = asyncio.Event()

    def run_to_end(self, endpoint: Endpoint) -> ChaosReport:
        """Blocks; Ctrl-C ends it early, with the report."""
        factory, _ = eventloop.factory()
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(self._run(endpoint))

    # ---- a subclass's

    @abc.abstractmethod
    def _target(self) -> int:
        """How many replicas are ready when the fleet is whole, as it should be now."""

    @abc.abstractmethod
    async def _disturb(self, begin_s: float) -> None:
        """Disrupt what is to be disrupted in the run that began at `begin_s` (Unix time); cancelled at its end."""

    @abc.abstractmethod
    def _client(self, prompts: KnownPrompts) -> LoadClient:
        """What sends the load; says what it will be."""

    @abc.abstractmethod
    async def _known_prompts(self, endpoint: Endpoint) -> KnownPrompts:
        """What to send. Raises: ConfigError, FleetError when there is nothing whose response is known."""

    def _nodes_seen(self) -> NodeHistory | None:
        """What became of nodes; None where they do not come and go."""
        return None

    # ---- from the first stream to the report

    async def _run(self, endpoint: Endpoint) -> ChaosReport:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._is_stopped.set)
        try:
            self._see(await asyncio.to_thread(self._fleet.look, -1, 0.0))
            return await self._measure(await self._known_prompts(endpoint))
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    async def _send(self, client: LoadClient, observer: RequestObserver, *, ends_at_stop: bool) -> None:
        """Send the client's load to its end, or to Ctrl-C."""
        client.prepare()
        await client.connect_first()
        running = asyncio.create_task(client.run(time.time(), observer))
        stop = asyncio.create_task(self._is_stopped.wait())
        try:
            await asyncio.wait({running, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                client.end()
            await running
        finally:
            stop.cancel()
            running.cancel()
        if ends_at_stop and self._is_stopped.is_set():
            raise FleetError("stopped before any fault was injected")

    async def _measure(self, prompts: KnownPrompts) -> ChaosReport:
        checks = StreamChecks(prompts.expected, self._disruptions, self._say)
        client = self._client(prompts)
        begin_s = time.time()
        watching = asyncio.create_task(self._watch())
        striking = asyncio.create_task(self._disturb(begin_s))
        try:
            await self._send(client, StreamObserver(checks.add), ends_at_stop=False)
            striking.cancel()
            await asyncio.wait({striking})
            wall_s = time.time() - begin_s
            _raise_failure(striking)
            await self._wait_until_whole(watching)
            if not self._is_stopped.is_set():
                await asyncio.sleep(BEAT_S)
            with suppress(FleetError):
                self._see(await asyncio.to_thread(self._fleet.look, -1, 0.0))
            _raise_failure(watching)
        finally:
            watching.cancel()
            striking.cancel()
        return ChaosReport(
            plan=self._requested_plan,
            engine=self._config.engine,
            target_replicas=self._config.replicas,
            wall_s=wall_s,
            disruptions=self._disruptions,
            skipped=self._skipped,
            streams=checks.streams,
            unfinished=client.unfinished,
            tokens=checks.tokens,
            broken=checks.broken,
            difference=await asyncio.to_thread(checks.difference),
            errors=checks.errors,
            messages=checks.messages,
            moves=sum(last - first for first, last in self._moved.values()),
            longest_s=checks.longest_s,
            client_late_s=client.lag.largest,
            was_interrupted=self._is_stopped.is_set(),
            nodes=self._nodes_seen(),
        )

    # ---- the fleet

    async def _watch(self) -> None:
        last_error = ""
        while True:
            try:
                self._see(await asyncio.to_thread(self._fleet.look, self._snapshot.version, LOOK_S))
                last_error = ""
            except FleetError as error:
                if str(error) != last_error:
                    last_error = str(error)
                    self._say(last_error)
                await asyncio.sleep(LOOK_S)

    def _ready(self) -> set[str]:
        return {replica.id for replica in self._snapshot.replicas if replica.state == "ready"}

    def _see(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        for gateway in snapshot.gateways:
            first, _ = self._moved.get(gateway.id, (gateway.moved, 0))
            self._moved[gateway.id] = first, gateway.moved
        for disruption in effects.follow(self._disruptions, self._ready(), self._target(), time.time()):
            if disruption.recover_s is not None:
                self._say(f"recovered {disruption.recover_s:.1f} s after the {disruption.kind} of {disruption.replica}")

    async def _wait_until_whole(self, watching: "asyncio.Task[None]") -> None:
        bound_s = time.monotonic() + RECOVERY_S + self._config.stall_timeout_s
        while any(disruption.whole_s is None for disruption in self._disruptions):
            if self._is_stopped.is_set() or watching.done() or time.monotonic() > bound_s:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_stopped.wait(), 0.1)


def _raise_failure(task: "asyncio.Task[None]") -> None:
    if task.done() and not task.cancelled() and (error := task.exception()) is not None:
        raise error
