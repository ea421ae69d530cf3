"""The fleet on a virtual clock: requests come, gateways place them, replicas answer, and each second a policy decides.

Events are kept in a heap by time: an arrival, its placement, the end of a step or of a run of equal steps, and what
happens to replicas. There is no event per token.
"""

import heapq
import math
import random
import time
from array import array
from collections.abc import Callable, Mapping
from typing import Any

from kervan.config.node_trace import NodeTrace
from kervan.config.workload import BLOCK_TOKENS as TRACE_BLOCK_TOKENS
from kervan.policy import evacuation, prefix, routing
from kervan.policy.autoscale.state import Decision, FleetState, Policy, PoolState, ReplicaState
from kervan.policy.prefix import PrefixTable
from kervan.sim.limits import BLOCK_TOKENS
from kervan.sim.scheduler import ScheduledStep
from kervan.simulate.engine import EngineTimes, PlannedTimes
from kervan.simulate.gateway import Link, SimulatedGateway
from kervan.simulate.market import MarketModel, generate, zone_of
from kervan.simulate.nodes import SpotNodes
from kervan.simulate.replica import SimulatedReplica
from kervan.simulate.runs import block_hashes, prompt_spans
from kervan.simulate.setup import FleetSetup, PoolSetup
from kervan.simulate.stream import SimulatedStream
from kervan.simulate.tally import Outcome, Tally, quantiles

SPOT = "spot"
LOSS_SEEN_S = 2.0  # from the loss of a node until gateways know (docs/architecture.md)
MAX_SETTLE_S = 1800.0  # how long after the last request the pools may take to come back to their floor
IDLE_EVACUATION_S = 1.0


