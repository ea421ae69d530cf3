"""One gateway of the simulated fleet: what it knows of the replicas, where it places streams, and which it holds.

It decides by the live gateway's own rules (`policy/routing.py`, `policy/admission.py`, `policy/evacuation.py`), and
knows what that would: its own streams exactly, those of other gateways from news that come every half second.
"""

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kervan.policy import admission, routing
from kervan.policy.admission import AdmissionState
from kervan.policy.evacuation import EvacuationState, LeavingStream, TargetReplica
from kervan.policy.output_length import LengthEstimate
from kervan.policy.prefill_speed import PrefillSpeed
from kervan.policy.prefix import Match, PrefixTable
from kervan.policy.routing import FleetLoad, ReplicaLoad
from kervan.sim.constants import Constants
from kervan.sim.limits import BLOCK_TOKENS
from kervan.simulate.stream import SimulatedStream

if TYPE_CHECKING:
    from kervan.simulate.engine import SimulatedEngine
    from kervan.simulate.replica import SimulatedReplica

NEWS_S = 0.5  # between two signs of life of a gateway at a replica, as live


@dataclass(slots=True, eq=False)
class Link:
    """What one gateway knows of one replica. `own_tokens`: what its streams there cost when the run under way began;
    `num_paying` of them pay a token with each step. `queued_tokens` are of prompts without a token.
    """

    replica: "SimulatedReplica"
    load: ReplicaLoad
    own_tokens: int = 0
    num_paying: int = 0
    risky_until_s: float = 0.0
    asks_again_s: float = 0.0
    streams: dict[SimulatedStream, None] = field(default_factory=dict)
    engine: "SimulatedEngine" = field(init=False)

    def __post_init__(self) -> None:
        self.engine = self.replica.engine

    def tokens_at(self, now_s: float) -> int:
        """What its streams cost now."""
        if not self.num_paying:
            return self.own_tokens
        engine = self.replica.engine
        return self.own_tokens - self.num_paying * int((now_s - engine.begin_s) * engine.steps_per_s)


