"""What becomes of a stream whose replica was lost: move it, try it alone, or reject it.

A request that kills its replica does so at a fixed point: before the first token that follows its placement.
So a stream that gave a token since it was placed is cleared of the death; one that gave none is suspected.
A suspect is placed again alone (see `routing.decide`); if that replica dies too, the suspect is rejected, unless the
replica was dead already: the proof is a sign of life that came after the request was sent. And it needs deaths: a
replica that was only silent (a pause of the machine, a broken network) comes back, and its loss proves nothing.
A replica that stands still in a step over a request is ended in the end (see `watchdog`). So a stream that was on two
when they stood still is rejected when the second one is lost: a third one would be ended as well.
"""

from dataclasses import dataclass
from typing import Literal

MAX_LOSSES = 2
MAX_STALLS = 2
# A request could kill faster than a replica answers a ping; so it is not tried for ever.
MAX_UNPROVEN_LOSSES = 5
# A silent replica is linked again within about a second of its return; a rejection waits for longer.
RETURN_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class QuarantineDecision:
    """`losses`, `unproven_losses`: the stream's new counts."""

    action: Literal["move", "try_alone", "reject"]
    losses: int
    unproven_losses: int
    reason: str


def decide(
    *, losses: int, unproven_losses: int, gave_token: bool, was_alive: bool, stalls: int = 0
) -> QuarantineDecision:
    """What to do with one stream of a lost replica.

    `losses`: earlier ones before it gave a token. `was_alive`: the replica gave a sign of life after it got the
    request; losses without one are counted apart (`unproven_losses`), once the stream is a suspect, and so are those of
    replicas that came back. `stalls`: replicas that stood still before it gave a token there, the lost one included.
    """
    if gave_token:
        return QuarantineDecision("move", 0, 0, "gave a token since it was placed")
    if stalls >= MAX_STALLS:
        return QuarantineDecision(
            "reject",
            losses,
            unproven_losses,
            f"{stalls} replicas made no step for too long after they got it, and were ended; send a shorter prompt, or "
            "raise the fleet's stall_timeout_s",
        )
    if (losses or unproven_losses) and not was_alive:
        unproven_losses += 1
        if unproven_losses >= MAX_UNPROVEN_LOSSES:
            return QuarantineDecision(
                "reject", losses, unproven_losses, f"{unproven_losses} replicas were lost right after they got it"
            )
        return QuarantineDecision(
            "try_alone", losses, unproven_losses, "its replica may have been dead before it got the request"
        )
    losses += 1
    if unproven_losses >= MAX_UNPROVEN_LOSSES:
        return QuarantineDecision(
            "reject", losses, unproven_losses, f"{unproven_losses + 1} times its replica was lost with it"
        )
    if losses >= MAX_LOSSES:
        return QuarantineDecision(
            "reject", losses, unproven_losses, f"{losses} replicas were lost before it gave a token"
        )
    return QuarantineDecision("try_alone", losses, unproven_losses, "its replica was lost before it gave a token")
