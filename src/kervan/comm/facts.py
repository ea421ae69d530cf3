"""What is known of a host and of the ranks on it, as plain values that JSON can hold; nothing is concluded here.

Gathered by `gather`, judged by the checks. None, or an empty value where that is said, means that it is not known here.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from kervan.observe.gpu_state import GpuState


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two GPUs of a host, by index. `path`: NV18, PIX, PXB, PHB, NODE or SYS. `has_peer_access`: to their memory."""

    a: int
    b: int
    path: str = ""
    has_peer_access: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A network interface. `kind`: what made it, such as bridge or veth; empty for a card."""

    name: str
    is_up: bool = True
    addresses: tuple[str, ...] = ()
    kind: str = ""
    has_default_route: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RdmaPort:
    """A port of an InfiniBand or RoCE card. `gpu_paths`: how near it is to each GPU, by index."""

    device: str
    port: int = 1
    state: str = "ACTIVE"
    link_layer: str = "InfiniBand"
    rate_gbit_s: float | None = None
    numa_node: int | None = None
    gpu_paths: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A variable of NCCL, torch or CUDA. `source`: `environment`, or a file and its line."""

    name: str
    value: str
    source: str = "environment"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """One host. `settings`: the environment first, then files; the first of a name is the one that counts.

    `memlock_bytes`: -1 for no limit. `gpu_numa`, of each GPU by index: its NUMA node, -1 if it has none. `acs_bridges`:
    PCI bridges that send peer traffic up to the root; None where reading them needs root. `iommu`: `off`,
    `passthrough`, `translated` or empty.
    """

    host: str
    kernel: str = ""
    is_container: bool = False
    is_virtual: bool = False
    driver: str = ""
    is_open_driver: bool | None = None
    gpus: tuple[GpuState, ...] = ()
    pairs: tuple[Pair, ...] = ()
    gpu_numa: tuple[int, ...] = ()
    shm_bytes: int | None = None
    shm_free_bytes: int | None = None
    memlock_bytes: int | None = None
    interfaces: tuple[Interface, ...] = ()
    rdma: tuple[RdmaPort, ...] = ()
    has_peermem: bool = False
    has_dmabuf: bool | None = None
    iommu: str = ""
    acs_bridges: tuple[str, ...] | None = None
    has_fabric_manager: bool | None = None
    xid_lines: tuple[str, ...] | None = None
    settings: tuple[Setting, ...] = ()

    def value(self, name: str) -> Setting | None:
        """What counts for a variable; None if it is not set."""
        return next((setting for setting in self.settings if setting.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """What a rank of the measurement found. `clock_s`: its wall clock minus rank 0's. `copy_gb_s`: of its GPU alone.

    `cpus`: that it may run on, `far_cpus` of them at another NUMA node than its GPU.
    """

    rank: int
    host: str
    gpu: str = ""
    nccl: str = ""
    torch: str = ""
    driver: str = ""
    init_s: float = 0.0
    clock_s: float = 0.0
    copy_gb_s: float | None = None
    cpus: int = 0
    far_cpus: int | None = None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSpeed:
    """Between two ranks, both ways at once: GB/s each way. `num_wrong`: entries that came wrong."""

    a: int
    b: int
    gb_s: float
    num_wrong: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """An all-reduce: its size, time and bus bandwidth, and entries of the result that were wrong."""

    bytes: int
    mode: str
    time_us: float
    busbw_gb_s: float
    num_wrong: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a short measurement found. `problem`: why it did not end. `loaded`: the GPUs while they were busy.

    `transports`: what NCCL's log says of each connection, such as P2P/CUMEM or NET/Socket, and how many there are.
    `ras`: what NCCL's own report says is wrong, `diagnostics`: all lines of its diagnostics; None where it has none.
    """

    on_gpu: bool
    ranks: tuple[RankFacts, ...] = ()
    reduced: tuple[Reduced, ...] = ()
    pairs: tuple[PairSpeed, ...] = ()
    loaded: tuple[GpuState, ...] = ()
    transports: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    nvls: bool | None = None
    ras: tuple[str, ...] | None = None
    diagnostics: tuple[str, ...] | None = None
    problem: str = ""


def to_json(facts: HostFacts | Measured) -> Any:
    """As plain values."""
    return msgspec.to_builtins(facts)


def host_from_json(value: Any) -> HostFacts:
    """The facts of which `to_json` made this value."""
    return msgspec.convert(value, HostFacts)
