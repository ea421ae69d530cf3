"""Reads what `HostFacts` holds from this machine: the driver, /proc, /sys, the environment and NCCL's files.

Whatever cannot be read is left unknown: containers hide much, and a check that lacks a fact says so.
"""

import os
import platform
import re
import resource
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from kervan.comm.facts import HostFacts, Interface, Pair, RdmaPort, Setting
from kervan.observe import gpu_state, nvidia_smi, nvml
from kervan.observe.gpu_state import GpuState
from kervan.observe.reading import Reading

PREFIXES = ("NCCL_", "TORCH_NCCL_", "TORCH_FR_", "TORCH_DIST", "GLOO_", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_", "UCX_")
CONF = Path("/etc/nccl.conf")
ACS_CAPABILITY = 0x000D
# Request redirect and completion redirect: they send what a GPU writes to its neighbour up to the root and back.
ACS_REDIRECT = 0b1100
PCI_CONFIG_BYTES = 4096


def host(environ: Mapping[str, str] = os.environ) -> HostFacts:
    """The facts of this host. Takes a second or two where nvidia-smi has to be asked."""
    gpus = gpu_state.read()
    reading = (nvml.read() or nvidia_smi.read()) if gpus else None
    shm = _shm()
    driver_text = _read(Path("/proc/driver/nvidia/version"))
    return HostFacts(
        host=socket.gethostname(),
        kernel=platform.release(),
        is_container=_is_container(),
        is_virtual=" hypervisor" in _read(Path("/proc/cpuinfo")),
        driver=reading.driver if reading else "",
        is_open_driver="Open Kernel Module" in driver_text if driver_text else None,
        gpus=gpus,
        pairs=_pairs(reading),
        gpu_numa=tuple(_numa_node(gpu) for gpu in gpus),
        shm_bytes=None if shm is None else shm[0],
        shm_free_bytes=None if shm is None else shm[1],
        memlock_bytes=_memlock(),
        interfaces=_interfaces(),
        rdma=rdma_ports(Path("/sys/class/infiniband"), gpus),
        has_peermem=Path("/sys/module/nvidia_peermem").exists() or Path("/sys/module/nv_peer_mem").exists(),
        has_dmabuf=_has_dmabuf(driver_text),
        iommu=_iommu(),
        acs_bridges=acs_bridges(Path("/sys/bus/pci/devices")),
        has_fabric_manager=_has_process("nv-fabricmanager"),
        xid_lines=_xid_lines(),
        settings=settings(environ),
    )


def settings(environ: Mapping[str, str]) -> tuple[Setting, ...]:
    """The environment's, then those of NCCL's files, of which the first one of a name counts."""
    found = [Setting(name=name, value=value) for name, value in sorted(environ.items()) if name.startswith(PREFIXES)]
    user = environ.get("NCCL_CONF_FILE")
    files = [Path(user) if user else Path(environ.get("HOME", "~")).expanduser() / ".nccl.conf", CONF]
    for path in files:
        found += parse_conf(_read(path), str(path))
    return tuple(found)


def parse_conf(text: str, path: str) -> list[Setting]:
    """NAME=value lines of an nccl.conf; `#` begins a comment."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        name, equals, value = line.partition("#")[0].strip().partition("=")
        if equals:
            found.append(Setting(name=name.strip(), value=value.strip(), source=f"{path}:{number}"))
    return found


def _pairs(reading: Reading | None) -> tuple[Pair, ...]:
    if reading is None:
        return ()
    indices = [device.index for device in reading.devices]
    return tuple(
        Pair(a=a, b=b, path=reading.connections.get((a, b), ""), has_peer_access=reading.peers.get((a, b)))
        for a in indices for b in indices if a < b
    )  # fmt: skip


def _numa_node(gpu: GpuState) -> int:
    domain, _, rest = gpu.bus_id.lower().partition(":")
    text = _read(Path("/sys/bus/pci/devices") / f"{domain[-4:]}:{rest}" / "numa_node").strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else -1


def _shm() -> tuple[int, int] | None:
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return None
    return stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize


def _memlock() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return -1 if soft == resource.RLIM_INFINITY else soft


def _interfaces() -> tuple[Interface, ...]:
    addresses, stats = psutil.net_if_addrs(), psutil.net_if_stats()
    default = {
        line.split()[0] for line in _read(Path("/proc/net/route")).splitlines()[1:] if line.split()[1:2] == ["00000000"]
    }
    found = []
    for _, name in socket.if_nameindex():
        place = Path("/sys/class/net") / name
        kind = "bridge" if (place / "bridge").exists() else "" if (place / "device").exists() else "virtual"
        ips = tuple(
            a.address.partition("%")[0]
            for a in addresses.get(name, ())
            if a.family in (socket.AF_INET, socket.AF_INET6)
        )
        is_up = name in stats and stats[name].isup
        found.append(Interface(name=name, is_up=is_up, addresses=ips, kind=kind, has_default_route=name in default))
    return tuple(found)


def rdma_ports(folder: Path, gpus: tuple[GpuState, ...]) -> tuple[RdmaPort, ...]:
    """The ports under /sys/class/infiniband, with how near each is to each GPU."""
    found = []
    for device in sorted(folder.iterdir()) if folder.exists() else ():
        numa = _read(device / "device" / "numa_node").strip()
        for port in sorted((device / "ports").iterdir()) if (device / "ports").exists() else ():
            rate = re.match(r"[\d.]+", _read(port / "rate"))
            found.append(
                RdmaPort(
                    device=device.name,
                    port=int(port.name),
                    state=_read(port / "state").rpartition(":")[2].strip(),
                    link_layer=_read(port / "link_layer").strip(),
                    rate_gbit_s=float(rate[0]) if rate else None,
                    numa_node=int(numa) if re.fullmatch(r"-?\d+", numa) else None,
                    gpu_paths=tuple(_pci_path(device / "device", gpu) for gpu in gpus),
                )
            )
    return tuple(found)


def _pci_path(card: Path, gpu: GpuState) -> str:
    """PIX or PXB below a common switch, PHB or NODE below a common root, else SYS; as `nvidia-smi topo -m` has it."""
    domain, _, rest = gpu.bus_id.lower().partition(":")
    there = Path("/sys/bus/pci/devices") / f"{domain[-4:]}:{rest}"
    try:
        a, b = card.resolve(strict=True).parts, there.resolve(strict=True).parts
    except OSError:
        return ""
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    roots = [part for part in a[:common] if part.startswith("pci")]
    if not roots:
        same = _read(card / "numa_node").strip() == _read(there / "numa_node").strip() not in ("", "-1")
        return "NODE" if same else "SYS"
    bridges = common - a.index(roots[0]) - 1
    return "PHB" if bridges == 0 else "PIX" if max(len(a), len(b)) - common <= 2 else "PXB"


def acs_bridges(folder: Path) -> tuple[str, ...] | None:
    """PCI bridges whose access control redirects peer traffic; None where the configuration space cannot be read."""
    found, is_readable = [], False
    for device in sorted(folder.iterdir()) if folder.exists() else ():
        if not _read(device / "class").startswith("0x0604"):
            continue
        try:
            config = (device / "config").read_bytes()[:PCI_CONFIG_BYTES]
        except OSError:
            continue
        if len(config) <= 256:
            continue
        is_readable = True
        if redirects(config):
            found.append(device.name)
    return tuple(found) if is_readable else None


def redirects(config: bytes) -> bool:
    """Whether the access control capability in a PCI configuration space redirects requests or completions."""
    at = 0x100
    for _ in range(64):
        if at < 0x100 or at + 8 > len(config):
            return False
        head = int.from_bytes(config[at : at + 4], "little")
        if head & 0xFFFF == ACS_CAPABILITY:
            return bool(int.from_bytes(config[at + 6 : at + 8], "little") & ACS_REDIRECT)
        at = head >> 20
    return False


def _has_dmabuf(driver_text: str) -> bool | None:
    """The open driver on Linux 5.12 or newer exports GPU memory so. None without a driver."""
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    if not driver_text or version is None:
        return None
    return "Open Kernel Module" in driver_text and (int(version[1]), int(version[2])) >= (5, 12)


def _iommu() -> str:
    groups = Path("/sys/kernel/iommu_groups")
    kinds = {_read(group / "type").strip() for group in groups.iterdir()} if groups.exists() else set()
    if not kinds:
        return "off" if groups.exists() else ""
    return "passthrough" if kinds <= {"identity"} else "translated"


def _is_container() -> bool:
    return (
        Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() or "KUBERNETES_SERVICE_HOST" in os.environ
    )


def _has_process(name: str) -> bool:
    return any(process.info["name"] == name for process in psutil.process_iter(["name"]))


def _xid_lines() -> tuple[str, ...] | None:
    """The driver's errors in the kernel's log since boot; None where that may not be read."""
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    found = []
    try:
        while True:
            line = os.read(fd, 8192).decode(errors="replace")
            if "NVRM: Xid" in line:
                found.append(line.rpartition(";")[2].strip()[:200])
    except OSError:  # no more lines, or not for this user
        return tuple(found)
    finally:
        os.close(fd)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
