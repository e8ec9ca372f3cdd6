"""Tables of numbers in CSV files, and what an editor or a crash can do to them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path


class DamagedTableError(ValueError):
    """A row of a table cannot be read. The message names the file, the row and the damage."""


def read_table(
    path: Path, index: str, *, damaged: Callable[[str], None] | None = None
) -> tuple[list[str], list[dict[str, float]]]:
    """Read a CSV file of numbers with a line of column names. Return the names and the rows.

    A last line without its end is left out: a crash has truncated it, and its last number would be another one.

    Args:
        index: the column of whole numbers that increase from row to row.
        damaged: is called with a message for each row that cannot be read, and the row is left out.

    Raises:
        DamagedTableError: a row cannot be read, and `damaged` is not given.
    """
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines(keepends=True)
    names: list[str] = []
    rows: list[dict[str, float]] = []

    def report(number: int, text: str) -> None:
        message = f"{path}, row {number}: {text}"
        if damaged is None:
            raise DamagedTableError(message)
        damaged(message)

    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            if number < len(lines):  # splitlines also ends a line at characters that no table has
                report(number, f"must end like a line of text; got {line[-1]!r}")
            continue
        if not line.strip():
            continue
        try:
            cells = next(csv.reader([line.rstrip("\r\n")]), [])
            if not names:
                names = _header(cells, index)
            else:
                rows.append(_row(cells, names, index, rows))
        except (csv.Error, ValueError) as error:
            report(number, str(error))
            if not names:
                break  # without names the numbers mean nothing
    return names, rows


def table_text(rows: Iterable[Mapping[str, float]], names: Sequence[str], index: str, *, header: bool = True) -> str:
    """Return rows as CSV text in the order of `names`, with NaN for a missing number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(names)
    for row in rows:  # repr is exact: reading it gives back the same float
        writer.writerow(int(row[name]) if name == index else repr(float(row.get(name, math.nan))) for name in names)
    return text.getvalue()


def _header(cells: list[str], index: str) -> list[str]:
    if index not in cells or len(set(cells)) != len(cells):
        raise ValueError(f"must hold the names of the columns, {index!r} among them; got {_short(cells)}")
    return cells


def _row(cells: list[str], names: list[str], index: str, before: list[dict[str, float]]) -> dict[str, float]:
    if len(cells) != len(names):
        raise ValueError(f"must hold {len(names)} numbers; got {len(cells)}")
    row: dict[str, float] = {}
    for name, cell in zip(names, cells, strict=True):
        try:
            row[name] = float(cell)
        except ValueError:
            raise ValueError(f"{name} must be a number; got {_short([cell])}") from None
    if not row[index].is_integer() or row[index] < 0 or (before and row[index] <= before[-1][index]):
        raise ValueError(f"{index} must be a whole number above that of the row before; got {row[index]:g}")
    return row


def _short(cells: list[str]) -> str:
    return repr(",".join(cells)[:60])
