"""Nodes of a spot market, as they come and go: which are there, and which of them have a replica."""

from collections.abc import Iterator

from kervan.config.node_trace import NodeTrace, Word


class SpotNodes:
    """Those of one pool, each for one replica."""

    def __init__(self, trace: NodeTrace) -> None:
        self._trace = trace
        self._free: dict[str, None] = {}
        self._there: dict[str, None] = {}
        self._doomed: dict[str, None] = {}

    def changes(self) -> Iterator[tuple[float, Word, tuple[str, ...]]]:
        """All that will happen, in order."""
        for change in self._trace.changes:
            yield change.at_s, change.word, change.nodes

    @property
    def num_there(self) -> int:
        """Nodes that a replica can be on, with one or without."""
        return len(self._there) - len(self._doomed)

    @property
    def losses_per_hour(self) -> float:
        """Of one node, over the whole trace."""
        count, node_s, there, last_s = 0, 0.0, 0, 0.0
        for change in self._trace.changes:
            node_s += there * (change.at_s - last_s)
            last_s = change.at_s
            there += len(change.nodes) if change.word == "add" else -len(change.nodes)
            count += len(change.nodes) if change.word == "remove" else 0
        node_s += there * max(0.0, self._trace.end_s - last_s)
        return count / max(node_s / 3600, 1e-9) if count else 0.0

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

    def came(self, names: tuple[str, ...]) -> None:
        """Nodes came."""
        for name in names:
            self._there[name] = self._free[name] = None

    def will_go(self, names: tuple[str, ...]) -> None:
        """Nodes will go: nothing is placed there any more."""
        for name in names:
            if name in self._there:
                self._doomed[name] = None
                self._free.pop(name, None)

    def went(self, names: tuple[str, ...]) -> None:
        """Nodes went."""
        for name in names:
            self._there.pop(name, None)
            self._free.pop(name, None)
            self._doomed.pop(name, None)
