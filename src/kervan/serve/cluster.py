"""The Ray cluster a fleet lives on: started here, or joined; and what it has."""

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil

from kervan.config.fleet import Device, FleetConfig
from kervan.errors import EngineError, FleetError
from kervan.facts.markets import SPOT
from kervan.serve import ray_auth, ray_internals
from kervan.serve.placement import NodeDevices
from kervan.serve.ray_errors import ANSWER_TIMEOUT_S, as_fleet_error, bounded, unsaid, wait_for

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
# Ray's own label key; a node has it from `ray start --labels`, the cluster launcher's or KubeRay's files.
MARKET_LABEL = "ray.io/market-type"
CONNECT_TIMEOUT_S = 5.0
JOIN_TIMEOUT_S = 40.0  # it takes about a second
# What begins a connection in HTTP/2, as gRPC speaks it: the preface and an empty SETTINGS frame (RFC 9113, 3.4). The
# other side answers with its own settings (frame type 4) at once, without looking at anything else.
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
HTTP2_SETTINGS = 4
SET_KERVAN_HOME = "set KERVAN_HOME to a directory that you can write to"
HAPROXY_DRAINING_S = "5"  # HAProxy hears of what leaves in about a second
KEY_VARIABLES = ("KERVAN_API_KEY", "KERVAN_API_KEYS", "KERVAN_NEW_KEY")
NODES_UNKNOWN = "Ray did not list the nodes of the cluster"


def home() -> Path:
    """Where kervan remembers the fleets started from this machine: $KERVAN_HOME or ~/.kervan.

    Raises: FleetError when there is no home directory.
    """
    if given := os.environ.get("KERVAN_HOME"):
        return Path(given)
    try:
        return Path.home() / ".kervan"
    except RuntimeError as error:
        raise FleetError(f"HOME is not set, and user {os.getuid()} has no home directory; {SET_KERVAN_HOME}") from error


def check_home() -> None:
    """Raises: FleetError when what is started could not be remembered in `home()`."""
    path = home()
    try:
        (path / "fleets").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise _home_error("write to", path, error) from error


def log_directory() -> Path:
    """Where a node keeps its logs: `home()`/logs, or one among the temporary files where that cannot be written."""
    with contextlib.suppress(OSError, FleetError):
        path = home() / "logs"
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK | os.X_OK):
            return path
    return Path(tempfile.gettempdir()) / f"kervan-logs-{os.getuid()}"


def _home_error(what: str, path: Path, error: OSError) -> FleetError:
    return FleetError(
        f"kervan cannot {what} {path}, where it remembers fleets ({error.strerror or error}); {SET_KERVAN_HOME}"
    )


def _remove(path: Path) -> None:
    """Forget what is remembered there, if anything is. Raises: FleetError when it cannot be removed."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _home_error("remove", path, error) from error


def _read(path: Path) -> bytes:
    """What is remembered there; nothing where there is nothing. Raises: FleetError when it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise _home_error("read", path, error) from error


class NoClusterError(FleetError):
    """Nothing is at the address of a Ray cluster, or no Ray."""


class LocalRay(msgspec.Struct, frozen=True):
    """A Ray that kervan started on this machine."""

    address: str
    pid: int
    temp_dir: str
    token: str
    has_haproxy: bool = False

    @property
    def is_alive(self) -> bool:
        """Whether its process is there, and is not another one with its id."""
        try:
            return "kervan.serve.local_ray" in " ".join(psutil.Process(self.pid).cmdline())
        except psutil.Error:
            return False


class Remembered(msgspec.Struct, frozen=True):
    """A fleet started from this machine."""

    name: str
    address: str
    url: str
    is_joined: bool = False  # on a cluster that kervan did not start


def _local_ray_path() -> Path:
    return home() / "local_ray.json"


def find_local_ray() -> LocalRay | None:
    """The running local Ray, if kervan has started one. Raises: FleetError when `home()` cannot be read."""
    try:
        local = msgspec.json.decode(_read(_local_ray_path()), type=LocalRay)
    except msgspec.MsgspecError:
        return None
    return local if local.is_alive else None


