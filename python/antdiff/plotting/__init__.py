"""Figures of clusters, analyses and runs, with one palette and one figure factory. matplotlib is imported on use."""

from antdiff.plotting._figure import new_figure
from antdiff.plotting.clusters import plot_clusters

__all__ = ["new_figure", "plot_clusters"]
