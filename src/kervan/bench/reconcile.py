"""The client's counts against the server's own metrics."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kervan.bench.tally import RequestTally

# Sample name -> what it is. vLLM's names; kervan, and vLLM under Ray (`ray_vllm_...`), have the same.
_NAMES = {
    "request_success_total": "requests",
    "generation_tokens_total": "output_tokens",
    "prompt_tokens_total": "input_tokens",
    "time_to_first_token_seconds_sum": "ttft_sum",
    "time_to_first_token_seconds_count": "ttft_count",
    "prefix_cache_queries_total": "prefix_queries",
    "prefix_cache_hits_total": "prefix_hits",
}
_SAMPLE = re.compile(r"^(?:vllm:|ray_vllm_|ray_vllm:|vllm_)([a-z_]+)(\{[^}]*\})? ([0-9.eE+-]+|NaN)", re.M)
TTFT_SHARE = 0.5
TTFT_SLACK_S = 0.1

Status = Literal["agrees", "disagrees", "unavailable"]


@dataclass(frozen=True, slots=True)
class Counters:
    """What a server's metrics page has counted since it started."""

    requests: float = 0.0
    output_tokens: float = 0.0
    input_tokens: float = 0.0
    ttft_sum: float = 0.0
    ttft_count: float = 0.0
    prefix_queries: float = 0.0  # tokens that were looked for in the prefix cache
    prefix_hits: float = 0.0

    def minus(self, before: "Counters") -> "Counters":
        """What was counted after `before`."""
        return Counters(*(getattr(self, name) - getattr(before, name) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity as client and server saw it. `allowed`: the largest difference that is no disagreement."""

    what: str
    client: float
    server: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the two differ by no more than is allowed."""
        return abs(self.client - self.server) <= self.allowed


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """`reason` says why there is nothing to compare. `server`: what it counted during the run."""

    status: Status
    reason: str = ""
    comparisons: tuple[Comparison, ...] = ()
    server: Counters | None = None


def read_counters(page: str) -> Counters | None:
    """The counters of a Prometheus page, summed over their labels; None when it has none of vLLM's."""
    counts: dict[str, float] = {}
    for name, _, value in _SAMPLE.findall(page):
        key = _NAMES.get(name)
        if key is not None and value != "NaN":
            counts[key] = counts.get(key, 0.0) + float(value)
    return Counters(**counts) if "requests" in counts or "output_tokens" in counts else None


def compare(tally: RequestTally, server: Counters) -> Reconciliation:
    """Client against server over the same time.

    A request that failed or was cut off in the client may or may not be one that the server finished, and may have
    cost it tokens the client never saw: that much difference is allowed. TTFT is compared as a mean: the server counts
    from after it has read and tokenized the request, so the client's is longer, by up to half or 0.1 s.
    """
    unclear = tally.num_errors - tally.not_sent + tally.unfinished
    rows = [Comparison("requests", tally.ok, server.requests, unclear)]
    if not tally.without_usage and not unclear:
        rows.append(Comparison("output tokens", tally.output_tokens, server.output_tokens, 0))
        rows.append(Comparison("input tokens", tally.input_tokens, server.input_tokens, 0))
    ttft_s = tally.whole("ttft_s").mean
    if ttft_s is not None and server.ttft_count and not unclear:
        server_s = server.ttft_sum / server.ttft_count
        rows.append(Comparison("mean TTFT, s", ttft_s, server_s, max(TTFT_SLACK_S, TTFT_SHARE * ttft_s)))
    status: Status = "agrees" if all(row.agrees for row in rows) else "disagrees"
    return Reconciliation(status, "", tuple(rows), server)


def to_dict(reconciliation: Reconciliation) -> Mapping[str, object]:
    """For JSON."""
    rows = {
        row.what: {"client": row.client, "server": row.server, "allowed": row.allowed, "agrees": row.agrees}
        for row in reconciliation.comparisons
    }
    return {"status": reconciliation.status, "reason": reconciliation.reason, "rows": rows}
