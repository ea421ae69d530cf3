"""Collectives over a group of ranks, checked and timed: eager, and on GPUs also inside a CUDA graph.

Bandwidths are those of nccl-tests: `bytes` is the larger of the buffers that a rank sends or receives, algbw is bytes
over time, busbw is algbw times a factor that makes it comparable with the speed of a link. 1 GB is 1e9 bytes.

NVLink multicast is never turned on: NCCL keeps what the environment says (NCCL_NVLS_ENABLE), and torch's own kernels,
which are measured as well, run without it.
"""

import os
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kervan.comm import expected
from kervan.comm.clock import TARGET_S, Call, capture, elapsed_s
from kervan.ranks.group import join as join_group
from kervan.ranks.rank import Doing, Keep, Rank

# `send_recv`: each rank sends to the next and receives from the one before, as in nccl-tests. `one_way`: rank 0 sends
# to rank 1.
Op = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv", "one_way"]
Mode = Literal["eager", "graph"]
Dtype = Literal["bfloat16", "float16", "float32"]
OPS: tuple[Op, ...] = get_args(Op)
MODES: tuple[Mode, ...] = get_args(Mode)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
KIB, MIB = 1 << 10, 1 << 20
SYMM_MEM_MAX_BYTES = 32 * MIB
TIMEOUT_S = 60.0
MAX_CALLS = 50
REPEATS = 7
CHECK_ITEMS = 16 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectivesPlan:
    """What the ranks measure: on GPUs by NCCL, or on CPU by gloo, which shows only that this code works.

    `symm_mem`: also torch's own all-reduce over memory that all GPUs of a node map, as vLLM's of small messages is.
    `planted_rank`: makes this rank's result wrong, to see that it is found. `sleeping_rank`: it stays away from the
    last collective, to see that it is named. `limit_s`: for each operation and size; None: `timeout_s` of torch.
    """

    on_gpu: bool
    ops: tuple[Op, ...] = ("all_reduce", "one_way")
    bytes: tuple[int, ...] = tuple(8 * KIB * 2**i for i in range(16))  # 8 KiB to 256 MiB
    modes: tuple[Mode, ...] = MODES
    dtype: Dtype = "bfloat16"
    symm_mem: bool = True
    timeout_s: float = TIMEOUT_S
    limit_s: float | None = None
    planted_rank: int | None = None
    sleeping_rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One operation of one size. `time_us`: of one call, on the slowest rank; the median of several repeats.

    `min_us`, `max_us`: the spread of those. `rank_us`: each rank's own median. `num_wrong`: entries of all ranks that
    are not what they should be. Eager calls have the host's time in them; those inside a CUDA graph do not. `backend`:
    nccl; gloo (CPU); or symm_mem.
    """

    op: Op
    ranks: int
    bytes: int
    mode: Mode
    backend: str
    dtype: Dtype
    time_us: float
    min_us: float
    max_us: float
    rank_us: tuple[float, ...]
    num_wrong: int | None
    slowest_rank: int
    slowest_host: str

    @property
    def seconds(self) -> float:
        return self.time_us / 1e6

    @property
    def algbw_gb_s(self) -> float:
        return self.bytes / self.seconds / 1e9

    @property
    def busbw_gb_s(self) -> float:
        return self.algbw_gb_s * bus_factor(self.op, self.ranks)

    @property
    def is_correct(self) -> bool:
        return self.num_wrong == 0


def bus_factor(op: Op, ranks: int) -> float:
    """What of `bytes` crosses each rank's link, one way. Source: nccl-tests, doc/PERFORMANCE.md."""
    if op == "all_reduce":
        return 2 * (ranks - 1) / ranks
    if op in ("all_gather", "reduce_scatter", "all_to_all"):
        return (ranks - 1) / ranks
    return 1.0


