"""A cluster whose autoscaler adds nodes: Ray's own, whose provider of nodes starts them on this machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.live import START_S, Fleet, eventually_async
from harness.ray_cluster import RayCluster
from harness.shared_fleet import Models
from harness.twin_load import STEP_S, kervan, load
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]

AUTOSCALER = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
}
NODES: dict[str, Any] = {
    "cluster_name": "growing",
    "max_workers": 1,
    "provider": {  # by its class: what `fake_multinode` stands for needs a file that is not in Ray's wheel
        "type": "external",
        "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__qualname__}",
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
    },
    "available_node_types": {
        FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
        "spot": {
            "resources": {"CPU": 1}, "labels": {"ray.io/market-type": "spot"}, "node_config": {}, "min_workers": 0,
            "max_workers": 1,
        },
    },
    "head_node_type": FAKE_HEAD_NODE_TYPE,
    "idle_timeout_minutes": 1000,
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "initialization_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "auth": {},
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "engine": "twin",
    "gpu": "H200",
    "twin": {"base_s": STEP_S},
    "pools": {"on-demand": "1", "spot": "0..2"},
    "policy": "ray",
    "autoscaling": {
        "target_ongoing_requests": 8, "upscale_delay_s": 0, "downscale_delay_s": 2, "look_back_period_s": 2,
        "metrics_interval_s": 1,
    },
    "gateways": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster(scratch: Path) -> Iterator[RayCluster]:
    """A head, whose autoscaler adds one spot node when something waits for it."""
    owned = RayCluster(scratch, "grow")
    config = scratch / "nodes.json"
    config.write_text(json.dumps({**NODES, "provider": {**NODES["provider"], "gcs_address": owned.address}}))
    try:
        owned.start_head("--num-cpus=2", f"--autoscaling-config={config}", env=AUTOSCALER)
        yield owned
    finally:
        owned.close()


def pools_of(fleet: Fleet) -> list[str]:
    """The pool of each replica that can be reached."""
    return sorted(labels["pool"] for labels, _ in fleet.metrics().get("kervan_replica_running", ()))


def problem(fleet: Fleet) -> str:
    """Why the directory cannot have as many replicas as it wants."""
    told: str = fleet.get("/kervan/status").json()["directory"]["scaling"]["problem"]
    return told


async def test_a_replica_without_room_is_asked_for_and_its_node_comes(
    cluster: RayCluster, models: Models, scratch: Path
) -> None:
    path = scratch / "growing.yaml"
    path.write_text(json.dumps(SETTINGS))
    arguments = ("max_model_len=2048", "served_model_name=twin")
    options = ("--config", str(path), "--address", cluster.address)
    fleet = cluster.home.up(models.demo, "growing", arguments, *options)
    async with load(fleet, models):
        # 16 streams want two replicas, and there is no node for a spot replica: fixed, the number stays as it is.
        await eventually_async(lambda: problem(fleet).startswith("2 replicas are wanted"), "no room is told", START_S)
        assert pools_of(fleet) == ["on-demand"]
        await kervan(fleet, "up", "--adds-nodes", "--address", cluster.address)
        await eventually_async(lambda: pools_of(fleet) == ["on-demand", "spot"], "the node has come", START_S)
    assert fleet.total("kervan_streams_broken_total") == 0
    assert cluster.home.kervan("down", "--name", "growing", "--address", cluster.address).returncode == 0
