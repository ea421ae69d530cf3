"""Fleets that are not on kervan's own Ray, or not behind their own ports: a running cluster, and Serve's HAProxy."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from live import SMALL, Fleet, Home, Take, eventually, free_port, take_chat

from kervan.demo import PAIRS

QUESTION, ANSWER = next(iter(PAIRS.items()))


@dataclass(frozen=True)
class RayHome(Home):
    """A place whose commands know a Ray cluster's token and settings, as its owner's shell would."""

    ray_environment: tuple[tuple[str, str], ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, **dict(self.ray_environment)}


def ray(home: Home, *words: str) -> str:
    program = Path(sys.executable).with_name("ray")
    done = subprocess.run(
        [program, *words], env=home.environment, cwd=home.scratch, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def cluster(scratch: Path) -> Iterator[tuple[RayHome, str]]:
    """A Ray cluster of one node as its owner starts it, with HAProxy; and its address."""
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "owner-" * 8,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    home = RayHome(scratch, "guest", tuple(settings.items()))
    port, place = free_port(), scratch / "r"
    program = Path(sys.executable).with_name("ray")
    words = [f"--port={port}", "--include-dashboard=false", "--object-store-memory=100000000", f"--temp-dir={place}"]
    with (scratch / "cluster.log").open("w") as log:
        head = subprocess.Popen(
            [program, "start", "--head", "--block", *words],
            env=home.environment,
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        eventually(lambda: is_listening(port) or head.poll() is not None, "the cluster listens", 60)
        yield home, f"127.0.0.1:{port}"
    finally:  # not by `ray stop`, which ends every Ray of this machine
        parts = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        parts += [p for p in psutil.process_iter(["cmdline"]) if str(place) in " ".join(p.info["cmdline"] or ())]
        head.terminate()
        _, alive = psutil.wait_procs(parts, timeout=20)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        head.wait(10)


def is_listening(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


async def test_running_cluster(cluster: tuple[RayHome, str], models: Any) -> None:
    """Guests on a cluster, one behind Serve's entry, one on its own port: up, an answer, down; the cluster stays."""
    home, address = cluster
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
    assert "Resources" in ray(home, "status", "--address", address)


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


@pytest.mark.parametrize("address", ["127.0.0.1:{free}", "nohost.invalid:6379", "ray://127.0.0.1:10001", "here"])
def test_address_without_a_cluster(home: Home, models: Any, address: str) -> None:
    """Told within seconds; Ray alone takes two minutes."""
    address = address.format(free=free_port())
    done = home.kervan("up", str(models.demo), "--address", address, "--name", "nowhere", timeout_s=60)
    assert done.returncode == 1
    assert re.match(r"error: .*--address", done.stderr.splitlines()[-1])
    assert address in done.stderr
    assert not Path(os.fspath(home.path), "fleets", "nowhere.json").exists()
