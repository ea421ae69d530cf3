"""A Ray cluster whose nodes come and go, and a fleet of twins on it, for the tests that take nodes away.

Its head has what Ray takes for a GPU, and so the gateways. Each test starts the nodes that it needs, with addresses of
its own, and they are gone when it ends. The cluster has a token and a cloud: the head's watcher asks it.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.clouds import Aws, Server, serving_beside
from harness.groups import until_group_ends
from harness.live import START_S, Fleet, Home
from harness.ray_cluster import AS_IF_GPU, SETTINGS, RayCluster, RayHome, ray_cluster
from harness.shared_fleet import Models
from harness.twin_load import STEP_S, kervan

REPLICAS, GATEWAYS = 4, 2
NAMED = ("max_model_len=2048", "served_model_name=twin")
# Ray takes a node for dead that five checks in a row do not reach: after 15 s by default. One that is only slow has 10 s
# for each.
SOON_DEAD = {"RAY_health_check_period_ms": "500"}


@dataclass(frozen=True)
class Nodes:
    """`cluster`, and on it `fleet`: four twins and two gateways, named "spread", that `joined` brought up."""

    cluster: RayCluster
    fleet: Fleet

    def on(self, node: str) -> tuple[set[str], set[str]]:
        """Ids of the fleet's replicas and gateways there."""
        status = self.fleet.status()
        replicas, gateways = ({p["id"] for p in status[kind] if p["node"] == node} for kind in ("replicas", "gateways"))
        return replicas, gateways

    @asynccontextmanager
    async def another(
        self,
        ip: str,
        *options: str,
        env: Mapping[str, str] | None = None,
        has_gateway: bool = False,
        has_directory: bool = False,
    ) -> AsyncIterator[tuple[int, int]]:
        """A node within the block, which has some replicas: (replicas, gateways) of the fleet.

        `has_gateway`: and a gateway, while another node has one too. `has_directory`: and the fleet's directory.
        """
        await asyncio.to_thread(self.cluster.start_node, ip, *options, env=env)
        replicas, gateways = REPLICAS, GATEWAYS
        try:
            there = self.on(ip)
            while not there[0] or (has_gateway and not 0 < len(there[1]) < gateways):
                # Ray puts what takes no resources where it likes.
                replicas += 0 if there[0] else 2
                gateways += 1 if has_gateway and not 0 < len(there[1]) < gateways else 0
                await kervan(self.fleet, "scale", str(replicas), "--gateways", str(gateways))
                there = self.on(ip)
            if has_directory:
                await asyncio.to_thread(self._bring_directory, ip)
            yield replicas, gateways
        finally:
            await asyncio.to_thread(self.cluster.end_node, ip)
        await kervan(self.fleet, "scale", str(REPLICAS), "--gateways", str(GATEWAYS))
        await asyncio.to_thread(self.fleet.wait_until_whole, REPLICAS, GATEWAYS)

    def _bring_directory(self, ip: str) -> None:
        words = [self.cluster.address, self.fleet.name, ip]
        done = subprocess.run(
            [sys.executable, "-c", BRING_DIRECTORY, *words], env=self.fleet.home.environment, cwd=self.fleet.home.scratch,
            capture_output=True, text=True, timeout=START_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


# Ray restarts it where it likes.
BRING_DIRECTORY = """
import sys
from kervan.serve import cluster
address, fleet, ip = sys.argv[1:]
cluster.connect(address)
import ray
from kervan.serve.directory.client import find_directory
(node,) = (node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == ip)
directory = find_directory(fleet)
while directory.node_id().result(None) != node:
    directory.kill(restarts=True)
"""


def aws_environment(server: Server, scratch: Path) -> dict[str, str]:
    """Of a node in a cloud: notices come from `server`, accounts go to `scratch`."""
    return {
        "KERVAN_NOTICES_WATCH": "aws",
        "KERVAN_NOTICES_AWS_URL": server.url,
        "KERVAN_NOTICES_AWS_PERIOD_S": "0.5",
        "KERVAN_NOTICES_STATE_FILE": f"{scratch}/account-{{node}}.json",
    }


def shell(home: Home, **variables: str) -> RayHome:
    """Another shell of the same user: its home directory is empty, and of Ray's settings it has only these."""
    return RayHome(home.scratch, home.name, ray_environment=tuple({"HOME": str(home.scratch), **variables}.items()))


@pytest.fixture(scope="session")
def nodes(request: pytest.FixtureRequest, scratch: Path, models: Models) -> Nodes:
    return until_group_ends(request.config, _nodes(scratch, models))


@contextlib.contextmanager
def _nodes(scratch: Path, models: Models) -> Iterator[Nodes]:
    config, token = scratch / "spread.yaml", scratch / "token-file"
    config.write_text(json.dumps({"engine": "twin", "gpu": "H200", "twin": {"base_s": STEP_S}}))
    token.write_text(SETTINGS["RAY_AUTH_TOKEN"] + "\n")
    with (
        serving_beside(Aws()) as server,
        ray_cluster(scratch, "nodes", *AS_IF_GPU, more=SOON_DEAD, head_env=aws_environment(server, scratch)) as cluster,
    ):
        joined = shell(cluster.home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
        options = ("--replicas", str(REPLICAS), "--gateways", str(GATEWAYS), "--address", cluster.address)
        brought_up = joined.up(models.demo, "spread", NAMED, "--config", str(config), *options)
        yield Nodes(cluster, Fleet(cluster.home, "spread", brought_up.url, brought_up.port))
        done = cluster.home.kervan("down", "--name", "spread")
        assert (done.returncode, done.stdout) == (0, "spread: stopped\n"), done.stderr
        asked = len(server.asked)
        time.sleep(2.0)
        assert len(server.asked) <= asked + 1, "the head's watcher goes on"  # one may have been under way
