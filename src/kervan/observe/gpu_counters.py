"""What GPUs do now, from NVML, under dcgm-exporter's names: use, memory, clocks, power, links, errors.

Shares of SMs, tensor cores and memory come from GPM, which Hopper and newer GPUs have: two samples, and what happened
between them. Rates of bytes on older GPUs come from two readings of the driver's counters.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kervan.observe.dcgm import DEV, PROF, GpuCounters

KIB, MIB = 1 << 10, 1 << 20
# GPM metric -> name and factor. Source: nvml.h, nvmlGpmMetricId_t; percent, and MiB per second.
GPM = {
    1: (f"{PROF}GR_ENGINE_ACTIVE", 0.01),
    2: (f"{PROF}SM_ACTIVE", 0.01),
    3: (f"{PROF}SM_OCCUPANCY", 0.01),
    5: (f"{PROF}PIPE_TENSOR_ACTIVE", 0.01),
    10: (f"{PROF}DRAM_ACTIVE", 0.01),
    20: (f"{PROF}PCIE_TX_BYTES", MIB),
    21: (f"{PROF}PCIE_RX_BYTES", MIB),
    60: (f"{PROF}NVLINK_RX_BYTES", MIB),
    61: (f"{PROF}NVLINK_TX_BYTES", MIB),
}
# Field values that count bytes, for GPUs without GPM. Source: nvml.h.
BYTE_FIELDS = {
    197: (f"{PROF}PCIE_TX_BYTES", 1),
    198: (f"{PROF}PCIE_RX_BYTES", 1),
    138: (f"{PROF}NVLINK_TX_BYTES", KIB),
    139: (f"{PROF}NVLINK_RX_BYTES", KIB),
}
MEMORY_TEMP_FIELD = 82
CORRECTED, UNCORRECTED, SINCE_RESET = 0, 1, 0
XID_EVENT = 0x8
GPM_VERSION = 1


@contextmanager
def opened() -> Iterator["GpuReader | None"]:
    """A reader of this machine's GPUs; None without the package `nvidia-ml-py`, a driver or a GPU."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        reader = GpuReader(pynvml)
        yield reader if reader.num_gpus else None
        reader.close()
    finally:
        pynvml.nvmlShutdown()


