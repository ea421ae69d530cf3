"""What each GPU of a machine does now: links, clocks, power, errors. By NVML, else by nvidia-smi."""

import ctypes
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Bits of nvmlDeviceGetCurrentClocksEventReasons that slow a GPU down; idle and application clocks do not count.
SLOWDOWNS = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
FABRIC_STATES = {0: "", 1: "not started", 2: "in progress", 3: "completed"}
FIELDS = (
    "index", "uuid", "name", "pci.bus_id", "mig.mode.current", "pcie.link.gen.current", "pcie.link.width.current",
    "pcie.link.gen.max", "pcie.link.width.max", "clocks.sm", "clocks.max.sm", "clocks_event_reasons.active",
    "power.limit", "power.default_limit", "temperature.gpu", "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending", "remapped_rows.failure",
)  # fmt: skip
TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """One GPU. 0, empty or None where the driver does not tell. `fabric`: of GPUs that a fabric manager joins."""

    index: int
    uuid: str = ""
    name: str = ""
    bus_id: str = ""
    has_mig: bool = False
    pcie_generation: int = 0
    pcie_lanes: int = 0
    max_pcie_generation: int = 0
    max_pcie_lanes: int = 0
    nvlinks_active: int | None = None
    nvlinks_inactive: int | None = None
    sm_clock_mhz: int = 0
    max_sm_clock_mhz: int = 0
    slowdowns: tuple[str, ...] = ()
    power_limit_w: float = 0.0
    default_power_limit_w: float = 0.0
    temperature_c: int = 0
    ecc_uncorrected: int | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    fabric: str = ""


def read() -> tuple[GpuState, ...]:
    """All GPUs of this machine; none where there is no driver."""
    return _by_nvml() or by_nvidia_smi()


def _by_nvml() -> tuple[GpuState, ...]:
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return read_with(pynvml)
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def read_with(nvml: Any) -> tuple[GpuState, ...]:
    """The states by an initialised module with the functions of `pynvml`."""
    return tuple(
        _state(nvml, index, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount())
    )


def _state(nvml: Any, index: int, handle: Any) -> GpuState:
    def ask(name: str, *arguments: Any) -> Any:
        """None where the GPU, the driver or the package does not have it."""
        function = getattr(nvml, name, None)
        try:
            return None if function is None else function(handle, *arguments)
        except nvml.NVMLError:
            return None

    mig = ask("nvmlDeviceGetMigMode")
    links = [ask("nvmlDeviceGetNvLinkState", link) for link in range(nvml.NVML_NVLINK_MAX_LINKS)]
    has_links = any(link is not None for link in links)
    bits = ask("nvmlDeviceGetCurrentClocksEventReasons")
    bits = ask("nvmlDeviceGetCurrentClocksThrottleReasons") if bits is None else bits
    remapped = ask("nvmlDeviceGetRemappedRows")
    pci = ask("nvmlDeviceGetPciInfo")
    return GpuState(
        index=index,
        uuid=_text(ask("nvmlDeviceGetUUID") or ""),
        name=_text(ask("nvmlDeviceGetName") or ""),
        bus_id="" if pci is None else _text(pci.busId),
        has_mig=mig is not None and mig[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        pcie_generation=ask("nvmlDeviceGetCurrPcieLinkGeneration") or 0,
        pcie_lanes=ask("nvmlDeviceGetCurrPcieLinkWidth") or 0,
        max_pcie_generation=ask("nvmlDeviceGetMaxPcieLinkGeneration") or 0,
        max_pcie_lanes=ask("nvmlDeviceGetMaxPcieLinkWidth") or 0,
        nvlinks_active=sum(link == nvml.NVML_FEATURE_ENABLED for link in links) if has_links else None,
        nvlinks_inactive=sum(link == nvml.NVML_FEATURE_DISABLED for link in links) if has_links else None,
        sm_clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM) or 0,
        max_sm_clock_mhz=ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM) or 0,
        slowdowns=slowdowns(bits or 0),
        power_limit_w=(ask("nvmlDeviceGetPowerManagementLimit") or 0) / 1e3,
        default_power_limit_w=(ask("nvmlDeviceGetPowerManagementDefaultLimit") or 0) / 1e3,
        temperature_c=ask("nvmlDeviceGetTemperature", 0) or 0,
        ecc_uncorrected=ask("nvmlDeviceGetTotalEccErrors", 1, 0),  # uncorrected, since the last reset
        remap_pending=None if remapped is None else bool(remapped[2]),
        remap_failed=None if remapped is None else bool(remapped[3]),
        fabric=_fabric(nvml, ask),
    )


