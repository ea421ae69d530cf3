"""What to change next, from where the time went. Pure: the first rule that holds speaks."""

from dataclasses import dataclass, field

from kervan.profile.samples import GPU_WAIT
from kervan.units import plural

IDLE = 0.6
QUEUED = 0.2
GATEWAY_BUSY = 0.7
GATEWAY_FULL = 0.9  # its loop is one thread, and tokens wait for it in any burst
GPU_IDLE = 0.1
CACHE_READING = 0.3
HOST = 0.25
COMMUNICATION = 0.2
SAMPLING = 0.2
MEMORY = 0.5


@dataclass(frozen=True, slots=True)
class Findings:
    """`shares`: of the window, of the GPU where there is one, else of the engine's loop; `host_shares`: of that loop.

    `request_shares`: of the time of all requests. `gateway_busy`: CPU time of the busiest gateway over the window.
    `streams`: in a step on average, `max_streams` that the engine takes, 0 if that is not known. `prefill_share`: of
    the tokens that were computed. `cache_reading`: of the GPU's time, by attention over `context_tokens` a step.
    `step_s`: between two steps.
    """

    shares: dict[str, float]
    has_gpu: bool
    host_shares: dict[str, float] = field(default_factory=dict)
    request_shares: dict[str, float] = field(default_factory=dict)
    gateway_busy: float = 0.0
    num_gateways: int = 0
    streams: float = 0.0
    max_streams: int = 0
    prefill_share: float = 0.0
    cache_reading: float = 0.0
    context_tokens: float = 0.0
    step_s: float = 0.0
    tp: int = 1
    is_eager: bool = False


def decide(found: Findings) -> str:
    """The next lever, in one sentence with its reason."""
    shares = found.shares
    idle = shares.get("nothing to do", shares.get("no work", 0.0))
    queued = found.request_shares.get("queue", 0.0) + found.request_shares.get("replica queue", 0.0)
    if idle > IDLE:
        return (
            f"nothing here: the replica had no request for {idle:.0%} of the time; profile it under load, or serve the "
            "load with fewer replicas (kervan scale)"
        )
    if queued > QUEUED:
        return (
            f"more places: requests spend {queued:.0%} of their time in queues; add replicas (kervan scale), or raise "
            "max_num_seqs while KV use is low"
        )
    gateway = ""
    if found.gateway_busy > GATEWAY_BUSY:
        gateway = (
            f"another gateway: the busiest one uses {found.gateway_busy:.0%} of a core; "
            f"kervan scale --gateways {found.num_gateways + 1}"
        )
    if not found.has_gpu:
        return gateway or _without_gpu(found)
    # Behind a GPU that always works a gateway takes no throughput: there it is the second thing to change.
    is_limit = idle + shares.get("host", 0.0) > GPU_IDLE or found.gateway_busy > GATEWAY_FULL
    if gateway and is_limit:
        return gateway
    return _with_gpu(found) + (f"; then {gateway}" if gateway else "")


def _with_gpu(found: Findings) -> str:
    shares = found.shares
    if shares.get("host", 0.0) > HOST:
        return _host(found)
    if shares.get("communication", 0.0) > COMMUNICATION:
        return (
            f"a smaller tp: GPUs exchange data for {shares['communication']:.0%} of the time at tp {found.tp}; "
            "kervan plan compares tp with more replicas, kervan comm doctor finds slow links"
        )
    if shares.get("memory", 0.0) < shares.get("compute", 0.0):
        return (
            f"less arithmetic: {found.prefill_share:.0%} of the tokens are prompts; FP8 weights, prefix caching "
            "(routing by prefix), or more replicas"
        )
    if found.cache_reading > CACHE_READING:
        return (
            f"less KV cache to read: attention over {found.context_tokens:,.0f} cached tokens a step takes "
            f"{found.cache_reading:.0%} of the time; an FP8 cache (kv_cache_dtype=fp8), shorter contexts, or more "
            "replicas"
        )
    room = f" of {found.max_streams} that fit a step" if found.max_streams else ""
    streams = plural(round(found.streams), "stream")
    return (
        f"more streams per replica: a step reads all weights for {streams}{room}; fewer replicas at the same load, or "
        "weights of fewer bits (FP8), give more tokens for the same reading"
    )


def _host(found: Findings) -> str:
    host = found.shares["host"]
    if found.is_eager:
        return f"CUDA graphs: the GPU waits for the host for {host:.0%} of the time; leave enforce_eager out"
    own = {
        name: share
        for name, share in found.host_shares.items()
        if name not in ("no work", "forward", "other", GPU_WAIT)
    }
    most = max(own, key=lambda name: own[name], default="")
    spent = f", of which most goes to {most} ({own[most]:.0%} of the loop)" if most else ""
    return (
        f"the host: the GPU waits for it for {host:.0%} of the time{spent}; async scheduling, fewer sampling "
        "parameters (logprobs, penalties, grammars), a faster core, or a larger model per replica"
    )


def _without_gpu(found: Findings) -> str:
    model = found.shares.get("forward", 0.0)
    sampling = found.shares.get("sampling", 0.0)
    if sampling > SAMPLING:
        return (
            f"sampling: it takes {sampling:.0%} of the loop on this CPU; requests without top_k, top_p, penalties and "
            "logprobs cost less"
        )
    if model > MEMORY:
        return (
            f"the model: its forward pass takes {model:.0%} of the loop on this CPU; more cores for the engine "
            "(VLLM_CPU_OMP_THREADS_BIND), a smaller model, or a GPU"
        )
    rest = {name: share for name, share in found.shares.items() if name not in ("forward", "no work", "other")}
    most = max(rest, key=lambda name: rest[name], default="")
    named = f"; most of the rest is {most} ({rest[most]:.0%})" if most else ""
    return (
        f"the host: the model takes {model:.0%} of the loop{named}; in steps of {found.step_s * 1e3:.1f} ms what "
        "surrounds it counts: more streams per step, or a larger model"
    )
