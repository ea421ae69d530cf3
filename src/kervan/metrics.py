"""Every metric that kervan exports: its name, type, labels, and what it means. `docs/metrics.md` is made from it.

All have the labels `fleet` and `model_name` beside their own. What is of scope "gateway" is counted by each gateway for
itself: on a page of several it has the label `gateway`, and is added up. What is of scope "fleet" is the same at every
gateway: it stands once on such a page, and where several pages are scraped the maximum counts.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]
Scope = Literal["gateway", "fleet"]


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One metric. `name`: as Prometheus stores it, for a histogram without `_bucket`. `labels`: its own, in order.

    `condition`: when it is there, if not always.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    scope: Scope = "gateway"
    condition: str = ""


# ---- streams: requests as clients see them

STREAMS_OPEN = Descriptor("kervan_streams_open", "gauge", "Streams in flight at a gateway.")
STREAMS_STARTED = Descriptor("kervan_streams_started_total", "counter", "Streams that requests have opened.")
STREAMS_ENDED = Descriptor(
    "kervan_streams_ended_total",
    "counter",
    "Streams by how they ended. good: whole, and within the SLO; slow: whole, and not; broken: with an error; "
    "refused: not taken, the queue was full; left: the client went, or vLLM found a stop string.",
    ("outcome",),
)
STREAMS_BROKEN = Descriptor(
    "kervan_streams_broken_total",
    "counter",
    "Streams that ended with an error. given_up: their replicas were lost with them; expired: no replica took them in "
    "time; engine: the engine failed on them; replay: they could not be given again.",
    ("reason",),
)
STREAMS_QUEUED = Descriptor(
    "kervan_streams_queued",
    "gauge",
    "Streams that wait, by what for. no_replica: none can take them; lost_replica: whether theirs comes back; "
    "bulk_turn: others of large requests are first; first_token: in a replica's queue, or prefilling.",
    ("cause",),
)
STREAMS_BOUND = Descriptor(
    "kervan_streams_bound", "gauge", "Streams that a gateway has in flight at most; what comes beyond is refused."
)
STREAMS_FETCHED = Descriptor("kervan_streams_fetched_total", "counter", "Streams whose clients came back for them.")
REQUESTS_OPEN = Descriptor("kervan_requests_open", "gauge", "HTTP requests in flight at a gateway.")
ADMISSION = Descriptor(
    "kervan_admission_requests_total",
    "counter",
    "Requests by what admission said. admitted; queue_full: 503, try again; too_large: 400; closing: the fleet ends.",
    ("decision",),
)
SLO_BOUND = Descriptor(
    "kervan_slo_bound_seconds",
    "gauge",
    "The bounds of the fleet's SLO: ttft, tpot, e2e. Those that are not set are not there.",
    ("bound",),
    "fleet",
)

# ---- moves

STREAMS_MOVED = Descriptor(
    "kervan_streams_moved_total",
    "counter",
    "Streams placed again on another replica, by why: theirs was lost (or its link broke), stalled, or is drained.",
    ("reason",),
)
MOVE_PAUSE = Descriptor(
    "kervan_stream_move_pause_seconds",
    "histogram",
    "Of streams that moved after their first token: from their last token before the move to the next.",
)
MOVE_TOKENS = Descriptor(
    "kervan_move_recomputed_tokens_total", "counter", "Tokens that were prefilled again because their stream moved."
)
DRAIN = Descriptor(
    "kervan_drain_seconds",
    "histogram",
    "From when a gateway hears of a drain or notice until it has no stream on the replica.",
)
DRAINS = Descriptor(
    "kervan_drains_total", "counter", "Replicas that began to drain, for whatever reason.", ("pool",), "fleet"
)
NOTICES = Descriptor(
    "kervan_notices_total", "counter", "Notices that nodes of the fleet were given.", ("kind", "source"), "fleet"
)
NODES_NOTICED = Descriptor("kervan_nodes_under_notice", "gauge", "Nodes with a notice that stands.", (), "fleet")
NOTICE_TO_EMPTY = Descriptor(
    "kervan_notice_to_empty_seconds",
    "histogram",
    "From when the directory heard that a node will go until no replica there had a stream.",
    (),
    "fleet",
)

# ---- replicas, as a gateway sees them

TTFT = Descriptor(
    "kervan_time_to_first_token_seconds",
    "histogram",
    "From placing a stream on a replica to its first token from there. Has the SLO's bound among its buckets.",
    ("replica", "pool"),
)
TPOT = Descriptor(
    "kervan_time_per_output_token_seconds",
    "histogram",
    "Of each stream that ended on a replica or left it: seconds per token there after the first. Has the SLO's bound "
    "among its buckets.",
    ("replica", "pool"),
)
GENERATED_TOKENS = Descriptor(
    "kervan_replica_generated_tokens_total", "counter", "Tokens that came from a replica.", ("replica", "pool")
)
PREFILLED_TOKENS = Descriptor(
    "kervan_replica_prefilled_tokens_total",
    "counter",
    "Tokens that a replica prefilled: of prompts, and of what moved streams had; without those in its prefix cache.",
    ("replica", "pool"),
)
STALLED = Descriptor(
    "kervan_replica_stalled_seconds",
    "gauge",
    "For how long a replica has had work and given a gateway no token; 0 while it is idle or steps.",
    ("replica", "pool"),
)
PREFIX_PREDICTED = Descriptor(
    "kervan_prefix_predicted_tokens_total",
    "counter",
    "Prompt tokens that were expected in the prefix cache of the replica they went to.",
    ("replica", "pool"),
)
PREFIX_POSSIBLE = Descriptor(
    "kervan_prefix_possible_tokens_total",
    "counter",
    "Prompt tokens that were expected in the prefix cache of some replica, counted at the one they went to.",
    ("replica", "pool"),
)
PREFIX_HIT = Descriptor(
    "kervan_prefix_hit_tokens_total",
    "counter",
    "Prompt tokens that were in the prefix cache of the replica they went to, as vLLM tells.",
    ("replica", "pool"),
)
LINKS = Descriptor("kervan_links", "gauge", "Replicas that a gateway is linked to.")
LINKS_BROKEN = Descriptor(
    "kervan_links_broken_total", "counter", "Links that ended, other than those of replicas that had drained."
)
REPLICAS_LOST = Descriptor(
    "kervan_replicas_lost_total",
    "counter",
    "Replicas whose link ended and that died: the engine said so, or they are no longer listed. Each gateway counts "
    "each, so take the maximum over gateways.",
)
REPLICAS_RETURNED = Descriptor(
    "kervan_replicas_returned_total",
    "counter",
    "Losses that were none: the link broke and came back, for example because a machine had no CPU left.",
)
DIRECTORY_AGE = Descriptor(
    "kervan_directory_age_seconds", "gauge", "Since a gateway heard of the fleet's directory, which tells each second."
)

# ---- replicas, as the directory lists them

REPLICAS = Descriptor(
    "kervan_replicas", "gauge", "Replicas by state; late: two heartbeats are missing.", ("state",), "fleet"
)
REPLICA_RUNNING = Descriptor(
    "kervan_replica_running", "gauge", "Requests in a replica's batch.", ("replica", "pool"), "fleet"
)
REPLICA_WAITING = Descriptor(
    "kervan_replica_waiting", "gauge", "Requests queued at a replica.", ("replica", "pool"), "fleet"
)
REPLICA_KV_CACHE = Descriptor(
    "kervan_replica_kv_cache_usage",
    "gauge",
    "Share of a replica's KV cache in use, 0 to 1.",
    ("replica", "pool"),
    "fleet",
)
REPLICA_BEAT_AGE = Descriptor(
    "kervan_replica_heartbeat_age_seconds",
    "gauge",
    "Since a replica's last heartbeat; they come every second.",
    ("replica", "pool"),
    "fleet",
)
REPLICA_STARTS = Descriptor(
    "kervan_replica_starts_total", "counter", "Starts of replicas that the directory saw.", ("pool",), "fleet"
)
REPLICA_START = Descriptor(
    "kervan_replica_start_seconds",
    "histogram",
    "Of replicas that became ready: from the begin of their start until they had produced a token.",
    ("pool",),
    "fleet",
)
START_FAILURES = Descriptor(
    "kervan_start_failures_total",
    "counter",
    "Replicas and gateways that could not start, or gateways that ended by themselves.",
    (),
    "fleet",
)

# ---- how many there are to be

REPLICAS_TARGET = Descriptor(
    "kervan_replicas_target", "gauge", "Replicas that the pool is to have now.", ("pool",), "fleet"
)
REPLICAS_MINIMUM = Descriptor(
    "kervan_replicas_minimum", "gauge", "The least replicas of the pool, by the settings.", ("pool",), "fleet"
)
REPLICAS_MAXIMUM = Descriptor(
    "kervan_replicas_maximum", "gauge", "The most replicas of the pool, by the settings.", ("pool",), "fleet"
)
REPLICAS_ROOM = Descriptor(
    "kervan_replicas_room",
    "gauge",
    "Replicas that the cluster can place, those there included; not there while that is not known.",
    ("pool",),
    "fleet",
)
DECISIONS = Descriptor(
    "kervan_autoscaling_decisions_total",
    "counter",
    "Changes of a pool's target, up or down, by the policy or by new settings.",
    ("pool", "direction"),
    "fleet",
)
AUTOSCALING_NUMBER = Descriptor(
    "kervan_autoscaling_number",
    "gauge",
    "What the last decision stands on, such as load_requests_per_s.",
    ("policy", "number"),
    "fleet",
    "where the policy has a choice",
)
AUTOSCALING_PROBLEM = Descriptor(
    "kervan_autoscaling_problem",
    "gauge",
    "1 while no decision can be made, or not be followed.",
    ("policy",),
    "fleet",
)
AUTOSCALING_CHANGED = Descriptor(
    "kervan_autoscaling_changed_timestamp_seconds", "gauge", "When a target changed last.", ("policy",), "fleet"
)
COST = Descriptor(
    "kervan_cost_usd_per_hour",
    "gauge",
    "What the GPUs of the replicas that are there cost, by kervan's price list.",
    ("pool",),
    "fleet",
    "where the price of the GPU is known",
)

# ---- gateways

GATEWAYS = Descriptor(
    "kervan_gateways", "gauge", "Gateways by state; late: two heartbeats are missing.", ("state",), "fleet"
)
GATEWAY_BEAT_AGE = Descriptor(
    "kervan_gateway_heartbeat_age_seconds", "gauge", "Since a gateway's last heartbeat.", ("gateway",), "fleet"
)
GATEWAY_BUSY = Descriptor(
    "kervan_gateway_busy_ratio",
    "gauge",
    "Share of the last second in which a gateway's event loop ran, or waited for a core, 0 to 1.",
    ("gateway",),
    "fleet",
)

# ---- API keys

_ENDED = "counted when a stream ends."
KEY_REQUESTS = Descriptor(
    "kervan_key_requests_total",
    "counter",
    "Requests of an API key that were worked on, counted when they end. (anybody): where no key is needed.",
    ("key",),
)
KEY_PROMPT_TOKENS = Descriptor(
    "kervan_key_prompt_tokens_total", "counter", f"Prompt tokens of an API key, {_ENDED}", ("key",)
)
KEY_CACHED_TOKENS = Descriptor(
    "kervan_key_cached_tokens_total", "counter", "Of its prompt tokens, those that were in a prefix cache.", ("key",)
)
KEY_GENERATED_TOKENS = Descriptor(
    "kervan_key_generated_tokens_total", "counter", f"Tokens that were generated for an API key, {_ENDED}", ("key",)
)
KEY_STREAMS = Descriptor("kervan_key_streams", "gauge", "Streams that an API key has in flight.", ("key",))
KEY_REJECTED = Descriptor(
    "kervan_key_rejected_total",
    "counter",
    "Requests that were refused because of their API key. requests, tokens, streams: 429, its limit; too_large: 400, "
    "above its limit; model: not one of its models; expired; key: none of the fleet's, counted for (unknown).",
    ("key", "reason"),
)

# ---- streams that clients can come back to

REPLAY_BYTES = Descriptor(
    "kervan_replay_bytes",
    "gauge",
    "Size of the journals and copies that a gateway keeps.",
    condition="with `replay_s`",
)
REPLAY_COPIED = Descriptor(
    "kervan_replay_is_copied",
    "gauge",
    "1 while another gateway has everything that this one's clients have received.",
    condition="with `replay_s`",
)
REPLAY_LATE = Descriptor(
    "kervan_replay_late_total",
    "counter",
    "How often clients stopped waiting for the copy.",
    condition="with `replay_s`",
)
REPLAY_DROPPED = Descriptor(
    "kervan_replay_dropped_total",
    "counter",
    "Journals dropped early to free memory.",
    condition="with `replay_s`",
)

SECTIONS: dict[str, tuple[Descriptor, ...]] = {
    "Streams": (
        STREAMS_OPEN, STREAMS_STARTED, STREAMS_ENDED, STREAMS_BROKEN, STREAMS_QUEUED, STREAMS_BOUND, STREAMS_FETCHED,
         REQUESTS_OPEN, ADMISSION, SLO_BOUND,
    ),
    "Moves, drains and notices": (
        STREAMS_MOVED, MOVE_PAUSE, MOVE_TOKENS, DRAIN, DRAINS, NOTICES, NODES_NOTICED, NOTICE_TO_EMPTY,
    ),
    "Replicas, as gateways see them": (
        TTFT, TPOT, GENERATED_TOKENS, PREFILLED_TOKENS, STALLED, PREFIX_PREDICTED, PREFIX_POSSIBLE, PREFIX_HIT, LINKS,
        LINKS_BROKEN, REPLICAS_LOST, REPLICAS_RETURNED, DIRECTORY_AGE,
    ),
    "Replicas, as the directory lists them": (
        REPLICAS, REPLICA_RUNNING, REPLICA_WAITING, REPLICA_KV_CACHE, REPLICA_BEAT_AGE, REPLICA_STARTS, REPLICA_START,
        START_FAILURES,
    ),
    "Scaling and cost": (
        REPLICAS_TARGET, REPLICAS_MINIMUM, REPLICAS_MAXIMUM, REPLICAS_ROOM, DECISIONS, AUTOSCALING_NUMBER,
        AUTOSCALING_PROBLEM, AUTOSCALING_CHANGED, COST,
    ),
    "Gateways": (GATEWAYS, GATEWAY_BEAT_AGE, GATEWAY_BUSY),
    "API keys": (
        KEY_REQUESTS, KEY_PROMPT_TOKENS, KEY_CACHED_TOKENS, KEY_GENERATED_TOKENS, KEY_STREAMS, KEY_REJECTED,
    ),
    "Reconnecting clients": (REPLAY_BYTES, REPLAY_COPIED, REPLAY_LATE, REPLAY_DROPPED),
}  # fmt: skip
ALL: dict[str, Descriptor] = {metric.name: metric for metrics in SECTIONS.values() for metric in metrics}