def num_items(op: Op, size: int, ranks: int, dtype: Dtype) -> int:
    """Entries of the larger buffer: as many as `size` bytes hold, a multiple of `ranks` where it is cut."""
    items = max(1, size // ITEM_BYTES[dtype])
    if op in ("all_gather", "reduce_scatter", "all_to_all"):
        return max(1, items // ranks) * ranks
    return items


def join(rank: Rank, *, on_gpu: bool, timeout_s: float = TIMEOUT_S, keep: Keep = lambda _: None) -> Any:
    """Join the process group of all ranks, on the GPU of this one's number on its node; returns the device."""
    keep(Doing("importing torch"))
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # read when torch first uses such memory
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    import torch

    if on_gpu:
        device = torch.device("cuda", rank.local)
        torch.cuda.set_device(device)
        join_group(rank, "nccl", timeout_s=timeout_s, device=device, keep=keep)
        return device
    torch.set_num_threads(1)
    join_group(rank, "gloo", timeout_s=timeout_s, keep=keep)
    return torch.device("cpu")


def work(rank: Rank, plan: CollectivesPlan, keep: Keep) -> None:
    """Work of one rank; the first of each node keeps the timings, and a text where something cannot run."""
    import torch
    import torch.distributed as dist

    device = join(rank, on_gpu=plan.on_gpu, timeout_s=plan.timeout_s, keep=keep)
    with torch.inference_mode():
        for row in measure(rank, plan, device, keep):
            if rank.local == 0:
                keep(row)
    dist.destroy_process_group()  # not after an error: it may wait for the ranks that go on


def measure(rank: Rank, plan: CollectivesPlan, device: Any, keep: Keep) -> Iterator[Timing | str]:
    """Each operation and size of a plan; all ranks call it, and all have the rows."""
    hosts = everybodys(rank, socket.gethostname())
    for op in plan.ops:
        if (op == "one_way" and rank.of != 2) or (op == "send_recv" and rank.of == 1):
            continue
        for size in plan.bytes:
            keep(Doing(f"{op} of {size} bytes", plan.limit_s))
            yield from _rows(op, size, rank, plan, device, hosts)
    if plan.sleeping_rank is not None:
        _hang(rank, plan, device, keep)
    if plan.symm_mem and plan.on_gpu and rank.of > 1 and "graph" in plan.modes and len(set(hosts)) == 1:
        keep(Doing("symm_mem all_reduce"))
        yield from _symm_mem(rank, plan, device, hosts)


def _hang(rank: Rank, plan: CollectivesPlan, device: Any, keep: Keep) -> None:
    """One rank stays away from an all-reduce, as a broken one would."""
    import torch
    import torch.distributed as dist

    keep(Doing("all_reduce that one rank sleeps in", plan.limit_s))
    if rank.number == plan.sleeping_rank:
        time.sleep(3600)
    dist.all_reduce(torch.zeros(8, device=device))
    end_of_calls(device)


def _rows(
    op: Op, size: int, rank: Rank, plan: CollectivesPlan, device: Any, hosts: Sequence[str]
) -> Iterator[Timing | str]:
    import torch

    items = num_items(op, size, rank.of, plan.dtype)
    call, result = _call(op, items, rank, plan.dtype, device)
    call()
    end_of_calls(device)
    if plan.planted_rank == rank.number:
        result[0] += 1
    wrong = sum(everybodys(rank, _num_wrong(op, items, rank, result)))
    if op == "all_reduce":
        result.zero_()  # it is added to itself at each call
    count = _agreed_count(call, device)
    name = "nccl" if device.type == "cuda" else "gloo"
    real_bytes = items * ITEM_BYTES[plan.dtype]
    for mode in plan.modes:
        try:
            if mode == "eager":
                took_s = _eager_seconds(call, count, device)
            elif device.type == "cuda":
                took_s = _graph_seconds(call, count, device)
            else:
                continue
        except (RuntimeError, NotImplementedError) as error:
            yield f"{op} of {size} bytes over {rank.of} ranks, {mode}: not measured ({_first_line(error)})"
            continue
        yield _timing(op, real_bytes, mode, name, plan.dtype, took_s, wrong, rank, hosts)
    if device.type == "cuda" and size >= 256 * MIB:
        del call, result
        torch.cuda.empty_cache()


def _timing(
    op: Op, size: int, mode: Mode, backend: str, dtype: Dtype, took_s: Sequence[float], wrong: int | None, rank: Rank,
    hosts: Sequence[str],
) -> Timing:  # fmt: skip
    """The same on all ranks: of each repeat the slowest rank counts."""
    all_s: list[Sequence[float]] = everybodys(rank, took_s)
    slowest_s = [max(repeat) for repeat in zip(*all_s, strict=True)]
    medians = [statistics.median(one) for one in all_s]
    slowest = max(range(rank.of), key=lambda number: medians[number])
    return Timing(
        op=op, ranks=rank.of, bytes=size, mode=mode, backend=backend, dtype=dtype,
        time_us=statistics.median(slowest_s) * 1e6, min_us=min(slowest_s) * 1e6, max_us=max(slowest_s) * 1e6,
        rank_us=tuple(s * 1e6 for s in medians), num_wrong=wrong, slowest_rank=slowest, slowest_host=hosts[slowest],
    )  # fmt: skip


def everybodys(rank: Rank, value: Any) -> list[Any]:
    """The value of each rank, on all ranks."""
    import torch.distributed as dist

    values: list[Any] = [None] * rank.of
    dist.all_gather_object(values, value)
    return values


# ---- operations


def _call(op: Op, items: int, rank: Rank, dtype: Dtype, device: Any) -> tuple[Call, Any]:
    """The call, with its arguments, and the buffer that has its result. The first call's result is checked."""
    import torch
    import torch.distributed as dist

    of, number = rank.of, rank.number
    kind = getattr(torch, dtype)

    def filled(count: int, first: int = 0) -> Any:
        return expected.fill(torch.empty(count, dtype=kind, device=device), number, of, first)

    def empty(count: int) -> Any:
        return torch.zeros(count, dtype=kind, device=device)

    if op == "all_reduce":
        buffer = filled(items)
        return lambda: dist.all_reduce(buffer), buffer
    if op == "broadcast":
        buffer = filled(items)
        return lambda: dist.broadcast(buffer, 0), buffer
    if op == "all_gather":
        part, whole = filled(items // of), empty(items)
        return lambda: dist.all_gather_into_tensor(whole, part), whole
    if op == "reduce_scatter":
        whole, part = filled(items), empty(items // of)
        return lambda: dist.reduce_scatter_tensor(part, whole), part
    if op == "all_to_all":
        mine, theirs = filled(items), empty(items)
        return lambda: dist.all_to_all_single(theirs, mine), theirs
    if op == "one_way":
        if number == 0:
            buffer = filled(items)
            return lambda: dist.send(buffer, 1), buffer
        buffer = empty(items)
        return lambda: dist.recv(buffer, 0), buffer
    out, into = filled(items), empty(items)
    to, source = (number + 1) % of, (number - 1) % of

    def exchange() -> None:
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, out, to), dist.P2POp(dist.irecv, into, source)])
        for each in works:
            each.wait()

    return exchange, into


def _num_wrong(op: Op, items: int, rank: Rank, result: Any) -> int:
    """Entries of this rank's result that are not what the operation should give."""
    of, number = rank.of, rank.number
    part = items // of
    if op == "all_reduce":
        return expected.num_wrong_sum(result, of, 0)
    if op == "broadcast":
        return expected.num_wrong(result, 0, of, 0)
    if op == "all_gather":
        return sum(expected.num_wrong(result[r * part : (r + 1) * part], r, of, 0) for r in range(of))
    if op == "reduce_scatter":
        return expected.num_wrong_sum(result, of, number * part)
    if op == "all_to_all":
        return sum(expected.num_wrong(result[r * part : (r + 1) * part], r, of, number * part) for r in range(of))
    if op == "one_way":
        return expected.num_wrong(result, 0, of, 0)
    return expected.num_wrong(result, (number - 1) % of, of, 0)


# ---- time


def _eager_seconds(call: Call, count: int, device: Any) -> list[float]:
    took_s = []
    for _ in range(REPEATS):
        barrier(device)
        begin_s = time.perf_counter()
        for _ in range(count):
            call()
        end_of_calls(device)
        took_s.append((time.perf_counter() - begin_s) / count)
    return took_s


def _graph_seconds(call: Call, count: int, device: Any) -> list[float]:
    graph, _ = capture([call], count)
    took_s = []
    for _ in range(1 + REPEATS):
        barrier(device)
        took_s.append(elapsed_s(graph.replay) / count)
    del graph
    return took_s[1:]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _agreed_count(call: Call, device: Any) -> int:
    """Calls in a repeat: as rank 0 reckons after a few, so that all ranks make as many."""
    import torch
    import torch.distributed as dist

    call()
    barrier(device)
    begin_s = time.perf_counter()
    call()
    end_of_calls(device)
    count = max(3, min(MAX_CALLS, round(TARGET_S / (time.perf_counter() - begin_s))))
    agreed = torch.tensor([count], device=device)
    dist.broadcast(agreed, 0)
    return int(agreed.item())


def end_of_calls(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def barrier(device: Any) -> None:
    import torch.distributed as dist

    if device.type == "cuda":
        dist.barrier(device_ids=[device.index])
    else:
        dist.barrier()
    end_of_calls(device)


def _symm_mem(rank: Rank, plan: CollectivesPlan, device: Any, hosts: Sequence[str]) -> Iterator[Timing | str]:
    """All-reduce by torch's kernels over memory that all GPUs map: one-shot or two-shot, the faster. Graph only.

    A text instead, where GPUs do not reach each other's memory.
    """
    import torch
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric

    sizes = [size for size in plan.bytes if 16 * rank.of <= size <= SYMM_MEM_MAX_BYTES]
    if not sizes or "all_reduce" not in plan.ops:
        return
    group = dist.group.WORLD.group_name
    try:
        memory = symmetric.empty(max(*sizes, 8192) // 2, dtype=torch.bfloat16, device=device)
        symmetric.rendezvous(memory, group)
        memory.fill_(float(rank.number + 1))
        torch.cuda.synchronize()
        dist.barrier(device_ids=[device.index])
        total = torch.ops.symm_mem.one_shot_all_reduce(memory[:4096], "sum", group)
        wrong = int((total != rank.of * (rank.of + 1) / 2).sum().item())
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        yield f"symm_mem all-reduce: not measured ({_first_line(error)})"
        return
    if wrong := sum(everybodys(rank, wrong)):
        yield f"symm_mem all-reduce: not measured, {wrong} entries of its sum are wrong"
        return
    memory.zero_()
    for size in sizes:
        part = memory[: size // 2]
        ways: tuple[Call, ...] = (
            lambda part=part: torch.ops.symm_mem.one_shot_all_reduce(part, "sum", group),  # type: ignore[misc]
            lambda part=part: torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", group),  # type: ignore[misc]
        )
        took = min((_graph_seconds(way, MAX_CALLS, device) for way in ways), key=statistics.median)
        yield _timing("all_reduce", size, "graph", "symm_mem", "bfloat16", took, wrong, rank, hosts)
