"""The figure factory and the elements that all figures share."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from antdiff._checks import as_count, as_number
from antdiff._files import written_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(
    width: float, height: float, columns: int = 1, rows: int = 1, *, grid: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure of `width` by `height` inches and its axes in reading order.

    It is made without pyplot, so it opens no window, keeps no global state and needs no display.
    """
    from matplotlib.figure import Figure

    width, height = as_number("width", width, above=0, most=100), as_number("height", height, above=0, most=100)
    columns, rows = as_count("columns", columns, most=100), as_count("rows", rows, most=100)
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.xaxis.label.set_size(9)
        ax.yaxis.label.set_size(9)
        if grid:
            ax.grid(True, alpha=0.25, linewidth=0.6)
    return figure, axes


def add_caption(figure: Figure, text: str, width: int) -> None:
    """Write `text` below the axes, in lines of at most `width` characters. Constrained layout makes room for it."""
    figure.supxlabel(textwrap.fill(text, width), x=0.01, ha="left", fontsize=8, color="#333333", linespacing=1.35)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the suffix of `path` names, PNG without one. The file is written atomically.

    Raises:
        ValueError: matplotlib does not know the format.
    """
    with written_atomically(path) as buffer:
        figure.savefig(buffer, format=path.suffix.removeprefix(".") or "png")
