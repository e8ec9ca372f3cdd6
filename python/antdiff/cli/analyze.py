"""``antdiff analyze``: affinity, conflict and transfer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import tyro

from antdiff._command import command
from antdiff.cli.options import OptionalPath


def analyze() -> int:
    """Measure how the timesteps of a run affect each other: affinity, conflict, transfer (each has its --help)."""
    raise AssertionError("antdiff analyze has commands of its own")  # main runs them


def affinity(
    run: tyro.conf.Positional[Path],
    timesteps: int = 100,
    images: int = 256,
    sketch: int | Literal["auto"] | None = "auto",
    memory: int = 1024,
    k: int | None = None,
    seed: int = 0,
    device: str = "auto",
    out: OptionalPath = None,
) -> int:
    """Measure task affinity: do the gradients of two timesteps point the same way?

    Cosines are averaged over the run's checkpoints; antdiff train --keep-checkpoints keeps more of them. Writes
    arrays, figures and clusters.json, the gradient clusters that antdiff train --clusters reads. Repeat the same
    command to resume an interrupted analysis.

    Args:
        run: run folder.
        timesteps: number of evenly spaced timesteps to measure. The others are interpolated.
        images: number of images, in two halves. Every timestep sees the same images.
        sketch: size to which the gradient of each part of the network is sketched. None is exact; auto is exact if
            that fits into the memory.
        memory: limit in MiB, not counting the network and its activations.
        k: number of clusters to make; the default is the run's number.
        seed: seed of the images, the noise and the sketch.
        device: auto, cpu, cuda, cuda:1, ...
        out: folder of the results; the default is RUN/analysis/affinity.
    """
    from antdiff.experiments.analyze import affinity_table, analyze_affinity

    where = out or run / "analysis" / "affinity"
    summary = analyze_affinity(
        run, timesteps=timesteps, images=images, sketch=sketch, memory=memory * 2**20, k=k, seed=seed,
        device=device, out=where,
    )  # fmt: skip
    print(f"{affinity_table(summary)}\n{where}/summary.json  affinity.png  gaps.png  layers.png")
    print(f"to train with these clusters: {command('train', '--clusters', where / 'clusters.json')}")
    return 0


def conflict(
    run: tyro.conf.Positional[Path],
    batch_size: int | None = None,
    batches: int = 32,
    repeats: int = 5,
    clusters: OptionalPath = None,
    seed: int = 0,
    device: str = "auto",
    out: OptionalPath = None,
) -> int:
    """Measure how often the gradients of the clusters conflict, in batches and in expectation, at each checkpoint.

    Args:
        run: run folder.
        batch_size: images per batch; the default is the run's. In smaller batches more of the conflict is noise.
        batches: number of batches per repetition.
        repeats: number of independent repetitions. Their spread gives the confidence intervals.
        clusters: path of a saved clusters JSON; the default is the run's clusters.
        seed: seed of the images, the noise and the timesteps.
        device: auto, cpu, cuda, cuda:1, ...
        out: folder of the results; the default is RUN/analysis/conflict.
    """
    from antdiff.experiments.analyze import analyze_conflict, conflict_table

    where = out or run / "analysis" / "conflict"
    summary = analyze_conflict(
        run, batch_size=batch_size, batches=batches, repeats=repeats, clusters=clusters, seed=seed, device=device,
        out=where,
    )  # fmt: skip
    print(f"{conflict_table(summary)}\n{where}/summary.json  conflict.png")
    return 0


def transfer(
    run: tyro.conf.Positional[Path],
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int | None = None,
    samples: int = 1000,
    device: str = "auto",
    out: OptionalPath = None,
) -> int:
    """Measure the negative transfer gap: compare a specialist of each cluster with a joint model.

    For each seed, trains a joint model with the run's settings and two specialists per cluster, one with equal
    iterations and one with equal samples. Repeat the same command to resume an interrupted analysis.

    Args:
        run: run folder whose settings and clusters are used.
        seeds: training seeds.
        steps: steps of the joint models; the default is the run's, but at most 400. If steps and seed are the run's
            own, its network serves as the joint model, provided that its weight average reaches back at most an
            eighth of the steps.
        samples: images per FD.
        device: auto, cpu, cuda, cuda:1, ...
        out: folder of the results; the default is RUN/analysis/transfer.
    """
    from antdiff.experiments.transfer import analyze_transfer, transfer_table

    where = out or run / "analysis" / "transfer"
    summary = analyze_transfer(run, seeds=seeds, steps=steps, samples=samples, device=device, out=where)
    if summary is None:
        print("\nstopped; repeat the same command to resume", file=sys.stderr)
        return 130
    print(f"{transfer_table(summary)}\n{where}/summary.json  transfer.png")
    return 0