def _fabric(nvml: Any, ask: Any) -> str:
    kind = getattr(nvml, "c_nvmlGpuFabricInfoV_t", None)
    if kind is None:
        return ""
    info = kind()
    asked = ask("nvmlDeviceGetGpuFabricInfoV", ctypes.byref(info))
    return FABRIC_STATES.get(int(info.state), "") if asked is not None or int(info.state) else ""


def slowdowns(bits: int) -> tuple[str, ...]:
    """The reasons in NVML's bits that slow a GPU down."""
    return tuple(word for bit, word in SLOWDOWNS.items() if bits & bit)


def by_nvidia_smi() -> tuple[GpuState, ...]:
    """The same by nvidia-smi, which knows less of the fabric."""
    text = _smi(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
    links = parse_links(_smi("nvlink", "-s")) if text else {}
    return parse_query(text, links)


def parse_query(text: str, links: dict[int, tuple[int, int]]) -> tuple[GpuState, ...]:
    """The rows of a query with `FIELDS`; rows that have other fields, as of an old driver, are left out."""
    states = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(FIELDS) or not cells[0].isdecimal():
            continue
        row = dict(zip(FIELDS, cells, strict=True))
        index = int(row["index"])
        active, inactive = links.get(index, (None, None))
        ecc = row["ecc.errors.uncorrected.volatile.total"]
        states.append(
            GpuState(
                index=index,
                uuid=row["uuid"],
                name=row["name"],
                bus_id=row["pci.bus_id"],
                has_mig=row["mig.mode.current"] == "Enabled",
                pcie_generation=_whole(row["pcie.link.gen.current"]),
                pcie_lanes=_whole(row["pcie.link.width.current"]),
                max_pcie_generation=_whole(row["pcie.link.gen.max"]),
                max_pcie_lanes=_whole(row["pcie.link.width.max"]),
                nvlinks_active=active,
                nvlinks_inactive=inactive,
                sm_clock_mhz=_whole(row["clocks.sm"]),
                max_sm_clock_mhz=_whole(row["clocks.max.sm"]),
                slowdowns=slowdowns(_bits(row["clocks_event_reasons.active"])),
                power_limit_w=_number(row["power.limit"]),
                default_power_limit_w=_number(row["power.default_limit"]),
                temperature_c=_whole(row["temperature.gpu"]),
                ecc_uncorrected=int(ecc) if ecc.isdecimal() else None,
                remap_pending=_claim(row["remapped_rows.pending"]),
                remap_failed=_claim(row["remapped_rows.failure"]),
            )
        )
    return tuple(states)


def parse_links(text: str) -> dict[int, tuple[int, int]]:
    """Active and inactive links of each GPU in what `nvidia-smi nvlink -s` prints."""
    counts: dict[int, tuple[int, int]] = {}
    gpu = -1
    for line in text.splitlines():
        if head := re.match(r"GPU (\d+):", line):
            gpu = int(head[1])
        elif (link := re.match(r"\s+Link \d+: (.+)$", line)) and gpu >= 0:
            active, inactive = counts.get(gpu, (0, 0))
            is_active = "inactive" not in link[1].lower()
            counts[gpu] = (active + is_active, inactive + (not is_active))
    return counts


def _smi(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _whole(text: str) -> int:
    return round(_number(text))


def _number(text: str) -> float:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0


def _bits(text: str) -> int:
    return int(text, 16) if re.fullmatch(r"0x[0-9a-fA-F]+", text) else 0


def _claim(text: str) -> bool | None:
    return {"Yes": True, "No": False, "1": True, "0": False}.get(text)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def indices(states: Sequence[GpuState]) -> str:
    """`GPU 0, 3` of some states, for a message."""
    return "GPU " + ", ".join(str(state.index) for state in states)
