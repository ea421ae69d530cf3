"""A Ray cluster as its owner starts it, with `ray start`; its nodes are on this machine, each with its own address."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.live import Home
from kervan.ports import free_port

SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "owner-" * 8,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",  # an idle worker per core, which no test is about
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # 3% of a core, for a dashboard that is not there
}
UP = "will now block forever"  # what `ray start --block` says then
# What Ray takes for one. Gateways are placed where GPUs are, alternating; twins, which take none, anywhere.
AS_IF_GPU = ("--num-gpus=1", '--resources={"accelerator_type:H200": 1}')
SECOND = "127.0.0.2"
CLOSE_S = 3.0
LEAN = ["--include-log-monitor=false"]  # it reads all logs for drivers that print them, and few do


@dataclass(frozen=True)
class RayHome(Home):
    """A place whose commands know a Ray cluster's token and settings, as its owner's shell would."""

    ray_environment: tuple[tuple[str, str], ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, **dict(self.ray_environment)}


class RayCluster:
    """Nodes, by the name given to them."""

    def __init__(self, scratch: Path, name: str, more: Mapping[str, str] | None = None):
        self.home = RayHome(scratch, name, ray_environment=tuple({**SETTINGS, **(more or {})}.items()))
        self.port = free_port()
        self.place = scratch / f"r-{name[:4]}"
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _before(self, name: str) -> list[str]:
        """Words before the command that starts a node."""
        return []

    def start_head(self, *options: str, env: Mapping[str, str] | None = None) -> None:
        ports = (
            f"--port={self.port}",
            f"--ray-client-server-port={free_port()}",
        )  # that of Ray Client is fixed otherwise
        words = ("--head", *ports, "--include-dashboard=false", f"--temp-dir={self.place}")
        self._start("head", *words, *options, env=env)

    def start_node(self, ip: str, *options: str, env: Mapping[str, str] | None = None) -> None:
        """`env`: what is different in this node's environment."""
        self._start(ip, f"--address={self.address}", f"--node-ip-address={ip}", *options, env=env)

    def _start(self, name: str, *words: str, env: Mapping[str, str] | None = None) -> None:
        """Returns when the node is up. Ray gives it 30 s, which a busy machine may exceed; then it is tried again."""
        program, path = Path(sys.executable).with_name("ray"), self.home.scratch / f"{self.home.name}-{name}.log"
        for _ in range(3):
            with path.open("w") as log:
                node = self._nodes[name] = subprocess.Popen(
                    [
                        *self._before(name),
                        program,
                        "start",
                        "--block",
                        "--object-store-memory=100000000",
                        *LEAN,
                        *words,
                    ],
                    env={**self.home.environment, **(env or {})},
                    cwd=self.home.scratch,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            while node.poll() is None:
                if UP in path.read_text():
                    return
                time.sleep(0.2)
            assert "timed out during startup" in path.read_text(), path.read_text()[-2000:]
        raise AssertionError(path.read_text()[-2000:])

    def node_has_ended(self, ip: str) -> bool:
        """Whether Ray has ended a node by itself (`ray start` goes on blocking then)."""
        return not any("raylet" in part.name() for part in psutil.Process(self._nodes[ip].pid).children())

    def kill_node(self, ip: str) -> None:
        """All processes of a node end at once, as when its power fails."""
        node = self._nodes.pop(ip)
        parts = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        assert any("raylet" in part.name() for part in parts)
        for part in parts:
            with contextlib.suppress(psutil.Error):
                part.kill()
        node.wait(10)

    def end_node(self, ip: str) -> None:
        """As `kill_node`, of a node that may have ended, or is gone."""
        if (node := self._nodes.pop(ip, None)) is None:
            return
        for part in (*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)):
            with contextlib.suppress(psutil.Error):
                part.kill()
        node.wait(10)

    def ray(self, *words: str) -> str:
        """`ray words`, ended well."""
        program = Path(sys.executable).with_name("ray")
        done = subprocess.run(
            [program, *words],
            env=self.home.environment, cwd=self.home.scratch, check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout + done.stderr

    def status(self) -> str:
        """What `ray status` says; nothing while the cluster does not answer."""
        with contextlib.suppress(AssertionError):
            return self.ray("status", "--address", self.address)
        return ""

    def close(self) -> None:
        """End all nodes; not by `ray stop`, which ends every Ray of this machine."""
        parts = []
        for node in self._nodes.values():
            with contextlib.suppress(psutil.Error):
                parts += [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.place) in word for word in process.info["cmdline"] or ()) and process.pid != os.getpid():
                parts.append(process)
        for node in self._nodes.values():
            node.terminate()
        # A head on which Serve ran does not end by this for over 20 s.
        _, alive = psutil.wait_procs(parts, timeout=CLOSE_S)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for node in self._nodes.values():
            node.wait(10)


@contextmanager
def ray_cluster(
    scratch: Path,
    name: str,
    *head: str,
    second: Sequence[str] | None = None,
    more: Mapping[str, str] | None = None,
    head_env: Mapping[str, str] | None = None,
) -> Iterator[RayCluster]:
    """A cluster within the block: a head with these options of `ray start`, and with `second` another node, SECOND.

    `more`: in the environment of all nodes and commands; `head_env`: in that of the head alone.
    """
    cluster = RayCluster(scratch, name, more)
    try:
        cluster.start_head(*head, env=head_env)
        if second is not None:
            cluster.start_node(SECOND, *second)
        yield cluster
    finally:
        cluster.close()
