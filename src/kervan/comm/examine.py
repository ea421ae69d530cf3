"""The short measurement of the doctor and of the preflight: what ranks find, and how they reach each other."""

import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kervan.comm import collectives, expected, gather, nccl_log
from kervan.comm.clock import elapsed_s
from kervan.comm.collectives import CollectivesPlan, Timing
from kervan.comm.facts import Measured, PairSpeed, RankFacts, Reduced
from kervan.errors import EngineError
from kervan.observe import gpu_state
from kervan.observe.gpu_state import GpuState
from kervan.ranks import ras, start
from kervan.ranks.rank import Doing, Nodes, Rank

MIB = 1 << 20
MAX_PAIRS = 64
PHASE_S = 60.0  # one step of the measurement; less than the timeout of a collective, which names nobody
REPEATS = 5
COPY_BYTES = 128 * MIB
LOG_VARIABLES = ("NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS", "NCCL_RUN_DIAGNOSTICS")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExaminePlan:
    """`bytes`: of all-reduces. `pair_bytes` 0: pairs are not measured. `load_s`: GPUs are kept busy for so long."""

    on_gpu: bool
    bytes: tuple[int, ...]
    pair_bytes: int = 0
    load_s: float = 0.0
    timeout_s: float = 90.0
    planted_rank: int | None = None
    sleeping_rank: int | None = None


