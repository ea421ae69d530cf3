"""Asks a Prometheus, or one that is started over its data directory for as long as it is asked.

Source: https://prometheus.io/docs/prometheus/latest/querying/api/
"""

import contextlib
import http.client
import json
import math
import re
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

TIMEOUT_S = 30.0
START_S = 30.0
POLL_S = 0.1
SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0, "y": 365 * 86_400.0}
PART = re.compile(r"([0-9]+)(ms|[smhdwy])")
NOT_ITS_PATHS = ("HTTP 404", "HTTP 405", "HTTP 501")  # of a server that does not know the API
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
        with self._understood():
            return [Series(one["metric"], tuple(_points(one["values"]))) for one in data["result"]]

    def query(self, expr: str) -> list[Series]:
        """The values now. Raises: PrometheusError."""
        data = self._get("query", query=expr)
        with self._understood():
            return [Series(one["metric"], tuple(_points([one["value"]]))) for one in data["result"]]

    def newest_s(self) -> float | None:
        """Unix time of the newest sample that it has; None without any. Raises: PrometheusError."""
        data = self._get("status/tsdb")
        with self._understood():
            newest_ms = int(data["headStats"]["maxTime"])
        return newest_ms / 1000 if newest_ms > 0 else None

    def scrape_interval_s(self) -> float:
        """The least of its jobs', since a window must hold some scrapes. Raises: PrometheusError."""
        data = self._get("status/config")
        with self._understood():
            config = yaml.safe_load(data["yaml"]) or {}
            jobs = (config.get("global", {}), *config.get("scrape_configs", ()))
            told = [part.get("scrape_interval") for part in jobs]
            return min((_duration_s(text) for text in told if text), default=DEFAULT_INTERVAL_S)

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{path}"
        try:
            body = urllib.parse.urlencode(parameters).encode() if parameters else None
            with open_direct(url, timeout_s=TIMEOUT_S, body=body) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            if (why := _reason(error)) in NOT_ITS_PATHS:
                raise self._other(why) from error
            raise PrometheusError(f"{self.url} refused {parameters or path}: {why}") from error
        except NO_RESPONSE as error:
            if isinstance(error, http.client.BadStatusLine) and not isinstance(error, OSError):  # another protocol
                raise self._other(reason(error)) from error
            raise PrometheusError(
                f"no Prometheus answers at {self.url} ({reason(error)}); start it, or give its address: --prometheus http://HOST:9090"
            ) from error
        with self._understood():
            told = json.loads(text)["data"]
            if not isinstance(told, dict):
                raise TypeError(f"data is of type {type(told).__name__}")
            return told

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """For what reads an answer: what has another form is of no Prometheus."""
        try:
            yield
        except (
            AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError,
            yaml.YAMLError,
        ) as error:  # fmt: skip
            raise self._other("its answer has not the form of the API") from error

    def _other(self, why: str) -> PrometheusError:
        return PrometheusError(
            f"what answers at {self.url} is no Prometheus ({why}); give a Prometheus' address: "
            "--prometheus http://HOST:9090"
        )


def _duration_s(text: str) -> float:
    """Seconds of a duration as Prometheus writes it: `1m30s`, `500ms`. Raises: ValueError for anything else."""
    if re.fullmatch(rf"({PART.pattern})+", text) is None:
        raise ValueError(f"{text!r} is no duration")
    return sum(int(number) * SECONDS[unit] for number, unit in PART.findall(text))


def _reason(error: urllib.error.HTTPError) -> str:
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
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
