"""The warm process of tests that start engines and gateways without Ray: it imports vLLM once for all of them."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from harness.groups import until_group_ends
from harness.places import TESTS
from harness.sleeping_rank_names import VARIABLE

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",  # as for every fleet with `otlp`
}


@dataclass(frozen=True)
class WarmPlace:
    """Where its socket is, and the environment in which it forks: in another one it would be another process.

    A rank of `sleeping_rank` sleeps from `fall_asleep` to `wake`.
    """

    directory: str
    environment: dict[str, str]

    def fall_asleep(self) -> None:
        Path(self.environment[VARIABLE]).touch()

    def wake(self) -> None:
        Path(self.environment[VARIABLE]).unlink(missing_ok=True)


@contextlib.contextmanager
def place_of_servers() -> Iterator[WarmPlace]:
    """A directory for fork servers, which end with the block."""
    directory = tempfile.mkdtemp(prefix="kt-")
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    more = {"PYTHONPATH": paths, VARIABLE: f"{directory}/sleep"}
    # vLLM, once imported here, changes the environment, and pytest does so for each test.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    yield WarmPlace(directory, {**kept, **SETTINGS, **more})
    for process in psutil.process_iter(["cmdline"]):
        if any(directory in word for word in process.info["cmdline"] or ()):
            process.kill()


@pytest.fixture(scope="session")
def warm_place(request: pytest.FixtureRequest) -> WarmPlace:
    """Whichever test is the first has the server import vLLM."""
    return until_group_ends(request.config, place_of_servers())


@pytest.fixture
def warm(warm_place: WarmPlace, monkeypatch: pytest.MonkeyPatch) -> WarmPlace:
    """`warm_place`, and within the test this process finds the server there."""
    monkeypatch.setattr(tempfile, "tempdir", warm_place.directory)
    return warm_place
