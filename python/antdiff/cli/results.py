"""``antdiff sample`` and ``antdiff report``: the results of a run."""

from __future__ import annotations

from pathlib import Path

import tyro

from antdiff.cli.options import OptionalPath


def sample(
    run: tyro.conf.Positional[Path],
    n: int = 100,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    out: OptionalPath = None,
) -> int:
    """Draw images from a run and write a PNG grid and an npz file (arr_0, uint8 NHWC).

    Args:
        run: run folder.
        n: number of images.
        steps: DDIM steps; the default is the run's setting.
        seed: seed of the starting noise.
        device: auto, cpu, cuda, cuda:1, ...
        out: path of the results without suffix, OUT.png and OUT.npz; the default is RUN/samples-<n>.
    """
    from antdiff.experiments.sample import sample as draw

    grid, archive = draw(run, n=n, steps=steps, seed=seed, device=device, out=out or run / f"samples-{n}")
    print(f"wrote {grid} and {archive}")
    return 0


def report(run: tyro.conf.Positional[Path], out: OptionalPath = None) -> int:
    """Write the report of a run, finished or not, or of a comparison, as one HTML file that needs no network.

    Args:
        run: run folder, or the folder made by antdiff compare.
        out: file to write; the default is RUN/report.html.
    """
    from antdiff.experiments.report import write_report

    print(f"wrote {write_report(run, out)}")
    return 0
