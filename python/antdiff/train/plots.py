"""Pictures of a run: sample grids, curves, comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from antdiff.train.data import to_uint8
from antdiff.train.models import draw_samples

if TYPE_CHECKING:
    from diffusers import DDPMScheduler
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROGRESS_IMAGES = 16

# One hue from light to dark in the order of the noise: the clusters are ordered, so their colours are too.
CLUSTER_COLOURS = "viridis"
METHOD_COLOURS = {"vanilla": "#4d4d4d", "sum": "#999999", "uw": "#0072b2", "pcgrad": "#d55e00", "nash": "#009e73",
                  "curriculum": "#cc79a7", "routing": "#56b4e9", "experts": "#e69f00"}  # fmt: skip
LABELS = {"vanilla": "vanilla", "sum": "sum", "uw": "UW", "pcgrad": "PCGrad", "nash": "NashMTL",
          "curriculum": "curriculum", "routing": "routing", "experts": "4 experts"}  # fmt: skip


def save_grid(images: torch.Tensor, path: Path, *, columns: int = 10, side: int = 64, gap: int = 4) -> None:
    """uint8 images [N, C, H, W] as a PNG grid; small ones are enlarged to about `side` pixels without smoothing."""
    from PIL import Image

    pixels = images.permute(0, 2, 3, 1).cpu().numpy()  # [N, H, W, C]
    scale = max(1, round(side / pixels.shape[1]))
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, channels = pixels.shape
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (
            gap + place * (length + gap) for place, length in zip(divmod(i, columns), (height, width), strict=True)
        )
        sheet[top : top + height, left : left + width] = image
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(path)


def save_progress_grid(
    model: torch.nn.Module,
    schedule: DDPMScheduler,
    shape: tuple[int, int, int],
    run: Path,
    step: int,
    sample_steps: int,
    device: torch.device,
) -> None:
    """16 samples of `model` after `step` steps as ``<run>/samples/step-<step>.png``.

    They start from the same noise at every step and in every run, of a generator that is nobody else's, so that grids
    can be compared and training does not notice. `model` is left in the mode it was in.
    """
    was_training = model.training
    generator = torch.Generator(device).manual_seed(0)
    images = draw_samples(model, schedule, PROGRESS_IMAGES, shape, steps=sample_steps, generator=generator)
    model.train(was_training)
    path = run / "samples" / f"step-{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    save_grid(to_uint8(images), path, columns=8, side=40, gap=2)


def figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure that needs no display, with its axes in reading order."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(width, height), layout="constrained", dpi=120)
    axes = sheet.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, alpha=0.25, linewidth=0.6)
    return sheet, list(axes.flat)


def cluster_colours(k: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps[CLUSTER_COLOURS](0.9 - 0.85 * i / max(1, k - 1)) for i in range(k)]


def save_curves(
    rows: Sequence[Mapping[str, float]], intervals: Sequence[tuple[int, int]], title: str, path: Path
) -> None:
    """Loss a cluster, balancing weights and conflicts over the steps, from the rows of metrics.csv."""
    k = len(intervals)
    conflicts = any(row["conflict_rate"] > 0 for row in rows)
    sheet, axes = figure(4.6 * (2 + conflicts), 4.3, columns=2 + conflicts)
    steps = np.array([row["step"] for row in rows])
    colours = cluster_colours(k)
    for i, (start, stop) in enumerate(intervals):
        label = f"t {start}..{stop - 1}"
        for ax, column in ((axes[0], f"loss_{i}"), (axes[1], f"weight_{i}")):
            values = np.array([row[column] for row in rows])
            ax.plot(steps, values, color=colours[i], alpha=0.25, linewidth=0.8)
            ax.plot(steps, smooth(values), color=colours[i], linewidth=1.8, label=label if ax is axes[0] else None)
    axes[0].plot(steps, smooth(np.array([row["loss"] for row in rows])), "k--", linewidth=1.3, label="mean over t")
    axes[0].set(title="training loss of each cluster", xlabel="step", ylabel="mean squared error", yscale="log")
    axes[1].set(title="weight of each cluster", xlabel="step", ylabel="weight")
    axes[1].set_ylim(bottom=0)
    if conflicts:
        rate = np.array([row["conflict_rate"] for row in rows])
        axes[2].plot(steps, rate, color="#d55e00", alpha=0.25, linewidth=0.8)
        axes[2].plot(steps, smooth(rate), color="#d55e00", linewidth=1.8)
        axes[2].set(title="cluster pairs in conflict", xlabel="step", ylabel="share with a negative inner product")
        axes[2].set_ylim(bottom=0)
    sheet.legend(loc="outside lower center", ncols=k + 1, fontsize=9, frameon=False)
    sheet.suptitle(title)
    sheet.savefig(path)


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """A centred moving mean over `share` of the points; NaN is passed over. At the start, where curves fall steeply, it
    is as narrow as is symmetric; at the end, where one point would stand for a trend, it looks back over half of it."""
    widest = int(len(values) * share / 2)
    out = np.full(len(values), np.nan)
    for i in range(len(values)):
        half = min(widest, i)
        window = values[i - half : i + half + 1]  # slicing cuts it at the end
        if np.isfinite(window).any():
            out[i] = np.nanmean(window)
    return out


def save_comparison(
    results: Mapping[str, Sequence[Mapping[str, Any]]], intervals: Sequence[tuple[int, int]], title: str, path: Path
) -> None:
    """FD of every training seed with its mean and SD, and the held-out loss of each cluster relative to vanilla."""
    sheet, (left, right) = figure(11, 4.2, columns=2)
    reference = np.mean([cell["held_out_losses"] for cell in results["vanilla"]], axis=0)  # [K]
    width = 0.8 / len(results)
    for place, (method, cells) in enumerate(results.items()):
        colour = METHOD_COLOURS[method]
        fds = np.array([cell["fd"]["mean"] for cell in cells])
        left.plot(place + np.linspace(-0.12, 0.12, len(fds)), fds, "o", color=colour, alpha=0.55, markersize=5)
        spread = fds.std(ddof=1) if len(fds) > 1 else 0.0
        left.errorbar(place, fds.mean(), spread, fmt="_", color=colour, capsize=5, markersize=18, elinewidth=1.5)
        relative = np.array([cell["held_out_losses"] for cell in cells]) / reference - 1  # [seeds, K]
        x = np.arange(len(intervals)) + (place - (len(results) - 1) / 2) * width
        error = relative.std(0, ddof=1) * 100 if len(cells) > 1 else None
        right.bar(
            x,
            relative.mean(0) * 100,
            width,
            yerr=error,
            color=colour,
            label=LABELS[method],
            error_kw={"linewidth": 0.9},
        )
    left.set_xticks(range(len(results)), [LABELS[method] for method in results])
    left.set(
        title="FD of each training seed, mean and SD", ylabel=f"FD ({next(iter(results.values()))[0]['data']}-CNN)"
    )
    left.set_ylim(bottom=0)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xticks(range(len(intervals)), [f"{start}..{stop - 1}" for start, stop in intervals])
    right.set(title="held-out loss against vanilla, mean and SD", xlabel="timesteps of the cluster", ylabel="%")
    sheet.legend(loc="outside lower center", ncols=len(results), fontsize=9, frameon=False)
    sheet.suptitle(title)
    sheet.savefig(path)
