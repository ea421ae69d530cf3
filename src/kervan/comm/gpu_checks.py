"""GPUs of one host: their links, peers, clocks and errors."""

from collections import Counter
from collections.abc import Iterator

from kervan.comm.check import Check, failed, listed, passed, skipped, warned
from kervan.comm.facts import HostFacts, Measured
from kervan.facts import hardware
from kervan.observe.gpu_state import GpuState, indices

NVLINK_BYTES_S = {2: 25e9, 3: 25e9, 4: 25e9, 5: 50e9}  # of one link, per direction, by generation
FAR = ("NODE", "SYS")
HOT = ("hardware slowdown", "hardware thermal slowdown", "hardware power brake")


def checks(facts: HostFacts, measured: Measured | None) -> Iterator[Check]:
    """All of this page. Those of a host without a GPU are skipped, and those of links with one GPU."""
    names = (
        "gpu-kinds", "mig", "nvlink", "peer-access", "gpu-paths", "fabric", "pcie", "clocks", "power-cap", "ecc", "xid",
    )  # fmt: skip
    if not facts.gpus:
        yield from (skipped(name, "no NVIDIA GPU is visible here") for name in names)
        return
    loaded = {state.index: state for state in measured.loaded} if measured else {}
    busy = [loaded.get(gpu.index, gpu) for gpu in facts.gpus]
    yield _kinds(facts)
    yield _mig(facts)
    yield _nvlink(facts)
    yield _peer_access(facts)
    yield _paths(facts)
    yield _fabric(facts)
    yield _pcie(busy, is_loaded=bool(loaded))
    yield _clocks(busy, is_loaded=bool(loaded))
    yield _power(facts)
    yield _ecc(facts)
    yield _xid(facts)


def expected_nvlinks(gpu: GpuState) -> int | None:
    """Of the GPU as its data sheet has it, 0 for one without; None for a GPU that is not in the table."""
    row = hardware.find(gpu.name)
    if row is None:
        return None
    if not row.link.kind.startswith("nvlink"):
        return 0
    return round(row.link.bytes_s / NVLINK_BYTES_S[row.link.generation])


def has_nvlink(facts: HostFacts) -> bool:
    """Whether all pairs of GPUs are joined by NVLink."""
    return bool(facts.pairs) and all(pair.path.startswith("NV") for pair in facts.pairs)


def _kinds(facts: HostFacts) -> Check:
    kinds = Counter(gpu.name for gpu in facts.gpus)
    said = " and ".join(f"{count}x {name}" for name, count in kinds.items())
    if len(kinds) > 1:
        return warned(
            "gpu-kinds", f"{said}: a collective is as slow as the slowest", "give one kind with CUDA_VISIBLE_DEVICES"
        )
    return passed("gpu-kinds", f"{said}, driver {facts.driver or 'not known'}")


def _mig(facts: HostFacts) -> Check:
    cut = [gpu for gpu in facts.gpus if gpu.has_mig]
    if cut:
        return failed(
            "mig", f"{indices(cut)} has MIG on, and parts of a GPU have no peer access or NVLink",
            f"nvidia-smi -i {','.join(str(gpu.index) for gpu in cut)} -mig 0",
        )  # fmt: skip
    return passed("mig", "off")


def _nvlink(facts: HostFacts) -> Check:
    known = [gpu for gpu in facts.gpus if gpu.nvlinks_active is not None]
    if len(facts.gpus) < 2:
        return skipped("nvlink", "one GPU has no other to be linked with")
    if not known:
        if any(expected_nvlinks(gpu) for gpu in facts.gpus):
            return skipped("nvlink", "the driver does not tell of links here, as on many virtual machines")
        return passed("nvlink", "these GPUs have none")
    wanted = {gpu.index: expected_nvlinks(gpu) for gpu in known}
    most = max(gpu.nvlinks_active or 0 for gpu in known)
    dead = [gpu for gpu in known if (gpu.nvlinks_active or 0) < (wanted[gpu.index] or most)]
    if not dead:
        return passed("nvlink", f"{most} links active on each GPU" if most else "these GPUs have none")
    said = listed(f"GPU {gpu.index} has {gpu.nvlinks_active} of {wanted[gpu.index] or most}" for gpu in dead)
    if most == 0 and all(hardware_kind(gpu) == "nvlink-bridge" for gpu in dead):
        return warned(
            "nvlink", f"{said} links active: no bridge is mounted", "mount one, or plan with PCIe (--gpu local)"
        )
    if most == 0:
        return failed(
            "nvlink", f"{said} links active: none works",
            "start nvidia-fabricmanager (systemctl status nvidia-fabricmanager), of the driver's version; on boards "
            "without NVLink, plan with PCIe (--gpu local)",
        )  # fmt: skip
    return failed(
        "nvlink", f"{said} links active: a link is dead",
        "nvidia-smi nvlink -s -i GPU shows which; reset the GPU (nvidia-smi -r) or the host; if it stays, repair it",
    )  # fmt: skip


