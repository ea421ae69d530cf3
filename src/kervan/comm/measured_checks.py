"""What a short measurement shows: results, bandwidth against the link's figure, slow ranks and pairs, skew."""

import statistics
from collections.abc import Iterator

from kervan.comm.check import Check, failed, listed, passed, skipped, warned
from kervan.comm.facts import HostFacts, Measured
from kervan.comm.nccl_log import failed_diagnostics
from kervan.facts import hardware
from kervan.sim.collectives import bus_bytes_s

MIN_SHARE = 0.8  # of the figure of a link, or of the median of all ranks or pairs
LARGE_BYTES = 64 << 20  # below, latency hides the bandwidth
MAX_CLOCK_SKEW_S = 1.0
MAX_INIT_S = 30.0
NAMES = (
    "measurement", "results", "bandwidth", "transport", "slow-pair", "slow-rank", "versions", "settings-differ",
    "clock-skew", "cpu-binding", "nccl-warnings", "ras-report", "nccl-diagnostics",
)  # fmt: skip


def checks(
    facts: HostFacts, measured: Measured | None, *, why_not: str = "not asked for", min_share: float = MIN_SHARE
) -> Iterator[Check]:
    """All of this page; skipped without a measurement. `min_share`: of the figure of a link, what is fast enough."""
    if measured is None:
        yield from (skipped(name, why_not) for name in NAMES)
        return
    yield _ended(measured)
    yield _results(measured)
    yield _bandwidth(facts, measured, min_share)
    yield _transport(facts, measured)
    yield _slow_pair(measured)
    yield _slow_rank(measured)
    yield _versions(measured)
    yield _settings(measured)
    yield _clock_skew(measured)
    yield _binding(measured)
    yield _warnings(measured)
    yield _ras(measured)
    yield _diagnostics(measured)


def _ended(measured: Measured) -> Check:
    if measured.problem:
        return failed("measurement", measured.problem, "mend what fails above; NCCL_DEBUG=INFO says what it tried last")
    slowest = max((rank.init_s for rank in measured.ranks), default=0.0)
    if slowest > MAX_INIT_S:
        return warned(
            "measurement",
            f"the ranks took {slowest:.0f} s to find each other",
            "look at name resolution and the interface; init_process_group with a device_id connects at once",
        )
    return passed("measurement", f"{len(measured.ranks)} ranks connected in {slowest:.1f} s")


def _results(measured: Measured) -> Check:
    wrong = [f"all-reduce of {r.bytes} bytes: {r.num_wrong} wrong entries" for r in measured.reduced if r.num_wrong]
    wrong += [f"ranks {p.a} and {p.b}: {p.num_wrong} wrong entries" for p in measured.pairs if p.num_wrong]
    if wrong:
        return failed(
            "results",
            f"data arrives wrong: {listed(wrong)}",
            "take the host out of service; test its GPUs and links (dcgmi diag -r 3)",
        )
    if not measured.reduced:
        return skipped("results", "nothing was measured")
    return passed("results", "all results are exact")


def _bandwidth(facts: HostFacts, measured: Measured, min_share: float) -> Check:
    large = [r for r in measured.reduced if r.bytes >= LARGE_BYTES]
    if not measured.on_gpu or not large or not facts.gpus:
        return skipped("bandwidth", "there is a figure to compare with for GPUs only")
    num = len(measured.ranks)
    if num < 2 or len({rank.host for rank in measured.ranks}) > 1:
        return skipped(
            "bandwidth",
            "one GPU" if num < 2 else "no figure for this network; compare kervan comm bench on healthy nodes",
        )
    row = hardware.find(facts.gpus[0].name)
    best = max(large, key=lambda r: r.busbw_gb_s)
    if row is None:
        return skipped("bandwidth", f"{best.busbw_gb_s:.0f} GB/s, and {facts.gpus[0].name} is not in the table of GPUs")
    figure = bus_bytes_s(row, num) / 1e9
    share = best.busbw_gb_s / figure
    reached = f"busbw of {num} GPUs {best.busbw_gb_s:.0f} GB/s at {best.bytes >> 20} MiB"
    said = f"{reached}, {100 * share:.0f}% of the {figure:.0f} of this link"
    if share < min_share:
        return failed(
            "bandwidth", said, "the checks on links, transports and settings say why; kervan comm bench shows all sizes"
        )
    return passed("bandwidth", said)


