"""The host around the GPUs: limits, PCI bridges, network cards and interfaces."""

import ipaddress
from collections.abc import Iterator

from kervan.comm.check import Check, failed, listed, matches, passed, skipped, warned
from kervan.comm.facts import HostFacts, Interface, RdmaPort
from kervan.comm.gpu_checks import has_nvlink
from kervan.units import plural

GIB = 1 << 30
MIN_SHM_BYTES = GIB
# Of interfaces that lead to containers and virtual machines of this host only, or to a tunnel.
INSIDE = (
    "docker",
    "br-",
    "virbr",
    "cni",
    "flannel",
    "cali",
    "veth",
    "lxc",
    "lxd",
    "podman",
    "kube",
    "tun",
    "tap",
    "wg",
    "tailscale",
)
NEAR = ("PIX", "PXB", "PHB")


def checks(facts: HostFacts, *, nodes: int) -> Iterator[Check]:
    """All of this page."""
    yield _shm(facts)
    yield _memlock(facts)
    yield _gpudirect(facts, nodes)
    yield _acs(facts)
    yield _iommu(facts)
    yield _rdma_ports(facts, nodes)
    yield _rails(facts, nodes)
    yield _nic_distance(facts)
    yield _hca(facts, nodes)
    yield _interface(facts, nodes)


def usable(facts: HostFacts) -> list[Interface]:
    """Interfaces that are up and have an address."""
    return [i for i in facts.interfaces if i.is_up and i.addresses]


def chosen(facts: HostFacts) -> list[Interface]:
    """Those that NCCL takes, as it does: by NCCL_SOCKET_IFNAME; else ib*; else all but docker* and lo; else those."""
    up = usable(facts)
    setting = facts.value("NCCL_SOCKET_IFNAME")
    if setting is not None and setting.value:
        return [i for i in up if matches(setting.value, i.name)]
    for pattern in ("ib", "^docker,lo", "docker", "lo"):
        if found := [i for i in up if matches(pattern, i.name)]:
            return found
    return []


def is_inside(interface: Interface) -> bool:
    """Whether other hosts cannot be reached over it: a bridge of containers, a loopback, link-local addresses only."""
    if interface.name == "lo" or (interface.name.startswith(INSIDE) and not interface.has_default_route):
        return True
    if interface.kind == "bridge" and not interface.has_default_route:
        return True
    return all(_is_link_local(address) for address in interface.addresses)


