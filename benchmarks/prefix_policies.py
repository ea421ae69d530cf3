"""Ways of routing beside each other on a simulated fleet: who finds the prefix cache, and what that costs the others.

    python benchmarks/prefix_policies.py --record DIR         # all loads: four minutes of CPU
    python benchmarks/prefix_policies.py --loads chats,hot --ways prefix,least-load

No process, no clock, no network: replicas are `kervan.twin`'s engines (vLLM's scheduler and prefix cache on paper,
steps as long as the planner expects of an 8B on half an H200), gateways are kervan's own `Placements` and `Prefixes`,
which hear of each other every half second. Each load is the same requests at the same times for each way (in closed
loops the same conversations), so what differs is where they go.

Ways: `prefix` and `least-load` are kervan's. `hash` is a consistent hash of a prompt's first 256 tokens with bounded
loads (Mirrokni et al., arXiv 1608.01350; 1.25 times the mean of requests in flight), `hash-session` one of the
conversation, which a router seldom knows. `ray` is the code of Ray Serve LLM's PrefixCacheAffinityRouter with its
tree and its defaults, `ray-bounded` the same with imbalanced_threshold=8; they and the hashes see exact queue lengths.

Possible are the tokens of whole blocks that any replica was sent before; max/mean is of requests in flight, over time.
"""

import argparse
import bisect
import functools
import hashlib
import heapq
import json
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kervan.bench import records
from kervan.config.fleet import FleetConfig
from kervan.fleet import placement, prefixes
from kervan.fleet.demand import DemandMeter
from kervan.fleet.link import ReplicaTally
from kervan.fleet.stream import Stream
from kervan.policy import routing
from kervan.policy.output_length import LengthEstimate
from kervan.policy.prefill_speed import PrefillSpeed
from kervan.policy.prefix import Match, PromptContent
from kervan.sim.prefix_cache import BlockHashes
from kervan.twin.settings import settings
from kervan.twin.token_engine import TwinEngine, TwinRequest, TwinSettings

HERE = Path(__file__).resolve().parent
BLOCK_TOKENS = 16
NEWS_PERIOD_S = 0.5
CLIENT_S = 0.002  # from the end of an answer to the next request of a conversation that does not think
TOKENISE_S = 0.0005  # between requests that come at once
WARM_SHARE = 0.25  # of a load's first requests, and of its last, that are not counted
HASHED_TOKENS = 256
HASH_BOUND = 1.25
HASH_POINTS = 64  # of each replica on the ring