def hardware_kind(gpu: GpuState) -> str:
    """What joins GPUs of this kind; empty for one that is not in the table."""
    row = hardware.find(gpu.name)
    return "" if row is None else row.link.kind


def _peer_access(facts: HostFacts) -> Check:
    known = [pair for pair in facts.pairs if pair.has_peer_access is not None]
    if not known:
        why = "one GPU has no peer" if len(facts.gpus) < 2 else "the driver does not tell"
        return skipped("peer-access", why)
    without = [pair for pair in known if not pair.has_peer_access]
    if not without:
        return passed("peer-access", f"all {len(known)} pairs reach each other's memory")
    row = hardware.find(facts.gpus[0].name)
    said = (
        f"no peer access between {listed(f'GPU {p.a} and {p.b}' for p in without)}: data goes through the host's memory"
    )
    if row is not None and not row.link.has_peer_to_peer:
        return warned(
            "peer-access",
            f"{said}, as always with {row.name}",
            "prefer pipeline stages or replicas to tensor parallelism",
        )
    return failed(
        "peer-access", said,
        "turn ACS off on the bridges between them, the IOMMU off or to passthrough (iommu=pt); as a virtual machine "
        "ask for one whose GPUs are passed through with their switch",
    )  # fmt: skip


def _paths(facts: HostFacts) -> Check:
    known = [pair for pair in facts.pairs if pair.path]
    if not known:
        return skipped("gpu-paths", "one GPU" if len(facts.gpus) < 2 else "the driver does not tell")
    far = [pair for pair in known if pair.path in FAR]
    said = ", ".join(f"{count} pairs {path}" for path, count in Counter(pair.path for pair in known).items())
    if far:
        return warned(
            "gpu-paths", f"{said}: {listed(f'GPU {p.a}-{p.b} {p.path}' for p in far)} cross the CPU's interconnect",
            "put tensor-parallel groups on GPUs that are near each other (CUDA_VISIBLE_DEVICES), replicas on the rest",
        )  # fmt: skip
    return passed("gpu-paths", said)


def _fabric(facts: HostFacts) -> Check:
    states = {gpu.fabric for gpu in facts.gpus if gpu.fabric}
    bad = [gpu for gpu in facts.gpus if gpu.fabric in ("not started", "in progress")]
    if bad and len(facts.gpus) > 1:
        return failed(
            "fabric", f"{indices(bad)} has not joined the NVSwitch fabric ({bad[0].fabric})",
            "start nvidia-fabricmanager in exactly the driver's version, and look at its log",
        )  # fmt: skip
    if "completed" in states:
        return passed("fabric", "all GPUs have joined the NVSwitch fabric")
    if facts.has_fabric_manager:
        return passed("fabric", "nv-fabricmanager runs")
    return skipped("fabric", "no fabric manager's state is visible: none is needed, or it runs outside")


def _pcie(busy: list[GpuState], *, is_loaded: bool) -> Check:
    known = [gpu for gpu in busy if gpu.max_pcie_lanes and gpu.pcie_lanes]
    if not known:
        return skipped("pcie", "the driver does not tell")
    narrow = [gpu for gpu in known if gpu.pcie_lanes < gpu.max_pcie_lanes]
    slow = [gpu for gpu in known if gpu.pcie_generation < gpu.max_pcie_generation]
    when = "under load" if is_loaded else "idle"
    if narrow:
        said = listed(f"GPU {g.index} has x{g.pcie_lanes} of x{g.max_pcie_lanes}" for g in narrow)
        return failed(
            "pcie", f"{said} lanes {when}", "reseat the GPU or its riser, and look at the slot's setting in the BIOS"
        )
    if slow and is_loaded:
        said = listed(f"GPU {g.index} runs generation {g.pcie_generation} of {g.max_pcie_generation}" for g in slow)
        return warned("pcie", f"{said} {when}", "reseat the riser; turn PCIe power saving off (pcie_aspm=off)")
    generations = {f"generation {g.pcie_generation} x{g.pcie_lanes}" for g in known}
    saving = ", a lower generation as idle links save power" if slow else ""
    return passed("pcie", f"{listed(sorted(generations))} {when}{saving}")


