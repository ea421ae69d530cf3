"""How long an engine has had work and made no step, and how long its present step should take."""

import time

from kervan.policy import watchdog

MIN_TOKENS = 64  # of steps with fewer, the time is not spent on tokens
MAX_STEPS = 8  # in progress at once: one for each pipeline stage, and one ahead
FADE = 0.98  # per such step: a speed that was seen once counts less and less


class StepClock:
    """Told by the thread that steps and by the one that takes requests; each only assigns, so neither waits.

    Steps may overlap (vLLM schedules one while another runs), and end in the order in which they began.
    """

    def __init__(self) -> None:
        self._since_s = self._ended_s = time.monotonic()
        self._begun: tuple[tuple[int, float], ...] = ()  # tokens and moment of each step that has begun and not ended
        self._tokens_per_s = 0.0
        self._held_s = 0.0

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

    def tokens_begin(self, num_tokens: int) -> None:
        """A step begins that computes so many tokens."""
        self._begun = (*self._begun[1 - MAX_STEPS :], (num_tokens, time.monotonic()))

    def tokens_end(self) -> None:
        """The tokens of the oldest step are there."""
        if not self._begun:
            return
        (num_tokens, began_s), *rest = self._begun
        now_s = time.monotonic()
        step_s, self._ended_s = now_s - max(began_s, self._ended_s), now_s
        self._begun = tuple(rest)
        if num_tokens >= MIN_TOKENS and step_s > 0:
            self._tokens_per_s = max(FADE * self._tokens_per_s, num_tokens / step_s)

    def hold(self, seconds: float) -> None:
        """The engine will make no step for so long, on purpose; 0 when that is over."""
        self._held_s = seconds

    @property
    def step_tokens(self) -> int:
        """What the steps in progress compute."""
        return sum(tokens for tokens, _ in self._begun)

    def expected_s(self, *, is_guessed: bool = False) -> float:
        """Seconds that the steps in progress should take from their begin; 0 when none is.

        By the fastest steps so far, or as long as it was told to `hold`; before there are any 0, or with `is_guessed`
        by `watchdog.CAUTIOUS_TOKENS_PER_S`.
        """
        tokens_per_s = self._tokens_per_s or (watchdog.CAUTIOUS_TOKENS_PER_S if is_guessed else 0.0)
        return max(self._held_s, self.step_tokens / tokens_per_s if tokens_per_s else 0.0)