@dataclass(slots=True)
class StartingRay:
    """A local Ray that ends with this process unless `keep` is called."""

    local: LocalRay
    process: subprocess.Popen[str]

    def keep(self) -> None:
        """Let this Ray outlive this process."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write("stay\n")
            self.process.stdin.flush()


def start_local_ray(*, has_haproxy: bool) -> StartingRay:
    """Start Ray on this machine, guarded by a token of its own.

    Ray gives its own parts half a minute, too little on a machine that is busy: one more try then.

    Raises: EngineError when Ray does not come up.
    """
    try:
        return _start_local_ray(has_haproxy=has_haproxy)
    except EngineError as error:
        if "timed out" not in str(error):
            raise
        return _start_local_ray(has_haproxy=has_haproxy)


def _start_local_ray(*, has_haproxy: bool) -> StartingRay:
    temp_dir = tempfile.mkdtemp(prefix="kervan-ray-")  # short: it holds Unix sockets
    token = secrets.token_hex(32)
    log = (Path(temp_dir) / "local_ray.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "kervan.serve.local_ray", temp_dir],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
        env={**without_keys(os.environ), **ray_environment(token, has_haproxy=has_haproxy)},
    )
    log.close()
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            last_line = (Path(temp_dir) / "local_ray.log").read_text().strip().splitlines()[-1:]
            raise EngineError(
                f"Ray did not start: {' '.join(last_line) or 'no output'}; is ray[serve] fully installed?"
            )
        local = LocalRay(json.loads(line)["address"], process.pid, temp_dir, token, has_haproxy)
        home().mkdir(parents=True, exist_ok=True)
        _write(_local_ray_path(), local)
    except BaseException:
        end_processes([process.pid])
        shutil.rmtree(temp_dir, ignore_errors=True)
        raise
    return StartingRay(local, process)


def without_keys(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without API keys: who starts a fleet has them, and what runs in it needs digests alone."""
    return {name: value for name, value in environment.items() if name not in KEY_VARIABLES}


def ray_environment(token: str, *, has_haproxy: bool = False) -> dict[str, str]:
    """Environment of all processes of a local Ray, and of its drivers."""
    env = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        ray_internals.NICENESS_VARIABLE: "0",
        ray_internals.CONTROL_LOOP_VARIABLE: "0.5",
        ray_internals.PRESTART_VARIABLE: "0",
        ray_internals.REPORTER_VARIABLE: "60000",  # this Ray has no dashboard
        ray_internals.KUBERNETES_AUTH_VARIABLE: "0",  # in a pod of KubeRay it is set, and would ask for another token
    }
    if has_haproxy:
        # Serve's own HAProxy is told of what leaves, and no other balancer knows the replicas of a Ray of one machine.
        env |= {ray_internals.HAPROXY_VARIABLE: "1", ray_internals.DRAINING_VARIABLE: HAPROXY_DRAINING_S}
    return env


def stop_local_ray(local: LocalRay) -> None:
    """End the local Ray and everything in it. Raises: FleetError when `home()` cannot be written; it has ended then."""
    end_session(local.pid, local.temp_dir)
    _remove(_local_ray_path())


def end_session(pid: int, temp_dir: str) -> None:
    """End a Ray that kervan started: its process, all below it, and its directory."""
    end_processes(_session_pids(pid, temp_dir))
    shutil.rmtree(temp_dir, ignore_errors=True)


def _session_pids(pid: int, temp_dir: str) -> list[int]:
    """The process of a local Ray, its descendants, and strays that name its directory."""
    pids = [pid]
    with contextlib.suppress(psutil.Error):
        pids += [child.pid for child in psutil.Process(pid).children(recursive=True)]
    for process in psutil.process_iter(["pid", "cmdline"]):
        if any(temp_dir in word for word in process.info["cmdline"] or ()) and process.pid != os.getpid():
            pids.append(process.info["pid"])
    return list(dict.fromkeys(pids))


def end_processes(pids: Sequence[int]) -> None:
    """SIGTERM to the first, SIGKILL to what is left of all after a while. Returns when they are gone."""
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            processes.append(psutil.Process(pid))
    if not processes:
        return
    with contextlib.suppress(psutil.Error):
        processes[0].terminate()
    _, alive = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)


