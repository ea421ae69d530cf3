"""The result of a run, in the words that tables, JSON, records and the HTML report share."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from kervan.bench import faults, reconcile
from kervan.bench.client_floor import BUSY, ClientFloor
from kervan.bench.drive import Outcome
from kervan.bench.endpoint import Probe
from kervan.bench.load import Endpoint, Load
from kervan.bench.reconcile import Reconciliation
from kervan.bench.sketch import quantile_intervals
from kervan.bench.tally import METRICS, RequestTally
from kervan.config.workload import Slo
from kervan.units import format_duration

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}
MAX_FLOOR_SHARE = 0.05
NO_FLOOR_S = 50e-6  # nothing to see: a server that sends several chunks at once has gaps of 0, and that is true
MAX_BUSY = 0.9
MAX_CLOCK_STEP_S = 0.001


@dataclass(frozen=True, slots=True)
class Result:
    """One run. `floor` None: calibration was skipped."""

    endpoint: Endpoint
    probe: Probe
    load: Load
    slo: Slo
    outcome: Outcome
    floor: ClientFloor | None
    reconciliation: Reconciliation

    @property
    def tally(self) -> RequestTally:
        """The counts of all workers together."""
        return self.outcome.tally

    @property
    def out_tok_s(self) -> float:
        """Output tokens of whole requests per second, from the first request sent to the last one ended."""
        return self.tally.output_tokens / self.tally.duration_s if self.tally.duration_s else 0.0

    @property
    def goodput_req_s(self) -> float:
        """Requests per second that kept the SLO."""
        return self.tally.good / self.tally.duration_s if self.tally.duration_s else 0.0

    @property
    def streams_achieved(self) -> float:
        """Requests in flight, averaged over the run."""
        return self.tally.busy_s / self.tally.duration_s if self.tally.duration_s else 0.0

    def quantile(self, metric: str, q: float) -> float | None:
        """The `q` quantile of one of `METRICS` over the whole run, in seconds; None if nothing was counted."""
        return self.tally.whole(metric).quantile(q)

    def effects(self) -> list[faults.Effect]:
        """The effect of each action of the run on output tokens/s."""
        bound_s = self.load.duration_s
        end_s = self.tally.last_end_s - self.tally.start_s if self.tally.last_end_s else 0.0
        return faults.effects(self.tally.timeline, self.outcome.events, min(end_s, bound_s or end_s))

    def doubts(self) -> list[str]:
        """Why the run is not valid; empty when it is. Each says what to do."""
        doubts = []
        tally, outcome = self.tally, self.outcome
        if not tally.ok:
            kinds = ", ".join(f"{count} {kind}" for kind, count in tally.errors.items()) or "nothing was sent"
            doubts.append(f"no request succeeded ({kinds})")
        if outcome.busiest_share > MAX_BUSY:
            doubts.append(
                f"a client process used {100 * outcome.busiest_share:.0f}% of a core, so it was late itself; "
                f"use --processes {self._processes(outcome.busiest_share / BUSY)}"
            )
        doubts += self._floor_doubts()
        late_s, ttft_s = tally.whole("late_s").quantile(0.5), tally.whole("ttft_s").quantile(0.5)
        if self.load.streams is None and late_s and ttft_s and late_s > MAX_FLOOR_SHARE * ttft_s:
            doubts.append(
                f"half of the requests were sent more than {format_duration(late_s)} late, over 5% of TTFT p50 "
                f"{format_duration(ttft_s)}; use --processes {self._processes(2)}"
            )
        if tally.not_sent:
            doubts.append(
                f"{tally.not_sent} requests were not sent, because {self.load.max_streams} were in flight; the server "
                "does not keep up, or raise --max-streams"
            )
        if abs(outcome.clock_step_s) > MAX_CLOCK_STEP_S:
            doubts.append(f"the clock was set by {outcome.clock_step_s * 1e3:.1f} ms during the run; run it again")
        return doubts

    def _floor_doubts(self) -> list[str]:
        if self.floor is None:
            return []
        doubts = []
        for metric, floor_s in (("ttft_s", self.floor.ttft_s), ("gap_s", self.floor.gap_s)):
            measured_s = self.quantile(metric, 0.5)
            if measured_s is not None and floor_s > max(NO_FLOOR_S, MAX_FLOOR_SHARE * measured_s):
                ratio = floor_s / max(measured_s, 1e-9) / MAX_FLOOR_SHARE
                doubts.append(
                    f"the client's own {metric.removesuffix('_s').upper()} floor, {format_duration(floor_s)}, is over "
                    f"5% of the measured p50 {format_duration(measured_s)}; use --processes {self._processes(ratio)}"
                )
        return doubts

    def _processes(self, factor: float) -> int:
        return max(self.outcome.num_processes + 1, math.ceil(self.outcome.num_processes * factor))

    def content(self) -> dict[str, Any]:
        """What a record holds of this run."""
        endpoint = self.endpoint
        return {
            "target": {
                "url": endpoint.url,
                "model": endpoint.model,
                "api": endpoint.api,
                "server_version": self.probe.version,
                "sampling": endpoint.sampling,
            },
            "load": self.load.to_dict(),
            "result": self.to_dict(),
            "timeline": self.tally.timeline.to_dict(),
        }

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints; scripts rely on its keys."""
        tally, doubts = self.tally, self.doubts()
        duration_s = tally.duration_s
        floor = None
        if self.floor is not None:
            floor = dataclasses.asdict(self.floor)
        return {
            "valid": not doubts,
            "doubts": doubts,
            "requests": {
                "ok": tally.ok,
                "errors": tally.num_errors,
                "truncated": tally.errors.get("truncated", 0),
                "duplicated": tally.errors.get("duplicated", 0),
                "unfinished": tally.unfinished,
                "by_error": dict(sorted(tally.errors.items())),
                "messages": tally.messages,
                "reconnected": tally.reconnected,
                "wrong_input_tokens": tally.wrong_input_tokens,
                "without_usage": tally.without_usage,
            },
            "duration_s": duration_s,
            "output_tokens": tally.output_tokens,
            "input_tokens": tally.input_tokens,
            "out_tok_s": self.out_tok_s,
            "in_tok_s": tally.input_tokens / duration_s if duration_s else 0.0,
            "req_s": tally.ok / duration_s if duration_s else 0.0,
            "tokens_per_chunk": tally.output_tokens / tally.num_chunks if tally.num_chunks else None,
            "streams_achieved": self.streams_achieved,
            **{metric: self._distribution(metric) for metric in METRICS},
            "stalls": {
                "threshold_s": self.load.stall_s,
                "count": tally.stalls,
                "streams": tally.stalled_streams,
                "longest_gap_s": tally.longest_gap_s,
            },
            "slo": str(self.slo) or None,
            "goodput_req_s": self.goodput_req_s,
            "slo_share": tally.good / (tally.ok + tally.num_errors) if tally.ok + tally.num_errors else None,
            "client_floor": floor,
            "client": {
                "processes": self.outcome.num_processes,
                "loop": self.outcome.loop,
                "clock": "kernel" if tally.ok and tally.with_kernel_time == tally.ok else "process",
                "busiest_share": self.outcome.busiest_share,
                "cpu_us_per_token": 1e6 * self.outcome.cpu_s / tally.output_tokens if tally.output_tokens else None,
                "lag_p99_s": self.outcome.lag.quantile(0.99),
            },
            "reconciliation": reconcile.to_dict(self.reconciliation),
            "faults": [dataclasses.asdict(effect) for effect in self.effects()],
            "interrupted": self.outcome.was_interrupted,
        }

    def _distribution(self, metric: str) -> dict[str, Any]:
        qs = list(QUANTILES.values())
        whole = self.tally.whole(metric)
        intervals = quantile_intervals([block[metric] for block in self.tally.blocks], qs)
        return {
            **dict(zip(QUANTILES, whole.quantiles(qs), strict=True)),
            "mean": whole.mean,
            "max": whole.largest if whole.count else None,
            "count": whole.count,
            "ci95": dict(zip(QUANTILES, intervals, strict=True)),
        }
