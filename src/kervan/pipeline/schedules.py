"""Schedules of torch.distributed.pipelining: their rules, and the order of work that each gives a rank."""

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from kervan.errors import ConfigError

Name = Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv", "dualpipev"]
Kind = Literal["F", "B", "I", "W"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """`chunks`: stages of a rank, (least, usual, most). `is_v`: a rank has stage i and its mirror image."""

    name: Name
    torch_name: str
    chunks: tuple[int, int, int]
    is_v: bool
    says: str


SCHEDULES: Final[dict[str, Schedule]] = {
    one.name: one
    for one in (
        Schedule("gpipe", "ScheduleGPipe", (1, 1, 1), False, "all forward passes, then all backward passes"),
        Schedule("1f1b", "Schedule1F1B", (1, 1, 1), False, "one forward, one backward: GPipe's bubble, less memory"),
        Schedule("interleaved", "ScheduleInterleaved1F1B", (2, 2, 64), False, "several stages a rank: bubble / stages"),
        Schedule("zero-bubble", "ScheduleInterleavedZeroBubble", (1, 2, 64), False,
                 "weights' gradients fill the bubble"),
        Schedule("zbv", "ScheduleZBVZeroBubble", (2, 2, 2), True, "the same, two stages a rank in a V"),
        Schedule("dualpipev", "ScheduleDualPipeV", (2, 2, 2), True, "DeepSeek's DualPipe, cut in half"),
    )
}  # fmt: skip


class Work(NamedTuple):
    """Forward, whole backward, backward for inputs, backward for weights: of a stage and micro-batch."""

    kind: Kind
    stage: int
    micro_batch: int


def find(name: str) -> Schedule:
    """Raises: ConfigError for a name that is none."""
    if name not in SCHEDULES:
        raise ConfigError(f"--schedule {name!r} is no schedule; the schedules are {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def check(schedule: Schedule, *, ranks: int, chunks: int, micro_batches: int, is_forward_only: bool = False) -> None:
    """Raises: ConfigError for numbers that a schedule cannot work with."""
    if schedule.is_v and is_forward_only:
        raise ConfigError(
            f"--forward-only with {schedule.name}: it fills the bubble with gradients of weights, which "
            "forward only has "
            "none of, and torch does not run it so; take --schedule gpipe or interleaved"
        )
    least, _, most = schedule.chunks
    if not least <= chunks <= most:
        rule = f"exactly {least}" if least == most else f"{least} to {most}"
        raise ConfigError(
            f"--chunks {chunks}: {schedule.name} has {rule} stage(s) on each rank; give --chunks "
            f"{min(max(chunks, least), most)}"
        )
    if schedule.name == "1f1b" and micro_batches < ranks:
        raise ConfigError(
            f"--micro-batches {micro_batches} is below the {ranks} stages, and 1f1b fills all stages first; give "
            f"--micro-batches {ranks} or more, or --schedule gpipe"
        )
    if schedule.name == "dualpipev" and micro_batches < 2 * ranks:
        raise ConfigError(
            f"--micro-batches {micro_batches} is below the {2 * ranks} stages (2 on each of {ranks} ranks) "
            "that dualpipev "
            f"fills first; give --micro-batches {2 * ranks} or more"
        )
    if schedule.name in {"interleaved", "zero-bubble"}:
        rounds = max(1, micro_batches // ranks)
        if micro_batches % rounds:
            near = [m for m in range(1, 4 * micro_batches + ranks) if m % max(1, m // ranks) == 0]
            nearest = min(near, key=lambda m: abs(m - micro_batches))
            raise ConfigError(
                f"--micro-batches {micro_batches}: {schedule.name} works in rounds of {ranks} stages, here "
                f"{rounds} rounds, "
                f"and {micro_batches} is no multiple of {rounds}; give --micro-batches {nearest}"
            )


def place(schedule: Schedule, *, ranks: int, chunks: int) -> list[tuple[int, ...]]:
    """The stages of each rank, in the order of its stages: in a loop, or there and back in a V."""
    if schedule.is_v:
        return [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)]
    return [tuple(rank + ranks * chunk for chunk in range(chunks)) for rank in range(ranks)]


def gpipe_orders(ranks: int, micro_batches: int) -> list[list[Work]]:
    """Work of each rank."""
    return [[Work(kind, rank, m) for kind in ("F", "B") for m in range(micro_batches)] for rank in range(ranks)]


def one_f_one_b_orders(ranks: int, micro_batches: int) -> list[list[Work]]:
    """Work of each rank: `ranks - rank` forward passes, then one of each in turn."""
    orders = []
    for rank in range(ranks):
        ahead = min(ranks - rank, micro_batches)
        order = [Work("F", rank, m) for m in range(ahead)]
        for m in range(micro_batches):
            order.append(Work("B", rank, m))
            if m + ahead < micro_batches:
                order.append(Work("F", rank, m + ahead))
        orders.append(order)
    return orders


def forward_only(orders: list[list[Work]]) -> list[list[Work]]:
    """The same without backward passes: what `schedule.eval` runs."""
    return [[work for work in order if work.kind == "F"] for order in orders]
