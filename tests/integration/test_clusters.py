"""Fleets that are not on kervan's own Ray, or not behind their own ports: a running cluster, and Serve's HAProxy."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness.live import SMALL, Fleet, Home, Take, eventually, take_chat
from harness.ray_cluster import RayCluster, ray_cluster

from kervan.demo import PAIRS
from kervan.ports import free_port
from kervan.serve.ray_internals import DRAINING_VARIABLE, HAPROXY_PORT_VARIABLES, HAPROXY_VARIABLE

QUESTION, ANSWER = next(iter(PAIRS.items()))


@pytest.fixture(scope="module")
def cluster(scratch: Path) -> Iterator[RayCluster]:
    """A Ray cluster of one node as its owner starts it, with HAProxy."""
    ports = {name: str(free_port()) for name in HAPROXY_PORT_VARIABLES}
    # An owner without balancers of his own; else each `kervan down` waits for them for 30 s.
    more = {HAPROXY_VARIABLE: "1", DRAINING_VARIABLE: "3", **ports}
    with ray_cluster(scratch, "guest", more=more) as owned:
        yield owned


async def test_running_cluster(cluster: RayCluster, models: Any) -> None:
    """Guests on a cluster, one behind Serve's entry, one on its own port: up, an answer, down; the cluster stays."""
    home, address = cluster.home, cluster.address
    known = home.ray_directories()
    arguments = (*SMALL, "max_model_len=512", "served_model_name=tiny")
    behind = home.up(models.demo, "behind", arguments, "--address", address, "--ingress", "serve")
    assert behind.url == f"http://127.0.0.1:{behind.port}"
    await assert_answers(behind)
    for words in (("status", "--json"), ("status", "--json", "--address", address)):
        done = home.kervan(*words, "--name", "behind")
        assert done.returncode == 0, done.stderr
        assert [r["state"] for r in json.loads(done.stdout)["replicas"]] == ["ready"]
    assert_refused_entry(home, models, address, "fleet 'behind' has the one entry")

    beside = home.up(models.demo, "beside", arguments, "--address", address)
    await assert_answers(beside)
    await assert_answers(behind)
    for fleet in (behind, beside):
        done = home.kervan("down", "--name", fleet.name)
        assert (done.returncode, done.stdout) == (0, f"{fleet.name}: stopped\n"), done.stderr
    eventually(lambda: refuses(beside), "the port is free", 60)
    assert_refused_entry(home, models, address, f"Serve listens on port {behind.port} of this cluster already")
    assert (home.fleets(), home.ray_directories()) == ([], known)
    assert "Resources" in cluster.ray("status", "--address", address)


async def assert_answers(fleet: Fleet) -> None:
    async with httpx.AsyncClient(base_url=fleet.url, timeout=60) as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        take = await take_chat(client, Take(), body)
    assert (take.error, take.text, take.finish_reason) == ("", ANSWER, "stop")
    assert take.num_pieces > 1
    assert fleet.get("/health/ready").status_code == 200


def assert_refused_entry(home: Home, models: Any, address: str, reason: str) -> None:
    words = ("--name", "second", "--address", address, "--ingress", "serve", "--port", str(free_port()), "--detach")
    done = home.kervan("up", str(models.demo), *words)
    assert done.returncode == 1
    assert reason in done.stderr.splitlines()[-1]
    assert "--ingress direct" in done.stderr


def refuses(fleet: Fleet) -> bool:
    try:
        httpx.get(fleet.url + "/health", timeout=5)
    except httpx.TransportError:
        return True
    return False


@pytest.mark.parametrize(
    ("address", "status"),
    [("127.0.0.1:{free}", 1), ("nohost.invalid:6379", 1), ("ray://127.0.0.1:10001", 2), ("here", 2)],
)
def test_address_without_a_cluster(home: Home, models: Any, address: str, status: int) -> None:
    """Told within seconds; Ray alone takes two minutes."""
    address = address.format(free=free_port())
    done = home.kervan("up", str(models.demo), "--address", address, "--name", "nowhere", timeout_s=60)
    assert done.returncode == status
    assert re.match(r"error: .*--address", done.stderr.splitlines()[-1])
    assert address in done.stderr
    assert not Path(os.fspath(home.path), "fleets", "nowhere.json").exists()