class SimulatedGateway:
    """One gateway. `streams`: in flight, held ones too."""

    def __init__(
        self, number: int, constants: Constants, num_gateways: int, seed: int, prefixes: PrefixTable | None = None
    ) -> None:
        """`prefixes`: what replicas have of prompts, for routing by it; the gateways tell each other at once."""
        self.number = number
        self.links: list[Link] = []
        self.fleet = FleetLoad()
        self.by_id: dict[str, Link] = {}
        self.held: dict[SimulatedStream, None] = {}
        self.lengths = LengthEstimate()
        self.prefill = PrefillSpeed()
        self.num_streams = 0
        self._prefixes = prefixes
        self._num_gateways = num_gateways
        self._constants = constants
        self._rng = random.Random(f"prompts {seed} {number}")
        self._free_s = 0.0
        self._news_at = -1
        self._admitted: tuple[int, int, int] = (-1, -1, -1)  # capacity, full capacity, and the most that was admitted

    # ---- what comes in

    def admits(self, *, capacity: int, full_capacity: int, max_queued: int) -> bool:
        """Whether it takes one more request (`policy/admission.py`)."""
        known = self._admitted
        if known[0] == capacity and known[1] == full_capacity and self.num_streams <= known[2]:
            return True  # as one with more before it was, in the same fleet
        decision = admission.decide(
            AdmissionState(
                outstanding_streams=self.num_streams,
                capacity_streams=capacity,
                full_capacity_streams=full_capacity,
                max_queued_streams=max_queued,
                num_gateways=self._num_gateways,
                completed_per_s=0.0,
            )
        )
        if decision.admitted:
            self._admitted = (capacity, full_capacity, self.num_streams)
        return decision.admitted

    def ready_s(self, prompt_tokens: int, now_s: float) -> float:
        """When a request that comes now is through the frontend, one prompt after the other."""
        c = self._constants
        begin_s = max(self._free_s, now_s)
        self._free_s = begin_s + self._rng.expovariate(1.0) * (c.prompt_s + c.prompt_token_s * prompt_tokens)
        return self._free_s

    # ---- replicas

    def link(self, replica: "SimulatedReplica", *, risky_until_s: float) -> Link:
        """A replica is ready."""
        link = Link(replica, ReplicaLoad(replica.id, 0, num_gateways=self._num_gateways), risky_until_s=risky_until_s)
        self.links.append(link)
        self._news_at = -1
        self.by_id[replica.id] = link
        self.fleet = FleetLoad(one.load for one in self.links)
        return link

    def unlink(self, link: Link) -> None:
        """A replica is gone."""
        self.links.remove(link)
        del self.by_id[link.replica.id]
        self.fleet = FleetLoad(one.load for one in self.links)

    # ---- placing

    def choose(self, stream: SimulatedStream, now_s: float, target: str | None = None) -> Link | None:
        """Where a stream goes now; None: nowhere, it is held."""
        if target is not None:
            link = self.by_id.get(target)
            if link is not None and not link.load.is_draining:
                return link
        self._look(now_s)
        placement = routing.decide(self.fleet.replicas)
        if placement.replica_id is None:
            return None
        link = self.by_id[placement.replica_id]
        match = self._match(stream)
        is_long = (link.load.is_risky or match is not None) and self._is_long(stream)
        if link.load.is_risky and is_long:
            safer = routing.safer(self.fleet.replicas, link.load)
            if safer is not None and safer.replica_id is not None:
                link = self.by_id[safer.replica_id]
        if match is None or not match.num_spans:
            return link
        better = routing.for_prefix(
            self.fleet, link.load, match, prompt_tokens=stream.prompt_tokens + stream.generated,
            prefill_tokens_per_s=self.prefill.tokens_per_s, avoids_risky=is_long,
        )  # fmt: skip
        return link if better is None or better.replica_id is None else self.by_id[better.replica_id]

    def _match(self, stream: SimulatedStream) -> Match | None:
        if self._prefixes is None or stream.spans is None:
            return None
        tokens = stream.prompt_tokens + stream.generated
        return self._prefixes.match(stream.spans, max_tokens=max(0, tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS)

    def _is_long(self, stream: SimulatedStream) -> bool:
        rest = stream.output_tokens - stream.generated
        if rest < routing.LONG_OUTPUT_TOKENS:
            return False
        expected = self.lengths.remaining_tokens(stream.generated, max_remaining_tokens=rest)
        return expected is None or expected >= routing.LONG_OUTPUT_TOKENS

    def _look(self, now_s: float) -> None:
        """Bring up to date what is known of the replicas."""
        for link in self.links:
            load, own = link.load, link.own_tokens
            if link.num_paying:  # as `tokens_at`
                engine = link.engine
                own -= link.num_paying * int((now_s - engine.begin_s) * engine.steps_per_s)
            if own != load.own_tokens:
                load.add(own - load.own_tokens)
        news_at = int(now_s / NEWS_S)
        if self._news_at != news_at:
            self._news_at = news_at
            self._hear(now_s)

    def _hear(self, now_s: float) -> None:
        """News of what the other gateways have at each replica."""
        for link in self.links:
            link.load.is_risky = now_s < link.risky_until_s
            if self._num_gateways > 1:
                others = sum(other.tokens_at(now_s) for other in link.replica.links if other is not link)
                link.load.hear(others, self._num_gateways, len(link.replica.streams))

    def placed(self, stream: SimulatedStream, link: Link, now_s: float) -> None:
        """A stream goes to a replica: charge it."""
        stream.queued_tokens = stream.prompt_tokens + stream.generated
        match = self._match(stream)
        if match is not None and self._prefixes is not None and stream.spans is not None:
            stream.queued_tokens -= int(link.load.prefix_trust * match.tokens(link.replica.id))
            self._prefixes.learn(link.replica.id, stream.spans.hashes)
        stream.cost_tokens = routing.cost_tokens(stream.queued_tokens, stream.output_tokens - stream.generated)
        stream.paid_from_step = -1
        stream.placed_s = now_s
        link.own_tokens += stream.cost_tokens
        link.load.add(stream.cost_tokens)
        link.load.take(stream.queued_tokens)
        link.streams[stream] = None

    def unplaced(self, stream: SimulatedStream, link: Link, group_steps: int, run_steps: int) -> None:
        """A stream leaves a replica. `run_steps`: steps of the run under way there that are over."""
        cost = stream.cost_at(group_steps - run_steps)  # as at the beginning of the run
        if stream.paid_from_step >= 0:
            link.num_paying -= 1
        link.own_tokens -= cost
        if not stream.gave_token:
            link.load.prefilled(stream.queued_tokens)
        link.load.release()
        stream.queued_tokens = 0
        stream.paid_from_step = -1
        link.streams.pop(stream, None)

    # ---- leaving

    def evacuation_state(self, link: Link, now_s: float) -> EvacuationState:
        """What it tells the policy of a replica that drains, and of those that may take its streams."""
        replica = link.replica
        steps = replica.engine.group_steps(now_s)
        return EvacuationState(
            streams=[self._leaving(stream, steps) for stream in link.streams],
            targets=[self._target(one, now_s) for one in self.links if not one.load.is_draining],
            deadline_s=None if replica.leaves_s is None else max(0.0, replica.leaves_s - now_s),
            may_linger=replica.may_linger,
            elapsed_s=now_s - replica.drains_from_s,
            source_s_per_token=replica.engine.step_s(),
        )

    def _leaving(self, stream: SimulatedStream, group_steps: int) -> LeavingStream:
        generated = stream.generated
        if stream.end_step:
            generated = stream.output_tokens - max(0, stream.end_step - group_steps)
        rest = stream.output_tokens - generated
        return LeavingStream(
            stream_id=str(stream.id),
            context_tokens=stream.prompt_tokens + generated,
            max_remaining_tokens=rest,
            expected_remaining_tokens=self.lengths.remaining_tokens(generated, max_remaining_tokens=rest),
            gave_token=stream.gave_token,
        )

    def _target(self, link: Link, now_s: float) -> TargetReplica:
        engine, share = link.replica.engine, 1 / self._num_gateways
        scheduler = engine.scheduler
        queued = sum(s.prompt_tokens + s.generated for s in link.streams if not s.gave_token)
        free_kv_tokens = scheduler.free_blocks * scheduler.block_tokens
        return TargetReplica(
            replica_id=link.replica.id,
            free_streams=int(share * max(0, scheduler.max_num_seqs - len(link.replica.streams))),
            free_kv_tokens=int(share * free_kv_tokens) - queued,
            prefill_tokens_per_s=share * self.prefill.tokens_per_s,
            queued_prefill_tokens=link.load.queued_tokens,
            step_s=engine.step_s() or 0.0,
            max_step_tokens=scheduler.max_num_batched_tokens,
        )
