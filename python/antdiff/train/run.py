"""A run folder from the first step to the closing table: train, load, measure, picture.

config.json  clusters.json  environment.json  metrics.csv  tensorboard/  samples/  checkpoints/     while it trains
results.json  samples.png  curves.png  model/                           when it is done
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antdiff import TimestepClusters
from antdiff._files import write_atomically
from antdiff.diffusion import log_snr
from antdiff.info import collect
from antdiff.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from antdiff.train.companions import BASE, Experts, make_model
from antdiff.train.config import TrainConfig, require_rows
from antdiff.train.data import ImageData, load_data, to_uint8
from antdiff.train.distributed import Team
from antdiff.train.log import Logger, read_csv
from antdiff.train.loop import choose_device, sensible_threads, train
from antdiff.train.metrics import Judge, Quality, accuracy, feature_net, held_out_losses
from antdiff.train.models import Denoiser, draw_samples, noise_schedule
from antdiff.train.plots import save_curves, save_grid

GRID_IMAGES = 60


def make_clusters(clusters: str, k: int, log_snr: torch.Tensor) -> TimestepClusters:
    """The clusters that a setting names (timestep, log-snr, or a file) for a schedule's log-SNR, float64 [T].

    Raises:
        ValueError: no such file, or it is for another T or, where `k` is not the default, another number of clusters.
    """
    T = len(log_snr)
    if clusters == "timestep":
        return TimestepClusters.uniform(T, k)
    if clusters == "log-snr":
        return TimestepClusters.from_log_snr(log_snr, k)
    path = Path(clusters)
    if not path.is_file():
        raise ValueError(f"clusters must be timestep, log-snr or a saved clusters JSON; there is no file {clusters!r}")
    loaded = TimestepClusters.load(path)
    if loaded.T != T:
        raise ValueError(f"clusters must cover the schedule's T={T} timesteps; {path} covers {loaded.T}")
    if k not in (loaded.k, TrainConfig().k):
        raise ValueError(f"k must agree with the clusters file or be left out; got k={k}, {path} has {loaded.k}")
    return loaded


def start_run(config: TrainConfig, run: Path) -> None:
    """Make the folder of a new run and write its clusters and settings. A ValueError if it already holds a run."""
    if (run / "config.json").exists():
        raise ValueError(f"{run} already holds a run: go on with --resume {run}, or give another --out")
    clusters = make_clusters(config.clusters, config.k, log_snr(noise_schedule()))
    require_rows(clusters.k, config.batch_size)  # a file of clusters has a k of its own
    if config.specialist is not None and not 0 <= config.specialist < clusters.k:
        raise ValueError(f"specialist must be a cluster, one of 0 .. {clusters.k - 1}; got {config.specialist}")
    run.mkdir(parents=True, exist_ok=True)
    clusters.save(run / "clusters.json")
    write_atomically(run / "config.json", config.to_json().encode())


def start_patch(base: Path, run: Path, *, steps: int, lr: float, device: str) -> TrainConfig:
    """Make the folder of a run that patches the averaged network of the run `base`, with a copy of it; its settings.

    Everything but `steps`, `lr` and `device` is as in `base`, except that a curriculum is not repeated.

    Raises:
        ValueError: `base` is not a run of a DiT, has no checkpoint, or `run` holds a run already.
    """
    config = TrainConfig.load(base / "config.json")
    if config.model != "dit" or config.experts or config.patch:
        kind = "a patched network" if config.patch else "experts" if config.experts else f"model {config.model}"
        raise ValueError(
            f"run must hold a DiT to patch (train it with --model dit): prompts are added to tokens; got {kind}"
        )
    config = replace(config, patch=str(base), steps=steps, lr=lr, device=device, curriculum=False)
    path = latest_checkpoint(base / "checkpoints")
    if path is None:
        raise ValueError(f"{base} has no checkpoint yet: train it first (antdiff train --resume {base})")
    state = load_checkpoint(path)
    start_run(config, run)
    save_checkpoint(run / BASE, int(state["step"]), {"model": averaged(state)})
    return config


def averaged(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The averaged weights in a checkpoint, under the network's own names."""
    return {key.removeprefix("module."): value for key, value in state["ema"].items() if key.startswith("module.")}


def extend_run(run: Path, saved: TrainConfig, steps: int) -> None:
    """Keep a resumed run's new number of steps, so that the next resumption goes on to it.

    Raises:
        ValueError: the run has done more steps than that already.
    """
    path = latest_checkpoint(run / "checkpoints")
    done = 0 if path is None else int(load_checkpoint(path)["step"])
    if steps < done:
        raise ValueError(f"steps must be at least the {done} that {run} has done already; got {steps}")
    if steps != saved.steps:
        write_atomically(run / "config.json", replace(saved, steps=steps).to_json().encode())


def execute(
    config: TrainConfig,
    run: Path,
    *,
    data: ImageData | None = None,
    progress: bool = True,
    loggers: Sequence[Logger] = (),
) -> dict[str, Any] | None:
    """Train (or go on training) in `run`, then measure. None if a signal stopped the training; else the results.

    Of several ranks the first measures, and the others have done: their results are empty.
    """
    team = Team()
    data = data or load_data(config.data, image_size=config.image_size)
    with sensible_threads(data.shape[1], choose_device(config.device)):
        if team.leads:
            write_atomically(run / "environment.json", (json.dumps(collect()[0], indent=2) + "\n").encode())
        if not train(config, data, run, progress=progress, loggers=loggers):
            return None
        team.part_ways()
        return evaluate(config, data, run, progress=progress) if team.leads else {}


