"""Short work on a node of the cluster, beside what runs there."""

from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kervan.errors import FleetError


def on_node(node_ids: dict[str, str], ip: str, work: Callable[..., Any], *args: Any) -> Any:
    """`work(*args)` in a process on a node: a reference to what it returns. None when the node has gone."""
    node_id = node_ids.get(ip)
    if node_id is None:
        return None
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(work).options(num_cpus=0, max_retries=0, scheduling_strategy=where)
    return task.remote(*args)


def result(task: Any, timeout_s: float, what: str) -> Any:
    """Raises: FleetError when there is none in time, with what the task raised."""
    if task is None:
        raise FleetError(f"{what}: its node has gone")
    try:
        return ray.get(task, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        ray.cancel(task, force=True)
        raise FleetError(f"{what} did not answer in {timeout_s:.0f} s") from error
    except ray.exceptions.RayTaskError as error:
        raise FleetError(str(error.cause if error.cause is not None else error).strip().splitlines()[-1]) from error
    except ray.exceptions.RayError as error:
        raise FleetError(f"{what}: {str(error).splitlines()[0]}") from error
