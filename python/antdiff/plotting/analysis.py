"""Figures of task affinity, conflict and transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from antdiff.analysis.affinity import TaskAffinity, mean_within
from antdiff.analysis.confidence import Interval
from antdiff.analysis.conflict import Conflict
from antdiff.analysis.estimate import Correlation
from antdiff.analysis.transfer import TransferGap
from antdiff.clustering import TimestepClusters
from antdiff.plotting._figure import add_caption, new_figure, save_figure
from antdiff.plotting.palette import CATEGORICAL, MARKERS, SEQUENTIAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save_heat_map(
    affinity: Tensor, log_snr: Tensor, clusterings: Mapping[str, TimestepClusters], text: str, path: Path
) -> None:
    """Plot the affinities ``[T, T]`` once per clustering, with its intervals as squares along the diagonal."""
    T = len(affinity)
    figure, axes = new_figure(3.5 * len(clusterings) + 0.7, 4.4, columns=len(clusterings))
    image: Any = None
    for ax, (name, clusters) in zip(axes, clusterings.items(), strict=True):
        image = _heat(ax, affinity, low=min(0.0, float(affinity.min())))
        for start, stop in pairwise(clusters.bounds):
            # A white line with a black outline is visible on every colour of the map.
            for colour, width in (("black", 2.6), ("white", 1.3)):
                ax.plot(*_square(start - 0.5, stop - 0.5), color=colour, linewidth=width, clip_on=False, zorder=4)
        ax.set_title(f"{name}\nmean affinity within clusters {mean_within(affinity, clusters):.3f}", fontsize=9)
        ax.set_xlabel("timestep t")
        ticks = [t * T // 4 for t in range(4)] + [T - 1]
        ax.set_xticks(ticks)
        ax.set_yticks(ticks)
    axes[0].set_ylabel("timestep s")
    levels = axes[-1].secondary_yaxis("right")
    levels.set_yticks(ticks, [f"{round(float(log_snr[t]), 1) + 0.0}" for t in ticks], fontsize=8)
    levels.set_ylabel("log-SNR of s", fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.75, pad=0.02, label="task affinity (cosine of gradients)")
    bar.ax.tick_params(labelsize=8)
    add_caption(figure, text, 175)
    save_figure(figure, path)


def _heat(ax: Axes, affinity: Tensor, *, low: float) -> Any:
    """Draw the matrix and its zero contour, inside which gradients conflict."""
    values = affinity.numpy()
    image = ax.imshow(values, cmap=SEQUENTIAL, vmin=low, vmax=1, origin="lower", interpolation="nearest")
    if low < 0 and values.min() < 0:
        ax.contour(values, levels=[0.0], colors="white", linewidths=0.7, linestyles="--", zorder=3)
    ax.spines[:].set_visible(False)
    return image


def _square(low: float, high: float) -> tuple[list[float], list[float]]:
    return [low, high, high, low, low], [low, low, high, high, low]


def save_gaps(found: TaskAffinity, correlations: Mapping[str, Correlation], text: str, path: Path) -> None:
    """Plot the affinity of every pair against its gap in t and in log-SNR, with medians of twelve equal-count bins."""
    figure, axes = new_figure(9.2, 3.7, columns=2)
    positions = {"t": found.timesteps, "log_snr": found.log_snr[found.timesteps]}
    labels = {"t": "gap |s - t| in timesteps", "log_snr": "gap in log-SNR (natural logarithm)"}
    i, j = np.triu_indices(len(found.timesteps), 1)
    for ax, (name, position) in zip(axes, positions.items(), strict=True):
        gaps = (position[i] - position[j]).abs().double().numpy()
        y = found.affinity[i, j].numpy()
        ax.plot(gaps, y, ".", color="#999999", markersize=2, alpha=0.3, linewidth=0, rasterized=True, zorder=1)
        x, low, middle, high = _binned(gaps, y)
        ax.fill_between(x, low, high, color=CATEGORICAL[0], alpha=0.2, linewidth=0, zorder=2, label="quartiles")
        ax.plot(x, middle, "-", color=CATEGORICAL[0], marker=MARKERS[0], markersize=4.5, zorder=4, label="median")
        x, _, middle, _ = _binned(gaps, found.raw[i, j].numpy())
        ax.plot(x, middle, linestyle="none", marker=MARKERS[1], markersize=8, markerfacecolor="none",
                markeredgecolor=CATEGORICAL[1], zorder=3, label="median without noise correction")  # fmt: skip
        ax.axhline(0, color="black", linewidth=0.7, linestyle=":")
        value = correlations[name]
        ax.set_title(f"Spearman {value.value:+.2f} [{value.low:+.2f}, {value.high:+.2f}]", fontsize=9)
        ax.set_xlabel(labels[name])
        ax.set_xlim(left=0)
    axes[0].set_ylabel("task affinity (cosine)")
    axes[1].sharey(axes[0])
    axes[0].legend(fontsize=8, frameon=False, loc="best")
    add_caption(figure, text, 130)
    save_figure(figure, path)


def _binned(x: np.ndarray, y: np.ndarray, bins: int = 12) -> tuple[np.ndarray, ...]:
    """Return the median x and the three quartiles of y of bins with equal counts."""
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    parts = [part for part in np.array_split(np.argsort(x, kind="stable"), bins) if len(part)]
    quartiles = np.array([np.quantile(y[part], [0.25, 0.5, 0.75]) for part in parts])  # [bins, 3]
    return np.array([np.median(x[part]) for part in parts]), *quartiles.T


def save_layers(
    names: Sequence[str], layers: Tensor, sizes: Sequence[int], timesteps: Tensor, text: str, path: Path
) -> None:
    """Plot one small heat map ``[n, n]`` for each of ``layers [L, n, n]``, all on one scale."""
    L = len(names)
    columns = min(5, L)
    rows = -(-L // columns)
    figure, axes = new_figure(2.1 * columns + 0.6, 2.25 * rows + 0.55, columns=columns, rows=rows)
    finite = [layer[layer.isfinite()] for layer in layers]
    low = max(-1.0, min(0.0, *(float(values.quantile(0.01)) if len(values) else 0.0 for values in finite)))
    image: Any = None
    positions = timesteps.tolist()
    for place, ax in enumerate(axes):
        if place >= L:
            ax.set_visible(False)
            continue
        image = ax.imshow(
            layers[place].numpy(), cmap=SEQUENTIAL, vmin=low, vmax=1, origin="lower", interpolation="nearest",
        )  # fmt: skip
        ax.set_facecolor("#dddddd")  # visible where there is no estimate
        ax.spines[:].set_visible(False)
        ax.set_title(f"{names[place]}\n{sizes[place]:,} parameters", fontsize=8)
        ticks = [0, len(positions) // 2, len(positions) - 1]
        ax.set_xticks(ticks, [str(positions[i]) for i in ticks], fontsize=7)
        ax.set_yticks(ticks, [str(positions[i]) for i in ticks], fontsize=7)
        if place % columns == 0:
            ax.set_ylabel("timestep s", fontsize=8)
        if place + columns >= L:
            ax.set_xlabel("timestep t", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, label="task affinity (cosine)", extend="min")
    bar.ax.tick_params(labelsize=8)
    add_caption(figure, text, 150)
    save_figure(figure, path)


def save_conflict(found: Mapping[int, Conflict], clusters: TimestepClusters, text: str, path: Path) -> None:
    """Plot the cosines of the clusters' expected gradients, and the share of conflicting pairs over the checkpoints."""
    figure, (left, right) = new_figure(9.4, 4.1, columns=2)
    steps, k = sorted(found), clusters.k
    names = [f"{start}..{stop - 1}" for start, stop in pairwise(clusters.bounds)]
    mean = torch.stack([found[step].expected().mean for step in steps]).nanmean(0)  # [K, K]
    if len(steps) > 1:
        spread = torch.stack([found[step].expected().mean for step in steps]).std(0)
    else:
        spread = (found[steps[0]].expected().high - mean).nan_to_num(0)
    floor = min(0.0, float(mean.nan_to_num(0).min()))
    image = left.imshow(mean.numpy(), cmap=SEQUENTIAL, vmin=floor, vmax=1, origin="lower")
    for i in range(k):
        for j in range(k):
            if i == j or k > 8:
                continue
            value = f"{float(mean[i, j]):+.2f}" + (f"\n±{float(spread[i, j]):.2f}" if k <= 6 else "")
            colour = "black" if float(mean[i, j]) - floor > 0.55 * (1 - floor) else "white"
            left.text(j, i, value, ha="center", va="center", fontsize=8, color=colour)
    left.set_xticks(range(k), names, rotation=35, ha="right", fontsize=8)
    left.set_yticks(range(k), names, fontsize=8)
    left.spines[:].set_visible(False)
    left.set(xlabel="timesteps of the cluster", ylabel="timesteps of the cluster")
    many = f"mean ± SD of {len(steps)} checkpoints" if len(steps) > 1 else "± 95 % interval"
    left.set_title(f"cosine of expected gradients, {many}", fontsize=9)
    bar = figure.colorbar(image, ax=left, shrink=0.85)
    bar.ax.tick_params(labelsize=8)

    shares = [found[step].share() for step in steps]
    _errorbar(right, steps, shares, 0, "pairs in a batch, including noise")
    pairs = max(1, k * (k - 1) // 2)
    expected = [found[step].conflicting_pairs() / pairs for step in steps]
    right.plot(steps, expected, color=CATEGORICAL[1], marker=MARKERS[1], linestyle="--", linewidth=1.2, markersize=5,
               label="pairs of expected gradients, beyond noise")  # fmt: skip
    top = max([0.5, *expected, *(float(share.high.nan_to_num(0)) for share in shares)])
    right.set_ylim(0, 1.25 * top)
    right.axhline(0.5, color="black", linewidth=0.7, linestyle=":")
    right.set(xlabel="training step of the checkpoint", ylabel="share of pairs that conflict")
    right.set_title("negative inner products of cluster gradients", fontsize=9)
    right.legend(fontsize=8, frameon=False, loc="upper left")
    if len(steps) == 1:
        right.set_xticks(steps)
    add_caption(figure, text, 140)
    save_figure(figure, path)


def _errorbar(
    ax: Axes, x: Sequence[float], intervals: Sequence[Interval], place: int, label: str, **options: Any
) -> None:
    mean = np.array([float(interval.mean) for interval in intervals])
    half = np.array([float(interval.high - interval.low) / 2 for interval in intervals])
    ax.errorbar(x, mean, np.nan_to_num(half), color=CATEGORICAL[place], marker=MARKERS[place], markersize=5, capsize=3,
                linewidth=1.2, label=label, **options)  # fmt: skip


def save_transfer(
    losses: Sequence[TransferGap], quality: Sequence[TransferGap], intervals: Sequence[tuple[int, int]], metric: str,
    text: str, path: Path,
) -> None:  # fmt: skip
    """Plot the NTG of each interval with its 95 % confidence interval over seeds.

    The left axes show it by held-out loss, relative to the joint model's; the right axes by sample quality.
    """
    figure, axes = new_figure(9.6, 4.0, columns=2)
    names = [f"{start}..{stop - 1}" for start, stop in intervals]
    for ax, gaps, relative in ((axes[0], losses, True), (axes[1], quality, False)):
        for place, gap in enumerate(gaps):
            x = np.arange(len(intervals)) + (place - (len(gaps) - 1) / 2) * 0.28
            scale = 100 if relative else 1
            values = (gap.specialist / gap.joint - 1) if relative else gap.specialist - gap.joint  # [S, K]
            for seed in values.numpy() * scale:
                ax.plot(
                    x + 0.08,
                    seed,
                    linestyle="none",
                    marker=MARKERS[place],
                    markersize=3,
                    color=CATEGORICAL[place],
                    alpha=0.6,
                )
            mean, low, high = gap.relative if relative else gap.gap
            half = torch.nan_to_num((high - low) / 2) * scale
            ax.errorbar(x, mean * scale, half, linestyle="none", marker=MARKERS[place], markersize=6.5, capsize=4,
                        color=CATEGORICAL[place], label=f"equal {gap.budget}")  # fmt: skip
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xticks(range(len(names)), names, fontsize=8, rotation=20)
        ax.set_xlabel("interval of timesteps (least noise at the left)")
        bottom, top = ax.get_ylim()
        ax.axhspan(min(bottom, 0.0), 0, color="#eeeeee", zorder=0)
        ax.set_ylim(bottom, top)
        ax.annotate("negative transfer", (0.01, 0.02), xycoords="axes fraction", ha="left", fontsize=8, color="#555555")
    axes[0].set_ylabel("NTG, % of the joint model's loss")
    axes[0].set_title("held-out denoising loss on the interval", fontsize=9)
    axes[1].set_ylabel(f"NTG, {metric}")
    axes[1].set_title("sample quality, with the specialist inside its interval", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False)
    add_caption(figure, text, 140)
    save_figure(figure, path)
