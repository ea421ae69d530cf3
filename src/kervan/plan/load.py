"""First step: a request to plan becomes a load: vLLM's limits for it, and the requests that a replica gets."""

import itertools
import random
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kervan.errors import ConfigError
from kervan.plan.request import PlanRequest
from kervan.plan.serving import LoadRequest, RunningRequest, fixed
from kervan.sim import limits as engine_limits
from kervan.sim.limits import BLOCK_TOKENS, EngineLimits
from kervan.sim.step_time import Batch

WARM_UP_SHARE = 0.2  # of what is measured, before it: the replica begins about as busy as it will be, not exactly
WARM_UP_REQUESTS = 10
TRACE_REQUESTS = 600  # of a trace, for one replica


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """What one replica gets: `requests` in their order, of which those numbered `measured` count, and what it runs
    already.
    """

    requests: Iterable[LoadRequest]
    measured: range
    running: tuple[RunningRequest, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanLoad:
    """`isl`, `osl`: mean prompt and output tokens. `limits`: of the engine that serves it."""

    request: PlanRequest
    limits: EngineLimits
    isl: float
    osl: float
    longest_tokens: int

    @property
    def context_tokens(self) -> float:
        """Mean length of a sequence that runs."""
        return self.isl + self.osl / 2

    @property
    def prefill_tokens(self) -> float:
        """Tokens of a mean prompt that are not found in the prefix cache."""
        return max(1.0, self.isl * (1 - self.request.prefix_hit))

    def mean_attended(self, chunk_tokens: float) -> float:
        """Tokens that one of a prompt looks at, on average, when so many are prefilled at once."""
        cached = self.isl - self.prefill_tokens
        return cached + min(self.prefill_tokens, chunk_tokens) / 2

    def decode_step(self, sequences: int) -> Batch:
        """A step that gives each of so many sequences of mean length a token."""
        return Batch(sequences, sequences * self.context_tokens, 0, 0.0, sequences)

    def prefill_step(self, tokens: int) -> Batch:
        """A step that computes so many tokens of prompts, whose cached tokens are attended to and not computed."""
        return Batch(0, 0, tokens, tokens * self.mean_attended(tokens), max(1, int(tokens / self.prefill_tokens)))

    @property
    def rate(self) -> float:
        """Requests per second of an open loop, over the whole plan; 0 for others."""
        trace = self.request.trace
        return self.request.rate or (len(trace) / max(1.0, trace[-1].at_s) if trace else 0.0)

    def closed_loop(self, count: int, seed: int) -> list[LoadRequest]:
        """So many requests that are sent one after the other."""
        isl, osl = self.request.isl, self.request.osl
        if isl.minimum == isl.maximum and osl.minimum == osl.maximum:
            return fixed(count, isl.maximum, osl.maximum, self.cached_tokens(isl.maximum))
        rng = random.Random(seed)
        return [self._drawn(0.0, rng) for _ in range(count)]

    def cached_tokens(self, prompt_tokens: int) -> int:
        """Tokens of a prompt that are found in the prefix cache: whole blocks, and never its last token."""
        return min(int(self.request.prefix_hit * prompt_tokens), prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS

    def _drawn(self, sent_s: float, rng: random.Random) -> LoadRequest:
        prompt, output = self.request.isl.sample(rng), self.request.osl.sample(rng)
        return LoadRequest(sent_s, prompt, output, self.cached_tokens(prompt))

    def open_loop(self, rate: float, copies: int, *, count: int, running: int, seed: int) -> OpenLoop:
        """What one of several replicas gets at `rate` requests per second; `count` are measured.

        `running`: so many it is busy with at the start, somewhere in their answers. Of a trace, as many rows as there
        are (`TRACE_REQUESTS` at most), at the times that it says or sped up to `--rate`, from an empty replica on.
        """
        if self.request.trace:
            return self._trace(copies)
        rng = random.Random(seed)
        isl, osl = self.request.isl, self.request.osl

        def poisson() -> Iterator[LoadRequest]:
            at_s = 0.0
            while True:
                at_s += rng.expovariate(rate)
                yield self._drawn(at_s, rng)

        begun = random.Random(seed + 1)
        drawn = [(isl.sample(begun), osl.sample(begun)) for _ in range(max(64, running))]
        # Of those that run at a moment, long answers are as many times more as they are longer.
        chosen = begun.choices(drawn, [output for _, output in drawn], k=running)
        busy_with = []
        for prompt, output in chosen:
            generated = begun.randrange(output)
            busy_with.append(RunningRequest(prompt + generated, output - generated))
        first = max(WARM_UP_REQUESTS, int(WARM_UP_SHARE * max(count, running)))
        return OpenLoop(poisson(), range(first, first + count), tuple(busy_with))

    def _trace(self, copies: int) -> OpenLoop:
        trace = self.request.trace
        rows = list(itertools.islice(trace, 0, TRACE_REQUESTS * copies, copies))
        scale = 1.0
        if self.request.rate and trace[-1].at_s > 0:
            scale = len(trace) / trace[-1].at_s / self.request.rate
        requests = [
            LoadRequest(
                row.at_s * scale, row.input_tokens, max(1, row.output_tokens), self.cached_tokens(row.input_tokens)
            )
            for row in rows
        ]
        return OpenLoop(requests, range(int(WARM_UP_SHARE * len(rows)), len(rows)))


def load(request: PlanRequest) -> PlanLoad:
    """The load of a plan.

    Raises: ConfigError for engine arguments that make no sense, and for requests that are longer than they allow.
    """
    isl, osl = request.isl.mean, request.osl.mean
    longest = request.isl.maximum + request.osl.maximum
    if request.trace:
        isl = statistics.fmean(row.input_tokens for row in request.trace)
        osl = statistics.fmean(max(1, row.output_tokens) for row in request.trace)
        longest = max(row.input_tokens + row.output_tokens for row in request.trace)
    limits = engine_limits.limits(request.spec, request.gpu, request.arguments, needed_tokens=longest)
    if longest > limits.max_model_len:
        own = request.spec.max_model_len
        is_allowed = longest <= own or not request.spec.has_max_model_len
        larger = f"--engine-arg max_model_len={longest}" if is_allowed else f"a model of more than {own} tokens"
        raise ConfigError(
            f"{_longest(request, longest)} max_model_len={limits.max_model_len}{_shorter(request)}, or {larger}"
        )
    return PlanLoad(request, limits, isl, osl, longest)


def _longest(request: PlanRequest, longest: int) -> str:
    """The longest request, and where it is from."""
    if not request.trace:
        return f"a request of {longest} tokens is longer than"
    row = max(request.trace, key=lambda row: row.input_tokens + row.output_tokens)
    return (
        f"line {row.line} of the trace has a prompt of {row.input_tokens} (ContextTokens or input_length) and "
        f"{row.output_tokens} output tokens, {longest} in all, which is longer than"
    )


def _shorter(request: PlanRequest) -> str:
    return "; leave such rows out" if request.trace else "; use shorter --isl and --osl"
