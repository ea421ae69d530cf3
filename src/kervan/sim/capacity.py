"""What one replica can do under a steady load, from its step times: the model by which an autoscaling policy sizes.

A mean-field of the scheduler, so that it takes well under a millisecond: `kervan.plan.serving` follows each request
instead. A replica decodes `b` sequences at once, and a share of its time goes into prompts:

    tpot = decode_step(b) / (1 - prefill_share)     prefill_share = rate * seconds that a prompt adds to its steps
    b    = rate * output_tokens * tpot              (Little's law)

which has one solution below saturation. Tails come from two queues: prompts wait for the budget of a step (M/D/1), and
for a place where all that the KV cache or `max_num_seqs` has room for are running (M/D/c).

Sources: Little 1961; Pollaczek-Khinchine for M/D/1; Sakasegawa 1977 for the wait in M/D/c; for the exponential tails
Kingman 1962. `tests/unit/sim/test_capacity.py` compares the highest rate that keeps an SLO with `plan/serving.py`.
"""

import functools
import math
from dataclasses import dataclass

from kervan.sim.step_time import Batch, StepTime

TAIL = 0.99  # quantile of the times that are predicted
LATE_STEPS = 1.5  # a prompt waits for the step that runs and, on average, half of that which is composed behind it
ROUNDS = 24  # of halving, until the batch is known to a ten millionth
GRID = 8  # points per e-fold of the batch
SIGMAS = 2.33  # of the normal distribution, at TAIL


@dataclass(frozen=True, slots=True)
class LoadPrediction:
    """What a replica would do under a steady load, at the 99th percentile; times are infinite in overload.

    `tpot_s` has the mean of each request, and the fluctuation of the batch. `utilization`: of what it has least of,
    time for prompts, places or KV cache; 1 is saturation. `kv_share`: of the KV cache, on average.
    """

    ttft_s: float
    tpot_s: float
    utilization: float
    kv_share: float
    in_flight: float
    """Requests in the replica, on average."""


