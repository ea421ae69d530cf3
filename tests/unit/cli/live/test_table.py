"""Tables that fit, and small graphs."""

import pytest

from kervan.cli.live.spark import meter, spark
from kervan.cli.live.table import Column, printable, table

ROWS = [("alpha", 1), ("b", 22222)]
COLUMNS: list[Column[tuple[str, int]]] = [
    Column("name", lambda row: row[0], 0, is_right=False, grows=True, least=3),
    Column("count", lambda row: str(row[1]), 1),
    Column("twice", lambda row: str(2 * row[1]), 2),
]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (24, ["name        count  twice", "alpha           1      2", "b           22222  44444"]),
        (19, ["name   count  twice", "alpha      1      2", "b      22222  44444"]),
        (17, ["nam  count  twice", "alp      1      2", "b    22222  44444"]),
        (16, ["name       count", "alpha          1", "b          22222"]),
        (9, ["name", "alpha", "b"]),
        (2, ["na", "al", "b"]),
    ],
)
def test_columns_leave_by_their_rank_and_one_takes_what_is_left(width: int, expected: list[str]) -> None:
    assert [line.plain.rstrip() for line in table(COLUMNS, ROWS, width)] == expected


def test_a_chosen_row_is_marked_over_the_whole_width() -> None:
    line = table(COLUMNS, ROWS, 30, chosen=1)[2]
    assert line.cell_len == 30 and line.style == "reverse"


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([0, 1, 2, 4, 8], 5, "▁▁▂▄█"),
        ([8], 3, "  █"),
        ([1, 2, 3, 4], 2, "▆█"),
        ([None, 4, None], 3, " █ "),
        ([0, 0], 2, "▁▁"),
        ([], 2, "  "),
        ([5], 0, ""),
    ],
)
def test_the_last_values_as_marks(values: list[float | None], width: int, expected: str) -> None:
    assert spark(values, width, is_unicode=True) == expected
    ascii_marks = spark(values, width, is_unicode=False)
    assert ascii_marks.isascii() and len(ascii_marks) == width


def test_a_common_top_makes_graphs_comparable() -> None:
    assert spark([4], 1, is_unicode=True, top=8) == "▄"
    assert meter(0.5, 4, is_unicode=False) == "##.." and meter(7, 2, is_unicode=True) == "██"


def test_what_terminals_take_for_commands_becomes_spaces() -> None:
    assert printable("a\x1b[2J\nb\u202e") == "a [2J b "
