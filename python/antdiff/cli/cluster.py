"""``antdiff cluster``."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

import tyro

from antdiff.cli.options import OptionalPath
from antdiff.train.config import TrainConfig

Schedule = Literal["linear", "cosine", "ldm", "sd", "flow"]  # antdiff.diffusion.SCHEDULES; a test compares them


def cluster(
    run: tyro.conf.Positional[Annotated[OptionalPath, tyro.conf.arg(metavar="[PATH]")]] = None,
    schedule: Schedule = "cosine",
    T: int = 1000,
    by: str = "log-snr",
    k: int = 5,
    save: OptionalPath = None,
    plot: OptionalPath = None,
) -> int:
    """Print, save and plot the timestep clusters of a noise schedule or of a run.

    Args:
        run: run folder whose clusters are shown. schedule, T, by and k are then taken from the run.
        schedule: noise schedule; antdiff train uses cosine with T = 1000.
        T: number of timesteps.
        by: timestep, log-snr, or the path of a saved clusters JSON.
        k: number of clusters.
        save: JSON file to write. antdiff train --clusters reads it.
        plot: image file to write (log-SNR with the intervals shaded).
    """
    from antdiff import diffusion
    from antdiff.train.run import make_clusters

    if run is not None:
        schedule, T, by, k = "cosine", 1000, str(run / "clusters.json"), TrainConfig().k
    log_snr = diffusion.log_snr(schedule, T)  # [T]
    clusters = make_clusters(by, k, log_snr)
    print(f"{clusters.k} clusters of {clusters.T} timesteps, {schedule} schedule, {by}")
    print(f"{'cluster':>7} {'timesteps':>12} {'size':>6} {'log-SNR':>18}")
    for i, (start, stop) in enumerate(itertools.pairwise(clusters.bounds)):
        span = f"{float(log_snr[start]):.2f} .. {float(log_snr[stop - 1]):.2f}"
        print(f"{i:>7} {f'{start}..{stop - 1}':>12} {stop - start:>6} {span:>18}")
    for path in (save, plot):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if save is not None:
        clusters.save(save)
        print(f"wrote {save}")
    if plot is not None:
        from antdiff.plotting import new_figure, plot_clusters
        from antdiff.plotting._figure import save_figure

        figure, (ax,) = new_figure(7, 3.2)
        plot_clusters(clusters, log_snr, ax=ax)
        save_figure(figure, plot)
        print(f"wrote {plot}")
    return 0
