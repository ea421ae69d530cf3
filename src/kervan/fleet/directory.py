"""Who lives where: soft state that replicas and gateways keep alive by beats.

Losing it harms nothing: gateways keep the links they have, and the next beats fill a new directory.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import structs

from kervan.config.api_keys import KeyTable
from kervan.config.fault import Fault
from kervan.config.profile import ProfileAsk
from kervan.config.workload import Slo
from kervan.fleet.events import EventCounts, FleetEvents
from kervan.fleet.usage import UsageByKey

EXPIRY_S = 10.0
LATE_S = 2.5  # two beats, of a second each, have not come, nor half of the next period later
MAX_FAILURES = 20

ReplicaState = Literal["starting", "ready", "draining", "unhealthy"]


class ReplicaEntry(msgspec.Struct, frozen=True):
    """One engine replica. `pid`: the process whose death is the replica's death (0 before it has one). `public_key`: of
    its CURVE pair, with which gateways know it at `address`.

    `nodes`: all of its nodes, when it has more than `node`. `start_s`: seconds of its start by part. `ready_for_s`:
    since its start ended. `version` tells replicas of one setting from those of another, as in a gateway's entry.
    `leaves_in_s`: it drains, and will be gone; with `may_linger`, its streams may use that time. `beat_age_s`:
    since the directory heard of it, when it was asked. `serve_id`: of the Serve replica that keeps it. `age_s`: since
    its start began.
    """

    id: str
    pool: str
    node: str
    pid: int
    state: ReplicaState
    address: str = ""
    engine_version: str = ""
    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    reason: str = ""
    log_path: str = ""
    version: str = ""
    nodes: list[str] = []
    start_s: dict[str, float] = {}
    ready_for_s: float = 0.0
    leaves_in_s: float | None = None
    may_linger: bool = False
    beat_age_s: float = 0.0
    serve_id: str = ""
    age_s: float = 0.0
    public_key: str = ""

    @property
    def lateness(self) -> str:
        """As of a gateway."""
        return lateness(self.beat_age_s)

    @property
    def is_reachable(self) -> bool:
        """Whether gateways can link to it."""
        return bool(self.address) and self.state in ("ready", "draining")


class PrefixTokens(msgspec.Struct, frozen=True):
    """Prompt tokens in prefix caches, of the streams that a gateway sent to one replica.

    `possible`: expected where the most of each prompt was; `predicted`: expected at the replica; `hits`: were there.
    """

    possible: int = 0
    predicted: int = 0
    hits: int = 0


class Traffic(msgspec.Struct, frozen=True):
    """What a gateway saw of a replica in the last second. `ttft_s`: median from placing to the first token, or None.

    `num_served`, `num_moved`: streams that ended there, and that went on elsewhere, since this gateway knows it.
    """

    tokens_per_s: float
    ttft_s: float | None
    num_served: int = 0
    num_moved: int = 0
    prefix: PrefixTokens = PrefixTokens()


class ReplicaShare(msgspec.Struct, frozen=True):
    """What a gateway has on one replica now. `step_s`: between its last steps; None when it makes none.

    `context_tokens`: of the prompts and outputs of its streams that generate, which a move would compute again.
    """

    streams: int = 0
    context_tokens: int = 0
    queued_tokens: int = 0
    step_s: float | None = None


class DemandCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What clients asked of one gateway and got since its last beat, as in `kervan.policy.autoscale.state.Demand`.

    `ttfts`, `tpots`: how many in each bin (`kervan.fleet.demand`); the latter of the streams that generate now.
    """

    window_s: float
    arrived: int = 0
    arrived_prompt_tokens: int = 0
    shed: int = 0
    finished: int = 0
    finished_output_tokens: int = 0
    generated_tokens: int = 0
    first_tokens: int = 0
    first_tokens_good: int = 0
    finished_good: int = 0
    held: int = 0
    held_tokens: int = 0
    queued: int = 0
    queued_tokens: int = 0
    running: int = 0
    running_context_tokens: int = 0
    ttfts: dict[int, int] = {}
    tpots: dict[int, int] = {}
    replicas: dict[str, ReplicaShare] = {}


