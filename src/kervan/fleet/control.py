"""The line between an engine process and the process that started it: JSON lines over a socket pair.

The starter sends commands, the engine sends reports. When either end goes, the other sees end-of-file: an engine
whose starter died ends itself, so nothing is left behind on a GPU.
"""

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Literal

import msgspec

from kervan.config.fault import Fault
from kervan.config.profile import ProfileAsk
from kervan.fleet.wire import EngineFacts

FailureKind = Literal["ConfigError", "CapacityError", "EngineError"]


class WorkerPlacement(msgspec.Struct, frozen=True):
    """Where a replica's workers live when it has more than one node: bundles of a Ray placement group.

    `bundles`: their indices in the order of the pipeline stages, each `workers_per_bundle` workers on one node, the
    engine's own node first. `ray_address`: of the cluster's GCS.
    """

    group_id: str
    ray_address: str
    bundles: list[int]
    workers_per_bundle: int


class EngineSpec(msgspec.Struct, frozen=True):
    """The first message to an engine process. `engine_argv`: arguments of vLLM's own server parser.

    `placement` None: all workers are processes of this node. `shares_gpu`: other engines may use the same GPU.
    `encrypts`: only gateways with the fleet's keys may connect. `secret_before`: as `auth.Secrets` takes it.
    `stacks_dir`: where workers of several write what they do, when they are asked (`comm.stacks`).
    """

    replica_id: str
    engine_argv: list[str]
    host: str
    secret: str
    placement: WorkerPlacement | None = None
    shares_gpu: bool = False
    encrypts: bool = True
    secret_before: str = ""
    stacks_dir: str = ""


class Command(msgspec.Struct, frozen=True):
    """`drain`: take no new work; `stop`: end now; `fault`: only twins obey; `profile`: only engines do."""

    command: Literal["drain", "stop", "fault", "profile"]
    fault: Fault | None = None
    profile: ProfileAsk | None = None


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine has produced a token and accepts gateways at `address`. `start_s`: seconds of its start's phases.

    `public_key`: of its CURVE pair; empty: it speaks plain text.
    """

    address: str
    facts: EngineFacts
    engine_version: str
    start_s: dict[str, float] = {}
    public_key: str = ""


class EngineLoad(msgspec.Struct, frozen=True, tag="load"):
    """Sent every second. `num_steps`: engine steps since start. `note`: shown beside the state.

    `expected_step_s`, `num_suspects`: as in `policy.watchdog.EngineSample`.
    """

    running: int
    waiting: int
    kv_cache_usage: float
    num_steps: int
    has_work: bool
    note: str = ""
    expected_step_s: float = 0.0
    num_suspects: int = 0


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot start; `kind` names the class of `kervan.errors`, `message` has the fix."""

    kind: FailureKind
    message: str


Report = Ready | EngineLoad | EngineFailed


class ControlEnd:
    """One end of the line; `send` may be called from any thread."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._reader = sock.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: msgspec.Struct) -> None:
        """Send a message as one JSON line. Raises: OSError when the other end is gone."""
        with self._lock:
            self._sock.sendall(msgspec.json.encode(message) + b"\n")

    def receive(self) -> bytes:
        """The next line; empty at end-of-file."""
        try:
            return self._reader.readline()
        except OSError:
            return b""

    def follow(self, on_line: Callable[[bytes], None], on_end: Callable[[], None]) -> threading.Thread:
        """Call `on_line` for each line in a daemon thread, then `on_end`."""

        def run() -> None:
            while line := self.receive():
                on_line(line)
            on_end()

        thread = threading.Thread(target=run, daemon=True, name="control")
        thread.start()
        return thread

    def close(self) -> None:
        """Close this end; the other end sees end-of-file."""
        with contextlib.suppress(OSError):  # it has gone already
            self._sock.shutdown(socket.SHUT_RDWR)
        self._reader.close()
        self._sock.close()
