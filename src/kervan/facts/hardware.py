"""GPUs: memory, bandwidth, arithmetic, links. What vendors write and what software reports; no machine is asked here.

Rates are dense (without sparsity) and per second. Links and PCIe are per direction, so half of what data sheets call
"total" or "bidirectional". Every number names its source in `Gpu.sources`, a key of `hardware_sources.SOURCES`.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from kervan.errors import ConfigError

LinkKind = Literal["nvlink", "nvlink-bridge", "infinity-fabric", "pcie"]

GEN3_X16_BYTES_S = 16e9
GEN4_X16_BYTES_S = 32e9
GEN5_X16_BYTES_S = 64e9
GEN6_X16_BYTES_S = 128e9


@dataclass(frozen=True, slots=True)
class GpuLink:
    """What joins the GPUs of a node.

    `bytes_s`: what one GPU sends in all, per direction. `max_gpus`: GPUs that it joins all to all; a bridge joins 2,
    GB200's 72 are in one rack. `has_peer_to_peer`: GPUs reach each other's memory; otherwise data passes through the
    host's.
    """

    kind: LinkKind
    generation: int
    bytes_s: float
    max_gpus: int
    has_peer_to_peer: bool = True


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    `memory_mib`: what nvidia-smi (rocm-smi) shows. `memory_gib`: what CUDA (HIP) and so torch and vLLM count as the
    whole, up to 3% less; drivers differ by some tenths of a percent. `bf16_flops`: of 16-bit numbers; T4 and V100 have
    no bfloat16, so theirs is float16's, which vLLM takes there. `fp8_flops`, `fp4_flops`: 0 where the GPU has no such
    units.
    """

    name: str
    memory_mib: int
    memory_gib: float
    bandwidth_bytes_s: float
    bf16_flops: float
    fp8_flops: float
    fp4_flops: float
    link: GpuLink
    pcie_bytes_s: float
    compute_capability: str
    sources: Mapping[str, str] = field(repr=False)


def _pcie(generation: int, has_peer_to_peer: bool) -> GpuLink:
    bytes_s = {3: GEN3_X16_BYTES_S, 4: GEN4_X16_BYTES_S, 5: GEN5_X16_BYTES_S}[generation]
    return GpuLink("pcie", generation, bytes_s, 8, has_peer_to_peer)


def _sources(sheet: str, memory_mib: str, memory_gib: str, compute_capability: str, **other: str) -> Mapping[str, str]:
    """All numbers are from the data sheet but those named."""
    fields = ("bandwidth_bytes_s", "bf16_flops", "fp8_flops", "fp4_flops", "link", "pcie_bytes_s")
    named = {"memory_mib": memory_mib, "memory_gib": memory_gib, "compute_capability": compute_capability}
    return MappingProxyType(dict.fromkeys(fields, sheet) | named | other)


