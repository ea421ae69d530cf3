"""Nodes of a spot market, as they come and go: which are there, and which of them have a replica."""

from collections.abc import Iterator

from kervan.config.node_trace import NodeTrace, Word

# As if a node had been watched for so long already, and was lost so often; chosen, so that a new fleet is careful.
PRIOR_LOSSES, PRIOR_HOURS = 1.0, 4.0


class SpotNodes:
    """Those of one pool, each for one replica."""

    def __init__(self, trace: NodeTrace) -> None:
        self._trace = trace
        self._free: dict[str, None] = {}
        self._there: dict[str, None] = {}
        self._doomed: dict[str, None] = {}
        self._num_lost = 0
        self._node_s = self._counted_s = 0.0

    def changes(self) -> Iterator[tuple[float, Word, tuple[str, ...]]]:
        """All that will happen, in order."""
        for change in self._trace.changes:
            yield change.at_s, change.word, change.nodes

    @property
    def num_there(self) -> int:
        """Nodes that a replica can be on, with one or without."""
        return len(self._there) - len(self._doomed)

    def losses_per_hour(self, now_s: float) -> float:
        """Of one node, as seen so far: what has not happened yet nobody knows. A fleet begins with `PRIOR_LOSSES`."""
        node_s = self._node_s + len(self._there) * (now_s - self._counted_s)
        return (self._num_lost + PRIOR_LOSSES) / (node_s / 3600 + PRIOR_HOURS)

    def _count(self, now_s: float) -> None:
        self._node_s += len(self._there) * (now_s - self._counted_s)
        self._counted_s = now_s

    def take(self) -> str | None:
        """A free node for a replica, the one that is there for longest; None without one."""
        node = next(iter(self._free), None)
        if node is not None:
            del self._free[node]
        return node

    def give_back(self, node: str) -> None:
        """A replica has left its node."""
        if node in self._there and node not in self._doomed:
            self._free[node] = None

    def came(self, names: tuple[str, ...], now_s: float) -> None:
        """Nodes came."""
        self._count(now_s)
        for name in names:
            self._there[name] = self._free[name] = None

    def will_go(self, names: tuple[str, ...]) -> None:
        """Nodes will go: nothing is placed there any more."""
        for name in names:
            if name in self._there:
                self._doomed[name] = None
                self._free.pop(name, None)

    def went(self, names: tuple[str, ...], now_s: float) -> None:
        """Nodes went."""
        self._count(now_s)
        self._num_lost += len(names)
        for name in names:
            self._there.pop(name, None)
            self._free.pop(name, None)
            self._doomed.pop(name, None)
