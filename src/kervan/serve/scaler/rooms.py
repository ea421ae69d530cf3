"""How many replicas of each pool the cluster has room for. Pure."""

from collections.abc import Mapping

# What is not listed so long after it was wanted has no room: Ray places an actor in a second or two, and on a busy
# machine it takes some more until that has told of itself.
PLACING_S = 20.0


class Rooms:
    """Follows what can be placed. Ray takes devices when it places a replica, which is listed a little later: until
    then the free ones say too little, and a fleet that follows them would stop what it has just asked for.
    """

    def __init__(self) -> None:
        self._rooms: dict[str, int] = {}
        self._changed_s: dict[str, float] = {}
        self._targets: dict[str, int] = {}

    def look(
        self, placeable: Mapping[str, int], listed: Mapping[str, int], targets: Mapping[str, int], now_s: float
    ) -> None:
        """`placeable`: by pool, those there included, as free devices say. `listed`: replicas that are on a node."""
        for pool, room in placeable.items():
            if targets.get(pool) != self._targets.get(pool):
                self._targets[pool], self._changed_s[pool] = targets.get(pool, 0), now_s
            is_settled = listed.get(pool, 0) >= targets.get(pool, 0)
            is_stuck = now_s - self._changed_s.get(pool, now_s) > PLACING_S
            before = self._rooms.get(pool, room)
            self._rooms[pool] = room if is_settled or is_stuck else max(before, room)

    def room(self, pool: str) -> int | None:
        """None while it is not known."""
        return self._rooms.get(pool)