# Machines with 4 of these join all to all, those with 8 only within two groups of 4.
NVLINK2 = GpuLink("nvlink", 2, 150e9, 4)
NVLINK3 = GpuLink("nvlink", 3, 300e9, 8)
NVLINK4 = GpuLink("nvlink", 4, 450e9, 8)
NVLINK5 = GpuLink("nvlink", 5, 900e9, 8)

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "T4", 15360, 14.56, 0.32e12, 65e12, 0, 0, _pcie(3, has_peer_to_peer=False), GEN3_X16_BYTES_S, "7.5",
            _sources("t4", "smi-modal", "cuda-logs", "cuda-gpus", link="p2p-t4"),
        ),
        Gpu(
            "V100", 16384, 15.77, 0.9e12, 125e12, 0, 0, NVLINK2, GEN3_X16_BYTES_S, "7.0",
            _sources("v100", "smi-v100", "cuda-logs", "cuda-gpus"),
        ),
        Gpu(
            "V100-32", 32768, 31.73, 0.9e12, 125e12, 0, 0, NVLINK2, GEN3_X16_BYTES_S, "7.0",
            _sources("v100", "smi-logs", "cuda-logs", "cuda-gpus"),
        ),
        Gpu(
            "A10G", 23028, 22.06, 0.60e12, 70e12, 0, 0, _pcie(4, has_peer_to_peer=False), GEN4_X16_BYTES_S, "8.6",
            _sources("a10g", "smi-a10", "cuda-a10", "cuda-gpus", link="p2p-g5"),
        ),
        Gpu(
            "L4", 23034, 22.03, 0.30e12, 121e12, 242.5e12, 0, _pcie(4, has_peer_to_peer=False), GEN4_X16_BYTES_S, "8.9",
            _sources("l4", "smi-modal", "cuda-l4", "cuda-gpus", link="p2p-g6"),
        ),
        Gpu(
            "L40S", 46068, 44.39, 0.864e12, 362.05e12, 733e12, 0, _pcie(4, has_peer_to_peer=True), GEN4_X16_BYTES_S,
            "8.9",
            _sources("l40s", "smi-modal", "cuda-logs", "cuda-gpus"),
        ),
        Gpu(
            "RTX-A6000", 49140, 47.40, 0.768e12, 154.8e12, 0, 0, GpuLink("nvlink-bridge", 3, 56.25e9, 2),
            GEN4_X16_BYTES_S, "8.6",
            _sources("a6000", "smi-logs", "cuda-a6000", "cuda-gpus", link="a6000-bridge"),
        ),
        Gpu(
            "RTX-PRO-6000", 97887, 94.97, 1.597e12, 480e12, 960e12, 1920e12, _pcie(5, has_peer_to_peer=True),
            GEN5_X16_BYTES_S, "12.0",
            _sources(
                "rtx-pro-6000", "smi-logs", "cuda-logs", "cuda-gpus", link="p2p-rtx-pro-6000",
                bf16_flops="rtx-pro-6000-rates", fp8_flops="rtx-pro-6000-rates", fp4_flops="rtx-pro-6000-rates",
            ),
        ),
        Gpu(
            "RTX-PRO-6000-Workstation", 97887, 94.97, 1.792e12, 503.8e12, 1007.6e12, 2015.2e12,
            _pcie(5, has_peer_to_peer=True), GEN5_X16_BYTES_S, "12.0",
            _sources("rtx-pro-6000-ws", "smi-logs", "cuda-logs", "cuda-gpus", link="p2p-rtx-pro-6000"),
        ),
        Gpu(
            "A100-40", 40960, 39.49, 1.555e12, 312e12, 0, 0, NVLINK3, GEN4_X16_BYTES_S, "8.0",
            _sources("a100-whitepaper", "smi-modal", "cuda-a100-40", "cuda-gpus"),
        ),
        Gpu(
            "A100", 81920, 79.25, 2.039e12, 312e12, 0, 0, NVLINK3, GEN4_X16_BYTES_S, "8.0",
            _sources("a100", "smi-modal", "cuda-logs", "cuda-gpus"),
        ),
        Gpu(
            "A100-PCIe", 81920, 79.25, 1.935e12, 312e12, 0, 0, GpuLink("nvlink-bridge", 3, 300e9, 2), GEN4_X16_BYTES_S,
            "8.0",
            _sources("a100-pcie", "smi-logs", "cuda-as-a100", "cuda-gpus"),
        ),
        Gpu(
            "H20", 97871, 95.00, 4.0e12, 148e12, 296e12, 0, NVLINK4, GEN5_X16_BYTES_S, "9.0",
            _sources("h20", "smi-logs", "cuda-h20", "cuda-gpus"),
        ),
        Gpu(
            "H20-141", 143771, 139.80, 4.8e12, 148e12, 296e12, 0, NVLINK4, GEN5_X16_BYTES_S, "9.0",
            _sources("h20", "smi-logs", "cuda-as-h200", "cuda-gpus", bandwidth_bytes_s="h20-141"),
        ),
        Gpu(
            "H100", 81559, 79.18, 3.35e12, 989e12, 1979e12, 0, NVLINK4, GEN5_X16_BYTES_S, "9.0",
            _sources("h100", "h100-read", "h100-read", "h100-read"),
        ),
        Gpu(
            "H100-PCIe", 81559, 79.18, 2.0e12, 756.5e12, 1513e12, 0, GpuLink("nvlink-bridge", 4, 300e9, 2),
            GEN5_X16_BYTES_S, "9.0",
            _sources("h100-2022", "smi-logs", "cuda-as-h100", "cuda-gpus"),
        ),
        Gpu(
            "H100-NVL", 95830, 93.10, 3.9e12, 835.5e12, 1670.5e12, 0, GpuLink("nvlink-bridge", 4, 300e9, 2),
            GEN5_X16_BYTES_S, "9.0",
            _sources("h100-nvl", "smi-logs", "cuda-logs", "cuda-gpus"),
        ),
        Gpu(
            "H200", 143771, 139.80, 4.8e12, 989e12, 1979e12, 0, NVLINK4, GEN5_X16_BYTES_S, "9.0",
            _sources("h200", "h200-read", "cuda-logs", "cuda-gpus"),
        ),
        Gpu(
            "B200", 183359, 178.35, 7.7e12, 2250e12, 4500e12, 9000e12, NVLINK5, GEN5_X16_BYTES_S, "10.0",
            _sources("blackwell", "smi-b200", "cuda-b200", "cuda-b200", bandwidth_bytes_s="cuda-b200"),
        ),
        Gpu(
            "B300", 275040, 267.69, 8.0e12, 2250e12, 4500e12, 13500e12, NVLINK5, GEN6_X16_BYTES_S, "10.3",
            _sources(
                "b300", "smi-logs", "cuda-logs", "smi-logs", bandwidth_bytes_s="b300-hgx", pcie_bytes_s="b300-pcie",
            ),
        ),
        Gpu(
            "GH200", 97871, 94.50, 4.0e12, 989e12, 1979e12, 0, GpuLink("nvlink", 4, 450e9, 2), GEN5_X16_BYTES_S, "9.0",
            _sources("gh200", "smi-logs", "cuda-logs", "cuda-gpus"),
        ),
        Gpu(
            "GB200", 189471, 184.31, 8.0e12, 2500e12, 5000e12, 10000e12, GpuLink("nvlink", 5, 900e9, 72),
            GEN5_X16_BYTES_S, "10.0",
            _sources("blackwell", "smi-logs", "cuda-logs", "cuda-gpus"),
        ),
        Gpu(
            "MI300X", 196592, 191.98, 5.3e12, 1307.4e12, 2614.9e12, 0, GpuLink("infinity-fabric", 4, 448e9, 8),
            GEN5_X16_BYTES_S, "gfx942",
            _sources("mi300x", "smi-mi300x", "cuda-logs", "mi300x"),
        ),
        Gpu(
            "MI325X", 262128, 255.98, 6.0e12, 1307.4e12, 2614.9e12, 0, GpuLink("infinity-fabric", 4, 448e9, 8),
            GEN5_X16_BYTES_S, "gfx942",
            _sources("mi325x", "smi-mi325x", "cuda-logs", "rocm-gpus"),
        ),
        Gpu(
            "MI355X", 294896, 287.98, 8.0e12, 2516.6e12, 5033.2e12, 10066.3e12,
            GpuLink("infinity-fabric", 4, 537.6e9, 8), GEN5_X16_BYTES_S, "gfx950",
            _sources("mi355x", "smi-mi355x", "cuda-logs", "rocm-gpus"),
        ),
        Gpu(
            "RTX4090", 24564, 23.52, 1.008e12, 165.2e12, 330.3e12, 0, _pcie(4, has_peer_to_peer=False),
            GEN4_X16_BYTES_S, "8.9",
            _sources("rtx4090", "smi-4090", "cuda-logs", "cuda-gpus", link="p2p-4090"),
        ),
        Gpu(
            "RTX5090", 32607, 31.36, 1.792e12, 209.5e12, 419e12, 1676e12, _pcie(5, has_peer_to_peer=False),
            GEN5_X16_BYTES_S, "12.0",
            _sources("rtx5090", "smi-5090", "cuda-logs", "cuda-gpus", link="p2p-5090"),
        ),
    )
}  # fmt: skip

