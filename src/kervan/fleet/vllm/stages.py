"""Pipeline stages on several nodes: vLLM's Ray executor in a placement group that kervan's replica holds.

vLLM takes one bundle per GPU, which lets Ray cut a tensor-parallel group in two. Here a bundle is everything the
replica has on one node, so a group is whole by construction; and nothing is placed inside of something else that is
still to be placed, which is how ray#59064 locks up.
"""

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2

from kervan.fleet.control import WorkerPlacement


def join(placement: WorkerPlacement, vllm_config: VllmConfig) -> None:
    """Connect this process to Ray as a driver, and let `StagesExecutor` use the placement group.

    Ray ends the workers when this process ends, on whatever node they are.
    """
    ray.init(address=placement.ray_address, namespace="kervan", logging_level="warning")
    group = PlacementGroup(ray.PlacementGroupID.from_hex(placement.group_id))
    vllm_config.parallel_config.placement_group = group
    nodes = placement_group_table(group)["bundles_to_node_id"]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    workers = [
        (bundle, nodes[bundle], addresses[nodes[bundle]])
        for bundle in placement.bundles
        for _ in range(placement.workers_per_bundle)
    ]
    # The names through which vLLM's executor finds its cluster, its places and its workers; same in 0.24 and 0.32.
    ray_executor_v2.initialize_ray_cluster = lambda *_args, **_kwargs: None
    ray_executor_v2.get_bundles_sorted_by_node = lambda _group: workers
    ray_executor_v2.RayWorkerProc = StageWorker


class StageWorker(ray_executor_v2.RayWorkerProc):  # type: ignore[misc]
    """vLLM's worker, on CPUs too, which Ray does not number."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        if current_platform.is_cpu():
            return ray.get_runtime_context().get_node_id(), []
        node_and_gpus: tuple[str, list[int]] = super().get_node_and_physical_gpu_ids()
        return node_and_gpus


class StagesExecutor(ray_executor_v2.RayExecutorV2):  # type: ignore[misc]
    """vLLM's Ray executor over the bundles given to `join`."""

    @staticmethod
    def _get_actor_resource_kwargs() -> dict[str, Any]:
        return {} if current_platform.is_cpu() else {"num_gpus": 1}