class GatewayEntry(msgspec.Struct, frozen=True):
    """One gateway. `url` is public; `internal_url` reaches this very gateway, not its neighbours on the port.

    `busy`: the share of the last second in which its loop ran, or waited for a core. `models`: names by which clients
    may ask it. `neighbours`: other fleets on its port to which it passes requests on. `copies_address`: where it takes
    copies of other gateways' journals, host:port. `beat_age_s`: as of a replica. `demand`: since its beat before.
    `usage`: of API keys since its start; the directory adds it up, and lists it nowhere.
    """

    id: str
    node: str
    pid: int
    url: str
    internal_url: str
    is_ready: bool
    reason: str = ""
    version: str = ""
    streams: int = 0
    held: int = 0
    moved: int = 0
    traffic: dict[str, Traffic] = {}
    log_path: str = ""
    busy: float = 0.0
    models: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    copies_address: str = ""
    beat_age_s: float = 0.0
    demand: DemandCounts | None = None
    usage: UsageByKey = {}

    @property
    def lateness(self) -> str:
        """Like "late: last heartbeat 6.2 s ago"; empty for one that was heard of lately."""
        return lateness(self.beat_age_s)


def lateness(beat_age_s: float) -> str:
    """What is shown of a replica or gateway that was heard of so long ago; empty while that is as usual."""
    return f"late: last heartbeat {beat_age_s:.1f} s ago" if beat_age_s > LATE_S else ""


class NodeNotice(msgspec.Struct, frozen=True):
    """A node was told that it will go at `deadline_s` (Unix time, None without one), or may, if it is not certain.

    `kind` and `source` are words of `kervan.notices.events`. `seen_s`: Unix time.
    """

    kind: str
    source: str
    is_certain: bool
    deadline_s: float | None
    seen_s: float

    def describe(self, now_s: float) -> str:
        """What becomes of the node, like "leaves in 118 s: preemption (aws)". `now_s`: Unix time."""
        if not self.is_certain:
            when = "pauses for some seconds" if self.kind == "pause" else "may go"
        elif self.deadline_s is None:
            when = "goes"
        else:
            when = f"leaves in {max(0.0, self.deadline_s - now_s):.0f} s"
        return f"{when}: {self.kind} ({self.source})"


class NodeEntry(msgspec.Struct, frozen=True):
    """What the watcher of one node tells: who is asked for notices there, what they said, and what is wrong with them.

    `is_drained`: Ray puts nothing there any more. `before`: numbers of the account that the node before it has left.
    """

    node: str
    watches: list[str] = []
    notices: list[NodeNotice] = []
    problem: str = ""
    is_drained: bool = False
    before: dict[str, float] = {}


class StartFailure(msgspec.Struct, frozen=True):
    """An engine could not start, or a gateway could not or ended by itself; `kind` names a class of `kervan.errors`."""

    who: str
    kind: str
    message: str
    log_path: str = ""
    number: int = 0  # given by the directory: 1, 2, ...


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """An order to a replica: give up its streams and end, `deadline_s` seconds from when it was given at the latest.

    `may_linger`: nobody waits for the end, so streams that end before the deadline may do so there.
    """

    deadline_s: float
    may_linger: bool = False


class Suffer(msgspec.Struct, frozen=True, tag="suffer"):
    """An order to a simulated replica."""

    fault: Fault


class Strike(msgspec.Struct, frozen=True, tag="strike"):
    """An order to a replica of any engine: its process is killed, or stopped where it is (`kervan chaos`)."""

    how: Literal["kill", "hang"]


class Profile(msgspec.Struct, frozen=True, tag="profile"):
    """An order to a replica of a real engine: record what it does."""

    ask: ProfileAsk


Order = Drain | Suffer | Strike | Profile


