"""What one replica takes within the SLO, from its model or from what was seen.

From a model: the highest rate of requests of the lengths seen at which the predicted TTFT and TPOT keep the SLO, found
by halving, and corrected by a factor that is learned. Without one: the highest rate per replica that was seen to keep
it, and what was seen to break it.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from kervan.config.workload import Slo
from kervan.policy.autoscale.state import Prediction, ReplicaModel

GRID = 12  # lengths are rounded to so many per e-fold, 8% apart: a rate is searched for once
CLOSE = 1.005
MAX_RATE = 1000.0  # requests/s of a replica
RELAXED = 1.25  # of what an empty replica needs, where that is above the SLO
LONGER = 1.3  # a prompt so many times as long shows what prompts cost


@dataclass(frozen=True, slots=True)
class ReplicaRate:
    """`requests_per_s`: the most within the SLO. `places`: requests in a replica then. `stay_s`: how long one is
    there. `quiet_stay_s`: at half the rate. `wait_s`: how much longer a first token may take and be within the SLO.
    `prompt_share`: of a request's work that grows with its prompt. `relaxed`: the bounds that no replica keeps, or "".
    """

    requests_per_s: float
    places: float
    stay_s: float
    quiet_stay_s: float
    wait_s: float
    prompt_share: float = 0.5
    relaxed: str = ""

    def stays_s(self, share: float) -> float:
        """How long a request is in a replica that does this share of what it can, about."""
        return self.quiet_stay_s + (self.stay_s - self.quiet_stay_s) * min(1.0, max(0.0, 2 * share - 1))


class ModelledRates:
    """Rates from a model. It remembers what it has searched for; the same lengths give the same rate."""

    def __init__(self, model: ReplicaModel, slo: Slo) -> None:
        self._model = model
        self._slo = slo
        self._rate_on_grid = functools.lru_cache(maxsize=4096)(self._rate)

    def at(
        self, prompt_tokens: float, output_tokens: float, arrivals_cv2: float = 1.0, prompts_cv2: float = 0.0
    ) -> ReplicaRate:
        """For requests of about these mean lengths, and variances. Arrivals in bursts count as Poisson: what a burst
        needs is a question of headroom.
        """
        variances = round(4 * min(1.0, arrivals_cv2)) / 4, round(2 * min(8.0, prompts_cv2)) / 2
        return self._rate_on_grid(_on_grid(prompt_tokens), _on_grid(output_tokens), *variances)

    def _rate(self, prompt_tokens: float, output_tokens: float, arrivals_cv2: float, prompts_cv2: float) -> ReplicaRate:
        def predict(rate: float, prompt_tokens: float = prompt_tokens) -> Prediction:
            return self._model.predict(
                requests_per_s=rate, prompt_tokens=prompt_tokens, output_tokens=output_tokens,
                arrivals_cv2=arrivals_cv2, prompts_cv2=prompts_cv2,
            )  # fmt: skip

        quiet = predict(1e-6)
        ttft_s = _bound(self._slo.ttft_s)
        tpot_s = _bound(self._slo.tpot_s)
        e2e_s = _bound(self._slo.e2e_s)
        quiet_e2e_s = quiet.ttft_s + quiet.tpot_s * output_tokens
        relaxed = [
            f"{name} {bound:.3g} s (an empty replica needs {needs:.3g} s)"
            for name, bound, needs in (
                ("TTFT", ttft_s, quiet.ttft_s), ("TPOT", tpot_s, quiet.tpot_s), ("e2e", e2e_s, quiet_e2e_s)
            )
            if needs >= bound
        ]  # fmt: skip
        ttft_s, tpot_s = max(ttft_s, RELAXED * quiet.ttft_s), max(tpot_s, RELAXED * quiet.tpot_s)
        e2e_s = max(e2e_s, RELAXED * quiet_e2e_s)
        low = _highest(predict, output_tokens, ttft_s, tpot_s, e2e_s)
        full = predict(low)
        half = predict(low / 2)
        longer = _highest(lambda rate: predict(rate, LONGER * prompt_tokens), output_tokens, ttft_s, tpot_s, e2e_s)
        prompt_share = min(1.0, max(0.0, (low / max(longer, 1e-9) - 1) / (LONGER - 1)))
        bound_s = min(ttft_s, e2e_s)
        return ReplicaRate(
            requests_per_s=low,
            places=full.in_flight,
            stay_s=full.in_flight / low,
            quiet_stay_s=half.in_flight / (low / 2),
            # Half of the bound: the other half is for those that wait longer than others.
            wait_s=0.0 if math.isinf(bound_s) else bound_s / 2,
            prompt_share=prompt_share,
            relaxed=" and ".join(relaxed),
        )


def _highest(
    predict: Callable[[float], Prediction], output_tokens: float, ttft_s: float, tpot_s: float, e2e_s: float
) -> float:
    low, high = 1e-6, MAX_RATE
    while high / low > CLOSE:
        middle = math.sqrt(low * high)
        seen = predict(middle)
        keeps = (
            math.isfinite(seen.ttft_s)
            and seen.ttft_s <= ttft_s
            and seen.tpot_s <= tpot_s
            and seen.ttft_s + seen.tpot_s * output_tokens <= e2e_s
        )
        low, high = (middle, high) if keeps else (low, middle)
    return low


def _bound(value: float | None) -> float:
    return math.inf if value is None else value


def _on_grid(tokens: float) -> float:
    return math.exp(round(math.log(max(1.0, tokens)) * GRID) / GRID)
