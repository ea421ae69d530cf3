"""Kills, drains or hangs replicas of a fleet at regular times, under a closed loop whose every token is checked."""

import asyncio
import resource
import time

from kervan.bench import drive
from kervan.bench.endpoint import find_alphabet
from kervan.bench.load import Endpoint
from kervan.bench.load_client import LoadClient, Share
from kervan.bench.prompts import Alphabet, Prompts
from kervan.chaos import schedule
from kervan.chaos.checked_load import CheckedStream, StreamObserver, only_some, tokens_as_recorded
from kervan.chaos.checked_run import CheckedRun, KnownPrompts, Say, known_prompts_of_twins, probe
from kervan.chaos.effects import Disruption
from kervan.chaos.fleet_under_test import FleetUnderTest
from kervan.chaos.plans import DisruptionPlan
from kervan.chaos.report import ChaosReport
from kervan.chaos.schedule import DisruptionKind
from kervan.config.fleet import FleetConfig
from kervan.config.workload import Slo, parse_lengths
from kervan.errors import ConfigError, FleetError
from kervan.units import plural

NUM_PROMPTS = 32  # of a real model, each sent twice before the disruptions


def check_size(plan: DisruptionPlan, config: FleetConfig) -> None:
    """Raises: ConfigError when the fleet is so small that nothing could be disrupted."""
    if config.replicas < plan.min_ready + 1:
        raise ConfigError(
            f"the fleet has {plural(config.replicas, 'replica')}, and --min-ready {plan.min_ready} wants "
            f"{plan.min_ready} besides the one that goes; kervan scale {plan.min_ready + 1}, or --min-ready 0"
        )


def run(fleet: FleetUnderTest, config: FleetConfig, plan: DisruptionPlan, endpoint: Endpoint, say: Say) -> ChaosReport:
    """Carry out `plan` on the fleet at `endpoint`. Blocks; Ctrl-C ends it early, with the report.

    Raises: ConfigError, FleetError before the first disruption.
    """
    check_size(plan, config)
    drive.raise_file_limit()
    need, limit = plan.streams + drive.FILES_PER_PROCESS, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if need > limit:
        raise ConfigError(
            f"--streams {plan.streams} needs {need} open files, and the limit is {limit}; "
            f"raise it (ulimit -n {need}), or use --streams {max(1, limit - drive.FILES_PER_PROCESS)}"
        )
    return _PeriodicRun(fleet, config, plan, say).run_to_end(endpoint)


class _PeriodicRun(CheckedRun):
    """Each kind of disruption once in its period, under a closed loop."""

    def __init__(self, fleet: FleetUnderTest, config: FleetConfig, plan: DisruptionPlan, say: Say) -> None:
        super().__init__(fleet, config, plan, list(plan.periods_s), say)
        self._plan = plan

    def _target(self) -> int:
        return self._config.replicas

    def _client(self, prompts: KnownPrompts) -> LoadClient:
        plan = self._plan
        self._say(f"{plan.streams} streams on {self._config.replicas} replicas for {plan.duration_s:g} s")
        load = plan.load(plan.streams, duration_s=plan.duration_s)
        build = Prompts(load, prompts.endpoint, prompts.alphabet)
        some = only_some(build, prompts.numbers, plan.seed) if prompts.numbers else build.request
        return LoadClient(Share(load, prompts.endpoint, prompts.alphabet, Slo()), build=some)

    async def _known_prompts(self, endpoint: Endpoint) -> KnownPrompts:
        load = self._plan.load(self._plan.streams, duration_s=self._plan.duration_s)
        endpoint, server = await probe(endpoint)
        longest = parse_lengths(load.isl).maximum + parse_lengths(load.osl).maximum
        if server.max_model_len is not None and longest > server.max_model_len:
            raise ConfigError(
                f"--isl {load.isl} and --osl {load.osl} make up to {longest} tokens, and the model's limit is "
                f"{server.max_model_len}; use shorter ones"
            )
        if self._config.engine == "twin":
            return known_prompts_of_twins(self._config, endpoint)
        alphabet, server = await asyncio.to_thread(find_alphabet, endpoint, load, server, None)
        if not server.answered:
            raise FleetError(f"{endpoint.url} does not answer: {server.complaint}")
        return await self._recorded(endpoint, alphabet)

    async def _recorded(self, endpoint: Endpoint, alphabet: Alphabet) -> KnownPrompts:
        """Prompts of a real model, with what it answers undisturbed, both alone and in a batch."""
        self._say(f"{NUM_PROMPTS} prompts are run twice without faults; later outputs are compared with these")
        rounds: list[dict[bytes, list[int]]] = []
        for streams in (1, min(max(2, self._plan.streams), NUM_PROMPTS)):
            responses: dict[bytes, list[int]] = {}

            def keep(stream: CheckedStream, responses: dict[bytes, list[int]] = responses) -> None:
                exchange = stream.exchange
                if exchange.error is not None:
                    why = f"{exchange.error}: {exchange.message}"
                    raise FleetError(f"a request failed before any fault was injected: {why}")
                responses[exchange.request.body] = stream.tokens

            client = LoadClient(Share(self._plan.load(streams, num_requests=NUM_PROMPTS), endpoint, alphabet, Slo()))
            await self._send(client, StreamObserver(keep), ends_at_stop=True)
            rounds.append(responses)
        same = {body: tokens for body, tokens in rounds[0].items() if rounds[1].get(body) == tokens}
        prompts = Prompts(self._plan.load(1, num_requests=NUM_PROMPTS), endpoint, alphabet)
        numbers = tuple(n for n in range(NUM_PROMPTS) if prompts.request(n, 0, None, ()).body in same)
        if not numbers:
            raise FleetError("no prompt gave the same output twice, so no stream could be checked")
        if len(numbers) < NUM_PROMPTS:
            self._say(f"{NUM_PROMPTS - len(numbers)} gave a different output in a batch, and are left out")
        return KnownPrompts(endpoint, alphabet, tokens_as_recorded(same), numbers)

    # ---- disruptions

    async def _disturb(self, begin_s: float) -> None:
        for number, moment in enumerate(self._plan.moments):
            await asyncio.sleep(begin_s + moment.at_s - time.time())
            await self._strike(number, moment.kind)

    async def _strike(self, number: int, kind: DisruptionKind) -> None:
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

    def _skip(self, kind: DisruptionKind, why: str) -> None:
        self._skipped[kind] += 1
        self._say(f"no {kind} this time: {why}")
