"""What becomes of a stream whose replica was lost: move it, try it alone, or give it up.

A request that kills its replica does so at a fixed point: before the first token that follows its placement.
So a stream that gave a token since it was placed is innocent of the death; one that gave none is a suspect.
A suspect is placed again alone (see `routing.decide`); if that replica dies too, the suspect is convicted.
"""

from dataclasses import dataclass
from typing import Literal

MAX_STRIKES = 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """`strikes`: the stream's new count."""

    action: Literal["move", "try_alone", "give_up"]
    strikes: int
    reason: str


def decide(*, strikes: int, gave_token: bool) -> Verdict:
    """Judge one stream of a lost replica; `strikes` counts earlier deaths without a token."""
    if gave_token:
        return Verdict("move", 0, "gave a token since it was placed")
    strikes += 1
    if strikes >= MAX_STRIKES:
        return Verdict("give_up", strikes, f"{strikes} replicas were lost before it gave a token")
    return Verdict("try_alone", strikes, "its replica was lost before it gave a token")
