"""Hosts as `comm.gather` would describe them: a healthy one with eight H200, and what may be wrong with it."""

import dataclasses
from typing import Any

from kervan.comm.facts import HostFacts, Interface, Measured, Pair, PairSpeed, RankFacts, RdmaPort, Reduced, Setting
from kervan.observe.gpu_state import GpuState

GIB = 1 << 30
NUM = 8


def gpu(index: int, **changes: Any) -> GpuState:
    """An H200 in order."""
    state = GpuState(
        index=index, uuid=f"GPU-{index}", name="NVIDIA H200", bus_id=f"00000000:{index + 1:02X}:00.0",
        pcie_generation=5, pcie_lanes=16, max_pcie_generation=5, max_pcie_lanes=16, nvlinks_active=18,
        nvlinks_inactive=0, sm_clock_mhz=1830, max_sm_clock_mhz=1980, power_limit_w=700.0, default_power_limit_w=700.0,
        temperature_c=40, ecc_uncorrected=0, remap_pending=False, remap_failed=False, fabric="completed",
    )  # fmt: skip
    return dataclasses.replace(state, **changes)


def pairs(path: str = "NV18", *, peer: bool = True, num: int = NUM) -> tuple[Pair, ...]:
    return tuple(Pair(a=a, b=b, path=path, has_peer_access=peer) for a in range(num) for b in range(a + 1, num))


def host(**changes: Any) -> HostFacts:
    """8x H200 with eight rails, as root sees them on bare metal."""
    paths = [tuple("PIX" if g == n else "SYS" for g in range(NUM)) for n in range(NUM)]
    facts = HostFacts(
        host="node-1", kernel="6.8.0", driver="580.95.05", is_open_driver=True,
        gpus=tuple(gpu(i) for i in range(NUM)), pairs=pairs(), gpu_numa=(0, 0, 0, 0, 1, 1, 1, 1),
        shm_bytes=1000 * GIB, shm_free_bytes=999 * GIB, memlock_bytes=-1,
        interfaces=(
            Interface(name="lo", addresses=("127.0.0.1",), kind="virtual"),
            Interface(name="eth0", addresses=("10.0.0.11",), has_default_route=True),
        ),
        rdma=tuple(RdmaPort(device=f"mlx5_{n}", rate_gbit_s=400.0, gpu_paths=paths[n]) for n in range(NUM)),
        has_peermem=True, has_dmabuf=True, iommu="passthrough", acs_bridges=(), has_fabric_manager=True, xid_lines=(),
    )  # fmt: skip
    return dataclasses.replace(facts, **changes)


def with_gpu(index: int, **changes: Any) -> HostFacts:
    """The host, with something else about one GPU."""
    healthy = host()
    return dataclasses.replace(
        healthy, gpus=tuple(dataclasses.replace(g, **changes) if g.index == index else g for g in healthy.gpus)
    )


def with_settings(*texts: str, **changes: Any) -> HostFacts:
    """The host with `NAME=value` in its environment."""
    return host(settings=tuple(Setting(name=t.partition("=")[0], value=t.partition("=")[2]) for t in texts), **changes)


def rank(number: int, **changes: Any) -> RankFacts:
    facts = RankFacts(
        rank=number, host="node-1", gpu=f"GPU {number} NVIDIA H200", nccl="2.28.9", torch="2.11.0", driver="580.95.05",
        init_s=2.5, copy_gb_s=4300.0, cpus=96, far_cpus=48,
    )  # fmt: skip
    return dataclasses.replace(facts, **changes)


def measured(**changes: Any) -> Measured:
    """What such a host shows: 428 GB/s is the figure of eight H200 (0.95 of 450)."""
    found = Measured(
        on_gpu=True,
        ranks=tuple(rank(i) for i in range(NUM)),
        reduced=(
            Reduced(bytes=8192, mode="graph", time_us=14.0, busbw_gb_s=1.0),
            Reduced(bytes=256 << 20, mode="graph", time_us=1000.0, busbw_gb_s=440.0),
        ),
        pairs=tuple(PairSpeed(a=a, b=b, gb_s=350.0) for a in range(NUM) for b in range(a + 1, NUM)),
        loaded=tuple(gpu(i) for i in range(NUM)),
        transports={"P2P/CUMEM": 224},
        nvls=True,
        ras=(),
        diagnostics=("[OK]   p2p: verified P2P access in both directions between every GPU pair (56 peer accesses)",),
    )
    return dataclasses.replace(found, **changes)
