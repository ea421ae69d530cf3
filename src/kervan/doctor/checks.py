"""Checks of a machine that is described, not asked: pass, warn, fail or skipped, each with its cause and its fix."""

import fnmatch
import ipaddress
import re
from collections.abc import Iterator

from kervan.comm import gpu_checks, host_checks, settings_checks
from kervan.comm.check import Check, failed, listed, passed, skipped, warned
from kervan.doctor.machine import Machine
from kervan.fleet.vllm import versions as vllm_versions
from kervan.units import format_bytes

MIN_PYTHON = (3, 11)
RAY_VERSION = "2.60.0"  # of pyproject.toml: kervan uses names of Ray that are not public
# The least driver of each CUDA release that torch is built for. Source: NVIDIA, CUDA Toolkit release notes, tables
# "minimum required driver version for CUDA minor version compatibility".
MIN_DRIVERS = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
MIN_NOFILE, GOOD_NOFILE = 2048, 65536
MIN_PROCESSES = 4096
GIB = 1 << 30
RAY_FULL = 0.95  # of a disk: Ray stores no more objects there (local_fs_capacity_threshold)
MIN_WEIGHTS_BYTES = 20 * GIB
MIN_FREE_BYTES = GIB
RAY_KILLS_AT = 0.95  # of memory in use (RAY_memory_usage_threshold)
MAX_CLOCK_S = 5.0
# Of `kervan comm doctor`: what of the host matters for a fleet on one node, too.
HOST_CHECKS = frozenset({"shm", "memlock", "interface"})


def examine(machine: Machine) -> list[Check]:
    """All checks: of kervan's own, then those that `kervan comm doctor` makes without measuring."""
    host = [check for check in host_checks.checks(machine.host, nodes=1) if check.name in HOST_CHECKS]
    return [
        *own_checks(machine),
        *host,
        *gpu_checks.checks(machine.host, None),
        *settings_checks.checks(machine.host, nodes=1),
    ]


def own_checks(machine: Machine) -> Iterator[Check]:
    """Those of this page."""
    yield _python(machine)
    yield _ray_version(machine)
    yield _vllm_version(machine)
    yield _torch(machine)
    yield _driver(machine)
    yield _gpus(machine)
    yield _ray(machine)
    yield _fleet(machine)
    yield _ports(machine)
    yield _home(machine)
    yield _nofile(machine)
    yield _processes(machine)
    yield _memory(machine)
    yield _disk(machine)
    yield _clock(machine)
    yield _autogroups(machine)
    yield _hub_cache(machine)
    yield _hub_token(machine)
    yield _proxies(machine)


