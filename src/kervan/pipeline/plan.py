"""What the ranks of a pipeline are told, and what they report. No torch."""

from dataclasses import dataclass
from typing import Literal

from kervan.memory.shape import DecoderShape
from kervan.pipeline.bubble import Span
from kervan.pipeline.cut import Costs
from kervan.pipeline.schedules import Schedule, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePlan:
    """What the ranks run. `cut`: layers of each stage; None: balanced by measured costs.

    `batch`: sequences of a step, whatever the number of micro-batches.
    """

    shape: DecoderShape
    schedule: Schedule
    chunks: int
    micro_batches: tuple[int, ...]
    batch: int
    seq: int
    device: Literal["cuda", "cpu"]
    dtype: Literal["fp32", "bf16"]
    is_forward_only: bool
    cut: tuple[range, ...] | None
    repeats: int
    is_checked: bool = True


@dataclass(frozen=True, slots=True)
class Ran:
    """A number of micro-batches: spans of each repeat, all ranks, and how far outputs and gradients are off.

    `output_error` and `gradient_error`: largest difference to the unsplit model, as a share of its largest number.
    `orders`: the work of each rank as the schedule gives it. `peak_bytes`: of each rank.
    """

    micro_batches: int
    spans: tuple[tuple[Span, ...], ...]
    orders: tuple[tuple[Work, ...], ...]
    output_error: float
    gradient_error: float
    peak_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all numbers of micro-batches share. `costs`: as modelled or measured."""

    cut: tuple[range, ...]
    costs: Costs
    is_gpu_shared: bool
    parameters: tuple[int, ...]
