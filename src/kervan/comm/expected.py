"""Values whose sums are exact, and what collectives make of them.

Entry i of rank r is `TABLE[(i + 31 r) mod 509]`, a small whole number. Sums over ranks stay within 256, up to which
bfloat16 has all whole numbers, so in whatever order a collective adds, the result has one right value. The period is
prime, so what lands in a wrong place is seen.
"""

from typing import Any

PERIOD = 509
SHIFT = 31
MAX_SUM = 256
MAX_VALUE = 7
CHUNK = PERIOD * 32768  # entries that are compared at once: 16.7 million


def table(ranks: int) -> list[int]:
    """One period, for sums over so many ranks. With more than 128, most entries are 0: each sum has at most 256."""
    top = min(MAX_VALUE, MAX_SUM // ranks)
    if top >= 2:
        return [((i * 7919) >> 3) % (top + 1) for i in range(PERIOD)]
    every = -(-ranks // 64)  # in any run of ranks, one of so many is not 0
    return [1 + i % 3 if i % every == 0 else 0 for i in range(PERIOD)]


def value(i: int, rank: int, ranks: int) -> int:
    """Entry i of what a rank brings."""
    return table(ranks)[(i + SHIFT * rank) % PERIOD]


def sums(ranks: int) -> list[int]:
    """One period of the sums over all ranks."""
    row = table(ranks)
    return [sum(row[(i + SHIFT * rank) % PERIOD] for rank in range(ranks)) for i in range(PERIOD)]


def fill(buffer: Any, rank: int, ranks: int, first: int) -> Any:
    """Write a rank's entries from `first` on into a flat tensor, which comes back."""
    _each_chunk(buffer, table(ranks), first + SHIFT * rank, lambda part, row: part.copy_(row))
    return buffer


def num_wrong(buffer: Any, rank: int, ranks: int, first: int) -> int:
    """Entries of a flat tensor that are not a rank's entries from `first` on."""
    return _count(buffer, table(ranks), first + SHIFT * rank)


def num_wrong_sum(buffer: Any, ranks: int, first: int) -> int:
    """Entries of a flat tensor that are not the sums over all ranks from `first` on."""
    return _count(buffer, sums(ranks), first)


def _count(buffer: Any, period: list[int], first: int) -> int:
    wrong = 0

    def compare(part: Any, row: Any) -> None:
        nonlocal wrong
        wrong += int((part != row).sum().item())

    _each_chunk(buffer, period, first, compare)
    return wrong


def _each_chunk(buffer: Any, period: list[int], first: int, use: Any) -> None:
    """Call `use` with each part of a tensor and the entries that belong there; few are in memory at once."""
    import torch

    at = first % PERIOD
    row = torch.tensor(period[at:] + period[:at], dtype=buffer.dtype, device=buffer.device)
    whole = row.repeat(-(-min(buffer.numel(), CHUNK) // PERIOD))
    for begin in range(0, buffer.numel(), CHUNK):
        part = buffer[begin : begin + CHUNK]
        use(part, whole[: part.numel()])