def at_once(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Run what has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("it waits for something")


# ---- the fleet


@dataclass(eq=False)
class Ask:
    """One request. `then` gets the answer's tokens when it is over."""

    tokens: list[int]
    osl: int
    session: str
    then: Callable[[list[int]], None]
    number: int = 0
    sent_s: float = 0.0
    ttft_s: float = 0.0
    possible_tokens: int = 0
    cached_tokens: int = 0
    answer: list[int] = field(default_factory=list)
    hashes: BlockHashes | None = None


class Replica:
    """A twin's engine on a virtual clock."""

    def __init__(self, sim: "Simulation", name: str, twin: TwinSettings) -> None:
        self.sim, self.name, self.speed = sim, name, twin.speed
        self.engine = TwinEngine(twin.timing, twin.limits)
        self.links: dict[int, Link] = {}
        self.is_stepping = False
        self.num_here = 0
        self.computed_tokens = 0

    def add(self, gateway: int, stream: Stream) -> None:
        ask: Ask = stream.request
        request = TwinRequest(id=stream.wire_id, client=gateway, prompt=ask.tokens, max_tokens=ask.osl, ignore_eos=True)
        self.engine.add(request, self.sim.now_s)
        self.num_here += 1
        if not self.is_stepping:
            self._step()

    def _step(self) -> None:
        step = self.engine.start_step(self.sim.now_s)
        self.is_stepping = step is not None
        if step is not None:
            self.computed_tokens += step.prefill_tokens
            self.sim.later(step.duration_s / self.speed, lambda: self._end(step))

    def _end(self, step: Any) -> None:
        for output in self.engine.end_step(step):
            self.num_here -= output.finish is not None
            self.links[output.client].deliver(output)
        self._step()


class Link:
    """A gateway's link to a replica, with what `Placements` and `Prefixes` look at."""

    def __init__(self, gateway: "Gateway", replica: Replica) -> None:
        limits = replica.engine.limits
        self.replica_id, self.gateway, self.replica = replica.name, gateway, replica
        self.load = routing.ReplicaLoad(replica.name, 0)
        self.facts = SimpleNamespace(block_size=limits.block_size, num_gpu_blocks=limits.num_blocks)
        self.news, self.num_told, self.told = bytearray(), 1, lambda _: None
        self.streams: dict[str, Stream] = {}
        self.tally, self.prefill, self.input = ReplicaTally(), PrefillSpeed(), self
        self.is_draining = False
        self.emptied_s = self.stepped_s = 0.0
        self.as_real: Any = self
        self.told_tokens = 0  # the last time that the others heard of this gateway
        replica.links[gateway.number] = self

    def is_late(self, now_s: float) -> bool:
        """No replica stands still here."""
        return False

    async def send_multipart(self, frames: Sequence[Any], copy: bool) -> None:
        self.replica.add(self.gateway.number, self.streams[frames[0].decode()])

    def deliver(self, output: Any) -> None:
        """What `FleetClient._deliver` does with an output."""
        stream = self.streams[output.id]
        if output.first is not None:
            self._first_token(stream, output.first.cached_tokens)
        stream.generated.append(output.token)
        paid = min(1, stream.cost_tokens - 1)
        stream.cost_tokens -= paid
        self.load.add(-paid)
        if output.finish is not None:
            self.gateway.prefixes.ended(stream, self.as_real)
            self.gateway.placements.forget(stream)
            self.gateway.sim.ended(stream.request, stream.generated)

    def _first_token(self, stream: Stream, cached_tokens: int) -> None:
        ask: Ask = stream.request
        ask.ttft_s, ask.cached_tokens = self.gateway.sim.now_s - ask.sent_s, cached_tokens
        stream.gave_token = True
        self.gateway.prefill.observe(stream.prompt_tokens - cached_tokens, ask.ttft_s)
        self.prefill.observe(stream.prompt_tokens - cached_tokens, ask.ttft_s)
        self.load.prefill_tokens_per_s = self.prefill.known_tokens_per_s or 0.0
        self.gateway.prefixes.first_token(stream, self.as_real, cached_tokens)
        queued = min(stream.cost_tokens - 1, stream.queued_tokens)
        stream.cost_tokens -= queued
        self.load.add(-queued)
        self.gateway.placements.prefilled(stream, self.as_real)


class Asks:
    """The codec of simulated requests."""

    def prompt(self, stream: Stream) -> PromptContent:
        return PromptContent(stream.request.tokens)

    def encode_add(self, stream: Stream) -> Sequence[Any]:
        return [stream.wire_id.encode()]


class Places(placement.Placements):
    """kervan's placements, where `way` may say something else of where a stream goes."""

    way: "Way"

    def _choose(self, stream: Stream, target: str | None, match: Match | None) -> routing.Placement:
        name = self.way.choose(stream.request)
        return super()._choose(stream, target, match) if name is None else routing.Placement(name, "")


class Gateway:
    def __init__(self, sim: "Simulation", number: int) -> None:
        self.sim, self.number = sim, number
        codec: Any = Asks()
        self.prefill = PrefillSpeed()
        self.prefixes = prefixes.Prefixes(codec, "secret", is_on=sim.way.routes_by_prefix)
        links = [Link(self, replica) for replica in sim.replicas]
        known: Any = SimpleNamespace(
            live={link.replica_id: link for link in links}, fleet=routing.FleetLoad(link.load for link in links)
        )
        self.links: dict[str, Any] = known.live
        counts: Any = SimpleNamespace(moves={})
        self.placements = Places(
            codec, known, LengthEstimate(), self.prefill, self.prefixes, counts, DemandMeter(), hold_timeout_s=1e9,
            give_up=lambda stream, why: None, reject=lambda stream, why: None, forgotten=lambda stream: None,
        )  # fmt: skip
        self.placements.way = sim.way
        for link in self.links.values():
            self.prefixes.opened(link)

    def send(self, ask: Ask) -> None:
        stream = Stream(str(ask.number), ask, len(ask.tokens), ask.osl, wire_id=str(ask.number))
        self.placements.streams[stream.request_id] = stream
        at_once(self.placements.place(stream))


class Simulation:
    """One fleet, one way of routing, one load."""

    def __init__(self, way: "Way", *, replicas: int, gateways: int, twin: TwinSettings, seed: int) -> None:
        self.now_s = 0.0
        self.way, self.rng = way, random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self.replicas = [Replica(self, f"r{n:03}", twin) for n in range(replicas)]
        way.begin(self)
        self.gateways = [Gateway(self, n) for n in range(gateways)]
        self.done: list[Ask] = []
        self._num_asked = 0
        self._seen: set[int] = set()
        self._load_s = self._looked_s = self._max_load = self._mean_load = 0.0
        if gateways > 1:
            for n in range(gateways):
                self.later(NEWS_PERIOD_S * n / gateways, functools.partial(self._tell, self.gateways[n]))

    def later(self, delay_s: float, what: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (self.now_s + delay_s, self._num_events, what))

    def _tell(self, gateway: Gateway) -> None:
        """A PING to each replica, and the PONG: what others said before comes back."""
        for name, link in gateway.links.items():
            others = [other.links[name] for other in self.gateways if other is not gateway]
            for other in others:
                if link.news:
                    other.told(bytes(link.news))
            link.news.clear()
            link.load.hear(sum(other.told_tokens for other in others), len(self.gateways), link.replica.num_here)
            link.told_tokens = link.load.own_tokens
        if len(self._events) or any(replica.is_stepping for replica in self.replicas):
            self.later(NEWS_PERIOD_S, lambda: self._tell(gateway))

    def ask(self, tokens: list[int], osl: int, session: str, then: Callable[[list[int]], None]) -> None:
        self._look()
        ask = Ask(tokens, osl, session, then, self._num_asked, self.now_s)
        self._num_asked += 1
        ask.hashes = BlockHashes(tokens, BLOCK_TOKENS)
        most = (len(tokens) - 1) // BLOCK_TOKENS
        num_seen = next((n for n, value in enumerate(ask.hashes.values) if value not in self._seen), most)
        ask.possible_tokens = min(num_seen, most) * BLOCK_TOKENS
        self._seen.update(ask.hashes.values)
        self.rng.choice(self.gateways).send(ask)

    def ended(self, ask: Ask, answer: list[int]) -> None:
        self._look()
        assert ask.hashes is not None
        num_blocks = len(ask.hashes.values)
        for token in answer[:-1]:
            ask.hashes.append(token)
        self._seen.update(ask.hashes.values[num_blocks:])
        ask.hashes, ask.answer = None, answer
        self.done.append(ask)
        ask.then(answer)

    def _look(self) -> None:
        """Requests in flight so far, by replica."""
        counts = [replica.num_here for replica in self.replicas]
        passed_s, self._looked_s = self.now_s - self._looked_s, self.now_s
        self._max_load += passed_s * max(counts)
        self._mean_load += passed_s * sum(counts) / len(counts)

    def run(self, until_s: float = float("inf")) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, what = heapq.heappop(self._events)
            what()
            if not any(r.is_stepping for r in self.replicas) and self._is_over():
                break

    def _is_over(self) -> bool:
        """Only news is left to come."""
        return len(self._events) <= (len(self.gateways) if len(self.gateways) > 1 else 0)

    def figures(self) -> dict[str, float]:
        asks = sorted(self.done, key=lambda ask: ask.number)
        cut = int(WARM_SHARE * len(asks))
        warm = asks[cut : len(asks) - cut]
        over_s = warm[-1].sent_s - warm[0].sent_s
        ttfts = sorted(ask.ttft_s for ask in warm)
        possible = sum(ask.possible_tokens for ask in warm)
        computed = [replica.computed_tokens for replica in self.replicas]
        predicted = sum(link.tally.predicted_cached_tokens for g in self.gateways for link in g.links.values())
        found = sum(link.tally.cached_tokens for g in self.gateways for link in g.links.values())
        reused = [ask.ttft_s for ask in warm if 2 * ask.possible_tokens > len(ask.tokens)]
        return {
            "requests": len(warm),
            "prompt_tokens": sum(len(ask.tokens) for ask in warm),
            "possible_share": possible / max(1, sum(len(ask.tokens) for ask in warm)),
            "of_possible": sum(ask.cached_tokens for ask in warm) / possible if possible else 1.0,
            "ttft_p50_s": statistics.median(ttfts),
            "ttft_p99_s": ttfts[int(0.99 * (len(ttfts) - 1))],
            "ttft_mean_s": statistics.mean(ttfts),
            "reused_ttft_p50_s": statistics.median(reused) if reused else 0.0,
            "out_tok_s": sum(len(ask.answer) for ask in warm) / over_s if over_s else 0.0,
            "max_over_mean": self._max_load / self._mean_load,
            "prefill_max_over_mean": max(computed) * len(computed) / max(1, sum(computed)),
            "found_of_predicted": found / predicted if predicted else 1.0,
        }


# ---- ways of routing


class Way:
    """None of `choose`: as kervan decides."""

    routes_by_prefix = True

    def begin(self, sim: Simulation) -> None:
        self.sim = sim

    def choose(self, ask: Ask) -> str | None:
        return None


class LeastLoad(Way):
    routes_by_prefix = False


class BoundedHash(Way):
    """Consistent hashing with bounded loads: the first replica on the ring with room. It knows what is in flight."""

    routes_by_prefix = False

    def __init__(self, key: Callable[[Ask], str]) -> None:
        self._key = key

    def begin(self, sim: Simulation) -> None:
        super().begin(sim)
        self._ring = sorted(
            (self._point(f"{replica.name} {n}"), replica.name, replica)
            for replica in sim.replicas
            for n in range(HASH_POINTS)
        )

    def _point(self, text: str) -> int:
        return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=8).digest(), "big")

    def choose(self, ask: Ask) -> str:
        replicas = self.sim.replicas
        most = HASH_BOUND * (1 + sum(replica.num_here for replica in replicas)) / len(replicas)
        begin = bisect.bisect(self._ring, (self._point(self._key(ask)), ""))
        for n in range(len(self._ring)):
            _, name, replica = self._ring[(begin + n) % len(self._ring)]
            if replica.num_here + 1 <= max(1, most):
                return name
        return min(replicas, key=lambda replica: replica.num_here).name