class GpuReader:
    """Reads again and again; what is a rate or a share is of the time since the last reading.

    `nvml`: an initialised module with the functions of `pynvml`.
    """

    def __init__(
        self, nvml: Any, *, now_s: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._nvml = nvml
        self._sleep = sleep
        self._now_s = now_s
        self._gpus = [
            _Gpu(nvml, index, nvml.nvmlDeviceGetHandleByIndex(index), now_s)
            for index in range(nvml.nvmlDeviceGetCount())
        ]
        self._xids = _Xids(nvml, [gpu.handle for gpu in self._gpus])

    @property
    def num_gpus(self) -> int:
        """GPUs of this machine."""
        return len(self._gpus)

    def read(self, over_s: float = 0.0) -> tuple[GpuCounters, ...]:
        """All GPUs. `over_s`: begin a new interval, and wait for so long before reading."""
        if over_s:
            for gpu in self._gpus:
                gpu.begin()
            self._sleep(over_s)
        xids = self._xids.read()
        return tuple(gpu.read(None if xids is None else xids.get(gpu.uuid, 0)) for gpu in self._gpus)

    def close(self) -> None:
        """Give back what NVML keeps for it."""
        for gpu in self._gpus:
            gpu.close()
        self._xids.close()


class _Gpu:
    """One GPU, and the sample that its next reading is compared with."""

    def __init__(self, nvml: Any, index: int, handle: Any, now_s: Callable[[], float]) -> None:
        self._nvml, self._index, self.handle, self._now_s = nvml, index, handle, now_s
        self.uuid = _text(self._ask("nvmlDeviceGetUUID") or "")
        self._name = _text(self._ask("nvmlDeviceGetName") or "")
        support = self._ask("nvmlGpmQueryDeviceSupport")
        self._has_gpm = support is not None and bool(support.isSupportedDevice)
        self._sample: Any = None
        self._bytes: tuple[float, dict[int, int]] = (0.0, {})
        self.begin()

    def _ask(self, name: str, *arguments: Any) -> Any:
        """None where the GPU, the driver or the package does not have it."""
        function = getattr(self._nvml, name, None)
        try:
            return None if function is None else function(self.handle, *arguments)
        except self._nvml.NVMLError:
            return None

    def begin(self) -> None:
        """An interval begins."""
        if self._has_gpm:
            self._free(self._sample)
            self._sample = self._taken()
        else:
            self._bytes = self._now_s(), self._byte_counts()

    def _taken(self) -> Any:
        sample = self._nvml.nvmlGpmSampleAlloc()
        try:
            self._nvml.nvmlGpmSampleGet(self.handle, sample)
        except self._nvml.NVMLError:  # not for this user, or another one counts
            self._free(sample)
            return None
        return sample

    def _free(self, sample: Any) -> None:
        if sample is not None:
            self._nvml.nvmlGpmSampleFree(sample)

    def close(self) -> None:
        """Free its sample."""
        self._free(self._sample)
        self._sample = None

    def read(self, xid: int | None) -> GpuCounters:
        """Its counters now. `xid`: the last one that was seen, None where that is not told."""
        values: dict[str, float | None] = {f"{DEV}XID_ERRORS": xid}
        use = self._ask("nvmlDeviceGetUtilizationRates")
        if use is not None:
            values |= {f"{DEV}GPU_UTIL": use.gpu, f"{DEV}MEM_COPY_UTIL": use.memory}
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        if memory is not None:
            values |= {f"{DEV}FB_USED": memory.used / MIB, f"{DEV}FB_FREE": memory.free / MIB}
        power = self._ask("nvmlDeviceGetPowerUsage")
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        remapped = self._ask("nvmlDeviceGetRemappedRows")
        values |= {
            f"{DEV}SM_CLOCK": self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM),
            f"{DEV}MEM_CLOCK": self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM),
            f"{DEV}GPU_TEMP": self._ask("nvmlDeviceGetTemperature", 0),
            f"{DEV}MEMORY_TEMP": self._fields([MEMORY_TEMP_FIELD]).get(MEMORY_TEMP_FIELD),
            f"{DEV}POWER_USAGE": None if power is None else power / 1e3,
            f"{DEV}TOTAL_ENERGY_CONSUMPTION": self._ask("nvmlDeviceGetTotalEnergyConsumption"),
            f"{DEV}CLOCKS_EVENT_REASONS": bits
            if bits is not None
            else self._ask("nvmlDeviceGetCurrentClocksThrottleReasons"),
            f"{DEV}PCIE_REPLAY_COUNTER": self._ask("nvmlDeviceGetPcieReplayCounter"),
            f"{DEV}ECC_SBE_VOL_TOTAL": self._ask("nvmlDeviceGetTotalEccErrors", CORRECTED, SINCE_RESET),
            f"{DEV}ECC_DBE_VOL_TOTAL": self._ask("nvmlDeviceGetTotalEccErrors", UNCORRECTED, SINCE_RESET),
            f"{DEV}UNCORRECTABLE_REMAPPED_ROWS": None if remapped is None else remapped[1],
            f"{DEV}ROW_REMAP_FAILURE": None if remapped is None else remapped[3],
        }
        values |= self._gpm() if self._has_gpm else self._byte_rates()
        known = {name: float(value) for name, value in values.items() if value is not None}
        return GpuCounters(index=self._index, uuid=self.uuid, name=self._name, values=known)

    def _gpm(self) -> dict[str, float | None]:
        before, now = self._sample, self._taken()
        self._sample = now
        if before is None or now is None:
            self._free(before)
            return {}
        asked = self._nvml.c_nvmlGpmMetricsGet_t()
        asked.version, asked.numMetrics = GPM_VERSION, len(GPM)
        asked.sample1, asked.sample2 = before, now
        for place, metric in enumerate(GPM):
            asked.metrics[place].metricId = metric
        try:
            self._nvml.nvmlGpmMetricsGet(asked)
        except self._nvml.NVMLError:
            return {}
        finally:
            self._free(before)
        found: dict[str, float | None] = {}
        for place, (name, factor) in enumerate(GPM.values()):
            row = asked.metrics[place]
            if row.nvmlReturn == self._nvml.NVML_SUCCESS and row.value == row.value:  # a GPU without NVLink has none
                found[name] = row.value * factor
        return found

    def _byte_rates(self) -> dict[str, float | None]:
        (before_s, before), now_s, now = self._bytes, self._now_s(), self._byte_counts()
        self._bytes = now_s, now
        if now_s <= before_s:
            return {}
        return {
            name: (now[number] - before[number]) * factor / (now_s - before_s)
            for number, (name, factor) in BYTE_FIELDS.items()
            if number in now and number in before and now[number] >= before[number]
        }

    def _byte_counts(self) -> dict[int, int]:
        return {number: int(value) for number, value in self._fields(list(BYTE_FIELDS)).items()}

    def _fields(self, numbers: list[int]) -> dict[int, int]:
        rows = self._ask("nvmlDeviceGetFieldValues", numbers) or ()
        return {row.fieldId: _number(self._nvml, row) for row in rows if row.nvmlReturn == self._nvml.NVML_SUCCESS}


def _number(nvml: Any, row: Any) -> int:
    """The value of a field, which says itself of which type it is."""
    kinds = {nvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal", nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal"}
    return int(getattr(row.value, kinds.get(row.valueType, "ullVal")))


class _Xids:
    """Xid errors since it was made: NVML tells them as events, and remembers none from before."""

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self._nvml = nvml
        self._last: dict[str, int] = {}
        self._events: Any = None
        try:
            self._events = nvml.nvmlEventSetCreate()
            for handle in handles:
                nvml.nvmlDeviceRegisterEvents(handle, XID_EVENT, self._events)
        except nvml.NVMLError:
            self.close()

    def read(self) -> dict[str, int] | None:
        """UUID -> its last Xid; None where they are not told."""
        if self._events is None:
            return None
        while True:
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
            except self._nvml.NVMLError:  # a timeout: there are no more
                return self._last
            self._last[_text(self._nvml.nvmlDeviceGetUUID(event.device))] = int(event.eventData)

    def close(self) -> None:
        """Listen no more."""
        if self._events is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlEventSetFree(self._events)
            self._events = None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
