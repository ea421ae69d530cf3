"""Nodes of a Ray cluster in network namespaces of this machine, each with its own address, loopback and ports.

A bridge joins them, and the tests reach them over it as clients on the same network would. A node can be cut off.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from harness.live import START_S
from harness.ray_cluster import RayCluster, RayHome

HEAD = "head"


def why_not() -> str:
    """Why this machine cannot have them; empty where it can."""
    try:
        with Network("probe", 0) as network:
            network.add("a")
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        return f"no network namespaces here: {said.strip()}"
    return ""


class Network(contextlib.AbstractContextManager["Network"]):
    """A bridge with an address, and namespaces on it. `number`: 0 to 15, of this process, so that two may be at once."""

    def __init__(self, name: str, number: int = 1) -> None:
        self._name, self._namespaces = f"kv{os.getpid()}{name[:3]}", dict[str, int]()
        self._subnet = f"10.{200 + number}.{os.getpid() % 250}"
        self._bridge = f"kb{os.getpid() % 10**6}{number}"

    def __enter__(self) -> "Network":
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("address", "add", f"{self._subnet}.254/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._namespaces:
            _ip("netns", "delete", self.namespace(name), must=False)  # its end of the cable goes with it
        _ip("link", "delete", self._bridge, must=False)

    def namespace(self, name: str) -> str:
        return f"{self._name}-{name}"

    def address(self, name: str) -> str:
        return f"{self._subnet}.{self._namespaces[name]}"

    def add(self, name: str) -> str:
        """A namespace on the bridge; its address."""
        number = self._namespaces[name] = len(self._namespaces) + 1
        inside = self.namespace(name)
        _ip("netns", "add", inside)
        _ip("link", "add", self._cable(name), "type", "veth", "peer", "name", "eth0", "netns", inside)
        _ip("link", "set", self._cable(name), "master", self._bridge, "up")
        _ip("-n", inside, "address", "add", f"{self._subnet}.{number}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", inside, "link", "set", link, "up")
        return self.address(name)

    def cut(self, name: str) -> None:
        """No packet comes to it or from it any more; nobody is told."""
        _ip("link", "set", self._cable(name), "nomaster")

    def join(self, name: str) -> None:
        """After `cut`."""
        _ip("link", "set", self._cable(name), "master", self._bridge)

    def _cable(self, name: str) -> str:
        return f"{self._bridge}-{self._namespaces[name]}"

    def inside(self, name: str) -> list[str]:
        """Words before a command that runs there."""
        return ["ip", "netns", "exec", self.namespace(name)]


def _ip(*words: str, must: bool = True) -> None:
    subprocess.run(["ip", *words], check=must, capture_output=True, text=True)


@dataclass(frozen=True)
class HeadHome(RayHome):
    """Commands run on the head."""

    before: tuple[str, ...] = field(default=())

    def kervan(self, *args: str, timeout_s: float = START_S) -> "subprocess.CompletedProcess[str]":
        words = [*self.before, sys.executable, "-m", "kervan", *args]
        return subprocess.run(
            words, env=self.environment, cwd=self.scratch, timeout=timeout_s,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip


class NamespaceCluster(RayCluster):
    """As RayCluster; a node is named by its namespace."""

    def __init__(self, scratch: Path, name: str, network: Network) -> None:
        super().__init__(scratch, name)
        self.network = network
        self._ip = network.add(HEAD)
        self.home = HeadHome(
            scratch, name, ray_environment=self.home.ray_environment, before=tuple(network.inside(HEAD))
        )

    @property
    def address(self) -> str:
        return f"{self._ip}:{self.port}"

    @property
    def ip(self) -> str:
        """Of the head."""
        return self._ip

    def _before(self, name: str) -> list[str]:
        return self.network.inside(name)

    def start_head(self, *options: str, **more: object) -> None:
        super().start_head(f"--node-ip-address={self._ip}", *options)

    def join_node(self, name: str, *options: str) -> str:
        """A node in a namespace, which is made where there is none; its address."""
        try:
            ip = self.network.address(name)
        except KeyError:
            ip = self.network.add(name)
        self._start(name, f"--address={self.address}", f"--node-ip-address={ip}", *options)
        return ip


@contextlib.contextmanager
def namespace_cluster(scratch: Path, name: str, *head: str) -> Iterator[NamespaceCluster]:
    """A head, started with these options of `ray start`; nothing of it is left after the block."""
    with Network(name) as network:
        cluster = NamespaceCluster(scratch, name, network)
        try:
            cluster.start_head(*head)
            yield cluster
        finally:
            cluster.close()
