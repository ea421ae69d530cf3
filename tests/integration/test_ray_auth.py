"""Ray's token authentication as users set it: a cluster with a token that is joined, and the Ray that kervan starts."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness.live import Fleet, Home
from harness.ray_cluster import SETTINGS, RayCluster, RayHome, ray_cluster
from harness.shared_fleet import Models

from kervan.ports import free_port

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(900)]

TWINS = ("--engine", "twin", "--gpu", "H200", "--gateways", "1")
NAMED = ("max_model_len=2048", "served_model_name=twin")
TOKEN = SETTINGS["RAY_AUTH_TOKEN"]


@pytest.fixture(scope="module")
def cluster(scratch: Path) -> Iterator[RayCluster]:
    with ray_cluster(scratch, "token") as owned:
        yield owned


def shell(home: Home, **variables: str) -> RayHome:
    """Another shell of the same user: its home directory is empty, and of Ray's settings it has only these."""
    return RayHome(home.scratch, home.name, ray_environment=tuple({"HOME": str(home.scratch), **variables}.items()))


def assert_answers(fleet: Fleet) -> None:
    body = {"model": "twin", "prompt": "Hello", "max_tokens": 3}
    answer = httpx.post(f"{fleet.url}/v1/completions", json=body, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 3


def fails(home: Home, *words: str) -> str:
    """The one line of a command's error; `kervan status` shows what the fleet's gateway knows besides."""
    done = home.kervan(*words, timeout_s=120)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    line = done.stderr
    assert "ray get-auth-token" in line or "set RAY_AUTH_MODE=token, which sends that in " in line
    return line


def test_a_cluster_with_a_token(cluster: RayCluster, models: Models, scratch: Path) -> None:
    """Joined with the token from a file; other shells give it in another way, or are told how, and end nothing."""
    file = scratch / "token-file"
    file.write_text(TOKEN + "\n")
    with_file = shell(cluster.home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(file))
    fleet = with_file.up(models.demo, "joined", NAMED, *TWINS, "--address", cluster.address)
    assert_answers(fleet)

    without = shell(cluster.home)
    name = ("--name", "joined")
    for words in (("status",), ("scale", "2"), ("down",)):
        assert "requires a token, and without RAY_AUTH_MODE none is sent" in fails(without, *words, *name)
    assert without.fleets() == ["joined"]
    unsent = shell(cluster.home, RAY_AUTH_TOKEN=TOKEN)
    assert "set RAY_AUTH_MODE=token, which sends that in RAY_AUTH_TOKEN" in fails(unsent, "status", *name)
    wrong = shell(cluster.home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="another")
    assert "the token in RAY_AUTH_TOKEN is not that of the Ray cluster at" in fails(wrong, "status", *name)
    missing = shell(cluster.home, RAY_AUTH_MODE="token")
    assert "but there is no token for the Ray cluster at" in fails(missing, "down", *name)

    assert [replica["state"] for replica in fleet.status()["replicas"]] == ["ready"]
    done = cluster.home.kervan("down", *name)
    assert (done.returncode, done.stdout) == (0, "joined: stopped\n"), done.stderr


def test_the_ray_that_kervan_starts_has_a_token_of_its_own(models: Models, scratch: Path) -> None:
    """Whatever the settings of the user's own clusters are, and without a home directory; nobody else gets in."""
    file = scratch / "a-file"
    file.touch()
    settings: dict[str, Any] = {
        "HOME": str(file), "RAY_AUTH_MODE": "nonsense", "RAY_AUTH_TOKEN_PATH": "/nowhere", "RAY_AUTH_TOKEN": "",
        "RAY_ENABLE_K8S_TOKEN_AUTH": "true",
    }  # fmt: skip
    home = shell(Home(scratch, "own"), **settings)
    fleet = home.up(models.demo, "own", NAMED, *TWINS)
    try:
        assert_answers(fleet)
        address = json.loads((home.path / "local_ray.json").read_text())["address"]
        later = shell(home, RAY_AUTH_MODE="disabled")
        assert [replica["state"] for replica in dataclasses.replace(fleet, home=later).status()["replicas"]] == [
            "ready"
        ]
        other = shell(Home(scratch, "other"))
        assert "requires a token" in fails(other, "status", "--name", "own", "--address", address)
        up = ("up", str(models.demo), *TWINS, "--port", str(free_port()), "--address", address)
        assert "requires a token" in fails(other, *up)
    finally:
        done = home.kervan("down", "--name", "own")
    assert (done.returncode, done.stdout) == (0, "own: stopped with Ray\n"), done.stderr