class RayRouter(Way):
    """Ray Serve LLM's PrefixCacheAffinityRouter: its own code for what it decides, and its tree, in this process.

    What is not its own: the choice of the shorter queue among those that it names, and between two random ones where it
    names none, as Serve's base class does; queue lengths are exact. One character stands for each token.
    """

    routes_by_prefix = False

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def begin(self, sim: Simulation) -> None:
        from ray.llm._internal.serve.routing_policies.prefix_aware import prefix_aware_router as module
        from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTree
        from ray.serve._private.common import DeploymentID, ReplicaID

        super().begin(sim)
        tree = PrefixTree()
        module.ray = SimpleNamespace(get=lambda value: value)
        called = SimpleNamespace(
            **{
                name: SimpleNamespace(remote=getattr(tree, name))
                for name in ("prefix_match", "get_smallest_tenants", "insert", "add_tenants")
            }
        )
        self._tree = tree
        router = self._router = module.PrefixCacheAffinityRouter.__new__(module.PrefixCacheAffinityRouter)
        router.initialize_state(imbalanced_threshold=self._threshold, tree_actor=called)
        ids = {replica.name: ReplicaID(replica.name, DeploymentID("sim")) for replica in sim.replicas}
        self._candidates = [
            SimpleNamespace(replica_id=ids[replica.name], replica=replica, max_ongoing_requests=10**9)
            for replica in sim.replicas
        ]
        router._replicas = {one.replica_id: one for one in self._candidates}
        router._use_replica_queue_len_cache = False
        router._probe_queue_lens = self._probe
        self._names = {one.replica_id.to_full_id_str(): one.replica.name for one in self._candidates}
        tree.add_tenants(list(self._names), 0.0)

    async def _probe(self, candidates: Iterable[Any], _: int) -> list[tuple[Any, int]]:
        return [(one, one.replica.num_here) for one in candidates]

    def choose(self, ask: Ask) -> str:
        text = "".join(chr(0x10000 + token) for token in ask.tokens)
        request = SimpleNamespace(args=[SimpleNamespace(prompt=text)])
        found: list[Any] = []

        async def decide() -> None:
            found.extend((await self._router._prefix_match_best_replicas(request, self._candidates))[0])

        at_once(decide())
        among = found or self.sim.rng.sample(self._candidates, min(2, len(self._candidates)))
        chosen = min(among, key=lambda one: one.replica.num_here)
        self._tree.insert(text, chosen.replica_id.to_full_id_str(), self.sim.now_s)
        return str(chosen.replica.name)


