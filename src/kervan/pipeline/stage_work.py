"""The work of one rank of a pipeline: its stages, a schedule of torch's, and when each piece of work ran.

Stages that share one GPU hand over through host memory with gloo: NCCL takes one rank for each GPU.
"""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn
from torch.distributed import pipelining

from kervan.memory.decoder import Decoder, Layer, RmsNorm, fill
from kervan.memory.shape import DecoderShape
from kervan.memory.techniques import Recipe
from kervan.pipeline import schedules
from kervan.pipeline.bubble import Span
from kervan.pipeline.cut import Costs, balanced
from kervan.pipeline.plan import PipelinePlan, Prepared, Ran
from kervan.pipeline.schedules import Kind, Work
from kervan.ranks.group import join as join_group
from kervan.ranks.rank import Doing, Keep, Rank

TIMEOUT_S = 120.0
WARM_UP_STEPS = 2
KINDS: dict[str, Kind] = {"F": "F", "B": "B", "I": "I", "W": "W"}


class Stage(nn.Module):  # type: ignore[misc]
    """Neighbouring layers; the first has the embedding table, the last norm and head. Weights as in the whole model."""

    def __init__(self, shape: DecoderShape, part: range, boundary: Any) -> None:
        super().__init__()
        self.boundary = boundary
        self.embed = nn.Embedding(shape.vocab, shape.hidden) if part.start == 0 else None
        self.layers = nn.ModuleDict({str(index): Layer(shape, "sdpa") for index in part})
        is_last = part.stop == shape.num_layers
        self.norm = RmsNorm(shape.hidden) if is_last else None
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False) if is_last else None
        self.is_tied = shape.is_tied

    def initialise(self) -> None:
        for name, parameter in self.named_parameters():
            fill(parameter, "embed.weight" if self.is_tied and name == "head.weight" else name, 0)

    def forward(self, x: Any) -> Any:
        x = x.to(next(self.parameters()).device)
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        if self.head is not None and self.norm is not None:
            x = self.head(self.norm(x))
        return x.to(self.boundary)


class NeighbouringStage(pipelining.PipelineStage):  # type: ignore[misc]
    """torch's stage, which greets only other ranks when a pipeline begins.

    Up to torch 2.11, a stage sends its neighbours a number at the start. In a V the last rank has two neighbouring
    stages, and would send to itself: NCCL does so, gloo fails with "Pair is not connected".
    """

    def _get_init_p2p_neighbors_ops(self) -> list[Any]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


def loss_of(logits: Any, targets: Any) -> Any:
    """Mean cross-entropy, in FP32."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.to(logits.device).flatten())


def work(rank: Rank, plans: tuple[PipelinePlan, ...], keep: Keep) -> None:
    """Work of one rank; rank 0 keeps for each plan a `Prepared`, then a `Ran` for each number of micro-batches."""
    device, boundary = _join(rank, plans[0], keep)
    try:
        for plan in plans:
            keep(Doing(f"preparing {plan.schedule.name}"))
            prepared = _prepare(rank, plan, device, boundary)
            if rank.number == 0:
                keep(prepared)
            for micro_batches in plan.micro_batches:
                keep(Doing(f"{plan.schedule.name} of {micro_batches} micro-batches"))
                ran = _run(rank, plan, prepared, micro_batches, device, boundary)
                if rank.number == 0:
                    keep(ran)
    finally:
        dist.destroy_process_group()


def _join(rank: Rank, plan: PipelinePlan, keep: Keep) -> tuple[Any, Any]:
    """This rank's device, and where tensors are handed over."""
    if plan.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // rank.local_of // 2))
        join_group(rank, "gloo", timeout_s=TIMEOUT_S, keep=keep)
        return torch.device("cpu"), torch.device("cpu")
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", rank.local % gpus)
    torch.cuda.set_device(device)
    if rank.local_of > gpus:
        join_group(rank, "gloo", timeout_s=TIMEOUT_S, keep=keep)
        return device, torch.device("cpu")
    join_group(rank, "cpu:gloo,cuda:nccl", timeout_s=TIMEOUT_S, device=device, keep=keep)
    return device, device


