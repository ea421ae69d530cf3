"""What a twin computes in place of a model. Pure: no clock, no I/O.

Steps are composed as vLLM's scheduler does (`kervan.sim.scheduler`), one after the other, with vLLM's prefix cache
(`kervan.sim.prefix_cache`).

The next token is a checksum of all tokens before it. So the same context gives the same token on every twin, with or
without a move in between, and a token that is lost, doubled or changed shows in every later one.
"""

import zlib
from array import array
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kervan.sim.limits import BLOCK_TOKENS
from kervan.sim.prefix_cache import BlockHashes, CachedRequest, CachingScheduler, Media, PrefixCacheCounts
from kervan.sim.scheduler import ScheduledStep, Scheduler

Finish = Literal["stop", "length"]
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
        """Seconds of a step."""
        return (
            self.base_s
            + prefill_tokens * self.prefill_token_s
            + sequences * self.sequence_s
            + context_tokens * self.context_token_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinLimits:
    """Sizes of the simulated engine. Tokens drawn are `first_token` to `last_token`; `eos_token` ends an answer.

    `mean_answer_tokens`: of answers that end by themselves (geometric; a request with `ignore_eos` never does).
    """

    num_blocks: int
    block_size: int = BLOCK_TOKENS
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 8192
    first_token: int = 0
    last_token: int = 999
    eos_token: int = 1000
    mean_answer_tokens: int = 256
    enable_prefix_caching: bool = True


@dataclass(frozen=True, slots=True)
class TwinSettings:
    """What a twin pretends to be. `speed`: 2 is a GPU twice as fast in everything. `start_s`: until it is ready."""

    timing: StepTiming
    limits: TwinLimits
    speed: float = 1.0
    start_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinRequest:
    """What a client wants of a twin. `client`: whose output it is, given back untouched.

    `scope`, `media`: what besides the tokens must be equal for a block of the prefix cache to be that of this prompt;
    `reads_cache`: whether it may use any.
    """

    id: str
    client: int
    prompt: Sequence[int]
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_tokens: frozenset[int] = frozenset()
    scope: Hashable = None
    media: tuple[Media, ...] = ()
    reads_cache: bool = True


@dataclass(slots=True, eq=False, kw_only=True)
class TwinSequence(CachedRequest):
    """A request that the twin runs. `checksum`: of all its tokens so far, which decides the next one.

    `queued_s`, `scheduled_s`: when it came, and when it first ran, by the clock that the engine's caller passes.
    """

    request: TwinRequest
    checksum: int
    num_tokens: int  # prompt + output
    queued_s: float
    scheduled_s: float = 0.0
    num_output: int = 0


@dataclass(frozen=True, slots=True)
class TwinOutput:
    """One sequence's part of a step. `stop_token`: the one of the request's own that ended it."""

    id: str
    client: int
    token: int
    finish: Finish | None
    stop_token: int | None
    first: "FirstToken | None"


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What goes with a sequence's first token. Times are those given to `add` and `start_step`."""

    prompt_tokens: int
    queued_s: float
    scheduled_s: float
    cached_tokens: int = 0
    stored_tokens: int = 0  # of the prompt, that were not in the prefix cache before and are now


@dataclass(frozen=True, slots=True)
class TwinStep:
    """What a step computes and how long that takes."""

    duration_s: float
    sequences: int
    prefill_tokens: int
    context_tokens: int
    scheduled: ScheduledStep[TwinSequence]


def next_token(checksum: int, limits: TwinLimits) -> int:
    """The token that follows a context with this CRC-32."""
    span = limits.last_token - limits.first_token + 1
    return limits.first_token + ((checksum * _MIX) & 0xFFFFFFFF) * span // 2**32


def extend(checksum: int, tokens: Iterable[int]) -> int:
    """The CRC-32 of a context, `tokens` later."""
    return zlib.crc32(array("I", tokens).tobytes(), checksum)


def answer(prompt: Sequence[int], num_tokens: int, limits: TwinLimits) -> list[int]:
    """The first `num_tokens` tokens that follow `prompt` on every twin with these limits (end-of-answer ignored)."""
    checksum = extend(0, prompt)
    tokens = []
    for _ in range(num_tokens):
        tokens.append(next_token(checksum, limits))
        checksum = extend(checksum, tokens[-1:])
    return tokens


class TwinEngine:
    """`start_step` plans a step, `end_step` gives its tokens; requests may come and go in between."""

    def __init__(self, timing: StepTiming, limits: TwinLimits):
        self.timing = timing
        self.limits = limits
        self._sequences: dict[str, TwinSequence] = {}
        self._num_added = 0
        kind: type[Scheduler[TwinSequence]] = CachingScheduler if limits.enable_prefix_caching else Scheduler
        self._scheduler = kind(
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            num_blocks=limits.num_blocks,
            block_tokens=limits.block_size,
        )
        self._told = PrefixCacheCounts()

    @property
    def num_running(self) -> int:
        """Requests with blocks."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._scheduler.waiting)

    @property
    def num_preempted(self) -> int:
        """How often a request was preempted, since the start."""
        return self._scheduler.num_preempted

    def new_prefix_counts(self) -> PrefixCacheCounts:
        """What was looked for in the prefix cache, and found, since the last call."""
        if not isinstance(self._scheduler, CachingScheduler):
            return self._told
        now, told = self._scheduler.counts, self._told
        self._told = replace(now)
        return PrefixCacheCounts(now.requests - told.requests, now.queries - told.queries, now.hits - told.hits)

    def reset_prefix_cache(self, *, preempts: bool = False) -> bool:
        """Forget what the prefix cache holds; false when blocks are in use. `preempts`: compute those again later."""
        if not isinstance(self._scheduler, CachingScheduler):
            return preempts or not self.num_running
        is_reset, preempted = self._scheduler.reset_prefix_cache(preempts=preempts)
        for sequence in preempted:
            sequence.context_tokens = sequence.num_tokens
        return is_reset

    @property
    def has_work(self) -> bool:
        """Whether any request is here."""
        return bool(self._sequences)

    @property
    def kv_cache_usage(self) -> float:
        """Share of the pool in use, reserved blocks included, 0 to 1; what is only cached is free."""
        return 1.0 - self._scheduler.free_blocks / self.limits.num_blocks

    def clients_of(self, client: int) -> list[str]:
        """The requests of one client."""
        return [s.request.id for s in self._sequences.values() if s.request.client == client]

    def add(self, request: TwinRequest, now_s: float = 0.0) -> None:
        """To the end of the queue. The order of calls is the order of arrival."""
        length = len(request.prompt)
        is_cached = self.limits.enable_prefix_caching
        sequence = TwinSequence(
            number=self._num_added,
            context_tokens=length,
            request=request,
            checksum=extend(0, request.prompt),
            num_tokens=length,
            queued_s=now_s,
            reads_cache=request.reads_cache,
            hashes=BlockHashes(
                request.prompt if is_cached else (), self.limits.block_size, scope=request.scope, media=request.media
            ),
        )
        self._num_added += 1
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    def abort(self, ids: Iterable[str]) -> None:
        """Forget requests; unknown ids are ignored."""
        for request_id in ids:
            sequence = self._sequences.get(request_id)
            if sequence is not None:
                self._drop(sequence)

    def reserve(self, share: float) -> None:
        """Take this share of the pool away (0 gives it back), as far as one request of full length still fits."""
        limits = self.limits
        most = limits.num_blocks - -(-limits.max_model_len // limits.block_size)
        reserved = max(0, min(most, int(share * limits.num_blocks)))
        for sequence in self._scheduler.resize(limits.num_blocks - reserved):
            sequence.context_tokens = sequence.num_tokens  # what the step under way computes of it is thrown away

    def _drop(self, sequence: TwinSequence) -> None:
        del self._sequences[sequence.request.id]
        self._scheduler.remove(sequence)

    def start_step(self, now_s: float = 0.0) -> TwinStep | None:
        """The next step, at `now_s` of the caller's clock; None without work."""
        scheduled = self._scheduler.compose()
        if scheduled is None:
            return None
        prompts = scheduled.firsts if scheduled.chunk is None else [*scheduled.firsts, scheduled.chunk]
        for sequence in prompts:
            sequence.scheduled_s = sequence.scheduled_s or now_s
        batch = scheduled.batch
        sequences = batch.sequences + len(prompts)
        context_tokens = int(batch.context_tokens) + sum(sequence.computed_tokens for sequence in prompts)
        duration_s = self.timing.step_s(
            prefill_tokens=batch.prefill_tokens, sequences=sequences, context_tokens=context_tokens
        )
        return TwinStep(duration_s, sequences, batch.prefill_tokens, context_tokens, scheduled)

    def end_step(self, step: TwinStep) -> list[TwinOutput]:
        """The tokens of a step, for the sequences that are still there."""
        outputs = []
        limits = self.limits
        self._scheduler.end(step.scheduled)
        for sequence in step.scheduled.group:  # without those that were aborted or preempted (by `reserve`) meanwhile
            request = sequence.request
            sequence.num_output += 1
            token = next_token(sequence.checksum, limits)
            may_stop = sequence.num_output > request.min_tokens
            if may_stop and not request.ignore_eos and sequence.checksum % limits.mean_answer_tokens == 0:
                token = limits.eos_token
            sequence.checksum = zlib.crc32(token.to_bytes(4, "little"), sequence.checksum)
            sequence.num_tokens += 1
            if limits.enable_prefix_caching:
                sequence.hashes.append(token)
            finish: Finish | None = None
            stop_token = None
            if may_stop and token in request.stop_tokens:
                finish, stop_token = "stop", token
            elif may_stop and token == limits.eos_token and not request.ignore_eos:
                finish = "stop"
            elif sequence.num_output >= request.max_tokens or sequence.num_tokens >= limits.max_model_len:
                finish = "length"
            first = None
            if sequence.num_output == 1:
                first = self._first_token(sequence)
            outputs.append(TwinOutput(request.id, request.client, token, finish, stop_token, first))
            if finish:
                self._drop(sequence)
        return outputs

    def _first_token(self, sequence: TwinSequence) -> FirstToken:
        prompt_tokens, cached_tokens = len(sequence.request.prompt), sequence.first_cached_tokens or 0
        held_tokens = len(sequence.blocks) * self.limits.block_size
        stored_tokens = max(0, min(held_tokens, prompt_tokens) - cached_tokens)
        return FirstToken(prompt_tokens, sequence.queued_s, sequence.scheduled_s, cached_tokens, stored_tokens)

    def check_integrity(self) -> None:
        """Raises: AssertionError when blocks were lost or given twice."""
        self._scheduler.check_integrity()
        assert len(self._sequences) == self.num_running + self.num_waiting