def first_tokens(ask: Ask) -> str:
    return " ".join(map(str, ask.tokens[:HASHED_TOKENS]))


WAYS: dict[str, Callable[[], Way]] = {
    "prefix": Way,
    "least-load": LeastLoad,
    "hash": lambda: BoundedHash(first_tokens),
    "hash-session": lambda: BoundedHash(lambda ask: ask.session),
    "ray": lambda: RayRouter(float("inf")),
    "ray-bounded": lambda: RayRouter(8),
}


DEFAULT_WAYS = [way for way in WAYS if way != "ray-bounded"]


# ---- loads


@dataclass(frozen=True)
class Talk:
    """A conversation: `prompts` are the new tokens of its turns. `calls`: of each turn at once, one of them goes on."""

    session: str
    system: list[int]
    prompts: list[list[int]]
    osls: list[int]
    thinks_s: list[float]
    calls: int = 1


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(10, 100_000) for _ in range(count)]


def talk(
    rng: random.Random, name: str, *, turns: int, isl: float, osl: float, think_s: float = 0.0, varies: bool = True,
    system: Sequence[int] = (), calls: int = 1,
) -> Talk:  # fmt: skip
    """`isl`, `osl`: means of exponential lengths, or what all have, without `varies`."""

    def length(mean: float, least: int) -> int:
        return max(least, min(int(rng.expovariate(1 / mean)), int(4 * mean))) if varies else int(mean)

    return Talk(
        name, [*system], [words(rng, length(isl, 16)) for _ in range(turns)], [length(osl, 4) for _ in range(turns)],
        [rng.expovariate(1 / think_s) if think_s else CLIENT_S for _ in range(turns)], calls,
    )  # fmt: skip


