"""The process that asks Ray for `kervan top`, and its other end.

Ray ends a process whose cluster is gone, and a call to a directory that is away takes seconds: neither may happen to
the process that has the terminal. It asks with a line, and gets a frame: eight bytes of length, and a `Frame`.
"""

import contextlib
import os
import struct
import subprocess
import sys
from typing import BinaryIO

import msgspec

from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError, FleetError, KervanError
from kervan.fleet.directory import Snapshot
from kervan.observe.dcgm import GpuCounters
from kervan.serve.status import FleetStatus, FleetWatch, fleet_status

LENGTH = struct.Struct("!Q")
LOOK, LOOK_WITH_GPUS = b"look\n", b"gpus\n"


class Frame(msgspec.Struct):
    """What was seen. `error`: why nothing was; `is_usage`: by what the user gave. `gpus`: None unless asked for."""

    config: str = ""
    snapshot: Snapshot | None = None
    error: str = ""
    is_usage: bool = False
    gpus: dict[str, tuple[GpuCounters, ...] | str] | None = None

    def status(self) -> FleetStatus:
        """The fleet. Raises: ConfigError or FleetError where there is none to see."""
        if self.snapshot is None:
            raise (ConfigError if self.is_usage else FleetError)(self.error)
        return fleet_status(FleetConfig.from_json(self.config), self.snapshot)


class Feed:
    """The process. Frames come one after the other, each after a `request`; `fileno` can be read when there is more."""

    def __init__(self, name: str, address: str | None) -> None:
        words = [sys.executable, "-m", "kervan.cli.live.feed", name, *([address] if address else [])]
        # In a session of its own: ^C and ^Z are for the one that has the terminal.
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._frames = self._process.stdin, self._process.stdout
        os.set_blocking(self._frames.fileno(), False)
        self._data = b""
        self.is_asked = False
        self.is_over = False

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._frames.fileno()

    def request(self, *, with_gpus: bool) -> None:
        """Ask for a frame; nothing if one is under way."""
        if self.is_asked or self.is_over:
            return
        try:
            self._requests.write(LOOK_WITH_GPUS if with_gpus else LOOK)
            self._requests.flush()
            self.is_asked = True
        except OSError:
            self.is_over = True

    def read(self) -> Frame | None:
        """The frame, if it is whole. `is_over`: the process has ended, and there will be none."""
        try:
            data = os.read(self._frames.fileno(), 1 << 20)
        except BlockingIOError:
            return None
        if not data:
            self.is_over = True
            return None
        self._data += data
        if len(self._data) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._data)
        if len(self._data) < LENGTH.size + length:
            return None
        frame = msgspec.msgpack.decode(self._data[LENGTH.size : LENGTH.size + length], type=Frame)
        self._data = self._data[LENGTH.size + length :]
        self.is_asked = False
        return frame

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._frames.close()
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()


class _Looker:
    """Looks at the fleet, and joins it again when its directory was started anew.

    `is_over`: it could not. A process joins one Ray cluster, and a fleet that comes back may be on another one.
    """

    def __init__(self, name: str, address: str | None) -> None:
        self._name, self._address = name, address
        self._watch: FleetWatch | None = None
        self._gpus: object = None
        self.is_over = False

    def frame(self, *, with_gpus: bool) -> Frame:
        try:
            if self._watch is None:
                self._watch = FleetWatch(self._name, self._address)
            status = self._watch.look()
        except KervanError as error:
            self.is_over, self._watch = self._watch is None, None
            return Frame(error=str(error), is_usage=isinstance(error, ConfigError))
        found = Frame(status.config.to_json(), status.snapshot)
        if with_gpus:
            found.gpus = self._look_at_gpus(status.snapshot)
        return found

    def _look_at_gpus(self, snapshot: Snapshot) -> dict[str, tuple[GpuCounters, ...] | str]:
        from kervan.cli.live.fleet_gpus import FleetGpus

        if self._gpus is None:
            self._gpus = FleetGpus(FleetWatch.here())
        assert isinstance(self._gpus, FleetGpus)
        nodes = {node for replica in snapshot.replicas for node in (replica.nodes or [replica.node])}
        return self._gpus.look(nodes)


def main(name: str, address: str | None, requests: BinaryIO, frames: BinaryIO) -> None:
    """Answer requests until there is nobody who makes any."""
    looker = _Looker(name, address)
    for request in requests:
        data = msgspec.msgpack.encode(looker.frame(with_gpus=request == LOOK_WITH_GPUS))
        try:
            frames.write(LENGTH.pack(len(data)) + data)
            frames.flush()
        except BrokenPipeError:
            return
        if looker.is_over:
            return


if __name__ == "__main__":
    frames_fd = os.dup(1)
    os.dup2(2, 1)  # what Ray prints is no frame
    with os.fdopen(frames_fd, "wb") as out:
        main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None, sys.stdin.buffer, out)
    os._exit(0)  # threads that wait for a part of Ray that does not answer keep nothing