def _transport(facts: HostFacts, measured: Measured) -> Check:
    used = {name: count for name, count in measured.transports.items() if count}
    if not measured.on_gpu or not used:
        return skipped("transport", "NCCL's log names no connections" if measured.on_gpu else "gloo has one only, TCP")
    said = ", ".join(f"{count}x {name}" for name, count in sorted(used.items()))
    hosts = {rank.host for rank in measured.ranks}
    slow = [name for name in used if name.startswith(("SHM", "NET"))]
    if len(hosts) == 1 and slow:
        peers = [p.has_peer_access for p in facts.pairs]
        if all(peers) and peers:
            return failed(
                "transport",
                f"{said}: GPUs that have peer access do not use it",
                "look at NCCL_P2P_DISABLE, NCCL_P2P_LEVEL and the checks on ACS and IOMMU",
            )
        if any(name.startswith("NET") for name in slow):
            return failed(
                "transport", f"{said}: ranks of one host talk over the network", "look at NCCL_SHM_DISABLE and /dev/shm"
            )
        return warned(
            "transport",
            f"{said}: data goes through the host's memory",
            "as these GPUs have no peer access, prefer replicas or pipeline stages",
        )
    if len(hosts) > 1 and facts.rdma and any(name.startswith("NET/Socket") for name in used):
        return failed(
            "transport",
            f"{said}: nodes talk over TCP though there is RDMA",
            "look at NCCL_IB_DISABLE, NCCL_IB_HCA, memlock, and at ibstat",
        )
    return passed("transport", said)


def _slow_pair(measured: Measured) -> Check:
    if len(measured.pairs) < 2:
        return skipped("slow-pair", "there are no two pairs to compare" if measured.pairs else "no pair was measured")
    if not measured.on_gpu:
        return skipped("slow-pair", "ranks on CPU share its cores")
    typical = statistics.median(pair.gb_s for pair in measured.pairs)
    slow = [pair for pair in measured.pairs if pair.gb_s < MIN_SHARE * typical]
    if slow:
        said = listed(f"ranks {p.a} and {p.b} {p.gb_s:.0f} GB/s" for p in slow)
        ranks = {rank.rank: rank for rank in measured.ranks}
        common = set.intersection(*({p.a, p.b} for p in slow))
        who = (
            f"; all have rank {min(common)} ({_place(ranks[min(common)])})"
            if common and len(slow) > 1 and min(common) in ranks
            else ""
        )
        return failed(
            "slow-pair",
            f"{said}, below {MIN_SHARE:.0%} of the median {typical:.0f} GB/s{who}",
            "nvidia-smi nvlink -s and topo -m for these GPUs",
        )
    return passed("slow-pair", f"{len(measured.pairs)} pairs, median {typical:.0f} GB/s each way")


def _place(rank: object) -> str:
    return f"{getattr(rank, 'gpu', '') or 'CPU'} on {getattr(rank, 'host', '')}"


def _slow_rank(measured: Measured) -> Check:
    known = [rank for rank in measured.ranks if rank.copy_gb_s]
    if len(known) < 2 or not measured.on_gpu:
        return skipped("slow-rank", "there are no two GPUs to compare")
    typical = statistics.median(rank.copy_gb_s or 0 for rank in known)
    slow = [rank for rank in known if (rank.copy_gb_s or 0) < MIN_SHARE * typical]
    if slow:
        said = listed(f"rank {r.rank} ({_place(r)}) copies {r.copy_gb_s:.0f} GB/s" for r in slow)
        return failed("slow-rank", f"{said}, below {MIN_SHARE:.0%} of the median {typical:.0f}: all ranks wait for it",
                      "look at its clocks, at what else runs on it, and at its errors")  # fmt: skip
    return passed("slow-rank", f"each GPU copies about {typical:.0f} GB/s")