class Talker:
    """Holds one conversation, then calls `over`."""

    def __init__(self, sim: Simulation, talk: Talk, over: Callable[[], None]) -> None:
        self.sim, self.talk, self.over = sim, talk, over
        self._said, self._turn, self._open = [*talk.system], 0, 0

    def begin(self) -> None:
        talk, turn = self.talk, self._turn
        self._open = talk.calls
        prompt = self._said + talk.prompts[turn]
        for call in range(talk.calls):
            tokens = prompt if not call else [*prompt, *talk.prompts[turn][: 16 * call]]
            self.sim.ask(tokens, talk.osls[turn], talk.session, functools.partial(self._answered, prompt, call))

    def _answered(self, prompt: list[int], call: int, answer: list[int]) -> None:
        if not call:
            self._said = prompt + answer
        self._open -= 1
        if self._open:
            return
        think_s = self.talk.thinks_s[self._turn]
        self._turn += 1
        if self._turn == len(self.talk.prompts):
            self.over()
        else:
            self.sim.later(think_s, self.begin)


def closed(sim: Simulation, talks: list[Talk], slots: int) -> None:
    """`slots` conversations at any time, until all were held."""
    rest = iter(talks)

    def next_one() -> None:
        one = next(rest, None)
        if one is not None:
            sim.later(CLIENT_S, Talker(sim, one, next_one).begin)

    for slot in range(slots):
        one = next(rest, None)
        if one is not None:
            sim.later(slot * TOKENISE_S, Talker(sim, one, next_one).begin)


def opened(sim: Simulation, talks: list[Talk], rate_s: float) -> None:
    """Conversations that begin at a rate."""
    rng, at_s = random.Random(7), 0.0
    for one in talks:
        at_s += rng.expovariate(rate_s)
        sim.later(at_s, Talker(sim, one, lambda: None).begin)


