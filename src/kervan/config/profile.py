"""What an engine and a gateway are asked to record while they serve."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProfileAsk:
    """A profile of a running engine.

    `directory`: on the engine's node; it exists, and the engine writes `ENGINE_FILE` there last. The profile ends after
    `for_s` seconds or `max_steps` steps, whichever comes first: each step adds some hundred events, and the engine
    stands still while they are written. `has_ranges`: name the parts of a step in it.
    """

    directory: str
    for_s: float
    max_steps: int
    has_ranges: bool = True


ENGINE_FILE = "engine.json"
TRACE_FILE = "torch.json"
