"""How long replicas take to start, learned for each kind of node. Pure."""

from collections.abc import Iterable, Mapping, Sequence

from kervan.fleet.directory import ReplicaEntry

# Until one has started: vLLM with a model of some GB needs one to three minutes on a GPU.
PRIOR_S = 90.0
SAFE_SHARE = 0.9  # of the starts are no longer than what is expected
MAX_KEPT = 32  # of each kind, the latest: a new driver or a fuller page cache changes them
PLACING_S = 120.0  # what takes longer to be placed has waited for room, which is no part of a start


class Starts:
    """Seconds from when a replica was wanted until it was ready, by kind of node."""

    def __init__(self, known: Mapping[str, Sequence[float]] | None = None, *, prior_s: float = PRIOR_S) -> None:
        self.prior_s = prior_s
        self._known = {kind: list(seconds) for kind, seconds in (known or {}).items()}
        self._wanted_s: dict[str, float] = {}  # of each pool: when it was last to have more
        self._placing_s: dict[str, float] = {}  # of each replica that starts: how long it took to be placed
        self._is_new = True  # what is ready already was started when nobody looked

    def wanted(self, pool: str, now_s: float) -> None:
        """A pool is to have more from now on."""
        self._wanted_s[pool] = now_s

    def look(self, replicas: Iterable[ReplicaEntry], kind_of: Mapping[str, str], now_s: float) -> None:
        """Learn from those that have become ready. `kind_of`: node -> its kind."""
        there = list(replicas)
        for replica in there:
            if replica.state == "starting" and replica.id not in self._placing_s:
                asked_s = self._wanted_s.get(replica.pool, now_s)
                waited_s = now_s - replica.age_s - asked_s
                self._placing_s[replica.id] = waited_s if 0 < waited_s <= PLACING_S else 0.0
            elif replica.state == "ready" and replica.id in self._placing_s:
                took_s = self._placing_s.pop(replica.id) + replica.age_s - replica.ready_for_s
                self._learn(kind_of.get(replica.node, ""), took_s)
            elif replica.state == "ready" and self._is_new and replica.age_s > replica.ready_for_s > 0:
                self._learn(kind_of.get(replica.node, ""), replica.age_s - replica.ready_for_s)
        self._is_new &= not there
        listed = {replica.id for replica in there}
        self._placing_s = {name: waited_s for name, waited_s in self._placing_s.items() if name in listed}

    def _learn(self, kind: str, took_s: float) -> None:
        kept = self._known.setdefault(kind, [])
        kept.append(round(took_s, 2))
        del kept[:-MAX_KEPT]

    def expected_s(self, kinds: Iterable[str]) -> float:
        """How long a start takes on one of these kinds, on the safe side."""
        known = sorted(took_s for kind in set(kinds) for took_s in self._known.get(kind, ()))
        if not known:
            known = sorted(took_s for kept in self._known.values() for took_s in kept)
        return known[min(len(known) - 1, int(SAFE_SHARE * len(known)))] if known else self.prior_s

    @property
    def known(self) -> dict[str, list[float]]:
        """What was learned, for storing."""
        return self._known