# Other names of the rows, as `_key` leaves them; those of NVML are among them ("NVIDIA H100 80GB HBM3").
ALIASES = {
    "t416gb": "T4",
    "v10016": "V100", "v10016gb": "V100", "v100sxm": "V100", "v100sxm2": "V100", "v100sxm216gb": "V100",
    "v10032gb": "V100-32", "v100sxm232gb": "V100-32",
    "a6000": "RTX-A6000", "rtxa600048gb": "RTX-A6000",
    "pro6000": "RTX-PRO-6000", "rtxpro6000se": "RTX-PRO-6000", "rtxpro6000server": "RTX-PRO-6000",
    "rtxpro6000blackwell": "RTX-PRO-6000", "rtxpro6000serveredition": "RTX-PRO-6000",
    "rtxpro6000blackwellserveredition": "RTX-PRO-6000",
    "rtxpro6000ws": "RTX-PRO-6000-Workstation", "rtxpro6000workstationedition": "RTX-PRO-6000-Workstation",
    "rtxpro6000blackwellworkstationedition": "RTX-PRO-6000-Workstation",
    "h2096": "H20", "h2096gb": "H20", "h20sxm": "H20",
    "h203e": "H20-141", "h20141gb": "H20-141",
    "a10040gb": "A100-40", "a10040gbsxm": "A100-40", "a10040gbsxm4": "A100-40", "a100sxm40gb": "A100-40",
    "a100sxm440gb": "A100-40",
    "a10080": "A100", "a10080gb": "A100", "a10080gbsxm": "A100", "a10080gbsxm4": "A100", "a100sxm": "A100",
    "a100sxm4": "A100", "a100sxm80gb": "A100", "a100sxm480gb": "A100",
    "a100pcie80gb": "A100-PCIe", "a10080gbpcie": "A100-PCIe",
    "h10080": "H100", "h10080gb": "H100", "h10080gbsxm": "H100", "h10080gbsxm5": "H100", "h10080gbhbm3": "H100",
    "h100sxm": "H100", "h100sxm5": "H100", "h100sxm80gb": "H100", "h100sxm580gb": "H100",
    "h10080gbpcie": "H100-PCIe", "h100pcie80gb": "H100-PCIe",
    "h10094": "H100-NVL", "h10094gb": "H100-NVL", "h100nvl94gb": "H100-NVL",
    "h200141gb": "H200", "h200sxm": "H200", "h200sxm5": "H200", "h200sxm141gb": "H200",
    "b200sxm": "B200", "b200sxm6": "B200", "b200180gb": "B200", "b200sxm180gb": "B200",
    "b300sxm": "B300", "b300sxm6": "B300", "b300sxm6ac": "B300",
    "gh20096gb": "GH200", "gh200120gb": "GH200", "gh200480gb": "GH200",
    "gb200nvl72": "GB200",
    "mi300x192gb": "MI300X", "mi300xoam": "MI300X", "instinctmi300x": "MI300X", "instinctmi300xoam": "MI300X",
    "mi325x256gb": "MI325X", "mi325xoam": "MI325X", "instinctmi325x": "MI325X", "instinctmi325xoam": "MI325X",
    "mi355x288gb": "MI355X", "mi355xoam": "MI355X", "instinctmi355x": "MI355X", "instinctmi355xoam": "MI355X",
    "4090": "RTX4090", "geforcertx4090": "RTX4090",
    "5090": "RTX5090", "geforcertx5090": "RTX5090",
}  # fmt: skip
VENDORS = ("nvidia", "amd", "tesla")


def _key(name: str) -> str:
    """The name without case, vendor, spaces, dashes and underscores."""
    parts = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    return "".join(part for part in parts if part not in VENDORS)


KNOWN = {_key(name): gpu for name, gpu in GPUS.items()} | {key: GPUS[name] for key, name in ALIASES.items()}


def find(name: str) -> Gpu | None:
    """The row of this name or alias, in any case and spelling; None for a name that is not in the table."""
    return KNOWN.get(_key(name))


def gpu(name: str) -> Gpu:
    """The row of this name or alias, in any case and spelling ("rtx 4090", "h100_sxm", "NVIDIA H200").

    Raises: ConfigError for a name that is not in the table.
    """
    row = find(name)
    if row is None:
        near = difflib.get_close_matches(_key(name), KNOWN, n=1)
        hint = f"did you mean {KNOWN[near[0]].name}? " if near else ""
        raise ConfigError(f"no GPU {name!r} is known; {hint}known: {', '.join(GPUS)} (--gpu)")
    return row