class Simulation:
    """One run; `run` may be called once."""

    def __init__(
        self,
        setup: FleetSetup,
        policy: Policy,
        seed: int = 0,
        *,
        times: EngineTimes | None = None,
        gives_up_below: float = 0.0,
    ) -> None:
        """`times`: of a step, in place of the planner's. `gives_up_below`: the run ends when the share of counted
        requests that keep the SLO can only be less.
        """
        self.setup = setup
        self.policy = policy
        self.seed = seed
        self.now_s = 0.0
        self.tally = Tally(setup.slo, setup.load.counts_from_s)
        self._gives_up_below = gives_up_below
        self.replicas: list[SimulatedReplica] = []  # those that are not gone
        self._gone: list[SimulatedReplica] = []
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._num_events = self._num_pushed = 0
        self._times: EngineTimes = PlannedTimes(setup.engine) if times is None else times
        self._constants = setup.engine.constants
        self._rng_start = random.Random(f"starts {seed}")
        self._rng_gateway = random.Random(f"gateways {seed}")
        self._rng_loss = random.Random(f"losses {seed}")
        self._caches_prefixes = setup.caches_prefixes and setup.load.has_hashes
        self._prefixes = PrefixTable() if self._caches_prefixes and setup.routing == "prefix" else None
        self._gateways = [
            SimulatedGateway(number, self._constants, setup.gateways, seed, self._prefixes)
            for number in range(setup.gateways)
        ]
        self._pools = {pool.name: pool for pool in setup.pools}
        self._nodes = {pool.name: SpotNodes(self._trace(pool.nodes)) for pool in setup.pools if pool.nodes is not None}
        self._targets = {pool.name: self._first_target(pool) for pool in setup.pools}
        self._memory: Mapping[str, Any] = {}
        self._load = setup.load.requests(seed)
        self._load_ended = False
        self._num_open = 0  # requests that have come and not ended
        self._last_end_s = 0.0
        self._capacity = self._full_capacity = 0
        self._num_ready = 0
        self._num_lost = self._num_started = 0
        self._tokens_told = 0
        self._gone_tokens = 0
        self._preemptions = 0
        self._at_floor_s = math.inf
        self._decisions: list[tuple[float, str]] = []
        self._seen: dict[str, array] = {  # type: ignore[type-arg]
            name: array("d") for name in ("arrived", "ready", "starting", "draining", "ttft_p95_s", "queued", "running")
        }
        self._is_given_up = False

    def _trace(self, nodes: NodeTrace | MarketModel) -> NodeTrace:
        if isinstance(nodes, NodeTrace):
            return nodes
        return generate(nodes, self.setup.load.duration_s + MAX_SETTLE_S, self.seed)

    def _first_target(self, pool: PoolSetup) -> int:
        if self.setup.initial is not None and pool is self.setup.pools[0]:
            return self.setup.initial
        return pool.minimum

    # ---- the clock

    def run(self) -> Outcome:
        """All of the load, and then until the pools are at their floor again."""
        started_s = time.perf_counter()
        for pool in self.setup.pools:
            for at_s, word, nodes in self._nodes[pool.name].changes() if pool.name in self._nodes else ():
                if word == "add" and at_s <= 0:
                    self._nodes[pool.name].came(nodes, 0.0)
                elif word == "add":
                    self._at(at_s, self._nodes_came, (pool.name, nodes))
                else:
                    if self.setup.notice_s > 0:
                        self._at(max(0.0, at_s - self.setup.notice_s), self._noticed, (pool.name, nodes, at_s))
                    self._at(at_s, self._nodes_went, (pool.name, nodes))
            for _ in range(self._targets[pool.name]):
                self._start(pool, is_there=True)
        self._next_arrival()
        self._at(self.setup.decides_every_s, self._beat, None)
        heap = self._heap
        while heap and not self._is_over():
            at_s, _, act, argument = heapq.heappop(heap)
            self.now_s = at_s
            act(argument)
            self._num_events += 1
        return self._outcome(time.perf_counter() - started_s)

    def _at(self, at_s: float, act: Callable[[Any], None], argument: Any) -> None:
        self._num_pushed += 1
        heapq.heappush(self._heap, (at_s, self._num_pushed, act, argument))

    def _is_over(self) -> bool:
        if self._is_given_up:
            return True
        if not self._load_ended or self._num_open:
            return False
        if self._at_floor_s < math.inf:
            return True
        return self.now_s > self._last_end_s + MAX_SETTLE_S

    # ---- requests

    def _next_arrival(self) -> None:
        following = next(self._load, None)
        if following is None:
            self._load_ended = True
            return
        self._num_open += 1
        self._at(following[0], self._arrived, following)

    def _arrived(self, request: tuple[float, int, int, tuple[int, ...]]) -> None:
        sent_s, prompt_tokens, output_tokens, hash_ids = request
        tally, gateways = self.tally, self._gateways
        tally.came(prompt_tokens, sent_s)
        gateway = gateways[0] if len(gateways) == 1 else self._rng_gateway.choice(gateways)
        if not gateway.admits(
            capacity=self._capacity, full_capacity=self._full_capacity, max_queued=self.setup.max_queued_streams
        ):
            tally.was_shed()
            self._over()
        else:
            gateway.num_streams += 1
            stream = SimulatedStream(
                number=0, context_tokens=prompt_tokens, remaining_tokens=output_tokens, id=tally.requests,
                sent_s=sent_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens, gateway=gateway.number,
            )  # fmt: skip
            if self._caches_prefixes:
                stream.hashes = block_hashes(hash_ids, TRACE_BLOCK_TOKENS, prompt_tokens, output_tokens, stream.id)
                if self._prefixes is not None:
                    stream.spans = prompt_spans(hash_ids, TRACE_BLOCK_TOKENS, prompt_tokens)
            self._at(gateway.ready_s(prompt_tokens, sent_s), self._place, stream)
        self._next_arrival()

    def _over(self) -> None:
        self._num_open -= 1
        self._last_end_s = self.now_s

    def _place(self, stream: SimulatedStream) -> None:
        self._place_at(stream, None)

    def _place_at(self, stream: SimulatedStream, target: str | None) -> None:
        now_s, tally = self.now_s, self.tally
        gateway = self._gateways[stream.gateway]
        link = gateway.choose(stream, now_s, target)
        tokens = stream.prompt_tokens + stream.generated
        if link is None:
            if stream.held_since_s < 0:
                stream.held_since_s = now_s
            gateway.held[stream] = None
            tally.num_held += 1
            tally.held_tokens += tokens
            return
        replica = link.replica
        stream.held_since_s = -1.0
        stream.replica = replica.number
        stream.number = replica.num_placed
        replica.num_placed += 1
        stream.gave_token, stream.end_step = False, 0
        stream.context_tokens, stream.remaining_tokens = tokens, stream.output_tokens - stream.generated
        stream.computed_tokens = stream.joined = stream.cached_tokens = 0
        gateway.placed(stream, link, now_s)
        replica.streams[stream] = None
        tally.num_queued += 1
        tally.queued_tokens += stream.queued_tokens
        before_s = replica.engine.end_s
        replica.engine.add(stream, now_s)
        self._follow(replica, before_s)

    def _follow(self, replica: SimulatedReplica, before_s: float) -> None:
        """The end of what a replica computes may have changed."""
        engine = replica.engine
        if engine.end_s != before_s:
            if engine.end_s < math.inf:
                self._at(engine.end_s, self._step_ended, replica)
            self._see_preempted(replica)

    def _see_preempted(self, replica: SimulatedReplica) -> None:
        engine = replica.engine
        if engine.scheduler.num_preempted == engine.seen_preempted:
            return
        steps = engine.begin_steps
        for stream in engine.newly_preempted():
            self._preemptions += 1
            stream.end_step = 0
            stream.generated = int(stream.output_tokens - stream.remaining_tokens)
            if stream.paid_from_step >= 0:
                stream.cost_tokens = max(1, stream.cost_at(steps))
                stream.paid_from_step = -1
                self._link_of(stream, replica).num_paying -= 1

    def _link_of(self, stream: SimulatedStream, replica: SimulatedReplica) -> Link:
        return replica.links[stream.gateway]

    # ---- steps

    def _step_ended(self, replica: SimulatedReplica) -> None:
        engine, now_s = replica.engine, self.now_s
        if engine.end_s != now_s:
            return  # it was cut short, or the replica is gone
        run = engine.end()
        steps = engine.scheduler.num_group_steps
        for link in replica.links:
            if link.num_paying:
                link.own_tokens -= link.num_paying * run.repeats
        if replica.stops:
            self._stop_paying(replica, steps)
        if run.batch.samples:
            self._deliver(replica, run, steps)
        engine.begin(now_s)
        if engine.end_s < math.inf:
            self._at(engine.end_s, self._step_ended, replica)
        self._see_preempted(replica)
        if replica.phase == "draining" and not replica.streams:
            self._emptied(replica)

    def _deliver(self, replica: SimulatedReplica, run: ScheduledStep[SimulatedStream], steps: int) -> None:
        c, now_s = self._constants, self.now_s
        work_s = run.batch.samples * c.output_s * max(1, self._num_ready) / len(self._gateways)
        replica.outputs_free_s = max(replica.outputs_free_s + run.repeats * work_s, now_s + work_s)
        seen_s = replica.outputs_free_s - work_s / 2 + c.delivery_s
        for stream in run.firsts:
            self._first_token(stream, replica, steps, seen_s)
        for stream in run.lasts:
            self._ended(stream, replica, steps, seen_s)

    def _first_token(self, stream: SimulatedStream, replica: SimulatedReplica, steps: int, seen_s: float) -> None:
        tally, link = self.tally, replica.links[stream.gateway]
        rest = int(stream.remaining_tokens)
        stream.end_step = steps + rest
        if not stream.gave_token:
            stream.gave_token = True
            tally.num_queued -= 1
            tally.queued_tokens -= stream.queued_tokens
            tally.num_running += 1
            if stream.first_s < 0:
                stream.first_s = seen_s
                tally.gave_first(seen_s - stream.sent_s)
            self._gateways[stream.gateway].prefill.observe(
                stream.prompt_tokens + stream.generated, self.now_s - stream.placed_s
            )
            queued = min(stream.cost_tokens - 1, stream.queued_tokens)
            stream.cost_tokens -= queued
            link.own_tokens -= queued
            link.load.prefilled(stream.queued_tokens)
            stream.queued_tokens = 0
        if stream.cost_tokens > 1:
            stream.cost_tokens -= 1
            link.own_tokens -= 1
            stream.paid_from_step = steps
            link.num_paying += 1
            if stream.cost_tokens <= rest - 1:
                heapq.heappush(replica.stops, (steps + stream.cost_tokens - 1, stream.id, steps, stream))

    def _stop_paying(self, replica: SimulatedReplica, steps: int) -> None:
        stops = replica.stops
        while stops and stops[0][0] <= steps:
            at, _, from_step, stream = heapq.heappop(stops)
            if stream.replica == replica.number and stream.paid_from_step == from_step:
                link = self._link_of(stream, replica)
                link.num_paying -= 1
                link.own_tokens += steps - at
                stream.cost_tokens, stream.paid_from_step = 1, -1

    def _ended(self, stream: SimulatedStream, replica: SimulatedReplica, steps: int, seen_s: float) -> None:
        gateway = self._gateways[stream.gateway]
        gateway.unplaced(stream, replica.links[stream.gateway], steps, 0)
        gateway.num_streams -= 1
        gateway.lengths.observe(stream.output_tokens)
        del replica.streams[stream]
        self.tally.num_running -= 1
        self.tally.ended(stream, seen_s)
        self._over()

    # ---- moves

    def _take_off(self, stream: SimulatedStream, replica: SimulatedReplica, generated: int, run_steps: int) -> None:
        """A stream is on no replica any more."""
        tally, engine = self.tally, replica.engine
        gateway = self._gateways[stream.gateway]
        if stream.gave_token:
            tally.num_running -= 1
        else:
            tally.num_queued -= 1
            tally.queued_tokens -= stream.queued_tokens
        gateway.unplaced(stream, replica.links[stream.gateway], engine.group_steps(self.now_s), run_steps)
        del replica.streams[stream]
        stream.generated = generated
        stream.replica = -1
        stream.moves += 1
        tally.moves += 1
        tally.recomputed_tokens += stream.prompt_tokens + generated if stream.gave_token else 0

    def _move(self, stream: SimulatedStream, replica: SimulatedReplica, target: str | None) -> None:
        engine, before_s = replica.engine, replica.engine.end_s
        if not engine.remove(stream, self.now_s):
            self._follow(replica, before_s)
            return
        self._take_off(
            stream, replica, int(stream.output_tokens - stream.remaining_tokens), engine.steps_done(self.now_s)
        )
        self._follow(replica, before_s)
        self._place_at(stream, target)

    def _drain(self, replica: SimulatedReplica, *, leaves_s: float | None = None) -> None:
        """No new streams go there, and its own leave."""
        if replica.phase == "starting":
            self._end_replica(replica)
            return
        if replica.phase == "draining":
            if leaves_s is not None:
                replica.leaves_s = min(leaves_s, replica.leaves_s or math.inf)
            return
        replica.phase, replica.drains_from_s, replica.leaves_s = "draining", self.now_s, leaves_s
        for link in replica.links:
            link.load.is_draining = True
        self._count_capacity()
        if leaves_s is None:
            self._at(self.now_s + self.setup.drain_timeout_s, self._drain_over, replica)
        if not replica.streams:
            self._emptied(replica)
            return
        for gateway, link in zip(self._gateways, replica.links, strict=True):
            self._evacuate((gateway, link))

    def _evacuate(self, which: tuple[SimulatedGateway, Link]) -> None:
        gateway, link = which
        replica = link.replica
        if replica.phase != "draining" or replica.gone_s < math.inf or not link.streams:
            return
        decision = evacuation.decide(gateway.evacuation_state(link, self.now_s))
        if decision.moves:
            streams = {str(stream.id): stream for stream in link.streams}
            for move in decision.moves:
                self._move(streams[move.stream_id], replica, move.replica_id)
        if not replica.streams:
            self._emptied(replica)
        elif link.streams:
            link.asks_again_s = self.now_s + (decision.ask_again_s or IDLE_EVACUATION_S)
            self._at(link.asks_again_s, self._evacuate_again, which)

    def _evacuate_again(self, which: tuple[SimulatedGateway, Link]) -> None:
        if which[1].asks_again_s == self.now_s:  # else it was decided again since, as a replica came
            self._evacuate(which)

    def _emptied(self, replica: SimulatedReplica) -> None:
        self._at(self.now_s + self.setup.stop_s, self._stopped, replica)

    def _stopped(self, replica: SimulatedReplica) -> None:
        if replica.phase == "draining" and not replica.streams and replica.gone_s == math.inf:
            self._end_replica(replica)

    def _drain_over(self, replica: SimulatedReplica) -> None:
        if replica.phase == "draining" and replica.gone_s == math.inf and replica.leaves_s is None:
            self._lose(replica, seen_after_s=0.0)

    def _lose(self, replica: SimulatedReplica, *, seen_after_s: float = LOSS_SEEN_S) -> None:
        """A replica ends with all that it has; its streams go on elsewhere when that is seen."""
        engine = replica.engine
        steps, run_steps = engine.group_steps(self.now_s), engine.steps_done(self.now_s)
        streams = list(replica.streams)
        for stream in streams:
            generated = stream.generated
            if stream.end_step:
                generated = stream.output_tokens - max(1, stream.end_step - steps)
            self._take_off(stream, replica, generated, run_steps)
        engine.end_s = math.inf
        self._end_replica(replica)
        for stream in streams:
            self._at(self.now_s + seen_after_s, self._place, stream)

    # ---- replicas

    def _start(self, pool: PoolSetup, *, is_there: bool = False) -> None:
        """A replica is asked for. `is_there`: it has been ready for long when the simulation begins."""
        self._num_started += 1
        number = self._num_started
        replica = SimulatedReplica(
            number=number, id=f"{pool.name}-{number:04d}", pool=pool.name, times=self._times, decided_s=self.now_s,
            paid_from_s=self.now_s, caches_prefixes=self._caches_prefixes,
        )  # fmt: skip
        self.replicas.append(replica)
        nodes = self._nodes.get(pool.name)
        if nodes is None:
            self._begin(replica, f"{pool.name}-node-{number}", is_there=is_there)
        elif (node := nodes.take()) is not None:
            self._begin(replica, node, is_there=is_there)
        self._count_capacity()

    def _begin(self, replica: SimulatedReplica, node: str, *, is_there: bool = False) -> None:
        """It has a node."""
        replica.node, replica.zone, replica.paid_from_s = node, zone_of(node), self.now_s
        start_s = 0.0 if is_there else self._pools[replica.pool].start.sample(self._rng_start)
        replica.ready_s = self.now_s + start_s
        if is_there:
            replica.decided_s = self.now_s - 3600.0
            self._become_ready(replica)
        else:
            self._at(replica.ready_s, self._become_ready, replica)
        rate = self.setup.losses_per_hour
        if rate > 0 and replica.pool != SPOT:
            self._at(self.now_s + self._rng_loss.expovariate(rate / 3600.0), self._node_failed, replica)

    def _node_failed(self, replica: SimulatedReplica) -> None:
        if replica.gone_s == math.inf:
            self._num_lost += 1
            self._lose(replica)

    def _become_ready(self, replica: SimulatedReplica) -> None:
        if replica.phase != "starting" or replica.gone_s < math.inf:
            return
        replica.phase = "ready"
        age_s = 0.0 if replica.decided_s >= 0 else 3600.0
        risky_s = routing.risky_for_s(is_spot=replica.pool == SPOT, age_s=age_s)
        if self._prefixes is not None:
            spans = self._times.num_blocks * BLOCK_TOKENS // prefix.span_tokens(BLOCK_TOKENS)
            self._prefixes.add(replica.id, max_spans=spans)
        for gateway in self._gateways:
            replica.links.append(gateway.link(replica, risky_until_s=self.now_s + risky_s))
        self._count_capacity()
        for gateway in self._gateways:
            self._place_held(gateway)
        for one in self.replicas:
            if one.phase == "draining":
                for gateway, link in zip(self._gateways, one.links, strict=True):
                    self._evacuate((gateway, link))

    def _place_held(self, gateway: SimulatedGateway) -> None:
        for stream in list(gateway.held):
            self._unhold(gateway, stream)
            self._place_at(stream, None)

    def _unhold(self, gateway: SimulatedGateway, stream: SimulatedStream) -> None:
        del gateway.held[stream]
        self.tally.num_held -= 1
        self.tally.held_tokens -= stream.prompt_tokens + stream.generated

    def _end_replica(self, replica: SimulatedReplica) -> None:
        """It is gone, and its node free."""
        replica.gone_s = self.now_s
        replica.phase = "draining"
        self._gone_tokens += replica.engine.tokens_until(self.now_s)
        replica.engine.end_s = math.inf
        for gateway, link in zip(self._gateways, replica.links, strict=False):
            gateway.unlink(link)
        if self._prefixes is not None:
            self._prefixes.remove(replica.id)
        self.replicas.remove(replica)
        self._gone.append(replica)
        nodes = self._nodes.get(replica.pool)
        if nodes is not None and replica.node:
            nodes.give_back(replica.node)
            self._hand_out(replica.pool)
        self._count_capacity()

    def _hand_out(self, pool: str) -> None:
        """Replicas that wait for a node get those that are free."""
        nodes = self._nodes[pool]
        for replica in list(self.replicas):
            if replica.pool == pool and replica.phase == "starting" and not replica.node:
                node = nodes.take()
                if node is None:
                    return
                self._begin(replica, node)

    def _nodes_came(self, change: tuple[str, tuple[str, ...]]) -> None:
        pool, names = change
        self._nodes[pool].came(names, self.now_s)
        self._hand_out(pool)

    def _noticed(self, change: tuple[str, tuple[str, ...], float]) -> None:
        pool, names, at_s = change
        self._nodes[pool].will_go(names)
        for replica in list(self.replicas):
            if replica.pool == pool and replica.node in names:
                self._drain(replica, leaves_s=at_s)

    def _nodes_went(self, change: tuple[str, tuple[str, ...]]) -> None:
        pool, names = change
        self._nodes[pool].went(names, self.now_s)
        for replica in list(self.replicas):
            if replica.pool == pool and replica.node in names:
                self._num_lost += 1
                self._lose(replica, seen_after_s=LOSS_SEEN_S)

    def _count_capacity(self) -> None:
        """How many streams the gateways take."""
        ready = sum(replica.phase == "ready" for replica in self.replicas)
        coming = sum(replica.phase != "draining" for replica in self.replicas)
        self._num_ready = ready
        self._capacity = ready * self._times.max_num_seqs
        self._full_capacity = coming * self._times.max_num_seqs

    # ---- the policy

    def _beat(self, _: None) -> None:
        now_s = self.now_s
        self._at(now_s + self.setup.decides_every_s, self._beat, None)
        self._expire()
        if self._gives_up_below and self._has_failed():
            self._is_given_up = True
            return
        state = self._state()
        self._see(state)
        decision = self.policy.decide(state, self._memory)
        self._memory = decision.memory
        self._act(decision)
        is_at_floor = all(
            sum(replica.pool == pool.name for replica in self.replicas) <= pool.minimum for pool in self.setup.pools
        )
        if self._load_ended and not self._num_open and is_at_floor:
            self._at_floor_s = now_s

    def _has_failed(self) -> bool:
        """So many have ended too late, or wait for too long already, that the rest cannot make up for it."""
        tally, slo, now_s = self.tally, self.setup.slo, self.now_s
        bound_s = math.inf if slo.ttft_s is None else slo.ttft_s
        counted_s = self.setup.load.counts_from_s
        late = sum(
            stream.first_s < 0 and now_s - stream.sent_s > bound_s and stream.sent_s >= counted_s
            for replica in self.replicas
            for stream in replica.streams
        )
        expected = max(tally.counted, self.setup.load.expected_after(counted_s))
        return late + tally.counted_bad > (1 - self._gives_up_below) * expected + 1

    def _expire(self) -> None:
        deadline_s = self.now_s - self.setup.hold_timeout_s
        for gateway in self._gateways:
            for stream in [stream for stream in gateway.held if stream.held_since_s < deadline_s]:
                self._unhold(gateway, stream)
                gateway.num_streams -= 1
                self.tally.expired += 1
                self._over()

    def _state(self) -> FleetState:
        now_s, window_s = self.now_s, self.setup.decides_every_s
        generated, context = self._gone_tokens, 0
        paces: list[tuple[float, int]] = []
        states = []
        for replica in self.replicas:
            engine = replica.engine
            if replica.phase == "starting":
                replica_context, num_streams = 0, 0
            else:
                generated += engine.tokens_until(now_s)
                replica_context, num_streams = engine.context_tokens(now_s), len(replica.streams)
                context += replica_context
                steps = engine.steps_until(now_s)
                made, replica.steps_seen = steps - replica.steps_seen, steps
                size = engine.scheduler.decoding[0]
                if size and made > 0:
                    replica.step_s = window_s / made
                    paces.append((replica.step_s, size))
            states.append(
                ReplicaState(
                    id=replica.id,
                    pool=replica.pool,
                    phase=replica.phase,
                    node=replica.node,
                    zone=replica.zone,
                    age_s=now_s - replica.decided_s,
                    ready_for_s=now_s - replica.ready_s if replica.phase != "starting" else 0.0,
                    streams=num_streams,
                    context_tokens=replica_context,
                    queued_tokens=sum([link.load.queued_tokens for link in replica.links]),
                    step_s=replica.step_s if replica.phase == "ready" else None,
                )
            )
        told, self._tokens_told = generated - self._tokens_told, generated
        demand = self.tally.demand(window_s, generated_tokens=told, running_context_tokens=context, paces=paces)
        return FleetState(
            now_s=now_s,
            local_minute=(self.setup.local_minute + int(now_s // 60)) % (7 * 24 * 60),
            pools=tuple(self._pool_state(pool) for pool in self.setup.pools),
            replicas=tuple(states),
            demand=demand,
        )

    def _pool_state(self, pool: PoolSetup) -> PoolState:
        nodes = self._nodes.get(pool.name)
        return PoolState(
            name=pool.name,
            minimum=pool.minimum,
            maximum=pool.maximum,
            target=self._targets[pool.name],
            room=None if nodes is None else nodes.num_there,
            start_s=pool.start.quantile_s(0.9),
            usd_per_hour=pool.usd_per_hour,
            losses_per_hour=self.setup.losses_per_hour if nodes is None else nodes.losses_per_hour(self.now_s),
        )

    def _see(self, state: FleetState) -> None:
        demand, seen = state.demand, self._seen
        assert demand is not None
        ready = state.count("ready")
        seen["arrived"].append(demand.arrived / demand.window_s)
        seen["ready"].append(ready)
        seen["starting"].append(state.count("starting"))
        seen["draining"].append(state.count("draining"))
        seen["ttft_p95_s"].append(-1.0 if demand.ttft_p95_s is None else demand.ttft_p95_s)
        seen["queued"].append(demand.queued + demand.held)
        seen["running"].append(demand.running)

    def _act(self, decision: Decision) -> None:
        for pool in self.setup.pools:
            target = min(pool.maximum, max(0, decision.targets.get(pool.name, self._targets[pool.name])))
            if target != self._targets[pool.name]:
                self._decisions.append(
                    (self.now_s, f"{pool.name} {self._targets[pool.name]} to {target}: {decision.reason}")
                )
            self._targets[pool.name] = target
            there = [r for r in self.replicas if r.pool == pool.name and r.phase in ("starting", "ready")]
            for _ in range(target - len(there)):
                self._start(pool)
            if len(there) > target:
                for replica in leaving(there, decision.leaving, len(there) - target):
                    self._drain(replica)

    # ---- the result

    def _outcome(self, computed_s: float) -> Outcome:
        setup, tally = self.setup, self.tally
        everybody = [*self._gone, *self.replicas]
        end_s = min(self._at_floor_s, self.now_s)
        if self._at_floor_s == math.inf:
            end_s = self._last_end_s
        hours = {pool.name: 0.0 for pool in setup.pools}
        counted_s = ready_s = 0.0
        for replica in everybody:
            until_s = min(end_s, replica.gone_s)
            begin_s = max(0.0, replica.decided_s)
            counted_s += max(0.0, until_s - begin_s)
            if replica.ready_s < math.inf:
                ready_s += max(0.0, until_s - max(0.0, replica.ready_s))
            if replica.node:
                hours[replica.pool] += max(0.0, until_s - replica.paid_from_s) / 3600
        usd: float | None = 0.0
        for pool in setup.pools:
            if hours[pool.name]:
                usd = None if usd is None or pool.usd_per_hour is None else usd + hours[pool.name] * pool.usd_per_hour
        counts = [
            sum(column)
            for column in zip(self._seen["ready"], self._seen["starting"], self._seen["draining"], strict=True)
        ]
        return Outcome(
            policy=self.policy.name,
            seed=self.seed,
            requests=tally.requests,
            finished=tally.finished,
            good=tally.good,
            shed=tally.shed,
            broken=tally.expired,
            moves=tally.moves,
            lost_replicas=self._num_lost,
            started_replicas=self._num_started,
            duration_s=max(setup.load.duration_s, 1e-9),
            episode_s=end_s,
            input_tokens=tally.input_tokens,
            output_tokens=tally.output_tokens,
            recomputed_tokens=tally.recomputed_tokens,
            preemptions=self._preemptions,
            replica_hours=hours,
            mean_replicas=counted_s / max(1e-9, end_s),
            mean_ready=ready_s / max(1e-9, end_s),
            max_replicas=int(max(counts, default=len(self.replicas))),
            usd=usd,
            ttft_s=quantiles(tally.ttfts_s),
            tpot_s=quantiles(tally.tpots_s),
            events=self._num_events,
            computed_s=computed_s,
            counted=tally.counted,
            counted_good=tally.counted_good,
            timeline={name: list(values) for name, values in self._seen.items()},
            every_s=setup.decides_every_s,
            decisions=self._decisions,
        )


def leaving(there: list[SimulatedReplica], named: tuple[str, ...], count: int) -> list[SimulatedReplica]:
    """Which of a pool's replicas go: those that the policy names, in its order; then those that have not started yet,
    and then the newest.
    """
    by_id = {replica.id: replica for replica in there}
    order = [by_id[name] for name in named if name in by_id]
    others = [replica for replica in there if replica.id not in named]
    order += sorted(others, key=lambda replica: (replica.phase != "starting", -replica.number))
    return order[:count]
