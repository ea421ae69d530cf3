"""This machine's GPUs as a row of the table: for `--gpu local`."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kervan.errors import ConfigError
from kervan.facts import hardware
from kervan.facts.hardware import Gpu, GpuLink
from kervan.observe import nvidia_smi, nvml
from kervan.observe.reading import GpuDevice, Reading

EXAMPLE = "for example --gpu H200"
NVLINK_BYTES_S = {2: 25e9, 3: 25e9, 4: 25e9, 5: 50e9}  # of one link, per direction, by generation
PCIE_LANE_BYTES_S = {3: 1e9, 4: 2e9, 5: 4e9, 6: 8e9}
NVLINKS = re.compile(r"NV(\d+)")
# From near to far; the last of those found is the slowest.
PCIE_PATHS = ("PIX", "PXB", "PHB", "NODE", "SYS")


@dataclass(frozen=True, slots=True)
class Machine:
    """`gpu`: the row of the table with memory, PCIe and link as this machine has them.

    `connection`: the slowest path between two of its GPUs in the words of `nvidia-smi topo -m`; empty with one GPU, and
    where the driver does not tell. The link is the data sheet's then.
    """

    gpu: Gpu
    num_gpus: int
    driver: str
    connection: str
    reader: str

    def __str__(self) -> str:
        parts = [f"{self.num_gpus}x {self.gpu.name} with {self.gpu.memory_mib} MiB", self.connection]
        return ", ".join(part for part in (*parts, f"driver {self.driver}") if part)


def read(environ: Mapping[str, str] = os.environ) -> Machine:
    """The GPUs of this machine that CUDA would see.

    Raises: ConfigError if there are none, if they differ, are cut by MIG, or are not in the table.
    """
    reading = nvml.read() or nvidia_smi.read()
    if reading is None:
        raise ConfigError(f"no NVIDIA GPU is visible on this machine; name one with --gpu, {EXAMPLE}")
    return machine(reading, environ.get("CUDA_VISIBLE_DEVICES"))


def machine(reading: Reading, visible: str | None = None) -> Machine:
    """What a reading means; `visible` is the value of CUDA_VISIBLE_DEVICES, None if it is not set.

    Raises: ConfigError as `read`.
    """
    devices = visible_devices(reading.devices, visible)
    gpu = _row(devices)
    for device in devices:
        if device.has_mig:
            raise ConfigError(
                f"GPU {device.index} ({device.name}) has MIG on, and a plan is for whole GPUs; turn MIG off "
                f"(nvidia-smi -i {device.index} -mig 0), or name the GPU with --gpu {gpu.name}"
            )
    memory_mib = min(device.memory_mib for device in devices)
    pcie_bytes_s = min(_pcie_bytes_s(device, gpu) for device in devices)
    link, connection = _link(gpu, devices, reading, pcie_bytes_s)
    measured = dataclasses.replace(
        gpu,
        memory_mib=memory_mib,
        memory_gib=gpu.memory_gib - (gpu.memory_mib - memory_mib) / 1024,
        pcie_bytes_s=pcie_bytes_s,
        link=link,
        sources={**gpu.sources, "memory_mib": "machine", "memory_gib": "machine", "pcie_bytes_s": "machine"}
        | ({"link": "machine"} if connection else {}),
    )
    return Machine(measured, len(devices), reading.driver, connection, reading.reader)


def visible_devices(devices: tuple[GpuDevice, ...], visible: str | None) -> list[GpuDevice]:
    """As CUDA reads the variable: indices or (starts of) UUIDs, up to the first that is not there."""
    if visible is None:
        return list(devices)
    chosen: list[GpuDevice] = []
    for word in (word.strip() for word in visible.split(",")):
        if word.startswith("MIG-"):
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES={visible} names a part of a GPU, and a plan is for whole GPUs; unset it, or "
                f"name the GPU, {EXAMPLE}"
            )
        matches = [
            d for d in devices if word and (word == str(d.index) or (word[0] == "G" and d.uuid.startswith(word)))
        ]
        if len(matches) != 1 or matches[0] in chosen:
            break
        chosen += matches
    if not chosen:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={visible!r} hides all {len(devices)} GPUs of this machine; unset it, or name the "
            f"GPU, {EXAMPLE}"
        )
    return chosen


def _row(devices: list[GpuDevice]) -> Gpu:
    counts = Counter(device.name for device in devices)
    if len(counts) > 1:
        kinds = " and ".join(f"{number}x {name}" for name, number in counts.items())
        raise ConfigError(
            f"this machine has {kinds}, and a plan is for GPUs of one kind; hide the others with "
            f"CUDA_VISIBLE_DEVICES, or name one, {EXAMPLE}"
        )
    name = devices[0].name
    gpu = hardware.find(name)
    if gpu is None:
        raise ConfigError(
            f"this machine's {name!r} is not in the table of GPUs; name the one that is nearest to it with --gpu: "
            f"{', '.join(hardware.GPUS)}"
        )
    return gpu


def _pcie_bytes_s(device: GpuDevice, gpu: Gpu) -> float:
    lane_bytes_s = PCIE_LANE_BYTES_S.get(device.pcie_generation, 0.0)
    return lane_bytes_s * device.pcie_lanes or gpu.pcie_bytes_s


def _link(gpu: Gpu, devices: list[GpuDevice], reading: Reading, pcie_bytes_s: float) -> tuple[GpuLink, str]:
    """What joins the GPUs, and the slowest connection between two of them, empty if it is not known."""
    indices = [device.index for device in devices]
    pairs = [(a, b) for a in indices for b in indices if a != b]
    paths = {pair: reading.connections.get(pair, "") for pair in pairs}
    links = {pair: int(match[1]) for pair, path in paths.items() if (match := NVLINKS.fullmatch(path))}
    if not pairs or not all(pair in links or path in PCIE_PATHS for pair, path in paths.items()):
        return gpu.link, ""
    far = [path for pair, path in paths.items() if pair not in links]
    slowest = max(far, key=PCIE_PATHS.index) if far else f"NV{min(links.values())}"
    joined = min(_joined(index, indices, links) for index in indices)
    if joined > 1 and gpu.link.kind.startswith("nvlink"):
        link_bytes_s = NVLINK_BYTES_S[gpu.link.generation]
        # Through a switch, each pair has all links of a GPU; without one, they are shared out among the pairs.
        most = round(gpu.link.bytes_s / link_bytes_s)
        num_links = min(min(most, sum(links.get((a, b), 0) for b in indices)) for a in indices)
        return dataclasses.replace(gpu.link, bytes_s=num_links * link_bytes_s, max_gpus=joined), slowest
    has_peer_to_peer = all(reading.peers.get(pair, gpu.link.has_peer_to_peer) for pair in pairs)
    generation = max((device.pcie_generation for device in devices), default=0)
    return GpuLink("pcie", generation, pcie_bytes_s, len(devices), has_peer_to_peer), slowest


def _joined(index: int, indices: list[int], links: Mapping[tuple[int, int], int]) -> int:
    """The size of the group around a GPU in which every pair has NVLinks."""
    group = [index]
    for other in indices:
        if other != index and all((other, member) in links for member in group):
            group.append(other)
    return len(group)
