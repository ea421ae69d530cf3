"""What becomes of a stream whose replica was lost: move it, try it alone, or give it up.

A request that kills its replica does so at a fixed point: before the first token that follows its placement.
So a stream that gave a token since it was placed is innocent of the death; one that gave none is a suspect.
A suspect is placed again alone (see `routing.decide`); if that replica dies too, the suspect is convicted, unless the
replica was dead already: a conviction needs a sign of life that came after the request was sent. And it needs deaths:
a replica that was only silent (a pause of the machine, a broken network) comes back, and its loss proves nothing.
"""

from dataclasses import dataclass
from typing import Literal

MAX_STRIKES = 2
# A request could kill faster than a replica answers a ping; so it is not tried for ever.
MAX_UNSEEN_LOSSES = 5
# A silent replica is linked again within about a second of its return; a sentence waits for longer.
RETURN_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """`strikes`, `unseen_losses`: the stream's new counts."""

    action: Literal["move", "try_alone", "give_up"]
    strikes: int
    unseen_losses: int
    reason: str


def decide(*, strikes: int, unseen_losses: int, gave_token: bool, was_alive: bool) -> Verdict:
    """Judge one stream of a lost replica.

    `strikes`: earlier losses without a token. `was_alive`: the replica gave a sign of life after it got the request;
    losses without one are counted apart (`unseen_losses`), once the stream is a suspect, and so are those of replicas
    that came back.
    """
    if gave_token:
        return Verdict("move", 0, 0, "gave a token since it was placed")
    if (strikes or unseen_losses) and not was_alive:
        unseen_losses += 1
        if unseen_losses >= MAX_UNSEEN_LOSSES:
            return Verdict(
                "give_up", strikes, unseen_losses, f"{unseen_losses} replicas were lost right after they got it"
            )
        return Verdict("try_alone", strikes, unseen_losses, "its replica may have been dead before it got the request")
    strikes += 1
    if unseen_losses >= MAX_UNSEEN_LOSSES:
        return Verdict("give_up", strikes, unseen_losses, f"{unseen_losses + 1} times its replica was lost with it")
    if strikes >= MAX_STRIKES:
        return Verdict("give_up", strikes, unseen_losses, f"{strikes} replicas were lost before it gave a token")
    return Verdict("try_alone", strikes, unseen_losses, "its replica was lost before it gave a token")