TALK_S, THINK_S, ARRIVALS_S = 20.0, 2.0, 15.0  # of a conversation with its thinking; for how long new ones come
Begin = Callable[[Simulation, int, random.Random], None]


def burst_chats(sim: Simulation, replicas: int, rng: random.Random) -> None:
    """As `prefix_chats.py`: 24 chats for each replica, all at once, five turns of 512 new tokens and 64 answered."""
    closed(
        sim, [talk(rng, f"{n}", turns=5, isl=512, osl=64, varies=False) for n in range(24 * replicas)], 24 * replicas
    )


def steady_chats(sim: Simulation, replicas: int, rng: random.Random) -> None:
    """24 chats for each replica at any time, lengths vary."""
    closed(sim, [talk(rng, f"{n}", turns=5, isl=512, osl=96) for n in range(60 * replicas)], 24 * replicas)


def open_chats(chats_s: float) -> Begin:
    """`chats_s`: chats that begin in a second for each replica. Eight turns, 2 s of thought in between."""

    def begin(sim: Simulation, replicas: int, rng: random.Random) -> None:
        rate_s = chats_s * replicas
        for n in range(int(TALK_S * rate_s)):  # as many are under way, and no cache has what they said before
            said = words(rng, int(rng.uniform(0, 4000)))
            one = talk(rng, f"early {n}", turns=rng.randint(1, 8), isl=512, osl=96, think_s=THINK_S, system=said)
            sim.later(rng.uniform(0, 2), Talker(sim, one, lambda: None).begin)
        count = int(ARRIVALS_S * rate_s)
        opened(sim, [talk(rng, f"{n}", turns=8, isl=512, osl=96, think_s=THINK_S) for n in range(count)], rate_s)

    return begin


def hot(sim: Simulation, replicas: int, rng: random.Random) -> None:
    """One system prompt of 3,000 tokens for all, and one question of 256 each; three quarters of what saturates."""
    system = words(rng, 3000)
    talks = [talk(rng, f"{n}", turns=1, isl=256, osl=128, system=system) for n in range(200 * replicas)]
    opened(sim, talks, 30 * replicas)


def hot_closed(sim: Simulation, replicas: int, rng: random.Random) -> None:
    """The same in a closed loop, 48 for each replica."""
    system = words(rng, 3000)
    talks = [talk(rng, f"{n}", turns=1, isl=256, osl=128, system=system) for n in range(300 * replicas)]
    closed(sim, talks, 48 * replicas)


def agents(sim: Simulation, replicas: int, rng: random.Random) -> None:
    """As the preset of `kervan bench`: tools of 1,500 tokens for all, six turns of three calls at once."""
    system = words(rng, 1500)
    talks = [
        talk(rng, f"{n}", turns=6, isl=400, osl=100, think_s=1.0, system=system, calls=3) for n in range(40 * replicas)
    ]
    closed(sim, talks, 12 * replicas)


def distinct(sim: Simulation, replicas: int, rng: random.Random) -> None:
    """Prompts that have nothing in common, 64 for each replica at any time."""
    closed(sim, [talk(rng, f"{n}", turns=1, isl=768, osl=96) for n in range(200 * replicas)], 64 * replicas)


def mooncake(path: Path, speed: float, rows: int) -> Begin:
    """The beginning of Mooncake's conversation trace, sped up so that `replicas` have to do with it."""

    def begin(sim: Simulation, replicas: int, rng: random.Random) -> None:
        blocks: dict[int, list[int]] = {}
        with path.open() as lines:
            for number, line in enumerate(lines):
                if number >= rows:
                    break
                row = json.loads(line)
                tokens: list[int] = []
                for block in row["hash_ids"]:
                    if block not in blocks:
                        blocks[block] = words(random.Random(block), 512)
                    tokens += blocks[block]
                tokens = tokens[: row["input_length"]]
                one = Talk(str(row["hash_ids"][:2]), [], [tokens], [min(row["output_length"], 256)], [0.0])
                sim.later(row["timestamp"] / 1e3 / (speed * replicas), Talker(sim, one, lambda: None).begin)

    return begin


