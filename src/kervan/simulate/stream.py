"""One request of the load, from its arrival to its end."""

from dataclasses import dataclass

from kervan.policy.prefix import Spans
from kervan.sim.limits import BLOCK_TOKENS
from kervan.sim.prefix_cache import BlockHashes, CachedRequest

NO_HASHES = BlockHashes((), BLOCK_TOKENS)


@dataclass(slots=True, eq=False, kw_only=True)
class SimulatedStream(CachedRequest):
    """A stream; `id` is its place in the load, `spans`: its prompt's, where routing looks at them. `generated`: tokens
    that it had when it was placed where it is now. `end_step`: the group's step there with its last token, 0 while it
    has no token from there.

    `cost_tokens`, `queued_tokens`: what it was charged at its replica. `paid_from_step`: from there on it pays a token
    of its cost with each.
    """

    hashes: BlockHashes = NO_HASHES
    id: int
    sent_s: float
    prompt_tokens: int
    output_tokens: int
    gateway: int = 0
    spans: Spans | None = None
    replica: int = -1
    generated: int = 0
    end_step: int = 0
    gave_token: bool = False
    first_s: float = -1.0
    held_since_s: float = -1.0
    placed_s: float = 0.0
    moves: int = 0
    cost_tokens: int = 0
    queued_tokens: int = 0
    paid_from_step: int = -1

    def cost_at(self, group_steps: int) -> int:
        """What it costs after so many steps of its group."""
        if self.paid_from_step < 0:
            return self.cost_tokens
        return self.cost_tokens - (group_steps - self.paid_from_step)
