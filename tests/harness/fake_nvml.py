# ruff: noqa: N802
"""NVML as `nvidia-ml-py` shows it, for GPUs that are described: what is missing raises as NVML does."""

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

GPM_PERCENT = {1: 99.0, 2: 61.5, 3: 20.0, 5: 48.0, 10: 73.0, 20: 100.0, 21: 200.0, 60: 1000.0, 61: 2000.0}


@dataclass
class FakeGpu:
    """`missing`: functions that it does not support. `gpm`: values of GPM metrics; None without GPM."""

    uuid: str = "GPU-0"
    name: str = "NVIDIA H200"
    gpm: dict[int, float] | None = field(default_factory=lambda: dict(GPM_PERCENT))
    missing: frozenset[str] = frozenset()
    reasons: int = 0x4
    fields: dict[int, int] = field(default_factory=lambda: {82: 55, 197: 1000, 198: 2000, 138: 10, 139: 20})


class FakeNvml:
    """The module. `samples`: GPM samples that are not freed."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_SUCCESS = 1, 2, 0
    NVML_VALUE_TYPE_UNSIGNED_INT, NVML_VALUE_TYPE_UNSIGNED_LONG_LONG = 1, 3

    class NVMLError(Exception):
        pass

    def __init__(self, *gpus: FakeGpu) -> None:
        self.gpus = gpus
        self.events: deque[tuple[FakeGpu, int]] = deque()
        self.samples: list[Any] = []
        self.has_events = True

    def _of(self, name: str, gpu: FakeGpu, value: Any) -> Any:
        if name in gpu.missing:
            raise self.NVMLError(f"{name}: not supported")
        return value

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        return self.gpus[index]

    def __getattr__(self, name: str) -> Any:
        rows = {
            "nvmlDeviceGetUUID": lambda gpu: gpu.uuid.encode(),
            "nvmlDeviceGetName": lambda gpu: gpu.name,
            "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=97, memory=40),
            "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=100 << 30, free=41 << 30, total=141 << 30),
            "nvmlDeviceGetPowerUsage": lambda gpu: 512_500,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: gpu.reasons,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: gpu.reasons,
            "nvmlDeviceGetRemappedRows": lambda gpu: (3, 1, 0, 0),
            "nvmlDeviceGetClockInfo": lambda gpu, kind: {1: 1980, 2: 3201}[kind],
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 47,
            "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: 123_456,
            "nvmlDeviceGetPcieReplayCounter": lambda gpu: 2,
            "nvmlDeviceGetTotalEccErrors": lambda gpu, kind, since: {0: 5, 1: 0}[kind],
            "nvmlGpmQueryDeviceSupport": lambda gpu: SimpleNamespace(isSupportedDevice=gpu.gpm is not None),
            "nvmlDeviceGetFieldValues": self._field_values,
        }
        if name not in rows:
            raise AttributeError(name)
        return lambda gpu, *rest: self._of(name, gpu, rows[name](gpu, *rest))

    def _field_values(self, gpu: FakeGpu, numbers: list[int]) -> list[Any]:
        return [
            SimpleNamespace(
                fieldId=number, nvmlReturn=0 if number in gpu.fields else 3, valueType=3,
                value=SimpleNamespace(ullVal=gpu.fields.get(number, 0), uiVal=0),
            )
            for number in numbers
        ]  # fmt: skip

    def nvmlGpmSampleAlloc(self) -> Any:
        self.samples.append(SimpleNamespace(gpu=None))
        return self.samples[-1]

    def nvmlGpmSampleGet(self, gpu: FakeGpu, sample: Any) -> None:
        self._of("nvmlGpmSampleGet", gpu, None)
        sample.gpu = gpu

    def nvmlGpmSampleFree(self, sample: Any) -> None:
        self.samples.remove(sample)

    def c_nvmlGpmMetricsGet_t(self) -> Any:
        rows = [SimpleNamespace(metricId=0, nvmlReturn=0, value=0.0) for _ in range(16)]
        return SimpleNamespace(version=0, numMetrics=0, sample1=None, sample2=None, metrics=rows)

    def nvmlGpmMetricsGet(self, asked: Any) -> None:
        assert asked.version == 1 and asked.sample1 is not asked.sample2
        gpm = asked.sample1.gpu.gpm
        for row in asked.metrics[: asked.numMetrics]:
            row.nvmlReturn, row.value = (0, gpm[row.metricId]) if row.metricId in gpm else (3, 0.0)

    def nvmlEventSetCreate(self) -> Any:
        if not self.has_events:
            raise self.NVMLError("not supported")
        return object()

    def nvmlDeviceRegisterEvents(self, gpu: FakeGpu, kinds: int, events: Any) -> None:
        assert kinds == 8

    def nvmlEventSetWait_v2(self, events: Any, timeout_ms: int) -> Any:
        if not self.events:
            raise self.NVMLError("timeout")
        gpu, xid = self.events.popleft()
        return SimpleNamespace(device=gpu, eventData=xid)

    def nvmlEventSetFree(self, events: Any) -> None:
        pass
