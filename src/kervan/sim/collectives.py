"""Time of the exchanges between GPUs: all-reduce in a tensor-parallel group, all-gather and reduce-scatter between
data-parallel ranks, hand-over between stages.
"""

from kervan.facts.hardware import Gpu

# Asymptotic bus bandwidth over the peak of one direction, and the size from which a message takes two rounds.
# Source: our measurement on 4x H200, benchmarks/records/collectives-h200-2026-11-22.jsonl (300 and 340 GB/s of 450 with
# 2 and 4 GPUs, eager, 268 MB); AIConfigurator 0.12's tables for 8 GPUs (446) and for PCIe.
BUS_SHARE = {2: 0.67, 4: 0.76}
LARGE_GROUP_BUS_SHARE = 0.95
TWO_ROUND_BYTES = 512 * 1024
# vLLM's own kernel, used up to 32 MiB with 4 GPUs, reaches less than NCCL does with large messages (110 GB/s of bus
# bandwidth at 16 MiB in that record).
OWN_KERNEL_BYTES = 32 * 2**20
OWN_KERNEL_BUS_SHARE = 0.28
PCIE_BUS_SHARE = 0.55
NETWORK_LATENCY_S = 25e-6
# NCCL's all-gather and reduce-scatter, over the latency of vLLM's own small all-reduce. Not measured: an all-reduce of
# NCCL is one of each, and with 4 GPUs and 8 MiB takes 22 us longer than its bytes do (that record), 11 us for each.
NCCL_LATENCY_FACTOR = 1.75


def bus_bytes_s(gpu: Gpu, ranks: int) -> float:
    """What each GPU of a group on one node sends per second."""
    if gpu.link.has_peer_to_peer and gpu.link.max_gpus >= ranks:
        share = BUS_SHARE.get(ranks, BUS_SHARE[4] if ranks == 3 else LARGE_GROUP_BUS_SHARE)
        return gpu.link.bytes_s * share
    return gpu.pcie_bytes_s * PCIE_BUS_SHARE * 2 / max(2, ranks)  # all pairs share the host's bridges


def all_reduce_s(gpu: Gpu, ranks: int, num_bytes: float, latency_s: float) -> float:
    """One all-reduce of `num_bytes` on each of `ranks` GPUs of a node, inside a CUDA graph.

    `latency_s`: of a small message over NVLink. Without peer access each round goes through the host.
    """
    if ranks == 1:
        return 0.0
    rounds = 2 if ranks > 2 and num_bytes > TWO_ROUND_BYTES else 1
    is_direct = gpu.link.has_peer_to_peer and gpu.link.max_gpus >= ranks
    latency_s = latency_s if is_direct else latency_s + 3e-6 * ranks
    bus = bus_bytes_s(gpu, ranks)
    if is_direct and ranks > 2 and num_bytes <= OWN_KERNEL_BYTES:
        bus = min(bus, gpu.link.bytes_s * OWN_KERNEL_BUS_SHARE)
    return rounds * latency_s + 2 * (ranks - 1) / ranks * num_bytes / bus


def gather_s(gpu: Gpu, ranks: int, num_bytes: float, latency_s: float) -> float:
    """One all-gather after which each of `ranks` GPUs of a node has `num_bytes`, or a reduce-scatter of as much.

    `latency_s`: of a small all-reduce over NVLink.
    """
    if ranks == 1:
        return 0.0
    is_direct = gpu.link.has_peer_to_peer and gpu.link.max_gpus >= ranks
    latency_s = NCCL_LATENCY_FACTOR * latency_s + (0.0 if is_direct else 3e-6 * ranks)
    return latency_s + (ranks - 1) / ranks * num_bytes / bus_bytes_s(gpu, ranks)


def send_s(gpu: Gpu, num_bytes: float, *, network_bytes_s: float = 0.0) -> float:
    """Handing `num_bytes` to a GPU of the next stage, on this node or (`network_bytes_s`) another."""
    if network_bytes_s:
        return NETWORK_LATENCY_S + num_bytes / network_bytes_s
    return num_bytes / (gpu.link.bytes_s * 0.78 if gpu.link.has_peer_to_peer else gpu.pcie_bytes_s * PCIE_BUS_SHARE)
