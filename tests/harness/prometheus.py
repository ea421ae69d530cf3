"""A real Prometheus on a free port, and promtool; tests that need them are skipped where they are not."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kervan.observe.render.prometheus import Prometheus, PrometheusError
from kervan.ports import free_port

START_S = 60.0


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on this machine: apt-get install prometheus, or make environment where apt-get works")
    return found


def promtool(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [program("promtool"), *words], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@dataclass(frozen=True)
class Running:
    """`data`: its directory, for who comes after its end."""

    api: Prometheus
    data: Path


@contextlib.contextmanager
def running(config: Path, data: Path) -> Iterator[Running]:
    """A Prometheus with this configuration; what it has stored stays in `data`."""
    port = free_port()
    log = data.with_suffix(".log")
    command = [
        *(program("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={data}"),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            api, deadline_s = Prometheus(f"http://127.0.0.1:{port}"), time.monotonic() + START_S
            while True:
                with contextlib.suppress(PrometheusError):
                    api.query("vector(1)")
                    break
                assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()
                time.sleep(0.1)
            yield Running(api, data)
        finally:
            process.terminate()
