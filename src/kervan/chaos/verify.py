"""What became of a stream's tokens: the truth beside what came. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

_EDIT = 1 << 32  # an alignment's cost is edits * _EDIT + replacements: of equally short ones, the fewest replacements


@dataclass(frozen=True, slots=True)
class Difference:
    """How many expected tokens did not come, how many came in addition, and how many came in place of others."""

    lost: int = 0
    doubled: int = 0
    wrong: int = 0

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(self.lost + other.lost, self.doubled + other.doubled, self.wrong + other.wrong)


def compare(truth: Sequence[int], got: Sequence[int], *, is_whole: bool = True) -> Difference:
    """The shortest explanation of `got` by tokens of `truth` lost, tokens put in (doubled), and tokens replaced.

    If it needs a replacement, the answer went another way: then `wrong` has all tokens from the first difference on,
    and lost or doubled are only by how much the answer is too short or too long. `is_whole` False: the stream broke,
    so tokens missing at its end count as neither.

    Costs time and memory in proportion to len(truth) * len(got) where they differ.
    """
    begin = 0
    while begin < min(len(truth), len(got)) and truth[begin] == got[begin]:
        begin += 1
    if begin == len(got) and (begin == len(truth) or not is_whole):
        return Difference()
    end = 0
    while is_whole and end < min(len(truth), len(got)) - begin and truth[-1 - end] == got[-1 - end]:
        end += 1
    ours, theirs = truth[begin : len(truth) - end], got[begin : len(got) - end]
    cost, num_truth = _align(ours, theirs, is_whole=is_whole)
    edits, replaced = divmod(cost, _EDIT)
    surplus = len(theirs) - num_truth
    if replaced:
        missing = max(0, -surplus) if is_whole else 0
        return Difference(lost=missing, doubled=max(0, surplus), wrong=min(len(truth), len(got)) - begin)
    return Difference(lost=(edits - surplus) // 2, doubled=(edits + surplus) // 2)


def _align(truth: Sequence[int], got: Sequence[int], *, is_whole: bool) -> tuple[int, int]:
    """The least cost, and how many tokens of `truth` it explains (all, if `is_whole`)."""
    row = [number * _EDIT for number in range(len(truth) + 1)]
    for token in got:
        diagonal, row[0] = row[0], row[0] + _EDIT
        for number, expected in enumerate(truth, 1):
            replaced = diagonal if token == expected else diagonal + _EDIT + 1
            diagonal = row[number]
            row[number] = min(replaced, diagonal + _EDIT, row[number - 1] + _EDIT)
    if is_whole:
        return row[-1], len(truth)
    _, _, cost, number = min((cost // _EDIT, abs(number - len(got)), cost, number) for number, cost in enumerate(row))
    return cost, number
