"""What is to be planned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kervan.config.workload import Lengths, Slo, TraceRow
from kervan.errors import ConfigError
from kervan.facts.architecture import ModelSpec
from kervan.facts.hardware import Gpu
from kervan.plan.calibration import PRIOR, Calibration

Goal = Literal["cost", "throughput", "latency"]
NETWORK_BYTES_S = 50e9  # between nodes, each GPU, when nobody says: 400 Gbit/s


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What is to be planned. One of `concurrency` (streams of a closed loop, over the whole plan) and `rate` (requests
    per second, Poisson) or `trace`; without any, each layout is loaded as far as the SLO allows.

    `counts_gpus`: `gpus` are those of the largest replica, and each layout gets as many copies as keep the SLO at the
    rate. `prefix_hit`: share of the prompt tokens that the prefix cache has. `fixed`: sizes of the layout that are
    given (tp, pp, dp, ep, attention_dp). `frontends`: API server processes per replica, or gateways. `usd_per_gpu_h`,
    `spot_usd_per_gpu_h`: None when no price is known. `network_bytes_s`: between nodes, each GPU.

    `spec` is the model as it is served: with `quantization=fp8` among the arguments, in FP8 (`sim.limits.as_served`).

    Raises: ConfigError for GPUs that do not divide over the nodes, two loads, GPUs to be counted for no rate, or
    hits in a prefix cache that is off.
    """

    spec: ModelSpec
    gpu: Gpu
    gpus: int = 8
    nodes: int = 1
    counts_gpus: bool = False
    isl: Lengths
    osl: Lengths
    concurrency: int | None = None
    rate: float | None = None
    trace: Sequence[TraceRow] = ()
    prefix_hit: float = 0.0
    slo: Slo = field(default_factory=Slo)
    goal: Goal = "cost"
    usd_per_gpu_h: float | None = None
    spot_usd_per_gpu_h: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)
    calibration: Calibration = PRIOR
    frontends: int = 1
    network_bytes_s: float = NETWORK_BYTES_S

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise ConfigError(
                f"{self.gpus} GPUs do not divide evenly over {self.nodes} nodes; give --gpus as a multiple of --nodes"
            )
        if self.concurrency is not None and self.rate is not None:
            raise ConfigError("--concurrency is a closed loop and --rate an open one; give one of them")
        if self.counts_gpus and (self.rate is None or self.slo == Slo()):
            raise ConfigError("how many GPUs are needed depends on --rate and --slo; give both, or --gpus")
        if self.prefix_hit and str(self.arguments.get("enable_prefix_caching")).lower() == "false":
            raise ConfigError(
                f"--prefix-hit {self.prefix_hit:g} is a share found in the prefix cache, and engine argument "
                "enable_prefix_caching=false turns that off; leave one of both out"
            )

    @property
    def gpus_per_node(self) -> int:
        """GPUs of each node; all nodes have the same number."""
        return self.gpus // self.nodes

    @property
    def has_load(self) -> bool:
        """Whether it says how many requests come; else each layout gets as many as it takes."""
        return self.concurrency is not None or self.is_open

    @property
    def is_open(self) -> bool:
        """Whether requests come at times of their own."""
        return self.rate is not None or bool(self.trace)
