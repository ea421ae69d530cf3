"""dcgm-exporter's field names, and its page: kervan's counters of GPUs have these names, wherever they come from.

Source: dcgm-exporter's default-counters.csv and dcp-metrics-included.csv, 4.8. Bytes are per second, shares 0 to 1.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from kervan.direct_http import NO_RESPONSE, open_direct, parse_url

URL = "http://127.0.0.1:9400/metrics"
TIMEOUT_S = 2.0
SAMPLE = re.compile(r"^(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Counter:
    """A number that a GPU has. `short`: kervan's column for it; `unit`: of its values."""

    name: str
    short: str
    kind: Literal["gauge", "counter"]
    unit: str
    text: str


DEV, PROF = "DCGM_FI_DEV_", "DCGM_FI_PROF_"
COUNTERS = (
    Counter(f"{DEV}GPU_UTIL", "GPU_UTIL", "gauge", "%", "Share of time with any kernel or copy; not how busy it was"),
    Counter(f"{DEV}MEM_COPY_UTIL", "MEM_COPY_UTIL", "gauge", "%", "Share of time in which memory was read or written"),
    Counter(f"{PROF}GR_ENGINE_ACTIVE", "GR_ENGINE_ACTIVE", "gauge", "", "Share of time with any kernel; not copies"),
    Counter(f"{PROF}SM_ACTIVE", "SM_ACTIVE", "gauge", "", "Share of SMs with a warp, over time"),
    Counter(f"{PROF}SM_OCCUPANCY", "SM_OCCUPANCY", "gauge", "", "Warps that were there, of those that SMs can hold"),
    Counter(f"{PROF}PIPE_TENSOR_ACTIVE", "PIPE_TENSOR_ACTIVE", "gauge", "", "Cycles with tensor cores at work"),
    Counter(f"{PROF}DRAM_ACTIVE", "DRAM_ACTIVE", "gauge", "", "Share of cycles in which memory sent or received"),
    Counter(f"{DEV}FB_USED", "FB_USED", "gauge", "MiB", "Memory in use; vLLM takes its part when it starts"),
    Counter(f"{DEV}FB_FREE", "FB_FREE", "gauge", "MiB", "Memory that is free"),
    Counter(f"{DEV}SM_CLOCK", "SM_CLOCK", "gauge", "MHz", "Clock of the SMs"),
    Counter(f"{DEV}MEM_CLOCK", "MEM_CLOCK", "gauge", "MHz", "Clock of the memory"),
    Counter(f"{DEV}GPU_TEMP", "GPU_TEMP", "gauge", "C", "Temperature of the GPU"),
    Counter(f"{DEV}MEMORY_TEMP", "MEMORY_TEMP", "gauge", "C", "Temperature of its memory"),
    Counter(f"{DEV}POWER_USAGE", "POWER_USAGE", "gauge", "W", "Power drawn now"),
    Counter(f"{DEV}TOTAL_ENERGY_CONSUMPTION", "ENERGY", "counter", "mJ", "Energy since the driver was loaded"),
    Counter(f"{DEV}CLOCKS_EVENT_REASONS", "THROTTLE", "gauge", "bits", "NVML's bits of what holds the clocks down"),
    Counter(f"{PROF}PCIE_TX_BYTES", "PCIE_TX", "gauge", "B/s", "Sent over PCIe"),
    Counter(f"{PROF}PCIE_RX_BYTES", "PCIE_RX", "gauge", "B/s", "Received over PCIe"),
    Counter(f"{PROF}NVLINK_TX_BYTES", "NVLINK_TX", "gauge", "B/s", "Sent over all NVLinks"),
    Counter(f"{PROF}NVLINK_RX_BYTES", "NVLINK_RX", "gauge", "B/s", "Received over all NVLinks"),
    Counter(f"{DEV}PCIE_REPLAY_COUNTER", "PCIE_REPLAY", "counter", "", "PCIe packets that were sent again"),
    Counter(f"{DEV}XID_ERRORS", "XID", "gauge", "", "Number of the last Xid error that was seen, 0 for none"),
    Counter(f"{DEV}ECC_SBE_VOL_TOTAL", "ECC_SBE", "counter", "", "Corrected memory errors since the last reset"),
    Counter(f"{DEV}ECC_DBE_VOL_TOTAL", "ECC_DBE", "counter", "", "Uncorrected memory errors since the last reset"),
    Counter(f"{DEV}UNCORRECTABLE_REMAPPED_ROWS", "ROWS_REMAPPED", "counter", "", "Rows remapped for such errors"),
    Counter(f"{DEV}ROW_REMAP_FAILURE", "REMAP_FAILED", "gauge", "", "1 if a broken row could not be remapped"),
)  # fmt: skip
BY_NAME = {counter.name: counter for counter in COUNTERS}
# Names of other versions of dcgm-exporter.
OTHER_NAMES = {f"{DEV}CLOCK_THROTTLE_REASONS": f"{DEV}CLOCKS_EVENT_REASONS"}
# NVML's bits (nvmlClocksEventReasons), all of them; those of `gpu_state.SLOWDOWNS` slow a GPU that has work.
REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCounters:
    """Of one GPU. `values`: by dcgm-exporter's names; what the GPU or the driver does not have is missing."""

    index: int
    uuid: str
    name: str
    values: dict[str, float] = field(default_factory=dict)

    @property
    def throttle(self) -> tuple[str, ...] | None:
        """What holds its clocks down, by name; None if that is not known."""
        bits = self.values.get(f"{DEV}CLOCKS_EVENT_REASONS")
        return None if bits is None else reasons(int(bits))


