"""Ray's token authentication as users set it: a cluster with a token that is joined, and the Ray that kervan starts."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness.live import Fleet, Home
from harness.ray_cluster import SETTINGS
from harness.shared_fleet import Models
from harness.shared_nodes import Nodes, shell

from kervan.ports import free_port

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(900)]

TWINS = ("--engine", "twin", "--gpu", "H200", "--gateways", "1")
NAMED = ("max_model_len=2048", "served_model_name=twin")
TOKEN = SETTINGS["RAY_AUTH_TOKEN"]


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


def test_a_cluster_with_a_token(nodes: Nodes) -> None:
    """Joined with the token from a file; other shells give it in another way, or are told how, and end nothing."""
    fleet, home, name = nodes.fleet, nodes.cluster.home, ("--name", nodes.fleet.name)
    assert_answers(fleet)
    before = fleet.status()

    without = shell(home)
    for words in (("status",), ("scale", "2"), ("down",)):
        assert "requires a token, and without RAY_AUTH_MODE none is sent" in fails(without, *words, *name)
    assert without.fleets() == [fleet.name]
    unsent = shell(home, RAY_AUTH_TOKEN=TOKEN)
    assert "set RAY_AUTH_MODE=token, which sends that in RAY_AUTH_TOKEN" in fails(unsent, "status", *name)
    wrong = shell(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="another")
    assert "the token in RAY_AUTH_TOKEN is not that of the Ray cluster at" in fails(wrong, "status", *name)
    missing = shell(home, RAY_AUTH_MODE="token")
    assert "but there is no token for the Ray cluster at" in fails(missing, "down", *name)

    after = fleet.status()
    assert {replica["state"] for replica in after["replicas"]} == {"ready"}
    assert [replica["id"] for replica in after["replicas"]] == [replica["id"] for replica in before["replicas"]]
    assert after["target_replicas"] == before["target_replicas"]


def test_the_ray_that_kervan_starts_has_a_token_of_its_own(models: Models, scratch: Path) -> None:
    """Whatever the settings of the user's own clusters are, and without a home directory; nobody else gets in."""
    file = scratch / "a-file"
    file.touch()
    settings: dict[str, Any] = {
        "HOME": str(file), "RAY_AUTH_MODE": "nonsense", "RAY_AUTH_TOKEN_PATH": "/nowhere", "RAY_AUTH_TOKEN": "",
        "RAY_ENABLE_K8S_TOKEN_AUTH": "true",
    }  # fmt: skip
    home = shell(Home(scratch, "own"), **settings)
    # The gateway's own home is as ever: what differs in its environment has vLLM imported once more.
    fleet = home.up(models.demo, "own", NAMED, *TWINS, "--env", f"HOME={os.environ['HOME']}")
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
