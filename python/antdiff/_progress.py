"""A progress bar on a terminal, and a line now and then in a file or a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

SECONDS_PER_LINE = 60.0


def progress_bar(total: int, *, unit: str, initial: int = 0, title: str | None = None, active: bool = True) -> tqdm:
    """Return tqdm's bar on standard error, or a silent one unless `active`.

    A bar that is no terminal's would fill a log with a copy of itself ten times a second. There, each copy is a line of
    its own, one at the start, one per minute and one at the end.
    """
    from tqdm import tqdm

    active = active and sys.stderr is not None  # None: the process was started with a closed standard error
    if not active or sys.stderr.isatty():
        return tqdm(total=total, initial=initial, desc=title, unit=unit, disable=not active, dynamic_ncols=True)
    return tqdm(
        total=total, initial=initial, desc=title, unit=unit, file=_Lines(sys.stderr), mininterval=SECONDS_PER_LINE,
        maxinterval=SECONDS_PER_LINE,
    )  # fmt: skip


class _Lines:
    """A text file to which tqdm writes its bar, with an end of line in place of the return to the start of the line."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.encoding = file, file.encoding
        self.last = ""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line and line != self.last:
            self.file.write(line + "\n")
            self.last = line

    def flush(self) -> None:
        self.file.flush()