def reasons(bits: int) -> tuple[str, ...]:
    """The names of NVML's bits."""
    return tuple(word for bit, word in REASONS.items() if bits & bit)


def page(gpus: Iterable[GpuCounters], host: str) -> str:
    """Prometheus text, with the labels of dcgm-exporter."""
    gpus = list(gpus)
    lines = []
    for counter in COUNTERS:
        samples = [
            f'{counter.name}{{gpu="{gpu.index}",UUID="{gpu.uuid}",device="nvidia{gpu.index}",modelName="{gpu.name}",'
            f'Hostname="{host}"}} {gpu.values[counter.name]:.10g}'
            for gpu in gpus
            if counter.name in gpu.values
        ]
        if samples:
            unit = f" ({counter.unit})" if counter.unit else ""
            lines += [f"# HELP {counter.name} {counter.text}{unit}.", f"# TYPE {counter.name} {counter.kind}", *samples]
    return "\n".join(lines) + "\n"


def parse(text: str) -> tuple[GpuCounters, ...]:
    """The GPUs of a dcgm-exporter's page; fields that kervan does not know are left out, parts of GPUs (MIG) too."""
    found: dict[str, dict[str, float]] = {}
    about: dict[str, tuple[int, str]] = {}
    for name, labels, value in _samples(text):
        uuid, index = labels.get("UUID", ""), labels.get("gpu", "")
        if not uuid or not index.isdecimal() or labels.get("GPU_I_ID"):
            continue
        about[uuid] = int(index), labels.get("modelName", "")
        found.setdefault(uuid, {})[name] = value
    gpus = [
        GpuCounters(index=index, uuid=uuid, name=model, values=found[uuid]) for uuid, (index, model) in about.items()
    ]
    return tuple(sorted(gpus, key=lambda gpu: gpu.index))


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for line in text.splitlines():
        match = None if line.startswith("#") else SAMPLE.match(line)
        if match is None:
            continue
        name = OTHER_NAMES.get(match["name"], match["name"])
        if name in BY_NAME:
            try:
                value = float(match["value"])
            except ValueError:
                continue
            if math.isfinite(value):  # nan is what a GPU does not have
                yield name, dict(LABEL.findall(match["labels"] or "")), value


def page_url(text: str, subject: str) -> str:
    """The URL of an exporter's page: of `127.0.0.1:9400` that of its metrics.

    Raises: ConfigError, which names `subject`.
    """
    url = parse_url(text, subject, "http://127.0.0.1:9400/metrics")
    return url if urlsplit(url).path else f"{url}/metrics"


def fetch(url: str = URL) -> tuple[GpuCounters, ...] | None:
    """What a dcgm-exporter at `url` tells; None where none answers."""
    try:
        with open_direct(url, timeout_s=TIMEOUT_S) as response:
            return parse(response.read().decode(errors="replace")) or None
    except NO_RESPONSE:
        return None
