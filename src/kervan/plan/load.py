"""First step: a request to plan becomes a load: vLLM's limits for it, and the requests that a replica gets."""

import dataclasses
import random
import statistics
from dataclasses import dataclass

from kervan.errors import ConfigError
from kervan.plan.request import PlanRequest
from kervan.plan.serving import LoadRequest, fixed
from kervan.sim import limits as engine_limits
from kervan.sim.limits import EngineLimits
from kervan.sim.step_time import Batch, StepTime

OPEN_LOOP_STEPS = 1800  # so long is an open loop followed, about
OPEN_LOOP_REQUESTS = (12, 160)


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
    def rate(self) -> float:
        """Requests per second of an open loop, over the whole plan; 0 for others."""
        trace = self.request.trace
        return self.request.rate or (len(trace) / max(1.0, trace[-1].at_s) if trace else 0.0)

    def closed_loop(self, count: int, seed: int) -> list[LoadRequest]:
        """So many requests that are sent one after the other."""
        isl, osl = self.request.isl, self.request.osl
        if isl.minimum == isl.maximum and osl.minimum == osl.maximum:
            return fixed(count, isl.maximum, osl.maximum)
        rng = random.Random(seed)
        return [LoadRequest(0.0, isl.sample(rng), osl.sample(rng)) for _ in range(count)]

    def open_loop(self, step_time: StepTime, rate: float, copies: int) -> list[LoadRequest]:
        """What one of several replicas gets at `rate` requests per second (0: as the trace says)."""
        trace = self.request.trace
        if trace:
            rows = trace[::copies]
            scale = 1.0
            if self.request.rate and rows[-1].at_s > 0:
                scale = len(trace) / rows[-1].at_s / self.request.rate
            requests = [LoadRequest(row.at_s * scale, row.input_tokens, max(1, row.output_tokens)) for row in rows]
            return requests[: OPEN_LOOP_REQUESTS[1]]
        alone_s = step_time.total_s(Batch(1, self.context_tokens, 0, 0.0, 1))
        # Sequences that run at once, in each of the stages' batches: so many tokens come of a step.
        busy = max(1.0, rate * self.osl * alone_s * 1.5 / step_time.layout.pp)
        count = int(min(OPEN_LOOP_REQUESTS[1], max(OPEN_LOOP_REQUESTS[0], OPEN_LOOP_STEPS * busy / self.osl)))
        rng = random.Random(1)
        at_s, requests = 0.0, []
        for request in self.closed_loop(count, seed=2):
            at_s += rng.expovariate(rate)
            requests.append(dataclasses.replace(request, sent_s=at_s))
        return requests


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
        raise ConfigError(
            f"a request of {longest} tokens is longer than max_model_len={limits.max_model_len}; use shorter --isl and "
            f"--osl, or --engine-arg max_model_len={longest} if the model allows"
        )
    return PlanLoad(request, limits, isl, osl, longest)
