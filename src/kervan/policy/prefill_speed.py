"""How fast replicas prefill, learned from first tokens."""

# Until prompts have been seen; assumed, not measured. Too high a guess moves streams sooner than the bound on
# inter-token latency allows; too low a one leaves them at a dying replica.
DEFAULT_PREFILL_TOKENS_PER_S = 20_000.0
MIN_PROMPT_TOKENS = 256  # of shorter ones, the time to the first token is not spent on prefill
MIN_PROMPTS = 8
FADE = 0.98  # per prompt: a speed that was seen once counts less and less


class PrefillSpeed:
    """The speed of the fastest prompts: they waited in no queue."""

    def __init__(self) -> None:
        self._num_prompts = 0
        self._fastest_tokens_per_s = 0.0

    def observe(self, prompt_tokens: int, ttft_s: float) -> None:
        """Take a prompt whose first token came `ttft_s` after it was sent."""
        if prompt_tokens < MIN_PROMPT_TOKENS or ttft_s <= 0:
            return
        self._num_prompts += 1
        self._fastest_tokens_per_s = max(FADE * self._fastest_tokens_per_s, prompt_tokens / ttft_s)

    @property
    def known_tokens_per_s(self) -> float | None:
        """None until enough prompts have been seen."""
        return self._fastest_tokens_per_s if self._num_prompts >= MIN_PROMPTS else None

    @property
    def tokens_per_s(self) -> float:
        """What is known, else an assumption."""
        return self.known_tokens_per_s or DEFAULT_PREFILL_TOKENS_PER_S
