"""Figures of runs: the curves of one run, and the comparison of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from antdiff.plotting._figure import new_figure, save_figure
from antdiff.plotting.palette import CATEGORICAL, DASHES, cluster_colours


def save_curves(
    rows: Sequence[Mapping[str, float]], intervals: Sequence[tuple[int, int]], title: str, path: Path
) -> None:
    """Plot the loss and the weight of each cluster, and the conflicts, over the steps, from the rows of metrics.csv."""
    k = len(intervals)
    conflicts = any(row.get("conflict_rate", 0) > 0 for row in rows)
    figure, axes = new_figure(4.6 * (2 + conflicts), 4.3, columns=2 + conflicts, grid=True)
    steps = np.array([row["step"] for row in rows])
    colours = cluster_colours(k)
    for i, (start, stop) in enumerate(intervals):
        label = f"t {start}..{stop - 1}"
        for ax, column in ((axes[0], f"loss_{i}"), (axes[1], f"weight_{i}")):
            values = np.array([row.get(column, np.nan) for row in rows])
            ax.plot(steps, values, color=colours[i], alpha=0.25, linewidth=0.8)
            (line,) = ax.plot(steps, smooth(values), color=colours[i], linewidth=1.8)
            line.set_dashes(DASHES[i % len(DASHES)])
            line.set_label(label if ax is axes[0] else None)
    axes[0].plot(
        steps, smooth(np.array([row.get("loss", np.nan) for row in rows])), "k", linewidth=1.3, label="mean over t"
    )
    axes[0].set(title="training loss of each cluster", xlabel="step", ylabel="mean squared error", yscale="log")
    axes[1].set(title="weight of each cluster", xlabel="step", ylabel="weight")
    axes[1].set_ylim(bottom=0)
    if conflicts:
        rate = np.array([row.get("conflict_rate", np.nan) for row in rows])
        axes[2].plot(steps, rate, color=CATEGORICAL[1], alpha=0.25, linewidth=0.8)
        axes[2].plot(steps, smooth(rate), color=CATEGORICAL[1], linewidth=1.8)
        axes[2].set(title="cluster pairs in conflict", xlabel="step", ylabel="share with a negative inner product")
        axes[2].set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=k + 1, fontsize=9, frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Return a centred moving mean over `share` of the points. NaN is ignored.

    At the start, where curves fall steeply, the window shrinks so that it stays symmetric. At the end, where a shrunken
    window would show single points as a trend, its backward half is used.
    """
    widest = int(len(values) * share / 2)
    out = np.full(len(values), np.nan)
    for i in range(len(values)):
        half = min(widest, i)
        window = values[i - half : i + half + 1]  # slicing truncates it at the end
        if np.isfinite(window).any():
            out[i] = np.nanmean(window)
    return out


def save_comparison(
    results: Mapping[str, Sequence[Mapping[str, Any]]], intervals: Sequence[tuple[int, int]], title: str, path: Path
) -> None:
    """Plot FD, and the held-out loss of each cluster relative to vanilla's, with one line per row of `results`.

    Each line shows every training seed, their mean (a bar) and their standard deviation. The axes of relative losses
    are linear up to 5 % and logarithmic beyond, so that a method that fails does not hide the others.
    """
    losses = {name: np.array([cell["held_out_losses"] for cell in cells]) for name, cells in results.items()}
    reference = losses["vanilla"].mean(0)  # [K], of [seeds, K]
    columns = [[np.array([cell["fd"]["mean"] for cell in cells]) for cells in results.values()]]
    for i, vanilla in enumerate(reference):
        columns.append([100 * (each[:, i] / vanilla - 1) for each in losses.values()])
    figure, axes = new_figure(3.4 + 1.7 * len(intervals), 1.5 + 0.27 * len(results), columns=len(columns), grid=True)
    for ax, column, colour in zip(axes, columns, [CATEGORICAL[1], *cluster_colours(len(intervals))], strict=True):
        for place, values in enumerate(column):
            ax.plot(values, np.full(len(values), place), "o", color=colour, alpha=0.45, markersize=4)
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            ax.errorbar(values.mean(), place, xerr=spread, fmt="|", color=colour, capsize=3, markersize=10)
        ax.axvline(column[0].mean(), color="black", linewidth=0.8, alpha=0.5)
        ax.set_yticks(range(len(results)), list(results) if ax is axes[0] else [])
        ax.set_ylim(len(results) - 0.5, -0.5)
    axes[0].set(title=f"FD ({next(iter(results.values()))[0]['data']}-CNN)", xlim=(0, None))
    for ax, column, (start, stop) in zip(axes[1:], columns[1:], intervals, strict=True):
        low, high = 1.3 * min(-5.0, *map(np.min, column)), 1.3 * max(5.0, *map(np.max, column))
        ax.set_xscale("symlog", linthresh=5)
        ax.set_xticks([tick for tick in (-50, -5, 0, 5, 50, 500) if low < tick < high])
        ax.xaxis.set_major_formatter("{x:+g}")
        ax.set(title=f"t {start}..{stop - 1}", xlabel="loss, % (log beyond 5)", xlim=(low, high))
    figure.suptitle(title)
    save_figure(figure, path)