def _is_link_local(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return ip.is_link_local or ip.is_loopback


def active_ports(facts: HostFacts) -> list[RdmaPort]:
    """RDMA ports with a link."""
    return [port for port in facts.rdma if port.state == "ACTIVE"]


def _shm(facts: HostFacts) -> Check:
    if facts.shm_bytes is None:
        return failed(
            "shm", "/dev/shm does not exist, and ranks of a host share memory there", "mount a tmpfs at /dev/shm"
        )
    size, free = facts.shm_bytes, facts.shm_free_bytes or 0
    digits = 1 if size < 100 * GIB else 0
    said = f"/dev/shm has {size / GIB:,.{digits}f} GiB, {free / GIB:,.{digits}f} GiB free"
    if size < MIN_SHM_BYTES:
        return failed(
            "shm", f"{said}, below {MIN_SHM_BYTES / GIB:g} GiB; containers have 64 MiB by default",
            "docker run --ipc=host or --shm-size=16g; in Kubernetes an emptyDir with medium: Memory at /dev/shm",
        )  # fmt: skip
    if free < MIN_SHM_BYTES:
        return warned("shm", said, "remove what ended processes left: ls -la /dev/shm")
    return passed("shm", said)


def _memlock(facts: HostFacts) -> Check:
    limit = facts.memlock_bytes
    if limit is None:
        return skipped("memlock", "not known")
    if limit < 0:
        return passed("memlock", "no limit on locked memory")
    if not active_ports(facts):
        return passed("memlock", f"{limit / 1024:.0f} KiB, which matters for RDMA only, and there is no active port")
    return failed(
        "memlock", f"at most {limit / 1024:.0f} KiB may be locked, and RDMA cards need all of their buffers locked",
        "docker run --ulimit memlock=-1; LimitMEMLOCK=infinity in the service; * - memlock unlimited in limits.conf",
    )  # fmt: skip


def _gpudirect(facts: HostFacts, nodes: int) -> Check:
    if not active_ports(facts) or not facts.gpus:
        return skipped("gpudirect", "no active RDMA port beside a GPU")
    if facts.has_peermem:
        return passed("gpudirect", "nvidia_peermem is loaded")
    if facts.has_dmabuf:
        return passed("gpudirect", "the open driver exports GPU memory (dmabuf)")
    said = "neither nvidia_peermem nor dmabuf: data to the network goes through the host's memory"
    fix = "modprobe nvidia_peermem, or install the open driver on Linux 5.12 or newer"
    return (failed if nodes > 1 else warned)("gpudirect", said, fix)


def _acs(facts: HostFacts) -> Check:
    if facts.acs_bridges is None:
        return skipped(
            "acs", "PCI configuration may be read by root only; sudo lspci -vvv | grep ACSCtl: SrcValid+ is on"
        )
    if not facts.acs_bridges:
        return passed("acs", "no bridge redirects peer traffic")
    said = f"access control redirects peer traffic at {listed(facts.acs_bridges)}"
    fix = "turn ACS off in the BIOS, or setpci -s BRIDGE ECAP_ACS+0x6.w=0000 at each boot"
    if facts.is_virtual or has_nvlink(facts):
        return warned("acs", f"{said}; NVLink does not pass them, network cards do", fix)
    return failed("acs", f"{said}: GPUs reach each other over the root only, slowly or not at all", fix)


def _iommu(facts: HostFacts) -> Check:
    if not facts.iommu:
        return skipped("iommu", "not visible here")
    if facts.iommu == "translated" and not facts.is_virtual:
        verdict = warned if has_nvlink(facts) or len(facts.gpus) < 2 else failed
        return verdict(
            "iommu", "the IOMMU translates each access of a device: peer traffic over PCIe goes astray or is slow",
            "boot with iommu=pt (or intel_iommu=off, amd_iommu=off)",
        )  # fmt: skip
    return passed("iommu", facts.iommu + (", set up by the virtual machine's host" if facts.is_virtual else ""))


def _rdma_ports(facts: HostFacts, nodes: int) -> Check:
    if not facts.rdma:
        if nodes > 1:
            return warned(
                "rdma-ports",
                "no RDMA port: nodes talk over TCP",
                "use nodes with InfiniBand, RoCE or EFA for tp or pp over nodes",
            )
        return skipped("rdma-ports", "this host has none")
    down = [port for port in facts.rdma if port.state != "ACTIVE"]
    rates = sorted({port.rate_gbit_s for port in active_ports(facts) if port.rate_gbit_s})
    if down:
        said = listed(f"{port.device}:{port.port} is {port.state or 'in an unknown state'}" for port in down)
        return (failed if nodes > 1 else warned)(
            "rdma-ports", said, "look at cable, switch and subnet manager (ibstat)"
        )
    if len(rates) > 1:
        return warned("rdma-ports", f"ports run at {listed(rates)} Gbit/s: the slowest sets the pace",
                      "leave the slow ones out, such as NCCL_IB_HCA=^mlx5_2")  # fmt: skip
    return passed("rdma-ports", f"{len(facts.rdma)} active" + (f" at {rates[0]:g} Gbit/s" if rates else ""))


def _rails(facts: HostFacts, nodes: int) -> Check:
    ports = active_ports(facts)
    if not ports or len(facts.gpus) < 2:
        return skipped("rails", "no RDMA ports for several GPUs")
    share = len(facts.gpus) / len(ports)
    if len(ports) == 1 or share > 2:
        ratio = f"{plural(len(ports), 'active RDMA port')} for {len(facts.gpus)} GPUs"
        said = f"{ratio}: {share:.0f} GPUs share one"
        return warned(
            "rails",
            said,
            "for layouts over nodes, use hosts with a card for each one or two GPUs, or keep replicas on one node",
        )
    return passed("rails", f"{len(ports)} ports for {len(facts.gpus)} GPUs")


def _nic_distance(facts: HostFacts) -> Check:
    ports = [port for port in active_ports(facts) if any(port.gpu_paths)]
    if not ports or not facts.gpus:
        return skipped("nic-distance", "no RDMA port whose place is known")
    far = [
        gpu.index
        for i, gpu in enumerate(facts.gpus)
        if not any(p.gpu_paths[i : i + 1] and p.gpu_paths[i] in NEAR for p in ports)
    ]
    if far:
        return warned("nic-distance", f"no card is near {listed(f'GPU {i}' for i in far)} (PIX, PXB or PHB)",
                      "move cards to the switches of these GPUs; their traffic crosses the CPU")  # fmt: skip
    return passed("nic-distance", "each GPU has a card near it")


def _hca(facts: HostFacts, nodes: int) -> Check:
    setting = facts.value("NCCL_IB_HCA")
    if setting is None or not setting.value:
        return passed("hca", "NCCL chooses the cards")
    names = [f"{port.device}:{port.port}" for port in facts.rdma]
    taken = [name for name in names if matches(setting.value, name)]
    said = f"NCCL_IB_HCA={setting.value} ({setting.source})"
    if not names:
        return warned("hca", f"{said}, and this host has no RDMA card", "unset NCCL_IB_HCA")
    if not taken:
        return failed("hca", f"{said} takes none of {listed(names)}", "unset NCCL_IB_HCA")
    exact = setting.value.lstrip("^").startswith("=")
    wanted = {word.partition(":")[0] for word in setting.value.lstrip("^=").split(",")}
    more = [name for name in taken if name.partition(":")[0] not in wanted]
    if more and not exact and not setting.value.startswith("^"):
        return warned(
            "hca",
            f"{said} is a prefix and also takes {listed(more)}",
            f"NCCL_IB_HCA=={setting.value} for exact names, or unset it",
        )
    if len(taken) < len(active_ports(facts)) and not setting.value.startswith("^"):
        verdict = failed if nodes > 1 and len(taken) == 1 else warned
        return verdict(
            "hca", f"{said} takes {len(taken)} of {len(names)} ports: the other rails are lost", "unset NCCL_IB_HCA"
        )
    return passed("hca", f"{said} takes {len(taken)} of {len(names)} ports")


def _interface(facts: HostFacts, nodes: int) -> Check:
    setting = facts.value("NCCL_SOCKET_IFNAME")
    up = usable(facts)
    taken = chosen(facts)
    best = next((i.name for i in up if i.has_default_route and not is_inside(i)), None)
    best = best or next((i.name for i in up if not is_inside(i)), "eth0")
    verdict = failed if nodes > 1 else warned
    if setting is not None and setting.value:
        said = f"NCCL_SOCKET_IFNAME={setting.value} ({setting.source})"
        fix = f"unset it, or NCCL_SOCKET_IFNAME=={best}"
        if not taken:
            return failed("interface", f"{said} matches none of {listed(i.name for i in up)}: NCCL does not start", fix)
        inside = [i.name for i in taken if is_inside(i)]
        if inside == [i.name for i in taken]:
            return verdict("interface", f"{said} takes {listed(inside)}, over which no other host is reached", fix)
        if inside or (len(taken) > 1 and not setting.value.startswith(("^", "="))):
            return warned("interface", f"{said} is a prefix and takes {listed(i.name for i in taken)}", fix)
        return passed("interface", f"{said} takes {listed(i.name for i in taken)}")
    if not taken:
        return failed("interface", "no interface is up and has an address", "bring one up")
    first = taken[0]
    if is_inside(first) and first.name != "lo":
        return verdict(
            "interface", f"NCCL takes {first.name} ({listed(first.addresses)}) first, and it leads to no other host",
            f"NCCL_SOCKET_IFNAME=={best} and GLOO_SOCKET_IFNAME={best}",
        )  # fmt: skip
    if first.name == "lo" and nodes > 1:
        return failed("interface", "only lo is up", "bring the network up")
    gloo = facts.value("GLOO_SOCKET_IFNAME")
    if gloo is not None and gloo.value and gloo.value not in {i.name for i in up}:
        said = f"GLOO_SOCKET_IFNAME={gloo.value} ({gloo.source}) is none of {listed(i.name for i in up)}"
        return failed("interface", f"{said}; names are exact",
                      f"GLOO_SOCKET_IFNAME={best}")  # fmt: skip
    return passed("interface", f"NCCL takes {listed(i.name for i in taken)}")