def _type(plan: PipelinePlan) -> Any:
    return torch.bfloat16 if plan.dtype == "bf16" else torch.float32


def _build(plan: PipelinePlan, device: Any, make: Callable[[], Any]) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(_type(plan))
    try:
        with torch.device(device):
            return make()
    finally:
        torch.set_default_dtype(before)


def _prepare(rank: Rank, plan: PipelinePlan, device: Any, boundary: Any) -> Prepared:
    from kervan.pipeline import cut as cutting

    costs = cutting.modelled(plan.shape, plan.seq)
    cut = plan.cut
    if cut is None:
        told: list[Any] = [_measured_costs(plan, device) if rank.number == 0 else None]
        dist.broadcast_object_list(told, src=0)
        costs = told[0]
        cut = balanced(costs, rank.of * plan.chunks)
    mine = sum(p.numel() for part in _places(rank, plan) for p in _build(
        plan, "meta", lambda part=part: Stage(plan.shape, cut[part], "meta")  # type: ignore[misc]
    ).parameters())  # fmt: skip
    counts: list[Any] = [None] * rank.of
    dist.all_gather_object(counts, mine)
    return Prepared(cut, costs, boundary != device, tuple(counts))


def _places(rank: Rank, plan: PipelinePlan) -> tuple[int, ...]:
    return schedules.place(plan.schedule, ranks=rank.of, chunks=plan.chunks)[rank.number]


