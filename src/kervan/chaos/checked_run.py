"""Disturbs a fleet under load, from the first stream to the report."""

import abc
import asyncio
import resource
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from kervan.bench import drive, endpoint, eventloop
from kervan.bench.client import LoadClient, RequestObserver, Share
from kervan.bench.endpoint import Probe
from kervan.bench.load import Endpoint, Load
from kervan.bench.prompts import Alphabet, Prompts
from kervan.chaos import effects, schedule
from kervan.chaos.checked_load import (
    SAMPLING,
    ExpectedTokens,
    Stream,
    StreamObserver,
    only_some,
    tokens_as_recorded,
    tokens_of_twins,
)
from kervan.chaos.effects import Disruption
from kervan.chaos.fleet_under_test import FleetUnderTest
from kervan.chaos.report import Report
from kervan.chaos.schedule import Kind, Moment
from kervan.chaos.stream_checks import StreamChecks
from kervan.config.fleet import FleetConfig
from kervan.config.workload import Slo, parse_lengths
from kervan.errors import ConfigError, FleetError
from kervan.fleet.directory import Snapshot
from kervan.serve.fleet import plural
from kervan.twin import settings as twins

Say = Callable[[str], None]

LOOK_S = 1.0
BEAT_S = 1.5  # after which all gateways have told what they moved
NUM_PROMPTS = 32  # of a real model, each answered twice before the disruptions
TIMEOUT_S = 400.0  # of a stream: longer than one is held without a replica (300 s by default)
RECOVERY_S = 300.0  # beyond the stall timeout


@dataclass(frozen=True, kw_only=True, slots=True)
class DisruptionPlan:
    """What to do. `periods_s`: a disruption of each kind comes once in so long. `deadline_s`: of drains."""

    periods_s: Mapping[Kind, float]
    duration_s: float
    streams: int
    min_ready: int = 1
    deadline_s: float = 30.0
    isl: str = "16..64"
    osl: str = "20..200"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        if not self.periods_s:
            raise ConfigError("nothing would be disturbed; give --kill-every, --drain-every or --hang-every")
        for kind, period_s in self.periods_s.items():
            if not 0 < period_s < self.duration_s:
                raise ConfigError(
                    f"--{kind}-every {period_s:g} s is not between 0 and the {self.duration_s:g} s of --for"
                )
        if self.min_ready < 0:
            raise ConfigError(f"--min-ready {self.min_ready} is below 0")

    @property
    def moments(self) -> list[Moment]:
        return schedule.moments(self.periods_s, self.duration_s)

    def check(self, config: FleetConfig) -> None:
        """Raises: ConfigError when the fleet is so small that nothing could be disrupted."""
        if config.replicas < self.min_ready + 1:
            raise ConfigError(
                f"the fleet has {plural(config.replicas, 'replica')}, and --min-ready {self.min_ready} wants "
                f"{self.min_ready} besides the one that goes; kervan scale {self.min_ready + 1}, or --min-ready 0"
            )


@dataclass(frozen=True, slots=True)
class KnownPrompts:
    """Prompts whose responses are known. `numbers`: those to choose from, all if empty."""

    endpoint: Endpoint
    alphabet: Alphabet
    expected: ExpectedTokens
    numbers: tuple[int, ...] = ()


async def first_look(at: Endpoint) -> tuple[Endpoint, Probe]:
    """The target with its model, and what it says of itself. Raises: ConfigError."""
    return await asyncio.to_thread(
        lambda: endpoint.first_look(
            at.url,
            model=at.model or None,
            api="completions",
            headers=at.headers,
            sampling=SAMPLING,
            verify_tls=True,
        )
    )


def known_prompts_of_twins(config: FleetConfig, at: Endpoint) -> KnownPrompts:
    """What may be asked of twins: anything, as their answers are computed."""
    limits = twins.settings(config).limits
    return KnownPrompts(
        at, Alphabet(vocab_size=limits.last_token + 1, first_id=limits.first_token), tokens_of_twins(limits)
    )