def numbers(version: str) -> tuple[int, ...]:
    """`2.60.0rc1` as (2, 60, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _python(machine: Machine) -> Check:
    python = machine.versions.python
    if numbers(python)[:2] < MIN_PYTHON:
        return failed("python", f"Python {python} is older than 3.11", "make an environment with Python 3.11 or newer")
    refusing = [f"{name} wants {needs}" for name, needs in machine.versions.python_needs.items()]
    if refusing:
        return failed(
            "python",
            f"Python {python}, and {listed(refusing)}",
            "make the environment anew with a Python that all take",
        )
    return passed("python", f"Python {python}")


def _ray_version(machine: Machine) -> Check:
    found = machine.versions.ray
    fix = f"pip install 'ray[serve]=={RAY_VERSION}', on all nodes"
    if not found:
        return failed("ray-version", "Ray is not installed", "pip install 'kervan[serve]'")
    if found.partition("+")[0] != RAY_VERSION:
        return failed("ray-version", f"Ray {found}, and kervan needs {RAY_VERSION}: it uses names that change", fix)
    return passed("ray-version", f"Ray {found}")


def _vllm_version(machine: Machine) -> Check:
    found = machine.versions.vllm
    if not found:
        return failed(
            "vllm-version", "vLLM is not installed, whose server every gateway runs",
            "pip install 'kervan[gpu]', or 'kervan[cpu]' without GPUs",
        )  # fmt: skip
    if not vllm_versions.MIN_VERSION <= numbers(found)[:2] < vllm_versions.MAX_VERSION:
        return failed(
            "vllm-version", f"vLLM {found} is outside the range {vllm_versions.supported()} that kervan supports",
            f"pip install 'vllm{vllm_versions.supported()}', on all nodes",
        )  # fmt: skip
    if (untested := vllm_versions.untested(found)) is not None:
        return warned("vllm-version", untested, f"prefer vLLM {' or '.join(vllm_versions.TESTED)}")
    return passed("vllm-version", f"vLLM {found}, which kervan is tested with")


def _torch(machine: Machine) -> Check:
    found, wanted = machine.versions.torch, machine.versions.vllm_needs_torch
    if not found or not wanted:
        return skipped("torch", "no vLLM is installed that says which torch it needs")
    exact = re.fullmatch(r"==\s*([\d.]+)\S*", wanted)
    if exact and numbers(exact[1]) != numbers(found):
        return failed(
            "torch", f"torch {found}, and vLLM {machine.versions.vllm} is built for {exact[1]}: its kernels fail",
            f"pip install 'torch=={exact[1]}'",
        )  # fmt: skip
    return passed("torch", f"torch {found}, as vLLM asks ({wanted})")


def _driver(machine: Machine) -> Check:
    cuda, driver = machine.versions.torch_cuda, machine.host.driver
    if not machine.host.gpus:
        return skipped("cuda-driver", "no NVIDIA GPU is visible here")
    if not cuda:
        return failed(
            "cuda-driver", f"torch {machine.versions.torch or '(none)'} is a build without CUDA, beside NVIDIA GPUs",
            "pip install 'kervan[gpu]' in an environment without the CPU build",
        )  # fmt: skip
    least = MIN_DRIVERS.get(numbers(cuda)[0])
    if not driver or least is None:
        return skipped("cuda-driver", f"driver {driver or 'unknown'} with CUDA {cuda}: not in kervan's table")
    if numbers(driver) < least:
        wanted = ".".join(f"{part:02d}" if place else str(part) for place, part in enumerate(least))
        return failed(
            "cuda-driver", f"driver {driver} is older than {wanted}, the least for torch's CUDA {cuda}",
            f"update the driver to {wanted} or newer, or install a vLLM built for an older CUDA",
        )  # fmt: skip
    return passed("cuda-driver", f"driver {driver} with torch's CUDA {cuda}")


def _gpus(machine: Machine) -> Check:
    visible, on_bus = len(machine.host.gpus), machine.num_pci_gpus
    if not visible and on_bus:
        return failed(
            "gpus", f"{on_bus} NVIDIA GPUs are on the PCI bus, and no driver shows them",
            "see nvidia-smi: load or install the driver (after an update: reboot); in a container: --gpus all",
        )  # fmt: skip
    if not visible:
        return skipped("gpus", "no NVIDIA GPU: fleets run on CPU here, or as twins")
    if on_bus > visible:
        return warned(
            "gpus", f"{visible} of {on_bus} NVIDIA GPUs of the PCI bus are visible",
            "if it is not a container that was given some: dmesg | grep -i xid, a GPU may have fallen off the bus",
        )  # fmt: skip
    names = sorted({gpu.name for gpu in machine.host.gpus})
    return passed("gpus", f"{visible}: {listed(names)}")


def _ray(machine: Machine) -> Check:
    if machine.ray_problem:
        return failed("ray", machine.ray_problem, "kervan status --why; or start Ray again: ray start, kervan up")
    if not machine.ray_address:
        return skipped("ray", "no Ray runs that kervan started, and RAY_ADDRESS names none: kervan up starts it")
    return passed("ray", f"a Ray cluster answers at {machine.ray_address}")


def _fleet(machine: Machine) -> Check:
    fleet = machine.fleet
    if fleet is None:
        return skipped("fleet", "no fleet of this name was started from this machine")
    if fleet.problem:
        return failed(
            "fleet",
            f"fleet {fleet.name!r} at {fleet.url}: {fleet.problem}",
            f"kervan status --name {fleet.name} --why",
        )
    return passed("fleet", f"fleet {fleet.name!r} answers at {fleet.url} and is ready")


def _ports(machine: Machine) -> Check:
    if not machine.ports:
        return skipped("ports", "no port was asked for")
    taken = [port for port in machine.ports if port.holder and not port.is_own]
    if taken:
        return failed(
            "ports", listed(f"port {port.number} is taken by {port.holder}" for port in taken),
            "kervan up --port with a free one, or stop what is there",
        )  # fmt: skip
    own = [port.number for port in machine.ports if port.is_own]
    if own:
        return passed("ports", f"port {listed(own)}: the fleet's own gateway")
    return passed("ports", f"port {listed(port.number for port in machine.ports)} is free")


def _home(machine: Machine) -> Check:
    if machine.home_problem:
        return failed("kervan-home", machine.home_problem, "KERVAN_HOME=DIR, one that you can write to")
    return passed("kervan-home", "fleets can be remembered")


def _nofile(machine: Machine) -> Check:
    soft, hard = machine.nofile
    said = f"{'no limit' if soft < 0 else soft} open files (hard limit {'none' if hard < 0 else hard})"
    fix = f"ulimit -n {GOOD_NOFILE} before kervan up and ray start; LimitNOFILE={GOOD_NOFILE} in a service"
    if 0 <= hard < GOOD_NOFILE:
        fix = (
            f"raise the hard limit to {GOOD_NOFILE}: LimitNOFILE in a service, nofile in /etc/security/limits.conf for "
            "a login, --ulimit nofile for a container"
        )
    if 0 <= soft < MIN_NOFILE:
        return failed("nofile", f"{said}: a gateway needs one for each client, and Ray hundreds", fix)
    if 0 <= soft < GOOD_NOFILE:
        return warned("nofile", f"{said}: a gateway needs one for each client", fix)
    return passed("nofile", said)


def _processes(machine: Machine) -> Check:
    limit = machine.max_processes
    if 0 <= limit < MIN_PROCESSES:
        return warned(
            "processes", f"at most {limit} processes and threads; Ray and vLLM start hundreds of threads each",
            "ulimit -u unlimited; in a container --pids-limit -1; in Kubernetes podPidsLimit",
        )  # fmt: skip
    return passed("processes", "no limit" if limit < 0 else f"at most {limit} processes and threads")


def _memory(machine: Machine) -> Check:
    if not machine.memory_bytes:
        return skipped("memory", "not known")
    used = 1 - machine.memory_free_bytes / machine.memory_bytes
    said = f"{used:.0%} of {format_bytes(machine.memory_bytes)} is in use"
    if used >= RAY_KILLS_AT:
        return failed("memory", f"{said}; from {RAY_KILLS_AT:.0%} on Ray ends processes", "free memory, or add some")
    if used >= RAY_KILLS_AT - 0.1:
        return warned("memory", f"{said}; from {RAY_KILLS_AT:.0%} on Ray ends processes", "free memory, or add some")
    return passed("memory", said)


def _disk(machine: Machine) -> Check:
    if not machine.folders:
        return skipped("disk", "not known")
    locked = [folder for folder in machine.folders if not folder.is_writable]
    if locked:
        return failed(
            "disk",
            listed(f"{folder.path} ({folder.what}) cannot be written" for folder in locked),
            "give it to this user, or name another one: HF_HOME, RAY_TMPDIR, KERVAN_HOME",
        )
    full = [folder for folder in machine.folders if folder.free_bytes < _least_bytes(folder.total_bytes)]
    said = listed(
        f"{folder.path} ({folder.what}) has {format_bytes(folder.free_bytes)} free"
        for folder in full or machine.folders
    )
    if full:
        return failed(
            "disk", f"{said}: above {RAY_FULL:.0%} of a disk in use, Ray stores nothing there", "free space, or move it"
        )
    low = [f for f in machine.folders if f.what == "weights" and f.free_bytes < MIN_WEIGHTS_BYTES]
    if low:
        return warned(
            "disk", f"{said}: weights of 8 billion parameters in bf16 take 16 GB", "free space, or HF_HOME elsewhere"
        )
    return passed("disk", said)


def _least_bytes(total_bytes: int) -> float:
    return (
        max(MIN_FREE_BYTES, (1 - RAY_FULL) * total_bytes) if total_bytes >= 20 * GIB else (1 - RAY_FULL) * total_bytes
    )


def _clock(machine: Machine) -> Check:
    fleet = machine.fleet
    if fleet is not None and fleet.clock_ahead_s is not None and abs(fleet.clock_ahead_s) > MAX_CLOCK_S:
        return failed(
            "clock", f"the fleet's gateway is {fleet.clock_ahead_s:+.0f} s off this machine's clock",
            "start a time service on both: systemctl enable --now chronyd or systemd-timesyncd",
        )  # fmt: skip
    if machine.is_clock_synchronised is None:
        return skipped("clock", "the kernel does not tell")
    if not machine.is_clock_synchronised:
        return warned(
            "clock", "no time service keeps it: logs and notices of several nodes may not agree",
            "systemctl enable --now chronyd or systemd-timesyncd; in a container or guest, on its host",
        )  # fmt: skip
    return passed("clock", "kept by a time service")


def _autogroups(machine: Machine) -> Check:
    if machine.starvation:
        cause, _, fix = machine.starvation.partition("; ")
        return warned("autogroups", cause, fix)
    return passed("autogroups", "this kernel does not starve sessions, or autogroups are off")


def _hub_cache(machine: Machine) -> Check:
    hub = machine.hub
    if hub is None:
        return skipped("hf-cache", "not known")
    if not hub.is_writable:
        return failed("hf-cache", f"{hub.path} cannot be written: no model can be fetched", "HF_HOME=DIR, or chown it")
    if hub.offline and not hub.num_models:
        return warned(  # a directory is served all the same
            "hf-cache",
            f"{hub.offline} forbids to ask the hub, and {hub.path} has no model: only directories can be served",
            f"kervan up DIRECTORY; for models of the hub unset {hub.offline.partition('=')[0]}",
        )
    more = f"; {hub.offline}: nothing is fetched" if hub.offline else ""
    return passed("hf-cache", f"{hub.path} has {hub.num_models} models{more}")


def _hub_token(machine: Machine) -> Check:
    hub = machine.hub
    if hub is None:
        return skipped("hf-token", "not known")
    if hub.token_problem:
        return warned(
            "hf-token", f"{hub.token_source}: {hub.token_problem}", "hf auth login, or export HF_TOKEN=hf_..."
        )
    if not hub.token_source:
        return passed("hf-token", "none; only gated and private models need one")
    return passed("hf-token", f"from {hub.token_source}")


def _proxies(machine: Machine) -> Check:
    if not machine.proxy:
        return passed("proxies", "none is set")
    through = [a for a in ("127.0.0.1", "localhost") if not is_exempt(a, machine.no_proxy)]
    hosts = [address for address in machine.own_addresses if not is_exempt(address, machine.no_proxy)]
    wanted = ",".join(dict.fromkeys([*machine.no_proxy, *through, *hosts]))
    fix = f"export no_proxy={wanted} NO_PROXY={wanted}, and all other nodes' addresses"
    if through:
        return failed(
            "proxies",
            f"{machine.proxy}, and no_proxy leaves out {listed(through)}: clients here ask it for the fleet",
            fix,
        )
    if hosts:
        return warned("proxies", f"{machine.proxy}, and no_proxy leaves out {listed(hosts)} of this machine", fix)
    return passed("proxies", f"{machine.proxy}, and own addresses go without it")


def is_exempt(host: str, no_proxy: tuple[str, ...]) -> bool:
    """Whether requests to `host` go without the proxy, as curl and Python read no_proxy: names, suffixes, networks."""
    for pattern in no_proxy:
        if pattern in ("*", host) or fnmatch.fnmatch(host, pattern):
            return True
        if host.endswith("." + pattern.lstrip(".")):
            return True
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(pattern, strict=False):
                return True
        except ValueError:
            continue
    return False
