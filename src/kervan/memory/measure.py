"""Training steps as they are: time, and what the allocator had at most, beside what the estimate says.

On a GPU the peak is the caching allocator's; on a CPU it is the sum of what torch's profiler saw allocated.
"""

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from kervan.memory.estimate import GIB, MICRO_BATCHES, estimate
from kervan.memory.shape import DecoderShape
from kervan.memory.techniques import Recipe
from kervan.ranks import start
from kervan.ranks.group import join as join_group
from kervan.ranks.rank import Doing, Keep, Nodes, Rank

PHASES = ("forward", "backward", "step")
WARM_UP_STEPS = 2
COLLECTIVE_TIMEOUT_S = 120.0
# What a row may leave to the next one: on a GPU, cuBLAS's workspaces stay (64 MiB on an H200).
LEFT_BYTES = {"cuda": 128 << 20, "cpu": 1 << 16}
FULL_SHARE = 0.98  # of what is free: the allocator gives out blocks, and the last gaps fit none
# Dense BF16 and TF32 peaks are not asked of the driver; the share of the peak is left to who reads the row.


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row: a model, techniques, and a micro-batch on each rank."""

    shape: DecoderShape
    recipe: Recipe
    seq: int
    batch: int
    micro_batches: int = MICRO_BATCHES


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurePlan:
    """Rows, one after the other. `snapshots`: a directory for rank 0's memory history.

    `first`: rows that have run before, in other processes. `planted_bytes`: each row leaves as much behind, as an
    engine does that is not freed, to see that it is noticed.
    """

    cases: tuple[Case, ...]
    device: Literal["cuda", "cpu"]
    steps: int = 5
    snapshots: Path | None = None
    first: int = 0
    planted_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One row. Bytes are of rank 0's device; `error`: of the estimate's peak, as a share of the measured one.

    `kept_bytes`: activations after the forward pass. `before_bytes`: what was there before the row, and is in its peak
    on a GPU. `available_bytes`: what the row could take. `problem`: why there are no numbers.
    """

    technique: str
    model: str
    parameters: int
    seq: int
    batch: int
    micro_batches: int
    ranks: int
    device: str
    estimate_bytes: float
    estimated_kept_bytes: float
    weights_bytes: int = 0
    gradients_bytes: int = 0
    optimizer_bytes: int = 0
    host_bytes: int = 0
    kept_bytes: int = 0
    phase_peak_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    reserved_bytes: int = 0
    context_bytes: int = 0
    before_bytes: int = 0
    available_bytes: int = 0
    step_s: float = 0.0
    step_s_min: float = 0.0
    step_s_max: float = 0.0
    tokens_s: float = 0.0
    model_tflops: float = 0.0
    losses: tuple[float, ...] = ()
    snapshot: str = ""
    problem: str = ""

    @property
    def error(self) -> float:
        """Of the estimated peak."""
        return self.estimate_bytes / self.peak_bytes - 1 if self.peak_bytes else 0.0

    @property
    def has_clean_base(self) -> bool:
        """Whether the peak is of this row alone."""
        return self.before_bytes <= LEFT_BYTES[self.device]

    @property
    def is_out_of_memory(self) -> bool:
        return any(part in self.problem for part in OUT_OF_MEMORY)

    @property
    def is_predicted_to_fit(self) -> bool:
        return self.estimate_bytes <= FULL_SHARE * self.available_bytes

    @property
    def verdict(self) -> str:
        """What is to be said of the row beside its numbers; empty if nothing is."""
        needs = f"{self.estimate_bytes / GIB:.4g} GiB of the {self.available_bytes / GIB:.4g} free"
        if self.is_out_of_memory:
            if self.is_predicted_to_fit:
                return f"out of memory, though predicted to fit with {needs}"
            return f"does not fit, as predicted: it takes {needs}"
        if self.problem:
            return self.problem
        before = f"{self.before_bytes / GIB:.3g} GiB were there before, and are in the peak"
        said = [] if self.has_clean_base else [before]
        if self.available_bytes and not self.is_predicted_to_fit:
            said.append(f"fits, though predicted not to: {needs}")
        return "; ".join(said)

    def to_dict(self) -> dict[str, Any]:
        """As `--json` and records have it."""
        return asdict(self) | {
            "error": round(self.error, 4), "peak_gib": round(self.peak_bytes / GIB, 4),
            "clean_base": self.has_clean_base, "predicted_to_fit": self.is_predicted_to_fit, "verdict": self.verdict,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Left:
    """A row has left memory behind: the rows from `next_case` on need new processes."""

    next_case: int
    what: str


@dataclass(frozen=True, slots=True)
class Lost:
    """A row of several ranks that one of them could not run: the others wait for it, so all have to end."""

    next_case: int
    row: Measured


def run(plan: MeasurePlan, *, ranks: int = 1, nodes: Nodes = Nodes(), for_s: float) -> Iterator[Measured | str]:  # noqa: B008 - frozen
    """Rows as they are measured, and a text before each. Raises: EngineError, ConfigError as `start.run`.

    A row never begins with memory that an earlier one has left: what cannot be given back ends with its processes.
    """
    end_s = time.monotonic() + for_s
    first = 0
    while first < len(plan.cases):
        rest = replace(plan, cases=plan.cases[first:], first=first)
        again = ""
        with start.Ranks(work, rest, ranks=ranks, nodes=nodes, for_s=max(1.0, end_s - time.monotonic())) as started:
            for row in started:
                if isinstance(row, Left):
                    first, again = row.next_case, row.what
                elif isinstance(row, Lost):
                    first, again = row.next_case, "a row of several ranks has ended early"
                    yield row.row
                    break
                else:
                    yield row
        if not again:
            return
        if first < len(plan.cases):
            yield f"{again}: the next rows run in new processes"


def work(rank: Rank, plan: MeasurePlan, keep: Keep) -> None:
    """Work of one rank; rank 0 keeps `Measured` rows, and a text before each."""
    import torch

    from kervan.memory import setups

    device = join(rank, plan.device, keep)
    for index, case in enumerate(plan.cases):
        name = f"{case.shape.name} {case.recipe.text}, {case.batch} x {case.seq} tokens"
        if rank.number == 0:
            keep(name)
        keep(Doing(name))
        blank = _blank(case, rank, plan.device, setups.held_bytes(device), setups.free_bytes(device))
        try:
            row = _measure(rank, plan, case, device, plan.first + index, blank)
        except (torch.OutOfMemoryError, ImportError, RuntimeError) as error:
            if not _can_go_on(error) or (rank.of > 1 and rank.of > rank.local_of):
                raise  # ranks of other nodes wait in a collective
            row = replace(blank, problem=_first_line(error))
            if rank.of > 1:
                keep(Lost(plan.first + index + 1, row))
                return
        if rank.number == 0:
            keep(row)
        if plan.planted_bytes:
            _PLANTED.append(torch.zeros(plan.planted_bytes, dtype=torch.uint8, device=device))
        left_bytes = _most(setups.held_bytes(device), rank)
        if left_bytes > LEFT_BYTES[plan.device] and index + 1 < len(plan.cases):
            if rank.local == 0:
                keep(Left(plan.first + index + 1, f"{case.recipe.text} has left {left_bytes / 2**20:.1f} MiB"))
            break
    torch.distributed.destroy_process_group()  # not after an error: it may wait for ranks that go on


_PLANTED: list[Any] = []


def _most(value: int, rank: Rank) -> int:
    """The largest of all ranks', on all of them."""
    import torch

    if rank.of == 1:
        return value
    most = torch.tensor([value], dtype=torch.int64)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def _can_go_on(error: BaseException) -> bool:
    """After out of memory or a kernel that does not take these tensors, other rows can run."""
    text = str(error)
    return isinstance(error, ImportError) or any(part in text for part in (*OUT_OF_MEMORY, "No available kernel"))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def join(rank: Rank, device: str, keep: Keep = lambda _: None) -> Any:
    """This rank's torch device, with the process group made."""
    keep(Doing("importing torch"))
    import torch

    if device == "cuda":
        mine = torch.device("cuda", rank.local)
        torch.cuda.set_device(mine)
        join_group(rank, "cpu:gloo,cuda:nccl", timeout_s=COLLECTIVE_TIMEOUT_S, device=mine, keep=keep)
    else:
        mine = torch.device("cpu")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // rank.local_of // 2))
        join_group(rank, "gloo", timeout_s=COLLECTIVE_TIMEOUT_S, keep=keep)
    keep(Doing("running"))
    return mine


def _blank(case: Case, rank: Rank, device: str, before_bytes: int, available_bytes: int) -> Measured:
    paper = estimate(
        case.shape, case.recipe, seq=case.seq, batch=case.batch, ranks=rank.of, micro_batches=case.micro_batches,
        on_gpu=device == "cuda",
    )  # fmt: skip
    return Measured(
        technique=case.recipe.text, model=case.shape.name, parameters=case.shape.parameters, seq=case.seq,
        batch=case.batch, micro_batches=case.micro_batches, ranks=rank.of, device=device,
        estimate_bytes=paper.total_bytes,
        estimated_kept_bytes=paper.kept_bytes, before_bytes=before_bytes, available_bytes=available_bytes,
    )  # fmt: skip


def _measure(rank: Rank, plan: MeasurePlan, case: Case, device: Any, index: int, blank: Measured) -> Measured:
    import torch

    from kervan.memory import setups

    on_gpu = device.type == "cuda"
    is_recorded = plan.snapshots is not None and on_gpu and rank.number == 0
    if is_recorded:
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    training = setups.make(case.shape, case.recipe, rank, device, micro_batches=case.micro_batches)
    try:
        return _train(rank, plan, case, device, index, blank, training, is_recorded=is_recorded)
    finally:
        training.close()
        if is_recorded:
            torch.cuda.memory._record_memory_history(enabled=None)


def _train(
    rank: Rank, plan: MeasurePlan, case: Case, device: Any, index: int, blank: Measured, training: Any, *,
    is_recorded: bool,
) -> Measured:  # fmt: skip
    import torch

    on_gpu = device.type == "cuda"
    generator = torch.Generator(device="cpu").manual_seed(1_000 + rank.number)
    losses = []

    def batch() -> tuple[Any, Any]:
        ids = torch.randint(case.shape.vocab, (case.batch, case.seq + 1), generator=generator)
        return ids[:, :-1].contiguous().to(device), ids[:, 1:].contiguous().to(device)

    def step() -> None:
        for _ in range(case.micro_batches):
            loss = training.forward(*batch())
            training.backward(loss)
        losses.append(loss.detach())
        training.step()

    snapshot = ""
    step()
    if is_recorded:
        assert plan.snapshots is not None
        snapshot = str(plan.snapshots / f"{index:02}-{case.shape.name}-{case.recipe.text.replace(',', '-')}.pickle")
        step()
        torch.cuda.memory._dump_snapshot(snapshot)
        torch.cuda.memory._record_memory_history(enabled=None)
    for _ in range(case.micro_batches - 1):
        training.backward(training.forward(*batch()))
    peaks = (_gpu_peaks if on_gpu else _cpu_peaks)(training, batch)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP_STEPS - 1 if on_gpu else 0):
        step()
    took_s = []
    for _ in range(plan.steps):
        _wait(device)
        begin_s = time.perf_counter()
        step()
        _wait(device)
        took_s.append(time.perf_counter() - begin_s)
    median_s = statistics.median(took_s) if took_s else 0.0
    tokens = case.batch * case.seq * case.micro_batches * rank.of
    flops = case.micro_batches * case.shape.step_flops(case.batch, case.seq)
    return replace(
        blank, **peaks,
        reserved_bytes=torch.cuda.max_memory_reserved() if on_gpu else 0,
        context_bytes=_context_bytes() if on_gpu else 0,
        step_s=median_s, step_s_min=min(took_s, default=0.0), step_s_max=max(took_s, default=0.0),
        tokens_s=tokens / median_s if median_s else 0.0, model_tflops=flops / median_s / 1e12 if median_s else 0.0,
        losses=tuple(round(float(loss), 5) for loss in losses), snapshot=snapshot,
    )  # fmt: skip


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _context_bytes() -> int:
    """What the process has on the GPU beside torch's allocator, if it is alone there."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return max(0, int(total - free - torch.cuda.memory_reserved()))


def _held(training: Any, *, on_gpu: bool) -> dict[str, int]:
    from kervan.memory.setups import sizes

    found, host = {}, 0
    for name, tensors in (("weights", training.weights()), ("optimizer", training.states()),
                          ("gradients", training.gradients())):  # fmt: skip
        on_device, on_host = sizes(tensors)
        found[f"{name}_bytes"] = on_device if on_gpu else on_host
        host += on_host if on_gpu else 0
    return found | {"host_bytes": host}


def _gpu_peaks(training: Any, batch: Any) -> dict[str, Any]:
    """The last micro-batch of a step with the allocator's peak in each phase."""
    import torch

    tokens, targets = batch()
    peaks: dict[str, int] = {}

    def phase(name: str) -> None:
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    loss = training.forward(tokens, targets)
    phase("forward")
    kept = torch.cuda.memory_allocated() - start
    training.backward(loss)
    phase("backward")
    held = _held(training, on_gpu=True)
    training.step()
    phase("step")
    return held | {"phase_peak_bytes": peaks, "peak_bytes": max(peaks.values()), "kept_bytes": kept}


