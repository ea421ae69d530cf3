"""Which replicas leave when a pool becomes smaller."""

from collections import Counter
from collections.abc import Mapping, Sequence

from kervan.policy.autoscale.state import ReplicaState

MIGRATION_TOKENS = 2048  # contexts within so many tokens are about as fast to move: other reasons decide
SPOT = "spot"


def choose(replicas: Sequence[ReplicaState], targets: Mapping[str, int]) -> tuple[str, ...]:
    """Those above the targets, in the order in which they go: `targets` by pool, of replicas that are not leaving yet.

    One that is not ready serves nobody: it goes first, the youngest before others. Then those with earlier settings,
    then of spot what is in the zone that has most, since a zone goes as a whole; then what empties a node, so that GPUs
    that lie together become free; then the one with the fewest tokens to move, and the youngest, which has least in its
    prefix cache and, of spot, is the likeliest to go. Those that drain or are unhealthy are none of the target.
    """
    chosen: list[str] = []
    for pool in sorted({replica.pool for replica in replicas}):
        here = [r for r in replicas if r.pool == pool and r.phase in ("starting", "ready")]
        excess = len(here) - targets.get(pool, len(here))
        if excess <= 0:
            continue
        on_node = Counter(replica.node for replica in replicas if replica.node and replica.phase != "draining")
        in_zone = Counter(replica.zone for replica in here if replica.pool == SPOT and replica.zone)
        left = list(here)
        for _ in range(excess):
            first = min(left, key=lambda replica: _key(replica, on_node, in_zone))
            left.remove(first)
            on_node[first.node] -= 1
            in_zone[first.zone] -= 1
            chosen.append(first.id)
    return tuple(chosen)


def _key(replica: ReplicaState, on_node: Mapping[str, int], in_zone: Mapping[str, int]) -> tuple[object, ...]:
    tokens = replica.context_tokens + replica.queued_tokens
    if replica.phase == "starting":
        return (0, not replica.is_outdated, replica.age_s, replica.id)
    return (
        1,
        not replica.is_outdated,
        -in_zone.get(replica.zone, 0),
        on_node.get(replica.node, 1) if replica.node else 1,
        tokens // MIGRATION_TOKENS,
        replica.ready_for_s,
        replica.id,
    )