def load_model(
    run: Path, config: TrainConfig, shape: tuple[int, int, int], device: torch.device
) -> tuple[Denoiser | Experts, int]:
    """The averaged (EMA) network of a run's last checkpoint, and the step it is from.

    Raises:
        ValueError: the run has no checkpoint yet.
        CheckpointError: the checkpoint cannot be read.
    """
    path = latest_checkpoint(run / "checkpoints")
    if path is None:
        raise ValueError(f"{run} has no checkpoint yet: train it first (antdiff train --resume {run})")
    state = load_checkpoint(path)
    model = make_model(config, shape, run, seed=0)
    model.load_state_dict(averaged(state))
    return model.to(device).eval(), int(state["step"])


def evaluate(config: TrainConfig, data: ImageData, run: Path, *, progress: bool = False) -> dict[str, Any]:
    """Measure a finished run and leave results.json, samples.png, curves.png and the network in diffusers' format."""
    if progress:
        print("measuring the averaged weights; the training is saved", file=sys.stderr, flush=True)
    device = choose_device(config.device)
    model, step = load_model(run, config, data.shape, device)
    schedule = noise_schedule()
    clusters = TimestepClusters.load(run / "clusters.json")
    net = feature_net(data)
    judge = Judge(data, net)
    qualities = []
    for seed in range(config.eval_seeds):
        if progress:
            print(f"  {config.eval_samples} samples, {seed + 1} of {config.eval_seeds}", file=sys.stderr, flush=True)
        generator = torch.Generator(device).manual_seed(seed)
        images = draw_samples(
            model, schedule, config.eval_samples, data.shape, steps=config.sample_steps, generator=generator
        )
        pixels = to_uint8(images).cpu()
        qualities.append(judge.measure(pixels))
        if seed == 0:
            save_grid(pixels[:GRID_IMAGES], run / "samples.png")
    results: dict[str, Any] = {
        "data": data.name,
        "method": config.method,
        "companions": config.companions,
        "timesteps": config.timestep_sampling,
        "seed": config.seed,
        "step": step,
        "eval_samples": config.eval_samples,
        "feature_accuracy": accuracy(net, data),
        **spread_of(qualities),
        "anchors": {name: asdict(quality) for name, quality in judge.anchors(config.eval_samples).items()},
        "held_out_losses": held_out_losses(model, data, schedule, intervals(clusters), device).tolist(),
        "intervals": intervals(clusters),
    }
    write_atomically(run / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    model.save(run / "model")
    rows = read_csv(run / "metrics.csv")
    if rows:
        title = f"{data.name}, {config.label}, {config.timestep_sampling} timesteps, seed {config.seed}"
        save_curves(rows, intervals(clusters), title, run / "curves.png")
    return results


def spread_of(qualities: list[Quality]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (0 for a single one) of each metric over sampling seeds."""
    columns = {
        name: np.array([getattr(quality, name) for quality in qualities]) for name in ("fd", "precision", "recall")
    }
    return {
        name: {"mean": float(values.mean()), "sd": float(values.std(ddof=1)) if len(values) > 1 else 0.0}
        for name, values in columns.items()
    }


def intervals(clusters: TimestepClusters) -> list[tuple[int, int]]:
    """The clusters as half-open (start, stop)."""
    return list(pairwise(clusters.bounds))


def closing_table(results: dict[str, Any], eval_seeds: int) -> str:
    """The results beside the data's own anchors, as text."""
    spread = {
        name: f"{results[name]['mean']:.3g}" + (f" ± {results[name]['sd']:.2g}" if eval_seeds > 1 else "")
        for name in ("fd", "precision", "recall")
    }
    rows = [(f"samples, {eval_seeds} seeds of {results['eval_samples']}", *spread.values())]
    for name, quality in results["anchors"].items():
        rows.append((name, *(f"{quality[column]:.3g}" for column in ("fd", "precision", "recall"))))
    lines = [f"{'':<28} {'FD (' + results['data'] + '-CNN)':>18} {'precision':>16} {'recall':>16}"]
    lines += [f"{name:<28} {fd:>18} {precision:>16} {recall:>16}" for name, fd, precision, recall in rows]
    shares = [stop - start for start, stop in results["intervals"]]
    mean = np.average(results["held_out_losses"], weights=shares)
    losses = "  ".join(
        f"t {start}..{stop - 1}: {loss:.4f}"
        for (start, stop), loss in zip(results["intervals"], results["held_out_losses"], strict=True)
    )
    lines += ["", f"held-out loss  {losses}  mean over t: {mean:.4f}"]
    lines += [
        "FD, lower is better: Frechet distance to the train images in the features of a small CNN trained on them,",
        "not an FID. It depends on the number of images (for held-out images, theirs): compare it between runs.",
        "Precision and recall, higher is better. Measured with the averaged (EMA) weights.",
    ]
    return "\n".join(lines)
