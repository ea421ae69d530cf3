"""A plan as what is to be started: `kervan up`, vLLM's arguments, Ray's resources."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kervan.config import engine_arguments as owned
from kervan.facts import layout as layouts
from kervan.plan.rank import PlannedLayout
from kervan.plan.request import PlanRequest

GRAPH_STEP = 8  # vLLM's captured batches are multiples of it


@dataclass(frozen=True, slots=True)
class Launch:
    """`argv`: the command that starts it; with `vllm serve` one replica of it. `engine_args`: beside the layout.
    `bundles`: what Ray holds for each replica, a bundle per node; none with `vllm serve`. `target_ongoing_requests`:
    sequences that a replica is planned to run at once, the target of an autoscaler.
    """

    argv: tuple[str, ...]
    engine_args: Mapping[str, Any]
    replicas: int
    bundles: tuple[Mapping[str, float], ...]
    target_ongoing_requests: int

    @property
    def command(self) -> str:
        """`argv` as one line for a shell."""
        return shlex.join(self.argv)


def launch(request: PlanRequest, layout: PlannedLayout, model: str) -> Launch:
    """How to start a layout. Batch limits are explicit: vLLM guesses them from the GPU that it sees when it reads
    its configuration, which on a Ray head without a GPU is none.
    """
    size, limits = layout.layout, layout.limits
    sequences = max(GRAPH_STEP, round(layout.mean_batch))
    of_rank = max(GRAPH_STEP, round(layout.mean_batch / size.attention_dp))
    engine_args: dict[str, Any] = {
        "max_model_len": limits.max_model_len,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "max_num_seqs": min(limits.max_num_seqs, max(64, -(-2 * of_rank // GRAPH_STEP) * GRAPH_STEP)),
        **dict(request.arguments.items()),
    }
    if size.starts_with == "vllm serve":
        argv = ["vllm", "serve", model, "--data-parallel-size", str(size.attention_dp), "--enable-expert-parallel"]
        return Launch((*argv, *owned.to_argv(engine_args)), engine_args, size.dp, (), sequences)
    argv = ["kervan", "up", model, "--tp", str(size.tp)]
    argv += ["--pp", str(size.pp)] if size.pp > 1 else []
    argv += ["--ep", str(size.ep)] if size.ep > 1 else []
    argv += ["--replicas", str(size.dp)]
    for key, value in engine_args.items():
        if value is not None:  # YAML's null: vLLM's own default
            argv += ["--engine-arg", f"{key}={_text(value)}"]
    nodes = layouts.nodes_per_replica(size, request.gpus_per_node)
    bundle = {"GPU": float(size.gpus_per_replica // nodes)}
    return Launch(tuple(argv), engine_args, size.dp, (bundle,) * nodes, sequences)


def _text(value: Any) -> str:
    """A value as `--engine-arg` reads it."""
    return json.dumps(value) if isinstance(value, bool | Mapping | list | tuple) else str(value)