def connect(address: str, *, or_start: bool = False) -> None:
    """Join a running Ray cluster as a driver. A process joins one; further calls change nothing.

    `or_start`: without an address, the caller would start Ray on this machine; errors advise it.

    Raises: NoClusterError when there is none at `address`; FleetError when it does not answer, or refuses the token.
    """
    if address == "auto":
        address = _found_address(or_start=or_start)
    check_address(address, or_start=or_start)
    local = find_local_ray()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if local is not None and local.address == address:  # another cluster keeps the user's own settings
        # Before ray is imported: it reads these once.
        os.environ.update(ray_environment(local.token, has_haproxy=local.has_haproxy))
    the_cluster = f"the Ray cluster at {address}"
    ray_auth.check_settings(the_cluster)
    import ray
    from ray.exceptions import AuthenticationError, RayError

    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)  # here: importing Ray sets it

    _check_raylet(address)

    def join() -> None:
        ray.init(
            address=address,
            namespace="kervan",
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )

    try:
        with sigterm_kept():
            wait_for(join, JOIN_TIMEOUT_S)
        ray_internals.silence_driver()
    except AuthenticationError as error:
        raise FleetError(ray_auth.refusal(the_cluster)) from error
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, RayError) as error:
        raise FleetError(
            f"no Ray cluster answers at {address} ({_first_line(error)}); check --address, or {_without(or_start)}"
        ) from error


@contextlib.contextmanager
def sigterm_kept() -> Iterator[None]:
    """Within the block Ray is started or joined. It replaces the process's handler of SIGTERM; here it gets it back."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _without(or_start: bool) -> str:
    """What a command does without --address, as advice."""
    return f"leave it out {'to start Ray on this machine' if or_start else 'for a fleet started from this machine'}"


def _found_address(*, or_start: bool) -> str:
    """The address that "auto" stands for. As Ray does, let the token be sent to a cluster found on this machine.

    Raises: NoClusterError when there is none; FleetError.
    """
    is_named = bool(os.environ.get("RAY_ADDRESS"))
    if not is_named and "RAY_AUTH_MODE" not in os.environ and ray_auth.has_token(os.environ):
        os.environ["RAY_AUTH_MODE"] = "token"  # before ray is imported
    try:
        found = ray_internals.found_address()
    except (ValueError, OSError) as error:
        raise FleetError(
            f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')!r} is not in HOST:PORT form ({_first_line(error)}); give that "
            "of the cluster's head, like 10.0.0.1:6379"
        ) from error
    if found is None:
        raise NoClusterError(
            "no Ray cluster runs on this machine, and RAY_ADDRESS is not set; give --address HOST:PORT of its "
            f"head, or {_without(or_start)}"
        )
    return found


def check_address(address: str, *, or_start: bool = False) -> None:
    """Find out in seconds that nothing answers at `address`, or no Ray; Ray itself takes minutes.

    Raises: NoClusterError for what no cluster can be behind; FleetError.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or "/" in host:
        raise FleetError(
            f"--address {address!r} is not in HOST:PORT form; give that of the cluster's head, like 10.0.0.1:6379"
        )
    try:
        is_grpc = _speaks_grpc(host.strip("[]"), int(port))
    except TimeoutError as error:
        raise FleetError(
            f"the Ray cluster at {address} does not answer (no word for {CONNECT_TIMEOUT_S:.0f} s): its head is "
            "stopped or overloaded; try again, or look at its process gcs_server"
        ) from error
    except (OSError, OverflowError) as error:
        failure = NoClusterError if isinstance(error, ConnectionRefusedError) else FleetError
        raise failure(
            f"no Ray cluster answers at {address} ({error}); check --address, or {_without(or_start)}"
        ) from error
    if not is_grpc:
        raise NoClusterError(
            f"what answers at {address} is not the head of a Ray cluster; give its GCS address to --address, like "
            f"10.0.0.1:6379, or {_without(or_start)}"
        )


