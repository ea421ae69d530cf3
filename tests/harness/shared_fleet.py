"""One fleet of vLLM replicas, shared by all tests that want one; models are made once and kept."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from harness.groups import until_group_ends
from harness.live import SMALL, Fleet, Home, eventually, is_alive
from harness.places import REPOSITORY
from kervan.demo import make_demo_model, make_embedding_model, make_lora_adapter
from kervan.fleet.fork_server import locked

FLEET_ARGS = (
    *SMALL,
    "max_model_len=2048",
    "served_model_name=tiny",
    "enable_auto_tool_choice=true",
    "tool_call_parser=hermes",
    "enable_lora=true",
)


@dataclass(frozen=True)
class Models:
    """Directories beside the demo's own model, which are made once and found again."""

    demo: Path
    embedding: Path
    adapter: Path


@pytest.fixture(scope="session")
def models() -> Models:
    place = REPOSITORY / ".demo"
    place.mkdir(exist_ok=True)
    with locked(place / "lock"):  # tests of two processes may want them at once
        demo = softened(make_demo_model(place / "model"), place / "soft")
        return Models(demo, make_embedding_model(place / "embedding"), make_lora_adapter(demo, place / "adapter"))


def softened(model: Path, directory: Path) -> Path:
    """A copy of the demo's model whose logits are a quarter: greedy answers stay, and sampling finds others too.

    The demo's own is so sure of its answers that every seed gives the same one.
    """
    source = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    marker = directory / "softened-from"
    if marker.is_file() and marker.read_text() == source:
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(model, directory)
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    norm = json.loads(content[8:begin])["model.norm.weight"]
    assert norm["dtype"] == "BF16"
    first, end = (begin + offset for offset in norm["data_offsets"])
    weights = np.frombuffer(content, np.uint16, count=(end - first) // 2, offset=first)
    weights -= 2 << 7  # two less in the exponent of BF16
    path.write_bytes(content)
    marker.write_text(source)
    return directory


@pytest.fixture(scope="session")
def home(scratch: Path) -> Home:
    return Home(scratch)


@pytest.fixture(scope="session")
def fleet(request: pytest.FixtureRequest, home: Home, models: Models) -> Fleet:
    """Two replicas and two gateways of the demo model, named "main"."""
    return until_group_ends(request.config, vllm_replicas(home, models))


@contextlib.contextmanager
def vllm_replicas(home: Home, models: Models) -> Iterator[Fleet]:
    """Two replicas and two gateways of the demo model, named "main"; nothing is left after `kervan down`."""
    arguments = (*FLEET_ARGS, f'lora_modules=["adapter={models.adapter}"]')
    running = home.up(models.demo, "main", arguments, "--replicas", "2", "--gateways", "2")
    yield running
    pids = [*running.pids(), *running.gateway_pids().values()]
    done = home.kervan("down", "--name", "main")
    assert (done.returncode, done.stdout) == (0, "main: stopped with Ray\n"), done.stderr
    assert home.fleets() == []
    assert home.ray_directories() == []
    eventually(lambda: not any(map(is_alive, pids)), f"processes {pids} are gone", 10)


@pytest.fixture
def whole_fleet(fleet: Fleet) -> Fleet:
    """The shared fleet once it has recovered from whatever a test before did to it."""
    if fleet.status()["target_replicas"] != 2:  # a test failed between two scalings
        assert fleet.home.kervan("scale", "2", "--name", fleet.name).returncode == 0
    fleet.wait_until_whole()
    return fleet