class Decided(msgspec.Struct, frozen=True):
    """A decision that changed how many replicas there are to be, or that none can be made. `at_s`: Unix time."""

    at_s: float
    before: dict[str, int]
    targets: dict[str, int]
    reason: str
    numbers: dict[str, float] = {}


class Scaling(msgspec.Struct, frozen=True):
    """How many replicas each pool is to have now, and why. `policy`: its name; `fixed` where there is no choice.

    `numbers`: what the reason stands on. `problem`: why no decision can be made, or not be followed; the targets stay.
    `since_s`: Unix time from when the targets are as they are. `history`: the last changes, oldest first. `changes`:
    how often each pool's target went "up" or "down".
    """

    policy: str
    targets: dict[str, int]
    reason: str
    numbers: dict[str, float] = {}
    problem: str = ""
    since_s: float = 0.0
    room: dict[str, int | None] = {}
    history: list[Decided] = []
    changes: dict[str, dict[str, int]] = {}


class Snapshot(msgspec.Struct, frozen=True):
    """The directory at one version. `is_closing`: the fleet ends when its streams have ended, and takes no more.

    `targets`: replicas that each pool is to have; `bounds`: the least and the most that it may. `slo`: what counts as
    good. `may_sleep`: the fleet may have no replica while nobody asks anything; the first request starts one.
    `events`: what has happened so far. `usd_per_h`: of the replicas that are there, by pool, where prices are known.
    `keys`: for gateways alone, None: as they were; `keys_problem`: why they are not as their file has them.
    """

    version: int
    replicas: list[ReplicaEntry]
    gateways: list[GatewayEntry]
    failures: list[StartFailure]
    nodes: list[NodeEntry] = []
    is_closing: bool = False
    targets: dict[str, int] = {}
    scaling: Scaling | None = None
    slo: Slo = Slo()
    may_sleep: bool = False
    bounds: dict[str, tuple[int, int]] = {}
    events: EventCounts = EventCounts()
    usd_per_h: dict[str, float] = {}
    keys: KeyTable | None = None
    keys_problem: str = ""


