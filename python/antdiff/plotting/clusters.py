"""The figure of a clustering."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from antdiff._checks import as_tensor, describe
from antdiff.plotting._figure import new_figure
from antdiff.plotting.palette import cluster_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from antdiff.clustering import TimestepClusters


def plot_clusters(
    clusters: TimestepClusters,
    log_snr: Tensor | np.ndarray[Any, Any] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Plot log-SNR against the timestep, with the clusters as shaded and numbered intervals.

    Args:
        clusters: clusters to draw.
        log_snr: ``[T]``. Without it, only the intervals are drawn.
        ax: axes to draw into; by default those of a new figure.

    Returns:
        The axes. ``ax.figure.savefig(path)`` writes them to a file.
    """
    if not hasattr(clusters, "bounds") or not hasattr(clusters, "k"):
        raise TypeError(f"clusters must be TimestepClusters; got {describe(clusters)}.")
    if ax is not None and not hasattr(ax, "axvspan"):
        raise TypeError(f"ax must be the axes of matplotlib; got {describe(ax)}. Leave it out for a new figure.")
    if log_snr is not None and not (isinstance(log_snr, np.ndarray) and log_snr.dtype.kind in "iuf"):
        as_tensor("log_snr", log_snr, kind="real")
    curve = None if log_snr is None else torch.as_tensor(log_snr).detach().cpu().numpy()  # [T]
    if curve is not None and curve.shape != (clusters.T,):
        raise ValueError(f"log_snr must have shape [T] with T={clusters.T}; got {list(curve.shape)}.")
    if ax is None:
        _, (ax,) = new_figure(7, 3.2)
    spans = list(pairwise(clusters.bounds))
    for i, ((start, stop), colour) in enumerate(zip(spans, cluster_colours(clusters.k), strict=True)):
        ax.axvspan(start - 0.5, stop - 0.5, color=colour, alpha=0.3, linewidth=0)
        ax.annotate(
            str(i),
            ((start + stop - 1) / 2, 0.97),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="top",
            fontsize=8,
        )
    if curve is not None:
        ax.plot(np.arange(clusters.T), curve, color="black", linewidth=1.5)
        ax.set_ylabel("log-SNR")
    else:
        ax.set_yticks([])
    ax.set_xlim(-0.5, clusters.T - 0.5)
    ax.set_xlabel("timestep")
    return ax
