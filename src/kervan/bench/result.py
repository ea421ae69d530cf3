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
from kervan.bench.prefix_reuse import CachedShare, cached_share
from kervan.bench.reconcile import Reconciliation
from kervan.bench.refusals import is_refusal
from kervan.bench.sketch import quantile_intervals
from kervan.bench.tally import METRICS, RequestTally
from kervan.config.workload import Slo
from kervan.units import format_duration, plural

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}
MAX_FLOOR_SHARE = 0.05
MAX_REFUSED_SHARE = 0.05
BURST_SHARE = 0.1  # of TPOT: a shorter gap is that of chunks sent together
AT_ONCE_S = 1e-6  # a token
NO_FLOOR_S = 50e-6  # nothing to see: a server that sends several chunks at once has gaps of 0, and that is true
MAX_BUSY = 0.9
MAX_CLOCK_STEP_S = 0.001
MAX_UNEXPECTED_SHARE = 0.02  # of the prompt tokens, from the cache and not of this run


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

    @property
    def prefix_cache(self) -> CachedShare:
        """How much of the prompts the server's prefix cache gave, and how much it could have."""
        server = self.reconciliation.server
        counts = (None, None) if server is None else (server.prefix_queries, server.prefix_hits)
        return cached_share(self.tally.prefix_reuse, queries=counts[0], hits=counts[1])

    def effects(self) -> list[faults.Effect]:
        """The effect of each action of the run on output tokens/s."""
        bound_s = self.load.duration_s
        end_s = self.tally.last_end_s - self.tally.start_s if self.tally.last_end_s else 0.0
        return faults.effects(self.tally.timeline, self.outcome.events, min(end_s, bound_s or end_s))

    @property
    def num_refused(self) -> int:
        """Requests that the server took no work for."""
        return sum(count for kind, count in self.tally.errors.items() if is_refusal(kind))

    def doubts(self) -> list[str]:
        """Why the run is not valid; empty when it is. Each says what to do."""
        return [*self.server_doubts(), *self._action_doubts(), *self.client_doubts()]

    def server_doubts(self) -> list[str]:
        """Why there is nothing to measure, or only a part."""
        tally = self.tally
        kinds = ", ".join(f"{count} {kind}" for kind, count in tally.errors.items()) or "nothing was sent"
        doubts = []
        if self.outcome.gave_up:
            message = next((m for messages in tally.messages.values() for m in messages), "")
            doubts.append(f"ended early, as no request can succeed ({kinds}): {' '.join(message.split())}")
        elif not tally.ok:
            doubts.append(f"no request succeeded ({kinds})")
        elif self.num_refused > MAX_REFUSED_SHARE * (total := tally.ok + tally.num_errors):
            doubts.append(
                f"{self.num_refused} of {total} requests ({100 * self.num_refused / total:.0f}%) were refused "
                f"({kinds}), and the times are those of the others; {self._why_refused()}"
            )
        if tally.sent_away:
            doubts.append(
                f"{plural(tally.sent_away, 'stream')} ended early: the server said to come back in "
                f"{tally.longest_retry_after_s:g} s (Retry-After), after the end of the load; try again then"
            )
        return doubts

    def _why_refused(self) -> str:
        if 2 * self.tally.errors.get("refused", 0) > self.num_refused:
            return "the server was away, or took no more connections"
        return "send less, or give the server more replicas"

    def _action_doubts(self) -> list[str]:
        if self.outcome.was_interrupted:
            return []
        end_s = max(0.0, self.tally.last_end_s - self.tally.start_s)
        return [
            f"--at '{action.at_s:g}s {action.command}' was not run: the load ended after {format_duration(end_s)}; "
            "use a longer --duration"
            for action in self.outcome.missed_actions
        ]

    def notes(self) -> list[str]:
        """What a reader would wonder about in the figures."""
        tally, notes = self.tally, []
        gap_s, tpot_s = self.quantile("gap_s", 0.5), self.quantile("tpot_s", 0.5)
        if tpot_s is not None and tpot_s < AT_ONCE_S:
            notes.append(
                "the answers came in one piece: the server, or a proxy before it, holds them back until they are "
                "whole; TTFT is the time of a whole answer"
            )
        elif tpot_s is not None and gap_s is not None and gap_s < BURST_SHARE * tpot_s:
            notes.append(
                "at least half of the chunks came together with the one before: the server sends several tokens at "
                f"once; TPOT, {format_duration(tpot_s)}, is the pace of a stream, not the gap"
            )
        cache = self.prefix_cache
        if cache.cached_tokens is not None and cache.possible_tokens is not None:
            excess = cache.cached_tokens - cache.possible_tokens
            if excess > MAX_UNEXPECTED_SHARE * cache.prompt_tokens:
                notes.append(
                    f"the prefix cache had {excess:,.0f} prompt tokens more than this run repeats: those of an earlier "
                    "run or of other clients; use another --seed, or restart the server"
                )
        if tally.told_to_wait:
            waited = "; an open loop sends all the same" if self.load.streams is None else "; its stream waited"
            notes.append(
                f"{plural(tally.told_to_wait, 'response')} asked to come back after up to "
                f"{tally.longest_retry_after_s:g} s (Retry-After){waited}"
            )
        return notes

    def client_doubts(self) -> list[str]:
        """Why the client's own part is not to be trusted."""
        doubts = []
        tally, outcome = self.tally, self.outcome
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
            "notes": self.notes(),
            "server": {"words": str(self.probe.served_by), **self.probe.served_by.to_dict()},
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
            "refusals": {
                "requests": self.num_refused,
                "told_to_wait": tally.told_to_wait,
                "longest_retry_after_s": tally.longest_retry_after_s,
                "streams_sent_away": tally.sent_away,
                "gave_up": self.outcome.gave_up,
            },
            "duration_s": duration_s,
            "output_tokens": tally.output_tokens,
            "input_tokens": tally.input_tokens,
            "out_tok_s": self.out_tok_s,
            "in_tok_s": tally.input_tokens / duration_s if duration_s else 0.0,
            "req_s": tally.ok / duration_s if duration_s else 0.0,
            "prefix_cache": self.prefix_cache.to_dict(),
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
            "faults_not_run": [dataclasses.asdict(action) for action in self.outcome.missed_actions],
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
