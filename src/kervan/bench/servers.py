"""Servers that a benchmark starts itself, from a command line."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kervan.direct_http import NO_RESPONSE, open_direct, parse_url
from kervan.errors import ConfigError, FleetError
from kervan.ports import free_port
from kervan.vendor.vllm_names import MODELS_PATH

START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 60.0
PLACE = "{port}"


def check(where: str) -> None:
    """Raises: ConfigError for what `reach` takes for neither a URL nor a command."""
    if PLACE in where:
        return
    try:
        parse_url(where)
    except ConfigError as error:
        raise ConfigError(
            f"{error}, or a command that starts a server, with {PLACE} in it: 'vllm serve MODEL --port {PLACE}'"
        ) from error


@contextmanager
def reach(where: str, say: Callable[[str], None] = lambda _: None) -> Iterator[str]:
    """The URL of a server: `where` itself, or, if it is a command with `{port}` in it, of the server it starts.

    The command runs in a shell. Its server is ready when `/v1/models` or `/health` answers 200, and is ended, with all
    that it started, on leaving.

    Raises: FleetError, with the end of its output, when it exits or is not ready in 15 minutes.
    """
    if PLACE not in where:
        yield where
        return
    port = free_port()
    command = where.replace(PLACE, str(port))
    with tempfile.TemporaryDirectory(prefix="kervan-bench-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, shell=True, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        try:
            say(f"starting: {command}")
            begin_s = time.monotonic()
            url = f"http://127.0.0.1:{port}"
            while not answers(url):
                if (code := process.poll()) is not None:
                    raise FleetError(f"`{command}` exited {code}: {_tail(log)}")
                if time.monotonic() - begin_s > START_TIMEOUT_S:
                    raise FleetError(f"`{command}` is not ready after {START_TIMEOUT_S:.0f} s: {_tail(log)}")
                time.sleep(0.25)
            say(f"ready after {time.monotonic() - begin_s:.0f} s")
            yield url
        finally:
            _end(process)


def answers(url: str) -> bool:
    """Whether a server answers 200 at /v1/models or /health, each within 5 s."""
    for path in (MODELS_PATH, "/health"):
        with suppress(*NO_RESPONSE), open_direct(url + path, timeout_s=5) as response:
            if response.status == 200:
                return True
    return False


def _tail(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-600:] or "no output"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the whole process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
