"""Policies under the same loads: each with each seed, in processes, and what the seeds say together."""

import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kervan.simulate import policies
from kervan.simulate.fleet import Simulation
from kervan.simulate.setup import FleetSetup
from kervan.simulate.tally import Outcome
from kervan.stats import bootstrap_interval

QUANTILES = ("p50", "p95", "p99")
FEW_SEEDS = 2  # from here on there is an interval


@dataclass(frozen=True, slots=True)
class Compared:
    """One policy: an outcome per seed, in their order."""

    name: str
    outcomes: tuple[Outcome, ...]

    def mean(self, figure: Callable[[Outcome], float | None]) -> float | None:
        """Over the seeds; None where one has none."""
        values = [figure(outcome) for outcome in self.outcomes]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if len(known) == len(values) else None

    def entry(self, figure: str, key: str) -> float | None:
        """The mean over the seeds of one entry of a figure: "p95" of `ttft_s`, a pool of `replica_hours`."""
        return self.mean(lambda outcome: getattr(outcome, figure)[key])

    def interval(self, figure: Callable[[Outcome], float | None]) -> tuple[float, float] | None:
        """95% of the mean, by bootstrap over the seeds; None with one seed."""
        known = [value for outcome in self.outcomes if (value := figure(outcome)) is not None]
        if len(known) < FEW_SEEDS:
            return None
        return bootstrap_interval(known, statistic=statistics.fmean, draws=1000)

    def as_dict(self) -> dict[str, Any]:
        """For scripts: means over the seeds."""
        whole = sum(outcome.requests for outcome in self.outcomes)
        figures: dict[str, Callable[[Outcome], float | None]] = {
            "slo_attainment": lambda o: o.attained,
            "mean_replicas": lambda o: o.mean_replicas,
            "usd": lambda o: o.usd,
        }
        result: dict[str, Any] = {
            "name": self.name,
            "slo_attainment": self.mean(figures["slo_attainment"]),
            "requests": whole // len(self.outcomes),
            "mean_replicas": self.mean(figures["mean_replicas"]),
            "replica_hours": self.mean(lambda o: sum(o.replica_hours.values())),
            "usd": self.mean(figures["usd"]),
            "usd_per_mtok": self.mean(lambda o: o.usd_per_mtok),
            "ttft_s": {q: self.entry("ttft_s", q) for q in QUANTILES},
            "tpot_s": {q: self.entry("tpot_s", q) for q in QUANTILES},
            "goodput_per_s": self.mean(lambda o: o.goodput_per_s),
            "finished": self.mean(lambda o: o.finished),
            "shed": self.mean(lambda o: o.shed),
            "moves": self.mean(lambda o: o.moves),
            "broken": self.mean(lambda o: o.broken),
            "replica_hours_by_pool": {
                name: self.entry("replica_hours", name) for name in self.outcomes[0].replica_hours
            },
            "mean_ready_replicas": self.mean(lambda o: o.mean_ready),
            "max_replicas": max(outcome.max_replicas for outcome in self.outcomes),
            "started_replicas": self.mean(lambda o: o.started_replicas),
            "lost_replicas": self.mean(lambda o: o.lost_replicas),
            "recomputed_tokens": self.mean(lambda o: o.recomputed_tokens),
            "preemptions": self.mean(lambda o: o.preemptions),
            "output_tokens": self.mean(lambda o: o.output_tokens),
            "episode_s": self.mean(lambda o: o.episode_s),
            "seeds": [outcome.seed for outcome in self.outcomes],
        }
        intervals = {name: self.interval(figure) for name, figure in figures.items()}
        if any(intervals.values()):
            result["interval_95"] = {name: list(one) for name, one in intervals.items() if one is not None}
        return result


def run_one(setup: FleetSetup, name: str, seed: int) -> Outcome:
    """One policy, one seed."""
    return Simulation(setup, policies.make(name, setup, seed), seed).run()


def run(
    setup: FleetSetup,
    names: Sequence[str],
    seeds: Sequence[int],
    *,
    processes: int = 0,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> list[Compared]:
    """Each policy with each seed; the result does not depend on `processes` (0: as many as there are cores)."""
    jobs = [(name, seed) for seed in seeds for name in names]
    outcomes: dict[tuple[str, int], Outcome] = {}
    workers = min(len(jobs), processes or len(os.sched_getaffinity(0)))
    if workers <= 1:
        for name, seed in jobs:
            outcomes[name, seed] = run_one(setup, name, seed)
            on_done(len(outcomes), len(jobs))
    else:
        with _pool(workers) as pool:
            futures = {pool.submit(run_one, setup, name, seed): (name, seed) for name, seed in jobs}
            for future in as_completed(futures):
                outcomes[futures[future]] = future.result()
                on_done(len(outcomes), len(jobs))
    return [Compared(name, tuple(outcomes[name, seed] for seed in seeds)) for name in names]


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    except BaseException:
        for process in list(getattr(pool, "_processes", {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
