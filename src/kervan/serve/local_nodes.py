"""A Ray cluster whose nodes are all on this machine, and come and go on order: for `kervan chaos --replay`.

`python -m kervan.serve.local_nodes TEMP_DIR` is the process that has the nodes: Ray binds their life to it. It reads
one order per line, `{"add": "127.0.0.2"}` or `{"remove": "127.0.0.2"}`, and responds to each with a line. It ends with
all nodes on SIGTERM, or when its input closes, so a command that dies leaves nothing.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

from kervan.errors import EngineError, FleetError
from kervan.facts.markets import ON_DEMAND, SPOT
from kervan.serve import cluster
from kervan.serve.ray_internals import NodeCluster

OBJECT_STORE_BYTES = 100 * 2**20  # tokens do not pass through Ray's object store
REGISTER_TIMEOUT_S = 120.0
TRIES = 3  # Ray gives a node half a minute to start, which a busy machine may exceed
# Gateways go where such a thing is: to the head, which is never removed.
HEAD_DEVICES: dict[str, Any] = {"num_gpus": 1, "resources": {"accelerator_type:H200": 1}}


class LocalNodes:
    """A head, and spot nodes that are added and removed. Calls block and may come from several threads."""

    def __init__(self) -> None:
        """Start the head. Raises: EngineError."""
        self._temp_dir = tempfile.mkdtemp(prefix="kervan-ray-")  # short: it holds Unix sockets
        self._token = secrets.token_hex(32)
        self._turn = threading.Lock()
        (Path(self._temp_dir) / "ray").mkdir()  # Ray writes its latest address there
        with self._log_path.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kervan.serve.local_nodes", self._temp_dir],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, **cluster.ray_environment(self._token), "RAY_TMPDIR": self._temp_dir},
            )
        try:
            self.address = str(self._response("the head of a Ray cluster")["address"])
        except BaseException:
            self.close()
            raise

    @property
    def _log_path(self) -> Path:
        return Path(self._temp_dir) / "local_nodes.log"

    def join(self) -> None:
        """Let this process be a driver of the cluster; before it has used Ray."""
        os.environ.update(cluster.ray_environment(self._token))
        cluster.connect(self.address)

    def add(self, ip: str) -> None:
        """Start a spot node with this loopback address; returns when Ray has it. Raises: EngineError."""
        self._order({"add": ip}, f"node {ip}")

    def drain(self, ip: str, deadline_s: float) -> None:
        """Let Ray put nothing more on a node, and end it at its deadline. Raises: FleetError."""
        node_id = next((node_id for node_id, address in cluster.nodes().items() if address == ip), None)
        if node_id is None:
            raise FleetError(f"Ray has no node {ip}; it has {', '.join(cluster.nodes().values())}")
        cluster.drain_node(node_id, deadline_s)

    def remove(self, ip: str) -> None:
        """Kill all processes of a node at once, as when its power fails. Raises: EngineError."""
        self._order({"remove": ip}, f"the end of node {ip}")

    def _order(self, order: dict[str, str], what: str) -> None:
        with self._turn:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.write(json.dumps(order) + "\n")
                self._process.stdin.flush()
            self._response(what)

    def _response(self, what: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            with contextlib.suppress(OSError):
                line = " ".join(self._log_path.read_text().strip().splitlines()[-1:])
            raise EngineError(f"Ray did not give {what}: {line or 'no output'}; is ray[serve] fully installed?")
        response: dict[str, Any] = json.loads(line)
        if "error" in response:
            raise EngineError(f"Ray did not give {what}: {response['error']}; try again when the machine is less busy")
        return response

    def close(self) -> None:
        """End all nodes and everything on them."""
        if "ray" in sys.modules:
            import ray

            ray.shutdown()
        cluster.end_session(self._process.pid, self._temp_dir)
        self._process.wait()


# ---- the process that has the nodes


class _RayNodes:
    """Spot nodes by address."""

    def __init__(self, temp_dir: str) -> None:
        self._cluster = NodeCluster()
        self._nodes: dict[str, Any] = {}
        self._start(
            num_cpus=os.cpu_count() or 1,
            labels={cluster.MARKET_LABEL: ON_DEMAND},
            include_dashboard=False,
            temp_dir=temp_dir,
            **HEAD_DEVICES,
        )

    @property
    def address(self) -> str:
        return self._cluster.address

    def _start(self, **options: Any) -> Any:
        for last in (*[False] * (TRIES - 1), True):
            try:
                node = self._cluster.add(object_store_memory=OBJECT_STORE_BYTES, **options)
            except Exception as error:
                if last or "timed out" not in str(error):
                    raise
            else:
                self._cluster.wait_for(node, REGISTER_TIMEOUT_S)
                return node
        raise AssertionError("not reached")

    def add(self, ip: str) -> None:
        self._nodes[ip] = self._start(num_cpus=1, labels={cluster.MARKET_LABEL: SPOT}, node_ip_address=ip)

    def remove(self, ip: str) -> None:
        node = self._nodes.pop(ip)
        for process in [*self._cluster.processes(node)]:  # first, so that no part of it sees another one end
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._cluster.remove(node)

    def close(self) -> None:
        self._cluster.close()


def main() -> None:
    """Blocks until its input closes or SIGTERM comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is for the log

    def respond(message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            responses.write(json.dumps(message) + "\n")
            responses.flush()

    temp_dir = sys.argv[1]
    try:
        nodes = _RayNodes(temp_dir)
        respond({"address": nodes.address})
        try:
            for line in sys.stdin:
                for word, ip in json.loads(line).items():
                    try:
                        (nodes.add if word == "add" else nodes.remove)(ip)
                    except Exception as error:  # noqa: BLE001 - whatever Ray raises goes to who gave the order
                        respond({"error": " ".join(f"{type(error).__name__}: {error}".split())})
                    else:
                        respond({})
        finally:
            nodes.close()
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
