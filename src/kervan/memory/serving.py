"""The memory of a serving engine: what the planner's model gives each part, beside what vLLM's log reports."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kervan.errors import ConfigError
from kervan.facts.hardware import Gpu
from kervan.sim.limits import EngineLimits
from kervan.sim.memory import GRAPHS_V1_GIB, MemoryEstimate
from kervan.vendor.vllm_names import GRAPHS_LINE, KV_CACHE_LINE, KV_TOKENS_LINE, WEIGHTS_LINE

# The largest of vLLM 0.24's reports of captured graphs in benchmarks/records/planner-points-2xh100-2026-11-25.json, and
# what a driver and its display or monitoring keep of an idle GPU.
GRAPHS_GIB = 0.83
IDLE_GIB = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What a log of vLLM says, of one GPU; None for lines that it does not have."""

    weights_gib: float | None = None
    kv_gib: float | None = None
    kv_tokens: int | None = None
    graphs_gib: float | None = None


def read_log(path: Path) -> Reported:
    """The first of each line: ranks of a replica report the same. Raises: ConfigError for a log without any."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise ConfigError(f"--log {path} cannot be read: {error.strerror}") from error
    weights, kv, tokens, graphs = (
        pattern.search(text) for pattern in (WEIGHTS_LINE, KV_CACHE_LINE, KV_TOKENS_LINE, GRAPHS_LINE)
    )
    if weights is None and kv is None:
        raise ConfigError(
            f"--log {path} has no line of vLLM's about memory ('Model loading took', 'Available KV cache "
            "memory'); give "
            "the log of a replica that has started, like ~/.kervan/logs/NAME.log"
        )
    return Reported(
        weights_gib=float(weights["gib"]) if weights else None,
        kv_gib=float(kv["gib"]) if kv else None,
        kv_tokens=int(tokens["tokens"].replace(",", "")) if tokens else None,
        graphs_gib=float(graphs["gib"]) if graphs else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How one GPU is divided, in GiB. `left_gib`: outside of what vLLM may use."""

    total_gib: float
    budget_gib: float
    weights_gib: float
    workspace_gib: float
    context_gib: float
    kv_gib: float
    kv_tokens: int
    left_gib: float
    graphs_gib: float
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {name: getattr(self, name) for name in self.__slots__}


def share(memory: MemoryEstimate, gpu: Gpu, limits: EngineLimits) -> Share:
    """What `gpu_memory_utilization` divides, and whether what it leaves is enough.

    vLLM measures weights, the peak of a profiled step and the CUDA context, and gives the rest of its budget to the KV
    cache. CUDA graphs are captured after that: model runner V1 counts an estimate of them, V2 does not.
    """
    utilization = limits.gpu_memory_utilization
    left = gpu.memory_gib * (1 - utilization)
    graphs = GRAPHS_GIB if limits.is_runner_v2 else max(0.0, GRAPHS_GIB - GRAPHS_V1_GIB)
    needed = graphs + IDLE_GIB
    if not memory.fits:
        verdict = f"does not start: {-memory.kv_gib:.1f} GiB are missing for weights and workspace alone"
    elif left < needed:
        most = int(100 * (1 - needed / gpu.memory_gib)) / 100
        verdict = (
            f"may fail: {left:.1f} GiB are left, and CUDA graphs ({graphs:.2f} GiB, captured after the KV "
            "cache) and an idle "
            f"GPU's own use ({IDLE_GIB} GiB) need {needed:.1f}; gpu_memory_utilization={most:g} leaves that"
        )
    else:
        verdict = f"{left - needed:.1f} GiB more than CUDA graphs and an idle GPU's own use need are left"
    return Share(
        total_gib=gpu.memory_gib, budget_gib=gpu.memory_gib * utilization, weights_gib=memory.weights_gib,
        workspace_gib=memory.activations_gib, context_gib=memory.overhead_gib, kv_gib=memory.kv_gib,
        kv_tokens=memory.kv_tokens, left_gib=left, graphs_gib=graphs, verdict=verdict,
    )  # fmt: skip


def off_by(found: Share, reported: Reported) -> dict[str, float]:
    """The model's errors, as shares of what vLLM reported."""
    pairs = {
        "weights": (found.weights_gib, reported.weights_gib),
        "kv_cache": (found.kv_gib, reported.kv_gib),
        "kv_tokens": (found.kv_tokens, reported.kv_tokens),
    }
    return {name: ours / theirs - 1 for name, (ours, theirs) in pairs.items() if theirs}
