"""The preflight of a replica: in its own reservation, on each of its nodes, before its engine starts."""

import asyncio
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kervan.comm import preflight
from kervan.config.fleet import FleetConfig
from kervan.errors import EngineError
from kervan.fleet.control import WorkerPlacement
from kervan.ports import free_port
from kervan.ranks.rank import Nodes

PLACE_S = 60.0  # until Ray has a process for a task


def is_needed(config: FleetConfig) -> bool:
    """Whether a replica has several ranks that must reach each other; those of twins do not exist."""
    return config.preflight and config.engine == "vllm" and config.world_size > 1


async def problem(config: FleetConfig, placement: WorkerPlacement | None, *, is_on_cpu: bool) -> str:
    """Why a replica may not start here, in one line that names the host; empty if it may."""
    if placement is None:
        return await asyncio.to_thread(_problem_here, config.world_size, not is_on_cpu, dict(config.env), Nodes())
    return await asyncio.to_thread(_problem_on_nodes, config, placement, not is_on_cpu)


def _problem_here(num_ranks: int, on_gpu: bool, env: dict[str, str], nodes: Nodes) -> str:
    try:
        preflight.run(num_ranks=num_ranks, on_gpu=on_gpu, nodes=nodes, env=env)
    except EngineError as error:
        return str(error)
    return ""


def _problem_on_nodes(config: FleetConfig, placement: WorkerPlacement, on_gpu: bool) -> str:
    """A task in each bundle starts that node's ranks; the bundle's GPUs are free again when it has ended."""
    group = PlacementGroup(ray.PlacementGroupID.from_hex(placement.group_id))
    rendezvous = f"{ray.util.get_node_ip_address()}:{free_port()}"
    each = placement.workers_per_bundle
    resources: dict[str, Any] = {"num_gpus": each, "num_cpus": 0} if on_gpu else {"num_cpus": each}
    tasks = []
    for number, bundle in enumerate(placement.bundles):
        where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        start = ray.remote(_problem_here).options(scheduling_strategy=where, max_retries=0, **resources)
        nodes = Nodes(len(placement.bundles), number, rendezvous)
        tasks.append(start.remote(each, on_gpu, dict(config.env), nodes))
    done, late = ray.wait(tasks, num_returns=len(tasks), timeout=preflight.FOR_S + PLACE_S)
    if late:
        for task in late:
            ray.cancel(task, force=True)
        return (
            f"the preflight did not end on {len(late)} of {len(tasks)} nodes of the replica in "
            f"{preflight.FOR_S + PLACE_S:.0f} s; look at their load and ray status; --no-preflight goes without"
        )
    return next(filter(None, ray.get(done)), "")