def _clocks(busy: list[GpuState], *, is_loaded: bool) -> Check:
    hot = [gpu for gpu in busy if set(gpu.slowdowns) & set(HOT)]
    if hot:
        said = listed(f"GPU {g.index}: {', '.join(g.slowdowns)} at {g.temperature_c} C, {_clock(g)}" for g in hot)
        return failed("clocks", said, "look at cooling and at the power supply; every rank waits for this GPU")
    slowed = [gpu for gpu in busy if gpu.slowdowns]
    if slowed:
        said = listed(
            f"GPU {g.index}: {', '.join(g.slowdowns)}, {g.sm_clock_mhz} of {g.max_sm_clock_mhz} MHz" for g in slowed
        )
        return warned("clocks", said, "raise the power limit (nvidia-smi -pl), or the cooling")
    if is_loaded:
        low = [g for g in busy if g.max_sm_clock_mhz and g.sm_clock_mhz < 0.6 * g.max_sm_clock_mhz]
        if low:
            said = listed(f"GPU {g.index}: {g.sm_clock_mhz} of {g.max_sm_clock_mhz} MHz" for g in low)
            return warned("clocks", f"{said} under load", "reset locked clocks: nvidia-smi -rgc")
    fastest = max(gpu.sm_clock_mhz for gpu in busy)
    return passed("clocks", f"nothing slows them{f', {fastest} MHz under load' if is_loaded else ''}")


def _clock(gpu: GpuState) -> str:
    return f"{gpu.sm_clock_mhz} of {gpu.max_sm_clock_mhz} MHz"


def _power(facts: HostFacts) -> Check:
    known = [gpu for gpu in facts.gpus if gpu.power_limit_w and gpu.default_power_limit_w]
    capped = [gpu for gpu in known if gpu.power_limit_w < 0.98 * gpu.default_power_limit_w]
    if capped:
        said = listed(f"GPU {g.index} {g.power_limit_w:.0f} of {g.default_power_limit_w:.0f} W" for g in capped)
        return warned(
            "power-cap", f"{said}: large batches run slower", "nvidia-smi -pl WATTS, if the cap is not wanted"
        )
    return (
        passed("power-cap", f"{known[0].power_limit_w:.0f} W, the default")
        if known
        else skipped("power-cap", "the driver does not tell")
    )


def _ecc(facts: HostFacts) -> Check:
    broken = [gpu for gpu in facts.gpus if gpu.remap_failed]
    if broken:
        return failed("ecc", f"{indices(broken)} could not remap a broken row of its memory", "replace the GPU (RMA)")
    pending = [gpu for gpu in facts.gpus if gpu.remap_pending]
    if pending:
        return failed(
            "ecc",
            f"{indices(pending)} waits for a reset to remap a broken row",
            "drain the host, then reset the GPU: nvidia-smi -r",
        )
    wrong = [gpu for gpu in facts.gpus if gpu.ecc_uncorrected]
    if wrong:
        said = listed(f"GPU {g.index} had {g.ecc_uncorrected} uncorrected errors" for g in wrong)
        return warned(
            "ecc", f"{said} since its last reset", "reset the GPU (nvidia-smi -r); if they come back, replace it"
        )
    if all(gpu.ecc_uncorrected is None for gpu in facts.gpus):
        return skipped("ecc", "the driver does not tell")
    return passed("ecc", "no uncorrected error, no remap pending")


def _xid(facts: HostFacts) -> Check:
    if facts.xid_lines is None:
        return skipped("xid", "the kernel's log may not be read here; see dmesg | grep Xid on the host")
    if facts.xid_lines:
        return warned(
            "xid",
            f"the driver reported {listed(facts.xid_lines, 2)}",
            "look the number up in NVIDIA's Xid list; 48, 63, 64, 74, 79, 94, 95 are hardware",
        )
    return passed("xid", "no error of the driver since boot")