def as_told(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as JSON types, for whoever asks a gateway: without inner addresses, paths of logs and versions."""
    replicas = [
        structs.replace(
            r, address="", public_key="", engine_version="", log_path="", version="", start_s={}, serve_id=""
        )
        for r in snapshot.replicas
    ]
    gateways = [
        structs.replace(
            g, internal_url="", copies_address="", version="", log_path="", traffic={}, demand=None, usage={}
        )
        for g in snapshot.gateways
    ]
    told: dict[str, Any] = msgspec.to_builtins(
        Snapshot(
            snapshot.version,
            replicas,
            gateways,
            [],
            is_closing=snapshot.is_closing,
            targets=snapshot.targets,
            scaling=snapshot.scaling,
        )
    )
    return told


Entry = TypeVar("Entry", ReplicaEntry, GatewayEntry)


def _lasting(entry: GatewayEntry) -> tuple[object, ...]:
    """What others must hear of at once when it changes."""
    return (
        entry.url,
        entry.internal_url,
        entry.copies_address,
        entry.is_ready,
        entry.reason,
        entry.version,
        entry.models,
    )


class Directory:
    """Entries with expiry; `version` grows whenever membership, a state or an address changes."""

    def __init__(self, now: Callable[[], float]):
        self._now = now
        self._replicas: dict[str, tuple[ReplicaEntry, float]] = {}
        self._gateways: dict[str, tuple[GatewayEntry, float]] = {}
        self._nodes: dict[str, tuple[NodeEntry, float]] = {}
        self._failures: list[StartFailure] = []
        self._orders: dict[str, list[Order]] = {}
        self._leaving: dict[str, tuple[float, bool]] = {}  # when, and whether they may linger
        self._num_failures = 0
        self._events = FleetEvents(now)
        self._is_closing = False
        self.version = 0

    def beat_replica(self, entry: ReplicaEntry) -> list[Order]:
        """Update the replica's entry; returns what it has been ordered to do since its last beat."""
        before = self._replicas.get(entry.id)
        self._replicas[entry.id] = (entry, self._now())
        self._events.replica(None if before is None else before[0], entry)
        if before is None or (before[0].state, before[0].address) != (entry.state, entry.address):
            self.version += 1
        return self._orders.pop(entry.id, [])

    def order(self, replica_id: str, order: Order) -> bool:
        """Give a replica an order at its next beat; False if it is not listed. Gateways see a drain before it does."""
        if replica_id not in self._replicas:
            return False
        self._orders.setdefault(replica_id, []).append(order)
        if isinstance(order, Drain):
            self._leaving[replica_id] = (self._now() + order.deadline_s, order.may_linger)
            self._events.drains(self._replicas[replica_id][0])
            self.version += 1
        return True

    def set_closing(self, is_closing: bool) -> None:
        """Let the gateways take no more requests, or take them again."""
        if is_closing != self._is_closing:
            self._is_closing = is_closing
            self.version += 1

    def beat_gateway(self, entry: GatewayEntry) -> None:
        """Update the gateway's entry."""
        before = self._gateways.get(entry.id)
        self._gateways[entry.id] = (entry, self._now())
        if before is None or _lasting(before[0]) != _lasting(entry):
            self.version += 1

    def beat_node(self, entry: NodeEntry) -> None:
        """Update the entry of a node, sent by its watcher."""
        before = self._nodes.get(entry.node)
        self._nodes[entry.node] = (entry, self._now())
        if before is None or before[0] != entry:
            self.version += 1

    def remove(self, entry_id: str) -> None:
        """Forget a replica or gateway that said goodbye."""
        self._orders.pop(entry_id, None)
        self._leaving.pop(entry_id, None)
        self._events.gone(entry_id)
        if self._replicas.pop(entry_id, None) or self._gateways.pop(entry_id, None):
            self.version += 1

    def report_failure(self, failure: StartFailure) -> None:
        """Keep why a replica or gateway could not start; the last `MAX_FAILURES` are kept."""
        self._num_failures += 1
        self._events.failed()
        numbered = msgspec.structs.replace(failure, number=self._num_failures)
        self._failures = [*self._failures, numbered][-MAX_FAILURES:]
        self.version += 1

    def expire(self) -> None:
        """Drop entries without a beat for `EXPIRY_S`."""
        oldest_s = self._now() - EXPIRY_S
        for entries in (self._replicas, self._gateways):
            for entry_id in [i for i, (_, at_s) in entries.items() if at_s < oldest_s]:
                self.remove(entry_id)
        for node in [node for node, (_, at_s) in self._nodes.items() if at_s < oldest_s]:
            del self._nodes[node]
            self.version += 1

    def snapshot(self) -> Snapshot:
        """All entries by id, with their age."""
        self.expire()
        replicas = [self._as_leaving(replica) for replica in self._listed(self._replicas)]
        nodes = [entry for _, (entry, _) in sorted(self._nodes.items())]
        gateways, failures = self._listed(self._gateways), list(self._failures)
        self._events.look(replicas, nodes)
        return Snapshot(self.version, replicas, gateways, failures, nodes, self._is_closing, events=self._events.told())

    def _as_leaving(self, replica: ReplicaEntry) -> ReplicaEntry:
        """The entry as it will be when the replica has heard that it must go."""
        if replica.id not in self._leaving or replica.state not in ("ready", "draining"):
            return replica
        at_s, may_linger = self._leaving[replica.id]
        leaves_in_s = max(0.0, at_s - self._now())
        return msgspec.structs.replace(replica, state="draining", leaves_in_s=leaves_in_s, may_linger=may_linger)

    def _listed(self, entries: dict[str, tuple[Entry, float]]) -> list[Entry]:
        now_s = self._now()
        return [
            structs.replace(entry, beat_age_s=round(now_s - at_s, 2)) for _, (entry, at_s) in sorted(entries.items())
        ]
