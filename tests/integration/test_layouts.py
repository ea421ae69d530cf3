"""Replicas of more than one worker: on one node, and over several."""

import asyncio
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness.live import ENVIRONMENT, REQUEST_S, SMALL, START_S, Fleet, Home, eventually, is_alive
from harness.ray_cluster import SECOND, RayCluster, ray_cluster
from harness.shared_fleet import Models
from harness.undisturbed import answers_undisturbed, under_load

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]

NUM_STREAMS = 4


@pytest.fixture
def pair(home: Home, models: Models, fleet: Fleet) -> Iterator[Fleet]:
    """One replica of two workers that share each layer; what they shared is gone with it. Beside `fleet`: on its Ray."""
    sockets_before = sockets_in(home)
    running = home.up(
        models.demo, "tensor", (*SMALL, "max_model_len=1024", "served_model_name=tiny"), "--tp", "2", "--gateways", "1"
    )
    shared = shared_by_workers(running)
    assert shared
    yield running
    shared |= shared_by_workers(running)
    assert home.kervan("down", "--name", "tensor").returncode == 0
    eventually(lambda: not any(path.exists() for path in shared), f"{shared} are gone", 30)
    eventually(lambda: sockets_in(home) <= sockets_before, "no socket of the fleet is left", 10)


def sockets_in(home: Home) -> set[Path]:
    """Sockets directly in the directory for such things."""
    return {path for path in home.scratch.iterdir() if path.is_socket()}


def shared_by_workers(fleet: Fleet) -> set[Path]:
    """Shared memory of Python's making that the fleet's engines and their workers have open; other tests have theirs."""
    pids = [pid for engine in fleet.pids() for pid in (engine, *workers(engine))]
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in pids]
    return {Path(name) for text in maps for name in re.findall(r"/dev/shm/psm_\w+", text)}


def workers(engine_pid: int) -> list[int]:
    """Its children but Python's resource tracker.

    By their titles they cannot be told for sure: setproctitle does nothing where the first variable of the environment
    was set anew, and Ray hands the variables on in any order.
    """
    children = psutil.Process(engine_pid).children(recursive=True)
    return [p.pid for p in children if "resource_tracker" not in " ".join(p.cmdline())]


async def test_half_of_a_tensor_parallel_group_dies(pair: Fleet) -> None:
    """The whole replica is replaced; streams wait, since there is no other, and go on where they were."""
    expected = await answers_undisturbed(pair)
    await asyncio.to_thread(pair.wait_until_whole, 1, 1)
    (engine,) = pair.pids()
    both = workers(engine)
    assert len(both) == 2, [p.cmdline() for p in psutil.Process(engine).children(recursive=True)]
    async with under_load(pair, expected, NUM_STREAMS) as load:
        os.kill(both[1], signal.SIGKILL)
        await load.finish()
    load.assert_whole(expected)
    assert pair.total("kervan_streams_moved_total") > 0
    assert not is_alive(engine)
    assert not any(is_alive(worker) for worker in both)
    await asyncio.to_thread(pair.wait_until_whole, 1, 1)


@pytest.fixture
def cluster(scratch: Path) -> Iterator[RayCluster]:
    # The log monitor brings what stages print into their replica's log.
    node = ("--num-cpus=1", "--include-log-monitor=true")
    with ray_cluster(scratch, "stages", *node, second=node) as owned:
        yield owned


@pytest.mark.exhaustive
def test_stages_are_on_nodes_of_their_own(cluster: RayCluster, models: Models) -> None:
    """Each of two nodes gets a stage. vLLM's CPU backend dies at their first step: that is told, and all is undone."""
    address = ("--address", cluster.address)
    eventually(lambda: "0.0/2.0 CPU" in cluster.status(), "two nodes", START_S)
    home, name = cluster.home, ("--name", "stages")
    refused = home.kervan("up", str(models.demo), *name, *address, "--tp", "2", "--nodes-per-replica", "2")
    assert refused.returncode == 2
    assert "nodes_per_replica=2 does not divide pp=1: a stage is whole on one node" in refused.stderr
    refused = home.kervan("up", str(models.demo), *name, *address, "--tp", "2")
    assert refused.returncode == 1
    assert "the tp=2 that share each layer must be on one node; the largest node has 1" in refused.stderr
    ended = []
    arguments = [word for argument in (*SMALL, "max_model_len=256") for word in ("--engine-arg", argument)]
    up = threading.Thread(
        target=lambda: ended.append(
            home.kervan("up", str(models.demo), *name, *address, "--pp", "2", "--detach", *arguments, *ENVIRONMENT)
        )
    )  # fmt: skip
    up.start()

    def nodes() -> list[str]:
        done = home.kervan("status", *name, *address, "--json", timeout_s=REQUEST_S)
        replicas = json.loads(done.stdout)["replicas"] if done.returncode == 0 else []
        return replicas[0]["nodes"] if replicas else []

    found = eventually(nodes, "a replica has its nodes", START_S)
    assert len(found) == 2
    assert SECOND in found
    up.join(START_S)
    assert ended[0].returncode == 1
    assert "loses a request between pipeline stages" in ended[0].stderr
    assert "--pp 1" in ended[0].stderr
    eventually(lambda: "0.0/2.0 CPU" in cluster.status(), "the cores are free again", START_S)
    started = stage_workers(home)
    assert started
    eventually(lambda: not any(map(is_alive, started)), "no worker is left", START_S)


def stage_workers(home: Home) -> set[int]:
    """Workers that Ray started for vLLM, on either node, as replicas' logs name them: what both say may be there once."""
    logs = "".join(log.read_text() for log in (home.path / "logs").glob("stages-on-demand-*.log"))
    return {int(pid) for pid in re.findall(r"\(StageWorker pid=(\d+)", logs)}
