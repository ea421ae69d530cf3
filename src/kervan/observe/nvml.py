"""A machine's GPUs as NVML describes them, through the package `nvidia-ml-py` where it is installed."""

from typing import Any

from kervan.observe.reading import GpuDevice, Pair, Reading

# Of nvml.h: some versions of the package have (0,) under the name NVML_P2P_CAPS_INDEX_READ, which its function refuses.
P2P_READ, P2P_NVLINK = 0, 2


def read() -> Reading | None:
    """A reading of this machine's GPUs by NVML; None without the package, the library or a GPU."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return read_with(pynvml)
    except pynvml.NVMLError:  # nvidia-smi then says why
        return None
    finally:
        pynvml.nvmlShutdown()


def read_with(nvml: Any) -> Reading | None:
    """The reading of an initialised module with the functions of `pynvml`."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if not handles:
        return None
    devices = tuple(_device(nvml, index, handle) for index, handle in enumerate(handles))
    pairs = [(a, b) for a in range(len(handles)) for b in range(len(handles)) if a != b]
    connections: dict[Pair, str] = {}
    peers: dict[Pair, bool] = {}
    for a, b in pairs:
        word = _connection(nvml, handles[a], handles[b])
        if word:
            connections[a, b] = word
        status = _query(nvml, nvml.nvmlDeviceGetP2PStatus, handles[a], handles[b], P2P_READ)
        if status is not None:
            peers[a, b] = status == nvml.NVML_P2P_STATUS_OK
    return Reading("NVML", _text(nvml.nvmlSystemGetDriverVersion()), devices, connections, peers)


def _device(nvml: Any, index: int, handle: Any) -> GpuDevice:
    mig = _query(nvml, nvml.nvmlDeviceGetMigMode, handle)
    return GpuDevice(
        index=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_mib=int(nvml.nvmlDeviceGetMemoryInfo(handle).total) >> 20,
        has_mig=mig is not None and mig[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        pcie_generation=_query(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle) or 0,
        pcie_lanes=_query(nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle) or 0,
    )


def _connection(nvml: Any, handle: Any, other: Any) -> str:
    """As `nvidia-smi topo -m` writes it; empty if it is not known."""
    by_nvlink = _query(nvml, nvml.nvmlDeviceGetP2PStatus, handle, other, P2P_NVLINK)
    if by_nvlink == nvml.NVML_P2P_STATUS_OK:
        ends = _link_ends(nvml, handle)
        bus_id = _text(nvml.nvmlDeviceGetPciInfo(other).busId)
        # Links that end at another GPU belong to that pair. Those of a switch, or whose end is hidden, serve all.
        direct = sum(end == bus_id for end in ends)
        return f"NV{direct or len(ends)}" if ends else ""
    ancestor = _query(nvml, nvml.nvmlDeviceGetTopologyCommonAncestor, handle, other)
    connections = {
        nvml.NVML_TOPOLOGY_SINGLE: "PIX",
        nvml.NVML_TOPOLOGY_MULTIPLE: "PXB",
        nvml.NVML_TOPOLOGY_HOSTBRIDGE: "PHB",
        nvml.NVML_TOPOLOGY_NODE: "NODE",
        nvml.NVML_TOPOLOGY_SYSTEM: "SYS",
    }
    return connections.get(ancestor, "")


def _link_ends(nvml: Any, handle: Any) -> list[str]:
    """The PCI bus id at the far end of each active NVLink, empty where it is hidden."""
    ends = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        if _query(nvml, nvml.nvmlDeviceGetNvLinkState, handle, link) == nvml.NVML_FEATURE_ENABLED:
            remote = _query(nvml, nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
            ends.append("" if remote is None else _text(remote.busId))
    return ends


def _query(nvml: Any, function: Any, *arguments: Any) -> Any:
    """What the function says; None where the GPU or the driver does not support the question."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    """Older versions of the package answer bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)