def _versions(measured: Measured) -> Check:
    if not measured.ranks:
        return skipped("versions", "no rank told")
    differing = []
    is_bad = False
    for name in ("nccl", "torch", "driver"):
        by_value: dict[str, list[int]] = {}
        for rank in measured.ranks:
            by_value.setdefault(str(getattr(rank, name)), []).append(rank.rank)
        if len(by_value) > 1:
            is_bad = is_bad or name == "nccl"
            differing.append(f"{name} " + ", ".join(f"{v or 'none'} (ranks {listed(r)})" for v, r in by_value.items()))
    if differing:
        verdict = failed if is_bad else warned
        return verdict("versions", "ranks differ: " + "; ".join(differing), "install the same image on all nodes")
    first = measured.ranks[0]
    words = [
        f"NCCL {first.nccl}" if first.nccl else "",
        f"torch {first.torch}",
        f"driver {first.driver}" if first.driver else "",
    ]
    return passed("versions", f"the same on all ranks: {', '.join(word for word in words if word)}")


def _settings(measured: Measured) -> Check:
    if not measured.ranks:
        return skipped("settings-differ", "no rank told")
    everywhere = set.intersection(*(set(rank.settings) for rank in measured.ranks))
    differing = sorted({s for rank in measured.ranks for s in rank.settings} - everywhere)
    differing = [s for s in differing if s.startswith("NCCL_") and not s.startswith("NCCL_DEBUG_FILE")]
    if differing:
        return failed(
            "settings-differ",
            f"not all ranks have {listed(differing)}",
            "give all nodes the same environment and nccl.conf",
        )
    return passed("settings-differ", "all ranks have the same NCCL settings")


def _clock_skew(measured: Measured) -> Check:
    skewed = [rank for rank in measured.ranks if abs(rank.clock_s) > MAX_CLOCK_SKEW_S]
    if skewed:
        said = listed(f"{r.host} (rank {r.rank}) {r.clock_s:+.1f} s" for r in skewed)
        return warned(
            "clock-skew", f"clocks differ from rank 0's: {said}", "run chrony or another NTP client on all nodes"
        )
    return (
        passed("clock-skew", "clocks agree within a second")
        if measured.ranks
        else skipped("clock-skew", "no rank told")
    )


def _binding(measured: Measured) -> Check:
    far = [rank for rank in measured.ranks if rank.far_cpus and rank.far_cpus == rank.cpus]
    if far:
        return warned("cpu-binding", f"{listed(f'rank {r.rank}' for r in far)} may only run on CPUs far from its GPU",
                      "bind ranks to their GPU's NUMA node, or not at all (numactl, taskset, cpuset)")  # fmt: skip
    if all(rank.far_cpus is None for rank in measured.ranks):
        return skipped("cpu-binding", "the GPUs' NUMA nodes are not known here")
    return passed("cpu-binding", "each rank may run near its GPU")


def _warnings(measured: Measured) -> Check:
    if not measured.on_gpu:
        return skipped("nccl-warnings", "gloo has no such log")
    if measured.warnings:
        return warned("nccl-warnings", listed(measured.warnings, 3), "NCCL's guide explains each under Troubleshooting")
    return passed("nccl-warnings", "NCCL warns of nothing")


def _ras(measured: Measured) -> Check:
    if measured.ras is None:
        return skipped("ras-report", "NCCL gives no report here" if measured.on_gpu else "gloo gives no report")
    if measured.ras:
        return failed("ras-report", listed(measured.ras, 3), "the ranks that it names are behind or gone")
    return passed("ras-report", "all ranks answer, and have launched the same collectives")


def _diagnostics(measured: Measured) -> Check:
    if measured.diagnostics is None:
        return skipped("nccl-diagnostics", "NCCL has them from 2.31 on" if measured.on_gpu else "gloo has none")
    if bad := failed_diagnostics(measured.diagnostics):
        return failed(
            "nccl-diagnostics", listed(bad, 3), "the pairs that it names do not reach each other: look at their link"
        )
    return passed("nccl-diagnostics", listed(line for line in measured.diagnostics if line.startswith("[OK]")))
