"""How long an engine has had work and made no step."""

import time


class StepClock:
    """Told by the thread that steps and by the one that takes requests; each only assigns, so neither waits."""

    def __init__(self) -> None:
        self._since_s = time.monotonic()

    def stepped(self) -> None:
        """A step has ended."""
        self._since_s = time.monotonic()

    def work_comes(self, *, has_work: bool) -> None:
        """A request is about to be handed to the engine, which `has_work` already or not."""
        if not has_work:
            self._since_s = time.monotonic()

    def stalled_s(self, *, has_work: bool) -> float:
        """Seconds without a step; 0 for an engine that has nothing to do."""
        return time.monotonic() - self._since_s if has_work else 0.0
