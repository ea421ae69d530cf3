"""Tables that fit: columns leave in the order of their importance where the screen is too narrow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.text import Text

RowT = TypeVar("RowT")
GAP = 2


@dataclass(frozen=True, slots=True)
class Column(Generic[RowT]):
    """`rank`: 0 stays in any case, others leave from the highest down. `grows`: takes the room that is left.

    `least`: to so few characters it may be cut. `most`: it takes no more.
    """

    title: str
    cell: Callable[[RowT], Text | str]
    rank: int = 0
    is_right: bool = True
    grows: bool = False
    least: int = 0
    most: int = 200


def printable(text: str) -> str:
    """Text from elsewhere as it may go to a terminal: on one line, and without what terminals take as commands."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def table(
    columns: Sequence[Column[RowT]],
    rows: Sequence[RowT],
    width: int,
    *,
    chosen: int | None = None,
    bold: str = "",
) -> list[Text]:
    """The head and a line for each row, of at most `width` characters.

    `chosen`: number of a row that is marked. `bold`: title of the column that rows are sorted by.
    """
    cells = [[_text(column.cell(row)) for row in rows] for column in columns]
    wanted = [
        min(column.most, max([len(column.title), *(cell.cell_len for cell in found)]))
        for column, found in zip(columns, cells, strict=True)
    ]
    kept = _fitting(columns, wanted, width)
    widths = {number: wanted[number] for number in kept}
    spare = width - sum(widths.values()) - GAP * (len(kept) - 1)
    for number in kept:
        if columns[number].grows:
            widths[number] = max(columns[number].least, widths[number] + spare)
            break
    head = Text(no_wrap=True)
    for place, number in enumerate(kept):
        style = "bold underline" if columns[number].title == bold else "dim"
        _append(head, Text(columns[number].title, style), widths[number], columns[number], is_first=place == 0)
    lines = [head]
    for row in range(len(rows)):
        line = Text(no_wrap=True)
        for place, number in enumerate(kept):
            _append(line, cells[number][row], widths[number], columns[number], is_first=place == 0)
        if row == chosen:
            line = Text(line.plain, "reverse", no_wrap=True)  # over colours it could not be read
            line.truncate(width, overflow="crop", pad=True)
        lines.append(line)
    for line in lines:
        line.truncate(width, overflow="crop")
    return lines


def _text(cell: Text | str) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(cell))


def _fitting(columns: Sequence[Column[RowT]], wanted: Sequence[int], width: int) -> list[int]:
    """Numbers of the columns that there is room for."""
    kept = list(range(len(columns)))
    while True:
        least = sum(min(wanted[n], columns[n].least) if columns[n].least else wanted[n] for n in kept)
        if least + GAP * (len(kept) - 1) <= width:
            return kept
        leaving = max(kept, key=lambda n: (columns[n].rank, n))
        if columns[leaving].rank == 0:
            return kept
        kept.remove(leaving)


def _append(line: Text, cell: Text, width: int, column: Column[RowT], *, is_first: bool) -> None:
    if not is_first:
        line.append(" " * GAP)
    cut = cell.copy()
    cut.truncate(width, overflow="crop")
    pad = " " * (width - cut.cell_len)
    if column.is_right:
        line.append(pad)
    line.append_text(cut)
    if not column.is_right:
        line.append(pad)