def full(*, on_gpu: bool) -> ExaminePlan:
    """What the doctor measures."""
    if on_gpu:
        return ExaminePlan(on_gpu=True, bytes=(8192, 64 * MIB, 256 * MIB), pair_bytes=64 * MIB, load_s=2.0)
    return ExaminePlan(on_gpu=False, bytes=(8192, MIB), pair_bytes=MIB // 4)


def brief(*, on_gpu: bool) -> ExaminePlan:
    """What the preflight measures."""
    return ExaminePlan(on_gpu=on_gpu, bytes=(8192, 64 * MIB) if on_gpu else (8192,))


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The GPUs are busy from now on."""


@dataclass(frozen=True, slots=True)
class _Log:
    """A rank's part of NCCL's log."""

    text: str


def run(
    plan: ExaminePlan,
    *,
    num_ranks: int,
    for_s: float,
    say: Callable[[str], None],
    nodes: Nodes = Nodes(),  # noqa: B008 - frozen
    env: Mapping[str, str] | None = None,
) -> Measured:
    """Measure. A measurement that fails or hangs is `Measured` too, with its problem."""
    found: dict[type[Any], list[Any]] = {RankFacts: [], Reduced: [], PairSpeed: [], _Log: []}
    loaded: tuple[GpuState, ...] = ()
    report: ras.RasReport | None = None
    problem = ""
    with tempfile.TemporaryDirectory(prefix="kervan-nccl-", ignore_cleanup_errors=True) as folder:
        logs = {
            "NCCL_DEBUG": "INFO",
            "NCCL_DEBUG_SUBSYS": "INIT,NET,ENV",
            "NCCL_DEBUG_FILE": f"{folder}/%h.%p",
            "NCCL_RUN_DIAGNOSTICS": "1",
        }
        env = {**(env or {}), **(logs if plan.on_gpu else {})}
        try:
            for row in start.run(work, plan, ranks=num_ranks, for_s=for_s, nodes=nodes, env=env):
                if isinstance(row, _Loaded):
                    say("the GPUs are busy: clocks and links under load")
                    loaded, report = gpu_state.read(), ras.ask()
                else:
                    found[type(row)].append(row)
        except EngineError as error:
            problem = str(error)
            if plan.on_gpu:
                found[_Log] = [_Log(_text(path)) for path in Path(folder).iterdir()]
    log = nccl_log.parse(row.text for row in found[_Log])
    return Measured(
        on_gpu=plan.on_gpu,
        ranks=tuple(found[RankFacts]),
        reduced=tuple(found[Reduced]),
        pairs=tuple(found[PairSpeed]),
        loaded=loaded,
        transports=log.transports,
        warnings=log.warnings,
        nvls=log.nvls,
        # ranks that run are never quite in step, so a mismatch of counts says nothing here
        ras=None if report is None else tuple(str(p) for p in report.problems if p.status != "MISMATCH"),
        diagnostics=log.diagnostics,
        problem=problem,
    )


def work(rank: Rank, plan: ExaminePlan, keep: Callable[[Any], None]) -> None:
    """Work of one rank; the first of each node keeps what all found, each its log."""
    import torch
    import torch.distributed as dist

    began_s = [0.0]

    def note(row: Any) -> None:
        began_s[0] = time.monotonic()  # of the last step of joining
        keep(row)

    device = collectives.join(rank, on_gpu=plan.on_gpu, timeout_s=plan.timeout_s, keep=note)
    with torch.inference_mode():
        for row in _rows(rank, plan, device, began_s[0], keep):
            if rank.local == 0:
                keep(row)
        if plan.on_gpu:
            keep(_Log(_own_log()))
    dist.destroy_process_group()


def _rows(rank: Rank, plan: ExaminePlan, device: Any, begin_s: float, keep: Callable[[Any], None]) -> Iterator[Any]:
    collectives.barrier(device)
    init_s = time.monotonic() - begin_s
    clocks = collectives.everybodys(rank, time.time())
    keep(Doing("telling its versions", PHASE_S))
    yield from collectives.everybodys(rank, _facts(rank, device, init_s, clocks[rank.number] - clocks[0]))
    sums = CollectivesPlan(
        on_gpu=plan.on_gpu,
        ops=("all_reduce",),
        bytes=plan.bytes,
        symm_mem=False,
        limit_s=PHASE_S,
        planted_rank=plan.planted_rank,
        sleeping_rank=plan.sleeping_rank,
    )
    call_s = 1e-3
    for row in collectives.measure(rank, sums, device, keep):
        if isinstance(row, Timing):
            call_s = row.seconds
            yield Reduced(
                bytes=row.bytes,
                mode=row.mode,
                time_us=row.time_us,
                busbw_gb_s=row.busbw_gb_s,
                num_wrong=row.num_wrong or 0,
            )
    if plan.pair_bytes:
        yield from _pairs(rank, plan.pair_bytes, device, keep)
    if plan.load_s:
        keep(Doing("keeping the GPUs busy", PHASE_S + plan.load_s))
        yield _Loaded()
        _load(rank, plan, device, call_s)


def _facts(rank: Rank, device: Any, init_s: float, clock_s: float) -> RankFacts:
    import torch

    is_gpu = device.type == "cuda"
    driver = re.search(r"Module(?: for \S+)?\s+(\d+\.[\d.]+)", _text(Path("/proc/driver/nvidia/version")))
    far, cpus = None, len(os.sched_getaffinity(0))
    name = ""
    if is_gpu:
        properties = torch.cuda.get_device_properties(device)
        name = f"GPU {rank.local} {properties.name}"
        far = _far_cpus(
            getattr(properties, "pci_bus_id", None),
            getattr(properties, "pci_domain_id", 0),
            getattr(properties, "pci_device_id", 0),
        )
    return RankFacts(
        rank=rank.number,
        host=socket.gethostname(),
        gpu=name,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if is_gpu else "",
        torch=str(torch.__version__),
        driver=driver[1] if driver else "",
        init_s=init_s,
        clock_s=clock_s,
        copy_gb_s=_copy_gb_s(device) if is_gpu else None,
        cpus=cpus,
        far_cpus=far,
        settings=tuple(f"{s.name}={s.value}" for s in gather.settings(os.environ) if s.name not in LOG_VARIABLES),
    )


def _far_cpus(bus: int | None, domain: int, slot: int) -> int | None:
    """CPUs that this process may use and that are not of the GPU's NUMA node; None if that is not known."""
    if bus is None:
        return None
    near = _text(Path(f"/sys/bus/pci/devices/{domain:04x}:{bus:02x}:{slot:02x}.0/local_cpulist")).strip()
    cpus: set[int] = set()
    for part in filter(None, near.split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return len(os.sched_getaffinity(0) - cpus) if cpus else None


def _copy_gb_s(device: Any) -> float:
    """Read and written, of a copy within the GPU."""
    import torch

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    into.copy_(source)
    took_s = min(elapsed_s(lambda: into.copy_(source)) for _ in range(REPEATS))
    return 2 * COPY_BYTES / took_s / 1e9


def _pairs(rank: Rank, size: int, device: Any, keep: Callable[[Any], None]) -> Iterator[PairSpeed]:
    """Each pair alone, both ways at once; with many ranks, only neighbours."""
    import torch
    import torch.distributed as dist

    pairs = [(a, b) for a in range(rank.of) for b in range(a + 1, rank.of)]
    if len(pairs) > MAX_PAIRS:
        pairs = [(a, (a + 1) % rank.of) for a in range(rank.of)]
    items = size // 2
    for a, b in pairs:
        keep(Doing(f"exchange between ranks {a} and {b}", PHASE_S))
        collectives.barrier(device)
        speed: tuple[float, int] | None = None
        if rank.number in (a, b):
            other = b if rank.number == a else a
            out = expected.fill(torch.empty(items, dtype=torch.bfloat16, device=device), rank.number, rank.of, 0)
            into = torch.zeros_like(out)

            def exchange(out: Any = out, into: Any = into, other: int = other) -> None:
                ops = [dist.P2POp(dist.isend, out, other), dist.P2POp(dist.irecv, into, other)]
                for each in dist.batch_isend_irecv(ops):
                    each.wait()

            exchange()
            collectives.end_of_calls(device)
            wrong = expected.num_wrong(into, other, rank.of, 0)
            took_s = []
            for _ in range(REPEATS):
                begin_s = time.perf_counter()
                exchange()
                collectives.end_of_calls(device)
                took_s.append(time.perf_counter() - begin_s)
            speed = (items * 2 / min(took_s) / 1e9, wrong)
        both = [s for s in collectives.everybodys(rank, speed) if s is not None]
        yield PairSpeed(a=a, b=b, gb_s=min(s[0] for s in both), num_wrong=sum(s[1] for s in both))


def _load(rank: Rank, plan: ExaminePlan, device: Any, call_s: float) -> None:
    import torch
    import torch.distributed as dist

    buffer = torch.zeros(plan.bytes[-1] // 2, dtype=torch.bfloat16, device=device)
    for _ in range(max(1, int(plan.load_s / call_s))):
        dist.all_reduce(buffer)
    collectives.end_of_calls(device)


def _own_log() -> str:
    """What NCCL wrote for this process: its log, and what it printed."""
    pattern = os.environ.get("NCCL_DEBUG_FILE", "")
    path = Path(pattern.replace("%h", socket.gethostname().partition(".")[0]).replace("%p", str(os.getpid())))
    text = _text(path) if pattern else ""
    printed = Path("/proc/self/fd/1")
    with suppress(OSError):
        if printed.resolve().is_file():
            text += "\n" + _text(printed)
    return text


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