def _measured_costs(plan: PipelinePlan, device: Any) -> Costs:
    """Seconds of forward and backward of a layer, the table and the head, for one micro-batch."""
    rows = max(1, plan.batch // max(plan.micro_batches))
    kind = _type(plan)
    layer = _build(plan, device, lambda: Layer(plan.shape, "sdpa"))
    x = torch.randn(rows, plan.seq, plan.shape.hidden, dtype=kind, device=device, requires_grad=True)
    tokens = torch.zeros(rows, plan.seq, dtype=torch.long, device=device)
    table = _build(plan, device, lambda: nn.Embedding(plan.shape.vocab, plan.shape.hidden))
    head = _build(plan, device, lambda: nn.Linear(plan.shape.hidden, plan.shape.vocab, bias=False))

    def seconds(call: Callable[[], Any]) -> float:
        took_s = []
        for _ in range(5):
            _wait(device)
            begin_s = time.perf_counter()
            out = call()
            if not plan.is_forward_only:
                out.sum().backward()
            _wait(device)
            took_s.append(time.perf_counter() - begin_s)
        return min(took_s[1:])

    layer_s = seconds(lambda: layer(x))
    head_s = seconds(lambda: loss_of(head(x), tokens) if not plan.is_forward_only else head(x))
    return Costs((layer_s,) * plan.shape.num_layers, seconds(lambda: table(tokens)), head_s)


def _wait(device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class _Recorder:
    """Begin and end of each piece of work, on the GPU's clock where there is one."""

    def __init__(self, rank: int, device: Any) -> None:
        self._rank, self._device = rank, device
        self._marks: list[tuple[Work, Any, Any]] = []

    def start(self) -> None:
        """A step begins: times are counted from here, on the host's monotonic clock."""
        self._marks = []
        _wait(self._device)
        self._zero_s = time.perf_counter()
        if self._device.type == "cuda":
            self._zero = torch.cuda.Event(enable_timing=True)
            self._zero.record()

    def wrap(self, stage: Any) -> None:
        """Note the work of one of torch's stages."""
        index = stage.stage_index
        forward, backward, weights = (
            stage.forward_one_chunk, stage.backward_one_chunk, stage.backward_weight_one_chunk
        )  # fmt: skip

        def timed_forward(chunk: int, *args: Any, **kwargs: Any) -> Any:
            return self._timed(Work("F", index, chunk), lambda: forward(chunk, *args, **kwargs))

        def timed_backward(chunk: int, *args: Any, **kwargs: Any) -> Any:
            if not stage.has_backward:  # forward only: torch calls it all the same, and it does nothing
                return backward(chunk, *args, **kwargs)
            kind: Kind = "B" if kwargs.get("full_backward", True) else "I"
            return self._timed(Work(kind, index, chunk), lambda: backward(chunk, *args, **kwargs))

        def timed_weights(chunk: int, *args: Any, **kwargs: Any) -> Any:
            return self._timed(Work("W", index, chunk), lambda: weights(chunk, *args, **kwargs))

        stage.forward_one_chunk, stage.backward_one_chunk = timed_forward, timed_backward
        stage.backward_weight_one_chunk = timed_weights

    def _timed(self, work: Work, call: Callable[[], Any]) -> Any:
        begin = self._now()
        result = call()
        self._marks.append((work, begin, self._now()))
        return result

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def spans(self) -> tuple[Span, ...]:
        """Of the step, in seconds since `start`."""
        _wait(self._device)

        def at(mark: Any) -> float:
            if self._device.type == "cuda":
                return float(self._zero.elapsed_time(mark)) / 1e3
            return float(mark - self._zero_s)

        return tuple(Span(self._rank, work, at(begin), at(end)) for work, begin, end in self._marks)


def _run(rank: Rank, plan: PipelinePlan, prepared: Prepared, micro_batches: int, device: Any, boundary: Any) -> Ran:
    rows = plan.batch // micro_batches
    total = rank.of * plan.chunks
    kind = _type(plan)
    places = _places(rank, plan)
    modules, stages = [], []
    for index in places:
        module = _build(plan, device, lambda index=index: Stage(plan.shape, prepared.cut[index], boundary))  # type: ignore[misc]
        module.initialise()
        is_first, is_last = index == 0, index == total - 1
        has_gradient = not plan.is_forward_only
        hidden = torch.empty(
            rows, plan.seq, plan.shape.hidden, dtype=kind, device="meta", requires_grad=has_gradient
        )  # fmt: skip
        tokens = torch.empty(rows, plan.seq, dtype=torch.long, device="meta")
        logits = torch.empty(
            rows, plan.seq, plan.shape.vocab, dtype=kind, device="meta", requires_grad=has_gradient
        )  # fmt: skip
        # Both are given: torch would ask the other ranks for the shapes in the first step.
        stages.append(
            NeighbouringStage(
                module,
                index,
                total,
                boundary,
                input_args=(tokens if is_first else hidden,),
                output_args=(logits if is_last else hidden,),
            )
        )
        modules.append(module)
    recorder = _Recorder(rank.number, device)
    for stage in stages:
        recorder.wrap(stage)
    chosen = getattr(pipelining, plan.schedule.torch_name)
    is_single = plan.schedule.chunks[2] == 1
    schedule = chosen(
        stages[0] if is_single else stages, micro_batches, loss_fn=None if plan.is_forward_only else loss_of
    )
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(plan.shape.vocab, (plan.batch, plan.seq + 1), generator=generator)
    inputs, targets = ids[:, :-1].contiguous().to(boundary), ids[:, 1:].contiguous().to(boundary)
    has_first, has_last = 0 in places, total - 1 in places

    def step() -> Any:
        arguments = (inputs,) if has_first else ()
        with _no_grad(plan):
            if plan.is_forward_only:
                return schedule.eval(*arguments)
            return schedule.step(*arguments, target=targets if has_last else None)

    output = step()
    output_error, gradient_error = (
        _errors(rank, plan, modules, places, output, (inputs, targets), micro_batches, device)
        if plan.is_checked
        else (0.0, 0.0)
    )
    del output
    for module in modules:
        module.zero_grad(set_to_none=True)
    found = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for repeat in range(WARM_UP_STEPS - 1 + plan.repeats):
        dist.barrier()
        recorder.start()
        step()
        mine = recorder.spans()
        for module in modules:
            module.zero_grad(set_to_none=True)
        if repeat >= WARM_UP_STEPS - 1:
            found.append(_all_spans(rank, mine))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    gathered: list[Any] = [None] * rank.of
    dist.all_gather_object(gathered, (output_error, gradient_error, peak))
    return Ran(
        micro_batches, tuple(found), _orders(schedule, rank.of, micro_batches, plan),
        max(one[0] for one in gathered), max(one[1] for one in gathered), tuple(one[2] for one in gathered),
    )  # fmt: skip


def _no_grad(plan: PipelinePlan) -> AbstractContextManager[Any]:
    return torch.no_grad() if plan.is_forward_only else nullcontext()


def _all_spans(rank: Rank, mine: tuple[Span, ...]) -> tuple[Span, ...]:
    """Of all ranks; each counts from a moment right after the same barrier."""
    everyone: list[Any] = [None] * rank.of
    dist.all_gather_object(everyone, mine)
    return tuple(span for spans in everyone for span in spans)


def _orders(schedule: Any, ranks: int, micro_batches: int, plan: PipelinePlan) -> tuple[tuple[Work, ...], ...]:
    """The order of work that torch has made for each rank; overlapped pairs one after the other."""
    name = plan.schedule.name
    if name in {"gpipe", "1f1b"}:
        made = (schedules.gpipe_orders if name == "gpipe" else schedules.one_f_one_b_orders)(ranks, micro_batches)
    else:
        made = [
            [work for action in schedule.pipeline_order[rank] for work in _works(action)] for rank in range(ranks)
        ]  # fmt: skip
    if plan.is_forward_only:
        made = schedules.forward_only(made)
    return tuple(tuple(order) for order in made)


def _works(action: Any) -> list[Work]:
    if action is None:
        return []
    if action.sub_actions:
        return [work for sub in action.sub_actions for work in _works(sub)]
    kind = KINDS.get(action.computation_type.value)
    if kind is None or action.microbatch_index is None:
        return []
    return [Work(kind, action.stage_index, action.microbatch_index)]


def _errors(
    rank: Rank, plan: PipelinePlan, modules: list[Any], places: tuple[int, ...], output: Any, data: tuple[Any, Any],
    micro_batches: int, device: Any,
) -> tuple[float, float]:  # fmt: skip
    """How far the outputs and this rank's gradients are from those of the whole model on the same micro-batches."""
    _add_tied(rank, plan, modules)
    whole = _build(plan, device, lambda: Decoder(plan.shape, Recipe()))
    whole.initialise(0)
    inputs, targets = (one.to(device) for one in data)
    outputs = []
    with _no_grad(plan):
        for tokens, wanted in zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
            logits = whole.head(whole.hidden(tokens))
            outputs.append(logits.detach())
            if not plan.is_forward_only:
                (loss_of(logits, wanted) / micro_batches).backward()
    output_error = 0.0
    if plan.chunks * rank.of - 1 in places:
        output_error = _difference(output.detach().to(device), torch.cat(outputs))
    gradient_error = 0.0
    if not plan.is_forward_only:
        expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
        if plan.shape.is_tied:
            expected["head.weight"] = expected["embed.weight"]
        gradient_error = max(
            _difference(parameter.grad, expected[name])
            for module in modules
            for name, parameter in module.named_parameters()
        )
    del whole
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return output_error, gradient_error


def _add_tied(rank: Rank, plan: PipelinePlan, modules: list[Any]) -> None:
    """Both copies of a tied table get the sum of their gradients; torch.distributed.pipelining leaves that to us."""
    if not plan.shape.is_tied or plan.is_forward_only:
        return
    tables = [module.embed.weight for module in modules if module.embed is not None]
    heads = [module.head.weight for module in modules if module.head is not None]
    if tables and heads:  # a V: both are here
        both = tables[0].grad + heads[0].grad
        tables[0].grad, heads[0].grad = both, both.clone()
    # all ranks take part in making a group
    ends = dist.new_group([0, rank.of - 1]) if not plan.schedule.is_v and rank.of > 1 else None
    if ends is None or rank.number not in {0, rank.of - 1}:
        return
    mine = (tables or heads)[0]
    on_host = dist.get_backend(ends) == "gloo" and mine.grad.is_cuda
    total = mine.grad.cpu() if on_host else mine.grad
    dist.all_reduce(total, group=ends)
    if on_host:
        mine.grad.copy_(total)


def _difference(found: Any, wanted: Any) -> float:
    scale = float(wanted.float().abs().max())
    return float((found.float() - wanted.float()).abs().max()) / scale if scale else float(found.float().abs().max())
