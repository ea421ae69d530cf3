"""Asks a Prometheus, or one that is started over its data directory for as long as it is asked.

Source: https://prometheus.io/docs/prometheus/latest/querying/api/
"""

import contextlib
import json
import math
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kervan.direct_http import NO_RESPONSE, open_direct, parse_url, reason
from kervan.errors import ConfigError, KervanError
from kervan.ports import free_port
from kervan.units import parse_duration_s

TIMEOUT_S = 30.0
START_S = 30.0
POLL_S = 0.1
DEFAULT_INTERVAL_S = 60.0  # Prometheus' own


class PrometheusError(KervanError):
    """A Prometheus does not answer, or not as it should."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line: what it is of, and (Unix time, value) in order; NaN and infinite values are left out."""

    labels: Mapping[str, str]
    points: tuple[tuple[float, float], ...]


class Prometheus:
    """The HTTP API at `url`; a proxy that the environment names is not asked."""

    def __init__(self, url: str) -> None:
        """Raises: ConfigError for what is no URL."""
        self.url = parse_url(url, "--prometheus")

    def query_range(self, expr: str, begin_s: float, end_s: float, step_s: float) -> list[Series]:
        """The values of an expression. Raises: PrometheusError."""
        data = self._get("query_range", query=expr, start=f"{begin_s:.3f}", end=f"{end_s:.3f}", step=f"{step_s:.3f}")
        return [Series(one["metric"], tuple(_points(one["values"]))) for one in data["result"]]

    def query(self, expr: str) -> list[Series]:
        """The values now. Raises: PrometheusError."""
        return [
            Series(one["metric"], tuple(_points([one["value"]]))) for one in self._get("query", query=expr)["result"]
        ]

    def newest_s(self) -> float | None:
        """Unix time of the newest sample that it has; None without any. Raises: PrometheusError."""
        newest_ms = int(self._get("status/tsdb")["headStats"]["maxTime"])
        return newest_ms / 1000 if newest_ms > 0 else None

    def scrape_interval_s(self) -> float:
        """The least of its jobs', since a window must hold some scrapes. Raises: PrometheusError."""
        config = yaml.safe_load(self._get("status/config")["yaml"]) or {}
        told = [part.get("scrape_interval") for part in (config.get("global", {}), *config.get("scrape_configs", ()))]
        return min((parse_duration_s(text.replace("m", "min"), "scrape_interval") for text in told if text),
                   default=DEFAULT_INTERVAL_S)  # fmt: skip

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{path}"
        try:
            body = urllib.parse.urlencode(parameters).encode() if parameters else None
            with open_direct(url, timeout_s=TIMEOUT_S, body=body) as response:
                told = json.load(response)
        except urllib.error.HTTPError as error:
            raise PrometheusError(f"{self.url} refused {parameters or path}: {_reason(error)}") from error
        except NO_RESPONSE as error:
            raise PrometheusError(
                f"no Prometheus answers at {self.url} ({reason(error)}); start it, or give its address: --prometheus http://HOST:9090"
            ) from error
        except RecursionError:
            told = None
        if not isinstance(told, dict) or "data" not in told:
            raise PrometheusError(
                f"what answers at {self.url} is no Prometheus; give its address: --prometheus http://HOST:9090"
            )
        return told["data"]


def _reason(error: urllib.error.HTTPError) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.load(error)["error"])
    return f"HTTP {error.code}"


def _points(values: list[tuple[float, str]]) -> Iterator[tuple[float, float]]:
    for at_s, text in values:
        if math.isfinite(value := float(text)):
            yield float(at_s), value


@contextlib.contextmanager
def over_directory(directory: Path) -> Iterator[Prometheus]:
    """A Prometheus that serves what another one has stored in `directory` (`--storage.tsdb.path`); it scrapes nothing.

    Raises: ConfigError without the program; PrometheusError when it does not start, as while another one has the data.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise ConfigError(
            "there is no program 'prometheus' on the PATH to read a data directory with; install it "
            "(apt-get install prometheus), or give a running one with --prometheus URL"
        )
    if not any((directory / name).exists() for name in ("wal", "chunks_head")):
        raise ConfigError(f"{directory} has no data of a Prometheus (no wal in it); give its --storage.tsdb.path")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="kervan-prometheus-") as scratch:
        config = Path(scratch) / "prometheus.yml"
        config.write_text("{}\n")
        log = Path(scratch) / "log"
        command = [
            *(program, f"--config.file={config}", f"--storage.tsdb.path={directory}"),
            *(f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.retention.time=10y", "--log.level=error"),
        ]
        with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
            try:
                yield _ready(Prometheus(f"http://127.0.0.1:{port}"), process, log)
            finally:
                process.terminate()


def _ready(server: Prometheus, process: "subprocess.Popen[bytes]", log: Path) -> Prometheus:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with contextlib.suppress(PrometheusError):
            server.query("vector(1)")
            return server
        time.sleep(POLL_S)
    last = (log.read_text().strip().splitlines() or ["it says nothing"])[-1]
    raise PrometheusError(f"prometheus did not start over the data: {last}")