def run(fleet: FleetUnderTest, config: FleetConfig, plan: DisruptionPlan, at: Endpoint, say: Say) -> Report:
    """Carry out `plan` on the fleet at `at`. Blocks; Ctrl-C ends it early, with the report.

    Raises: ConfigError, FleetError before the first disruption.
    """
    plan.check(config)
    drive.raise_file_limit()
    need, limit = plan.streams + drive.FILES_PER_PROCESS, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if need > limit:
        raise ConfigError(
            f"--streams {plan.streams} needs {need} open files, and the limit is {limit}; "
            f"raise it (ulimit -n {need}), or use --streams {max(1, limit - drive.FILES_PER_PROCESS)}"
        )
    return _Strikes(fleet, config, plan, say).run_to_end(at)


class CheckedRun(abc.ABC):
    """One run: the prompts, the load, the watch on the fleet and the report. What disturbs it is a subclass's.

    `kinds`: of the disruptions to come.
    """

    def __init__(self, fleet: FleetUnderTest, config: FleetConfig, kinds: Sequence[Kind], say: Say) -> None:
        self._fleet, self._config, self._say = fleet, config, say
        self._disruptions: list[Disruption] = []
        self._skipped: dict[Kind, int] = dict.fromkeys(kinds, 0)
        self._snapshot = Snapshot(-1, [], [], [])
        self._moved: dict[str, tuple[int, int]] = {}
        self._is_stopped = asyncio.Event()

    def run_to_end(self, at: Endpoint) -> Report:
        """Blocks; Ctrl-C ends it early, with the report."""
        factory, _ = eventloop.factory()
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(self._run(at))

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
    async def _known_prompts(self, at: Endpoint) -> KnownPrompts:
        """Raises: ConfigError, FleetError when nothing could be asked."""

    @abc.abstractmethod
    def _asked(self) -> Mapping[str, Any]:
        """What was asked for."""

    def _more(self) -> Mapping[str, Any]:
        """What the report has besides that of every run."""
        return {}

    # ---- from the first stream to the report

    async def _run(self, at: Endpoint) -> Report:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._is_stopped.set)
        try:
            self._see(await asyncio.to_thread(self._fleet.look, -1, 0.0))
            return await self._measure(await self._known_prompts(at))
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
            raise FleetError("stopped before anything was disturbed")

    async def _measure(self, prompts: KnownPrompts) -> Report:
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
        return Report(
            plan=self._asked(),
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
            more=self._more(),
        )

    # ---- the fleet

    async def _watch(self) -> None:
        told = ""
        while True:
            try:
                self._see(await asyncio.to_thread(self._fleet.look, self._snapshot.version, LOOK_S))
                told = ""
            except FleetError as error:
                if str(error) != told:
                    told = str(error)
                    self._say(told)
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
                self._say(
                    f"whole again {disruption.recover_s:.1f} s after the {disruption.kind} of {disruption.replica}"
                )

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


