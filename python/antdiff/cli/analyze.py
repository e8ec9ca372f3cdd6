"""``antdiff analyze``: affinity, conflict and transfer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import tyro

from antdiff._command import command


def analyze() -> int:
    """Measure what the timesteps of a run do to each other: affinity, conflict, transfer (each has its --help)."""
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
    out: Path | None = None,
) -> int:
    """Do the gradients of two timesteps point the same way? Cosines, averaged over the run's checkpoints.

    Leaves arrays, figures, and clusters.json: gradient clusters that antdiff train --clusters takes. The same
    command goes on where an interrupted one stopped. antdiff train --keep-checkpoints keeps more to average over.

    Args:
        run: run folder.
        timesteps: how many, evenly spaced; the rest is interpolated.
        images: at each timestep, the same ones at all, in two halves.
        sketch: numbers to which the gradient of each part of the network is projected; None: exact. auto: exact
            if that fits the memory.
        memory: MiB to stay within (the network and its activations not counted).
        k: clusters to make; the default is the run's number.
        seed: of images, noise and sketch.
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
    print(f"train with these clusters: {command('train', '--clusters', where / 'clusters.json')}")
    return 0


def conflict(
    run: tyro.conf.Positional[Path],
    batch_size: int | None = None,
    batches: int = 32,
    repeats: int = 5,
    clusters: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    out: Path | None = None,
) -> int:
    """How often do the gradients of the clusters conflict, in batches and in expectation, at each checkpoint?

    Args:
        run: run folder.
        batch_size: images a batch; the default is the run's. The smaller, the more conflict is noise.
        batches: of a repetition.
        repeats: independent repetitions, whose spread gives the intervals.
        clusters: a saved clusters JSON; the default is the run's.
        seed: of images, noise and timesteps.
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
    out: Path | None = None,
) -> int:
    """Is an interval better off alone? Specialists of each cluster against a joint model (negative transfer gap).

    Trains, for each seed, a joint model with the run's settings and two specialists a cluster: with equal
    iterations and with equal samples. The same command goes on where an interrupted one stopped.

    Args:
        run: run folder; its settings and clusters are used.
        seeds: of training.
        steps: of the joint models; the default is the run's, at most 400. With the run's own steps and seed its
            network is the joint model, if its average of weights reaches back an eighth of the steps at most.
        samples: images for each FD.
        device: auto, cpu, cuda, cuda:1, ...
        out: folder of the results; the default is RUN/analysis/transfer.
    """
    from antdiff.experiments.transfer import analyze_transfer, transfer_table

    where = out or run / "analysis" / "transfer"
    summary = analyze_transfer(run, seeds=seeds, steps=steps, samples=samples, device=device, out=where)
    if summary is None:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{transfer_table(summary)}\n{where}/summary.json  transfer.png")
    return 0