def _speaks_grpc(host: str, port: int) -> bool:
    """Whether what listens there greets as gRPC does. Raises: TimeoutError for one that is silent; OSError."""
    with socket.create_connection((host, port), CONNECT_TIMEOUT_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") not in ("0", "false", ""):
            return True
        connection.sendall(HTTP2_PREFACE)
        greeting = connection.recv(9)
        return len(greeting) > 3 and greeting[3] == HTTP2_SETTINGS


def _check_raylet(address: str) -> None:
    """Find out that the raylet of this node is silent: joining, Ray would end this process after 28 s without a word.

    Raises: FleetError.
    """
    own = {found.address for interface in psutil.net_if_addrs().values() for found in interface}
    from ray.exceptions import AuthenticationError

    the_cluster = f"the Ray cluster at {address}"
    with as_fleet_error(f"{the_cluster} did not list its nodes"):
        try:
            with unsaid(AuthenticationError):
                found = wait_for(lambda: ray_internals.raylets(address, 10), ANSWER_TIMEOUT_S)
        except AuthenticationError as error:
            raise FleetError(ray_auth.refusal(the_cluster)) from error
    silent = []
    for host, port in found:
        if host in own:
            try:
                _speaks_grpc(host, port)
            except OSError as error:  # a timeout too
                silent.append(f"{host}:{port}: {error}")
            else:
                return
    if silent:
        raise FleetError(
            f"Ray's process raylet on this node does not answer ({', '.join(silent)}), so nothing can be asked through "
            "it; try again in a few seconds"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def devices_by_node(device: Device | Literal[""] = "") -> list[NodeDevices]:
    """What Ray says of its alive nodes: those with GPUs, or in a cluster without any, all with their CPU cores.

    `device`: only nodes with such, even if there are none (any more).

    Raises: FleetError when Ray does not answer.
    """
    free_by_node = bounded(NODES_UNKNOWN, ray_internals.free_resources)
    by_device: dict[Device, list[NodeDevices]] = {"GPU": [], "CPU": []}
    for node in _all_nodes():
        resources: dict[str, Any] = node["Resources"]
        if not node["Alive"]:
            continue
        kind = next((name for name in resources if name.startswith("accelerator_type:")), None)
        for name, nodes in by_device.items():
            if total := int(resources.get(name, 0)):
                free = free_by_node.get(node["NodeID"], {}).get(name, 0.0)
                is_spot = node["Labels"].get(MARKET_LABEL) == SPOT
                nodes.append(NodeDevices(node["NodeManagerAddress"], total, free, kind, name, is_spot))
    if device:
        return by_device[device]
    return by_device["GPU"] or by_device["CPU"]


def nodes_for(config: FleetConfig) -> list[NodeDevices]:
    """Alive nodes on which the fleet's replicas may be. Twins need nothing that only some nodes have."""
    return devices_by_node("CPU" if config.engine == "twin" and config.pools else config.device)


def nodes() -> dict[str, str]:
    """Addresses of the alive nodes, by Ray's node id. Raises: FleetError when Ray does not answer."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in _all_nodes() if node["Alive"]}


def is_one_machine() -> bool:
    """Whether all nodes are this machine, which is one of them. Raises: FleetError, as `nodes`."""
    return len(set(nodes().values())) == 1


def _all_nodes() -> list[dict[str, Any]]:
    """What Ray says of its nodes, dead ones too."""
    import ray

    return bounded(NODES_UNKNOWN, ray.nodes)


def drain_node(node_id: str, deadline_s: float) -> None:
    """Ray and Serve put nothing more on a node; what is there goes on until it is ended, or the node is.

    Raises: FleetError when Ray refuses, or does not answer.
    """
    deadline_ms = time.time_ns() // 1_000_000 + int(deadline_s * 1000)
    refusal = bounded(f"Ray did not drain node {node_id}", lambda: ray_internals.drain_node(node_id, deadline_ms))
    if refusal:
        raise FleetError(f"Ray did not drain node {node_id}: {refusal}")


def dead_nodes() -> list[str]:
    """Addresses of nodes that Ray has lost, and where none is alive again. Raises: FleetError, as `nodes`."""
    nodes = _all_nodes()
    alive = {node["NodeManagerAddress"] for node in nodes if node["Alive"]}
    return sorted({node["NodeManagerAddress"] for node in nodes} - alive)


# ---- fleets started from here


def remember(fleet: Remembered) -> None:
    """Record in `home()` that a fleet was started from this machine."""
    path = home() / "fleets" / f"{fleet.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, fleet)


def recall(name: str) -> Remembered | None:
    """The fleet of this name that was started from this machine, if one was. Raises: as `find_local_ray`."""
    try:
        return msgspec.json.decode(_read(home() / "fleets" / f"{name}.json"), type=Remembered)
    except msgspec.MsgspecError:
        return None


def forget(name: str) -> None:
    """Undo `remember`. Raises: FleetError when `home()` cannot be written."""
    _remove(home() / "fleets" / f"{name}.json")


def remembered() -> list[Remembered]:
    """All fleets that were started from this machine, by name."""
    fleets = []
    for path in sorted((home() / "fleets").glob("*.json")):
        fleet = recall(path.stem)
        if fleet is not None:
            fleets.append(fleet)
    return fleets


def _write(path: Path, value: Any) -> None:
    partial = path.with_suffix(f".{os.getpid()}.{time.monotonic_ns()}")
    partial.touch(mode=0o600)  # it may hold a token
    partial.write_bytes(msgspec.json.encode(value))
    partial.replace(path)