class _Strikes(CheckedRun):
    """Each kind of disruption once in its period, under a closed loop."""

    def __init__(self, fleet: FleetUnderTest, config: FleetConfig, plan: DisruptionPlan, say: Say) -> None:
        super().__init__(fleet, config, list(plan.periods_s), say)
        self._plan = plan

    def _target(self) -> int:
        return self._config.replicas

    def _asked(self) -> Mapping[str, Any]:
        return asdict(self._plan)

    def _client(self, prompts: KnownPrompts) -> LoadClient:
        plan = self._plan
        self._say(f"{plan.streams} streams on {self._config.replicas} replicas for {plan.duration_s:g} s")
        load = self._load(plan.streams, duration_s=plan.duration_s)
        build = Prompts(load, prompts.endpoint, prompts.alphabet)
        some = only_some(build, prompts.numbers, plan.seed) if prompts.numbers else build.request
        return LoadClient(Share(load, prompts.endpoint, prompts.alphabet, Slo()), build=some)

    async def _known_prompts(self, at: Endpoint) -> KnownPrompts:
        load = self._load(self._plan.streams, duration_s=self._plan.duration_s)
        at, probe = await first_look(at)
        longest = parse_lengths(load.isl).maximum + parse_lengths(load.osl).maximum
        if probe.max_model_len is not None and longest > probe.max_model_len:
            raise ConfigError(
                f"--isl {load.isl} and --osl {load.osl} make up to {longest} tokens, and the model takes "
                f"{probe.max_model_len}; use shorter ones"
            )
        if self._config.engine == "twin":
            return known_prompts_of_twins(self._config, at)
        alphabet, probe = await asyncio.to_thread(endpoint.find_alphabet, at, load, probe, None)
        if not probe.answered:
            raise FleetError(f"{at.url} does not answer: {probe.complaint}")
        return await self._seen(at, alphabet)

    async def _seen(self, at: Endpoint, alphabet: Alphabet) -> KnownPrompts:
        """Prompts of a real model, with what it answers undisturbed, both alone and in a batch."""
        self._say(f"{NUM_PROMPTS} prompts are answered twice, undisturbed: by these the later answers are judged")
        rounds: list[dict[bytes, list[int]]] = []
        for streams in (1, min(max(2, self._plan.streams), NUM_PROMPTS)):
            responses: dict[bytes, list[int]] = {}

            def keep(stream: Stream, responses: dict[bytes, list[int]] = responses) -> None:
                exchange = stream.exchange
                if exchange.error is not None:
                    why = f"{exchange.error}: {exchange.message}"
                    raise FleetError(f"an answer failed before anything was disturbed: {why}")
                responses[exchange.request.body] = stream.tokens

            client = LoadClient(Share(self._load(streams, num_requests=NUM_PROMPTS), at, alphabet, Slo()))
            await self._send(client, StreamObserver(keep), ends_at_stop=True)
            rounds.append(responses)
        same = {body: tokens for body, tokens in rounds[0].items() if rounds[1].get(body) == tokens}
        prompts = Prompts(self._load(1, num_requests=NUM_PROMPTS), at, alphabet)
        numbers = tuple(n for n in range(NUM_PROMPTS) if prompts.request(n, 0, None, ()).body in same)
        if not numbers:
            raise FleetError("no prompt was answered twice in the same way, so no stream could be checked")
        if len(numbers) < NUM_PROMPTS:
            self._say(f"{NUM_PROMPTS - len(numbers)} were answered differently in a batch, and are left out")
        return KnownPrompts(at, alphabet, tokens_as_recorded(same), numbers)

    def _load(self, streams: int, *, num_requests: int | None = None, duration_s: float | None = None) -> Load:
        return Load(
            streams=streams,
            num_requests=num_requests,
            duration_s=duration_s,
            isl=self._plan.isl,
            osl=self._plan.osl,
            seed=self._plan.seed,
            timeout_s=TIMEOUT_S,
        )

    # ---- disruptions

    async def _disturb(self, begin_s: float) -> None:
        for number, moment in enumerate(self._plan.moments):
            await asyncio.sleep(begin_s + moment.at_s - time.time())
            await self._strike(number, moment.kind)

    async def _strike(self, number: int, kind: Kind) -> None:
        running = {r.id: r.running for r in self._snapshot.replicas if r.id in self._ready()}
        hit = {disruption.replica for disruption in self._disruptions if disruption.whole_s is None}
        fit = running.keys() - hit
        replica = schedule.choose(fit, min_ready=self._plan.min_ready, seed=self._plan.seed, number=number)
        if replica is None:
            self._skip(kind, f"{len(fit)} of {self._config.replicas} replicas are ready")
            return
        disruption = Disruption(number, kind, replica, time.time(), running[replica])
        self._disruptions.append(disruption)
        why = "it has left meanwhile"
        try:
            is_known = await asyncio.to_thread(self._fleet.strike, kind, replica, self._plan.deadline_s)
        except FleetError as error:
            is_known, why = False, str(error)
        if not is_known:
            self._disruptions.remove(disruption)
            self._skip(kind, f"{replica}: {why}")
            return
        self._say(f"{kind} {replica} with {disruption.streams} streams; {plural(len(fit) - 1, 'other')} ready")

    def _skip(self, kind: Kind, why: str) -> None:
        self._skipped[kind] += 1
        self._say(f"no {kind} this time: {why}")
