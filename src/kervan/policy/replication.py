"""Which other gateway keeps the copies of a gateway's journals."""

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Peer:
    """A gateway that may keep copies."""

    gateway_id: str
    node: str
    address: str


@dataclass(frozen=True, slots=True)
class PeerChoice:
    """The gateway that is to keep the copies; None without one."""

    peer: Peer | None
    reason: str


def decide(
    *, own_id: str, own_node: str, peers: Sequence[Peer], current: Peer | None, failed: Collection[str] = ()
) -> PeerChoice:
    """`current` stays while it is listed: a change sends all journals again. `failed`: ids of those that do not answer.

    Else one on another node, which does not go when this gateway's does. Of several, each gateway picks by a hash of
    both ids, so that the copies spread.
    """
    if current is not None and current in peers and current.gateway_id not in failed:
        return PeerChoice(current, "it has the copies")
    others = [peer for peer in peers if peer.gateway_id != own_id]
    able = [peer for peer in others if peer.gateway_id not in failed] or others
    if not able:
        return PeerChoice(None, "there is no other gateway")

    def rank(peer: Peer) -> tuple[bool, int, str]:
        spread = zlib.crc32(f"{own_id} {peer.gateway_id}".encode())
        return peer.node == own_node, spread, peer.gateway_id

    best = min(able, key=rank)
    where = "this node, as there is none on another" if best.node == own_node else f"node {best.node}"
    return PeerChoice(best, f"on {where}")
