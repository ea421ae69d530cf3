"""Two servers side by side: pairs of runs with the same seed, in the order A B B A, and ratios with intervals."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kervan.bench.result import Result
from kervan.stats import bootstrap_interval

Side = Literal["a", "b"]
LOWER_IS_BETTER = {"ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "e2e_p50_s", "gap_p99_s"}


def order(num_pairs: int) -> Iterator[tuple[int, tuple[Side, Side]]]:
    """(pair, its sides in the order of their runs): they swap in every second pair, so slow drift falls on both."""
    for pair in range(num_pairs):
        yield pair, ("a", "b") if pair % 2 == 0 else ("b", "a")


def figures(result: Result) -> dict[str, float | None]:
    """The numbers of a run that are compared."""
    return {
        "out_tok_s": result.out_tok_s or None,
        "goodput_req_s": result.goodput_req_s or None,
        "ttft_p50_s": result.quantile("ttft_s", 0.5),
        "ttft_p99_s": result.quantile("ttft_s", 0.99),
        "tpot_p50_s": result.quantile("tpot_s", 0.5),
        "tpot_p99_s": result.quantile("tpot_s", 0.99),
        "gap_p99_s": result.quantile("gap_s", 0.99),
        "e2e_p50_s": result.quantile("e2e_s", 0.5),
    }


@dataclass(frozen=True, slots=True)
class Ratio:
    """A's figure divided by B's, one per pair; `interval` is of the median, 95%, by bootstrap over pairs."""

    name: str
    values: tuple[float, ...]
    a_median: float
    b_median: float
    differences: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the ratios."""
        return statistics.median(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """95%, of the median."""
        return bootstrap_interval(self.values)

    @property
    def difference_interval(self) -> tuple[float, float]:
        """Of the median of A minus B."""
        return bootstrap_interval(self.differences)

    def to_dict(self) -> dict[str, Any]:
        """For JSON and records."""
        return {
            "ratio": self.median,
            "ci95": self.interval,
            "pairs": self.values,
            "a": self.a_median,
            "b": self.b_median,
            "difference": statistics.median(self.differences),
            "difference_ci95": self.difference_interval,
        }


def ratios(pairs: Sequence[tuple[Result, Result]]) -> list[Ratio]:
    """One per figure that both sides of at least one pair have. Pairs in which a request failed are left out."""
    whole = [(figures(a), figures(b)) for a, b in pairs if not (a.tally.num_errors or b.tally.num_errors)]
    compared = []
    for name in figures(pairs[0][0]) if pairs else ():
        both = [(x, y) for a, b in whole if (x := a[name]) is not None and (y := b[name])]
        if both:
            compared.append(
                Ratio(
                    name,
                    tuple(x / y for x, y in both),
                    statistics.median(x for x, _ in both),
                    statistics.median(y for _, y in both),
                    tuple(x - y for x, y in both),
                )
            )
    return compared


def run_pairs(num_pairs: int, measure: Callable[[Side, int], Result]) -> list[tuple[Result, Result]]:
    """`measure(side, pair)` for each run, in order; an interrupted run ends the series, and its pair is dropped."""
    pairs = []
    for pair, sides in order(num_pairs):
        results = {side: measure(side, pair) for side in sides}
        if any(result.outcome.was_interrupted for result in results.values()):
            break
        pairs.append((results["a"], results["b"]))
    return pairs


def worst_shortfall(compared: Sequence[Ratio], bound: float) -> Ratio | None:
    """The ratio of output tokens/s if its whole interval is below `bound`: A is surely slower than allowed."""
    speed = next((ratio for ratio in compared if ratio.name == "out_tok_s"), None)
    return speed if speed is not None and speed.interval[1] < bound else None
