"""What a driver says of a machine's GPUs, before anything is concluded from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """`pcie_generation`, `pcie_lanes`: what GPU and slot can do together, not what an idle link has; 0 if not known."""

    index: int
    uuid: str
    name: str
    memory_mib: int
    has_mig: bool = False
    pcie_generation: int = 0
    pcie_lanes: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """`connections`: the path between two GPUs in the words of `nvidia-smi topo -m` (NV18, PIX, PXB, PHB, NODE, SYS).

    `peers`: whether they reach each other's memory. Pairs that are not known are missing.
    """

    reader: Literal["NVML", "nvidia-smi"]
    driver: str
    devices: tuple[GpuDevice, ...]
    connections: Mapping[Pair, str] = field(default_factory=dict)
    peers: Mapping[Pair, bool] = field(default_factory=dict)