def _cpu_peaks(training: Any, batch: Any) -> dict[str, Any]:
    """The same by the profiler: what it sees allocated and given back, on top of weights and states."""
    from torch.profiler import ProfilerActivity, profile, record_function

    tokens, targets = batch()
    held = _held(training, on_gpu=False)
    base = held["weights_bytes"] + held["optimizer_bytes"] + held["gradients_bytes"] + tokens.nbytes + targets.nbytes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        with record_function("kervan.forward"):
            loss = training.forward(tokens, targets)
        with record_function("kervan.backward"):
            training.backward(loss)
        held = _held(training, on_gpu=False)
        with record_function("kervan.step"):
            training.step()
    peaks, kept = _replay(profiled.profiler.kineto_results.events(), base)
    return held | {"phase_peak_bytes": peaks, "peak_bytes": max(peaks.values()), "kept_bytes": kept}


def _replay(events: Any, base: int) -> tuple[dict[str, int], int]:
    """Peaks by phase, and what was held at the end of the forward pass beside `base`."""
    ends, changes = [], []
    for event in events:
        name = event.name()
        if name.startswith("kervan."):
            ends.append((event.start_ns() + event.duration_ns(), name.removeprefix("kervan.")))
        elif name == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
    held, peaks, kept = base, dict.fromkeys(PHASES, base), 0
    for when, change in sorted(changes, key=lambda pair: pair[0]):
        phase = next((name for end, name in sorted(ends) if when <= end), PHASES[-1])
        if phase == "forward":
            kept = held + change - base
        held += change
        peaks[phase] = max(peaks[phase], held)
    return peaks, kept