class ReplicaCapacity:
    """One replica, by its step times.

    `time_scale`: all times are so many times as long; `kervan simulate --replica-rate` asks for a replica that is
    slower, or faster, than its data sheet says.
    """

    def __init__(self, step_time: StepTime, kv_tokens: int, *, time_scale: float = 1.0) -> None:
        self._step_time = step_time
        self._scale = time_scale
        self._stages = step_time.layout.pp
        self.kv_tokens = kv_tokens
        self.max_num_seqs = step_time.max_num_seqs
        self.max_num_batched_tokens = step_time.max_num_batched_tokens
        self._grid_s = functools.lru_cache(maxsize=4096)(self._grid)
        budget = self.max_num_batched_tokens
        self.prefill_tokens_per_s = budget / self.step_s(sequences=0, context_tokens=0.0, prefill_tokens=budget)

    def step_s(self, *, sequences: int, context_tokens: float, prefill_tokens: int = 0) -> float:
        """Seconds from a token to the next with so many `sequences` that read `context_tokens` in all, while
        `prefill_tokens` of one prompt are computed beside them.
        """
        return self._step_s(sequences, context_tokens, prefill_tokens, prefill_tokens**2 / 2)

    def _step_s(self, sequences: float, context_tokens: float, prefill_tokens: int, pairs: float) -> float:
        st, p = self._step_time, self._stages
        here = math.ceil(sequences / p) if st.is_pipelined else math.ceil(sequences)
        context = context_tokens / p if st.is_pipelined else context_tokens
        batch = Batch(here, context, prefill_tokens, pairs, here + (1 if prefill_tokens else 0))
        if p == 1:
            return self._scale * st.stage_s(0, batch)
        whole_s, busy_s, _ = st.pass_s(batch)
        if not st.is_pipelined:
            return self._scale * whole_s
        alone = Batch(here, context, 0, 0.0, here)
        between_s = (p - 1) * st.pass_s(alone)[1] if here else 0.0
        return self._scale * (max(whole_s, busy_s + between_s) if here else busy_s)

    def predict(
        self,
        *,
        requests_per_s: float,
        prompt_tokens: float,
        output_tokens: float,
        arrivals_cv2: float = 1.0,
        prompts_cv2: float = 0.0,
    ) -> LoadPrediction:
        """The replica under requests of these mean lengths. `arrivals_cv2`: squared coefficient of variation of the
        distances between requests, 1 for Poisson arrivals. `prompts_cv2`: of the lengths of prompts.
        """
        rate, prompt, output = requests_per_s, max(1.0, prompt_tokens), max(1.0, output_tokens)
        mean_context = prompt + output / 2
        places = min(float(self.max_num_seqs), self.kv_tokens / mean_context)
        low, high = 0.0, places
        tpot_s, adds_s = self._tpot(rate, 0.0, mean_context, prompt)
        if tpot_s == math.inf:
            return LoadPrediction(math.inf, math.inf, rate * adds_s, 0.0, math.inf)
        for _ in range(ROUNDS):  # more sequences at once than come of it: the batch is smaller
            batch = (low + high) / 2
            tpot_s, adds_s = self._tpot(rate, batch, mean_context, prompt)
            if rate * (output - 1) * tpot_s > batch:
                low = batch
            else:
                high = batch
        if tpot_s == math.inf:
            return LoadPrediction(math.inf, math.inf, rate * adds_s, 1.0, math.inf)
        return self._with_tails(rate, prompt, output, tpot_s, adds_s, places, arrivals_cv2, prompts_cv2)

    def _tpot(self, rate: float, batch: float, mean_context: float, prompt: float) -> tuple[float, float]:
        """(seconds per token with such a batch and so many prompts beside it, what each of them adds)."""
        decode_s, packed_s, alone_s = self._times_s(batch, mean_context, prompt)
        # Those that come while a step with a prompt runs share the next one, and what that costs whatever is in it.
        adds_s = max(packed_s, alone_s / max(1.0, rate * (decode_s + alone_s)))
        share = rate * adds_s
        return (decode_s / (1 - share) if share < 1 else math.inf), adds_s

    def _times_s(self, batch: float, mean_context: float, prompt: float) -> tuple[float, float, float]:
        """(a step of so many that decode, what a prompt adds in a step that is full of prompts, and alone in one).

        Linear between grid points, of which there are few, and each is computed once.
        """
        place = math.log(1 + batch) * GRID
        below = math.floor(place)
        first, second = (math.floor(math.exp(one / GRID)) - 1 for one in (below, below + 1))
        low = self._grid_s(first, mean_context, prompt)
        if second == first:
            return low
        high = self._grid_s(second, mean_context, prompt)
        share = min(1.0, max(0.0, (batch - first) / (second - first)))
        decode_s, packed_s, alone_s = (a + share * (b - a) for a, b in zip(low, high, strict=True))
        return decode_s, packed_s, alone_s

    def _grid(self, running: int, mean_context: float, prompt: float) -> tuple[float, float, float]:
        context = running * mean_context
        decode_s = self._step_s(max(1, running), context, 0, 0.0)
        budget = max(1, self.max_num_batched_tokens - running)
        tokens = min(budget, round(prompt * max(1.0, budget / prompt)))  # as many prompts as a step has room for
        alone = min(budget, round(prompt))
        full_s = self._step_s(running, context, tokens, tokens * prompt / 2)
        alone_s = self._step_s(running, context, alone, alone * prompt / 2)
        before_s = decode_s if running else 0.0
        packed_s, single_s = (full_s - before_s) * prompt / tokens, (alone_s - before_s) * max(1.0, prompt / alone)
        return decode_s, max(1e-9, min(packed_s, single_s)), max(1e-9, single_s)

    def _with_tails(
        self,
        rate: float,
        prompt: float,
        output: float,
        tpot_s: float,
        adds_s: float,
        places: float,
        arrivals_cv2: float,
        prompts_cv2: float,
    ) -> LoadPrediction:
        c = self._step_time.constants
        mean_context = prompt + output / 2
        share = rate * adds_s
        steps = max(1.0, prompt / self.max_num_batched_tokens)
        decode_s = tpot_s * (1 - share)
        own_s = c.prompt_s + prompt * c.prompt_token_s + c.delivery_s + adds_s + (LATE_STEPS + steps) * decode_s
        # Kingman: the mean wait of those that wait for the budget.
        prefill_wait_s = adds_s * (arrivals_cv2 + prompts_cv2) / (2 * (1 - share))
        tail_s = prefill_wait_s * max(0.0, math.log(max(1e-9, share) / (1 - TAIL)))
        stay_s = own_s + (output - 1) * tpot_s
        offered = rate * stay_s
        fill = offered / places
        if fill >= 1:
            return LoadPrediction(math.inf, tpot_s, fill, offered * mean_context / self.kv_tokens, math.inf)
        whole = max(1.0, math.floor(places))
        waiting = fill ** (math.sqrt(2 * (whole + 1)) - 1)  # Sakasegawa: the share that finds all places taken, about
        place_wait_s = arrivals_cv2 * stay_s / (2 * whole * (1 - fill))
        place_tail_s = place_wait_s * max(0.0, math.log(max(1e-12, waiting) / (1 - TAIL)))
        mean_wait_s = share * prefill_wait_s + waiting * place_wait_s
        tail_tpot_s = 0.0
        if output > 1:
            variance = arrivals_cv2 + prompts_cv2
            tail_tpot_s = self._tail_tpot_s(rate, output, tpot_s, adds_s, mean_context, prompt, places, variance)
        return LoadPrediction(
            ttft_s=own_s + tail_s + place_tail_s,
            tpot_s=tail_tpot_s,
            utilization=max(share, fill),
            kv_share=offered * mean_context / self.kv_tokens,
            in_flight=rate * (stay_s + mean_wait_s),
        )

    def _tail_tpot_s(
        self,
        rate: float,
        output: float,
        tpot_s: float,
        adds_s: float,
        mean_context: float,
        prompt: float,
        places: float,
        variance: float,
    ) -> float:
        """Of a request that has more and longer prompts beside it than others, and a batch that is larger by its
        fluctuation. `variance`: of the prompts' tokens that come in a time, over that of equal prompts at random times.
        """
        batch = rate * (output - 1) * tpot_s
        decode_s = self._times_s(min(places, batch + math.sqrt(batch)), mean_context, prompt)[0]
        stay_s = (output - 1) * tpot_s
        for _ in range(4):
            prompts = rate * stay_s
            stay_s = (output - 1) * decode_s + adds_s * (prompts + SIGMAS * math.sqrt(prompts * variance))
        return max(tpot_s, stay_s / (output - 1))
