"""What a twin computes in place of a model: continuous batching over a pool of KV blocks. Pure: no clock, no I/O.

Follows vLLM's V1 scheduler in what a fleet can see of it: running sequences first, then the queue in order of arrival,
within a budget of tokens per step (so prompts are prefilled in chunks beside running answers), within the batch's
size and the pool of blocks. When the pool is full, the youngest running sequence is preempted: it gives back its
blocks, waits at the head of the queue, and its tokens are computed again later. No prefix cache.

The next token is a checksum of all tokens before it. So the same context gives the same token on every twin, with or
without a move in between, and a token that is lost, doubled or changed shows in every later one.
"""

import zlib
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Finish = Literal["stop", "length"]
BLOCK_SIZE = 16  # vLLM's default
_MIX = 2654435761  # Knuth's multiplicative hash: neighbouring checksums give far tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTiming:
    """Seconds of one engine step: base + prefill + decode + context.

    `base_s`: reading the weights, launching. `prefill_token_s`: per prompt token computed in the step. `sequence_s`:
    per sequence in the batch. `context_token_s`: per token of context that the batch reads from the KV cache.
    """

    base_s: float
    prefill_token_s: float
    sequence_s: float
    context_token_s: float

    def step_s(self, *, prefill_tokens: int, sequences: int, context_tokens: int) -> float:
        return (
            self.base_s
            + prefill_tokens * self.prefill_token_s
            + sequences * self.sequence_s
            + context_tokens * self.context_token_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes of the simulated engine. Tokens drawn are `first_token` to `last_token`; `eos_token` ends an answer.

    `mean_answer_tokens`: of answers that end by themselves (geometric; a request with `ignore_eos` never does).
    """

    num_blocks: int
    block_size: int = BLOCK_SIZE
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 8192
    first_token: int = 0
    last_token: int = 999
    eos_token: int = 1000
    mean_answer_tokens: int = 256


@dataclass(frozen=True, slots=True)
class TwinSettings:
    """What a twin pretends to be. `speed`: 2 is a GPU twice as fast in everything."""

    timing: StepTiming
    limits: Limits
    speed: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request. `client`: whose output it is, given back untouched."""

    id: str
    client: int
    prompt: Sequence[int]
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_tokens: frozenset[int] = frozenset()


@dataclass(slots=True, eq=False)
class _Sequence:
    ask: Ask
    checksum: int
    num_tokens: int  # prompt + output
    queued_s: float
    scheduled_s: float = 0.0
    num_output: int = 0
    num_computed: int = 0
    blocks: int = 0
    is_over: bool = False

    @property
    def room(self) -> int:
        return self.num_tokens - self.num_computed


@dataclass(frozen=True, slots=True)
class Output:
    """One sequence's part of a step. `stop_token`: the one of the request's own that ended it."""

    id: str
    client: int
    token: int
    finish: Finish | None
    stop_token: int | None
    first: "First | None"


@dataclass(frozen=True, slots=True)
class First:
    """What is told with a sequence's first token. Times are those given to `add` and `start_step`."""

    prompt_tokens: int
    queued_s: float
    scheduled_s: float


@dataclass(slots=True)
class Step:
    """What a step computes and how long that takes."""

    duration_s: float
    prefill_tokens: int
    context_tokens: int
    work: list[tuple[_Sequence, int]] = field(default_factory=list)


def next_token(checksum: int, limits: Limits) -> int:
    """The token that follows a context with this CRC-32."""
    span = limits.last_token - limits.first_token + 1
    return limits.first_token + ((checksum * _MIX) & 0xFFFFFFFF) * span // 2**32


def extend(checksum: int, tokens: Iterable[int]) -> int:
    """The CRC-32 of a context, `tokens` later."""
    return zlib.crc32(array("I", tokens).tobytes(), checksum)


def answer(prompt: Sequence[int], num_tokens: int, limits: Limits) -> list[int]:
    """The first `num_tokens` tokens that follow `prompt` on every twin with these limits (end-of-answer ignored)."""
    checksum = extend(0, prompt)
    tokens = []
    for _ in range(num_tokens):
        tokens.append(next_token(checksum, limits))
        checksum = extend(checksum, tokens[-1:])
    return tokens


class TwinEngine:
    """`start_step` plans a step, `end_step` gives its tokens; requests may come and go in between."""

    def __init__(self, timing: StepTiming, limits: Limits):
        self.timing = timing
        self.limits = limits
        self.num_preempted = 0
        self._sequences: dict[str, _Sequence] = {}
        self._running: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()
        self._free_blocks = limits.num_blocks
        self._reserved_blocks = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def kv_cache_usage(self) -> float:
        """Share of the pool in use, reserved blocks included, 0 to 1."""
        return 1.0 - self._free_blocks / self.limits.num_blocks

    def clients_of(self, client: int) -> list[str]:
        """The requests of one client."""
        return [s.ask.id for s in self._sequences.values() if s.ask.client == client]

    def add(self, ask: Ask, now_s: float = 0.0) -> None:
        sequence = _Sequence(ask, extend(0, ask.prompt), len(ask.prompt), now_s)
        self._sequences[ask.id] = sequence
        self._waiting.append(sequence)

    def abort(self, ids: Iterable[str]) -> None:
        """Forget requests; unknown ids are ignored."""
        for request_id in ids:
            sequence = self._sequences.get(request_id)
            if sequence is not None:
                self._drop(sequence)

    def reserve(self, share: float) -> None:
        """Take this share of the pool away (0 gives it back), as far as one request of full length still fits."""
        limits = self.limits
        most = limits.num_blocks - self._blocks_for(limits.max_model_len)
        wanted = max(0, min(most, int(share * limits.num_blocks)))
        while wanted > self._reserved_blocks + self._free_blocks:
            self._preempt(self._running[-1])
        self._free_blocks += self._reserved_blocks - wanted
        self._reserved_blocks = wanted

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_size)

    def _drop(self, sequence: _Sequence) -> None:
        sequence.is_over = True
        del self._sequences[sequence.ask.id]
        self._free_blocks += sequence.blocks
        sequence.blocks = 0
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)

    def _preempt(self, sequence: _Sequence) -> None:
        self.num_preempted += 1
        self._free_blocks += sequence.blocks
        sequence.blocks = sequence.num_computed = 0
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)

    def _grow(self, sequence: _Sequence, num_tokens: int) -> bool:
        """Get the blocks for `num_tokens` more; younger ones are preempted for it. False: it was preempted itself."""
        needed = self._blocks_for(sequence.num_computed + num_tokens) - sequence.blocks
        while needed > self._free_blocks:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        self._free_blocks -= needed
        sequence.blocks += needed
        return True

    def start_step(self, now_s: float = 0.0) -> Step | None:
        """The next step; None without work."""
        budget = self.limits.max_num_batched_tokens
        preempted_before = self.num_preempted
        step = Step(0.0, 0, 0)
        position = 0
        while position < len(self._running) and budget:  # `_grow` may shorten the list behind `position`
            sequence = self._running[position]
            num_tokens = min(sequence.room, budget)
            if not self._grow(sequence, num_tokens):
                break
            budget -= self._schedule(step, sequence, num_tokens)
            position += 1
        is_full = self.num_preempted > preempted_before
        while not is_full and self._waiting and budget and len(self._running) < self.limits.max_num_seqs:
            sequence = self._waiting[0]
            num_tokens = min(sequence.room, budget)
            needed = self._blocks_for(num_tokens)
            if needed > self._free_blocks:
                break
            self._waiting.popleft()
            sequence.scheduled_s = sequence.scheduled_s or now_s
            self._running.append(sequence)
            self._free_blocks -= needed
            sequence.blocks = needed
            budget -= self._schedule(step, sequence, num_tokens)
        if not step.work:
            return None
        step.duration_s = self.timing.step_s(
            prefill_tokens=step.prefill_tokens, sequences=len(step.work), context_tokens=step.context_tokens
        )
        return step

    @staticmethod
    def _schedule(step: Step, sequence: _Sequence, num_tokens: int) -> int:
        step.work.append((sequence, num_tokens))
        step.context_tokens += sequence.num_computed + num_tokens
        if num_tokens > 1 or sequence.num_output == 0:
            step.prefill_tokens += num_tokens
        return num_tokens

    def end_step(self, step: Step) -> list[Output]:
        """The tokens of a step, for the sequences that are still there."""
        outputs = []
        limits = self.limits
        for sequence, num_tokens in step.work:
            if sequence.is_over or not sequence.blocks:  # aborted or preempted (by `reserve`) meanwhile
                continue
            sequence.num_computed += num_tokens
            if sequence.room:
                continue
            ask = sequence.ask
            sequence.num_output += 1
            token = next_token(sequence.checksum, limits)
            may_stop = sequence.num_output > ask.min_tokens
            if may_stop and not ask.ignore_eos and sequence.checksum % limits.mean_answer_tokens == 0:
                token = limits.eos_token
            sequence.checksum = zlib.crc32(token.to_bytes(4, "little"), sequence.checksum)
            sequence.num_tokens += 1
            finish: Finish | None = None
            stop_token = None
            if may_stop and token in ask.stop_tokens:
                finish, stop_token = "stop", token
            elif may_stop and token == limits.eos_token and not ask.ignore_eos:
                finish = "stop"
            elif sequence.num_output >= ask.max_tokens or sequence.num_tokens >= limits.max_model_len:
                finish = "length"
            first = None
            if sequence.num_output == 1:
                first = First(len(ask.prompt), sequence.queued_s, sequence.scheduled_s)
            outputs.append(Output(ask.id, ask.client, token, finish, stop_token, first))
            if finish:
                self._drop(sequence)
        return outputs

    def check_integrity(self) -> None:
        """Raises: AssertionError when blocks were lost or given twice."""
        held = sum(sequence.blocks for sequence in self._sequences.values())
        total = held + self._free_blocks + self._reserved_blocks
        assert total == self.limits.num_blocks, (
            f"{held} held + {self._free_blocks} free + {self._reserved_blocks} reserved is {total}, "
            f"not {self.limits.num_blocks}"
        )
        assert len(self._sequences) == len(self._running) + len(self._waiting)