LOADS: dict[str, Begin] = {
    "burst-chats": burst_chats,
    "chats": steady_chats,
    "open-50": open_chats(1.25),
    "open-80": open_chats(2.0),
    "open-95": open_chats(2.4),
    "hot": hot,
    "hot-closed": hot_closed,
    "agents": agents,
    "distinct": distinct,
}


def run_one(
    load: str, way: str, begin: Begin, args: argparse.Namespace, twin: TwinSettings, seed: int
) -> dict[str, float]:
    sim = Simulation(WAYS[way](), replicas=args.replicas, gateways=args.gateways, twin=twin, seed=seed)
    begin(sim, args.replicas, random.Random(f"{load} {seed}"))
    sim.run()
    return sim.figures()


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| load | way | possible | of it found | TTFT p50 | p99 | mean | tok/s | max/mean load | found/predicted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        f = {name: statistics.median(one[name] for one in row["rounds"]) for name in row["rounds"][0]}
        lines.append(
            f"| {row['load']} | {row['way']} | {f['possible_share']:.0%} | {f['of_possible']:.1%} | "
            f"{1e3 * f['ttft_p50_s']:.0f} ms | {1e3 * f['ttft_p99_s']:.0f} ms | {1e3 * f['ttft_mean_s']:.0f} ms | "
            f"{f['out_tok_s']:,.0f} | {f['max_over_mean']:.2f} | {f['found_of_predicted']:.1%} |"
        )
    return "\n".join(lines)


def by_load(rows: list[dict[str, Any]]) -> str:
    """As Markdown, a row for each load and a column for each way; medians of the rounds."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        f = {name: statistics.median(one[name] for one in row["rounds"]) for name in row["rounds"][0]}
        found = f"{f['of_possible']:.0%}, " if f["possible_share"] else ""
        cells.setdefault(row["load"], {})[row["way"]] = (
            f"{found}{1e3 * f['ttft_p50_s']:,.0f} / {1e3 * f['ttft_p99_s']:,.0f} ms, "
            f"{f['out_tok_s']:,.0f} tok/s, {f['max_over_mean']:.2f}"
        )
    lines = [f"| load | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    return "\n".join([*lines, *(f"| {load} | {' | '.join(of[way] for way in ways)} |" for load, of in cells.items())])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--loads", help=f"with commas [default: {','.join(LOADS)},mooncake]")
    made.add_argument(
        "--ways", default=",".join(DEFAULT_WAYS), help=f"with commas, of {','.join(WAYS)} [default: %(default)s]"
    )
    made.add_argument("--replicas", type=int, default=4)
    made.add_argument("--gateways", type=int, default=2)
    made.add_argument("--speed", type=float, default=0.5, help="of an H200 that each replica has [default: half]")
    made.add_argument("--rounds", type=int, default=1)
    made.add_argument("--trace", type=Path, default=HERE / "traces" / "mooncake_conversation_first_1500.jsonl")
    made.add_argument("--trace-speed", type=float, default=0.4, help="for each replica")
    made.add_argument("--trace-rows", type=int, default=500)
    made.add_argument("--record", type=Path, help="a file or directory")
    return made


def main() -> None:
    args = parser().parse_args()
    loads = dict(LOADS)
    if args.trace.is_file():
        loads["mooncake"] = mooncake(args.trace, args.trace_speed, args.trace_rows)
    config = FleetConfig(
        model=str(HERE / "models" / "llama3-8b"),
        engine="twin",
        gpu="H200",
        twin={"speed": args.speed, "max_model_len": 131_072},
    )
    twin = settings(config)
    rows: list[dict[str, Any]] = []
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    for load in args.loads.split(",") if args.loads else loads:
        for way in args.ways.split(","):
            begin_s = time.process_time()
            rounds = [run_one(load, way, loads[load], args, twin, seed) for seed in range(args.rounds)]
            rows.append({"load": load, "way": way, "rounds": rounds})
            print(
                f"{table(rows[-1:]).splitlines()[-1]} {time.process_time() - begin_s:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        if args.record is not None:  # again after each load, so that what is done is kept
            record = records.record("prefix-policies", {"asked": asked, "rows": rows})
            record["command"] = shlex.join(["python", *sys.argv])
            args.record = records.write(args.record, record)
    print(table(rows))
    if args.record is not None:
        print(f"record: {args.record}")


if __name__ == "__main__":
    main()
