"""A run from the first step to the closing table: training, measurement, figures.

The measurement adds these files to the run folder: results.json  samples.png  curves.png  model/
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antdiff import TimestepClusters
from antdiff._devices import choose_device, sensible_threads
from antdiff._files import folder_written_whole, write_json
from antdiff.data import ImageData, to_uint8
from antdiff.experiments.quality import Judge, Quality, accuracy, feature_net, held_out_losses
from antdiff.info import collect
from antdiff.plotting.curves import save_curves
from antdiff.plotting.images import save_grid
from antdiff.train.config import TrainConfig
from antdiff.train.log import Logger, read_csv
from antdiff.train.loop import train
from antdiff.train.models import draw_samples, noise_schedule
from antdiff.train.ranks import RunRanks
from antdiff.train.run import intervals, load_model, load_run_data, locked_by_first

GRID_IMAGES = 60


def execute(
    config: TrainConfig,
    run: Path,
    *,
    data: ImageData | None = None,
    progress: bool = True,
    loggers: Sequence[Logger] = (),
) -> dict[str, Any] | None:
    """Train, or resume training, in `run`, then measure. Return the results, or None if a signal stopped the training.

    Only rank 0 measures. The other ranks return an empty dict.
    """
    ranks = RunRanks()
    data = data or load_run_data(config, run)
    with sensible_threads(data.shape[1], choose_device(config.device)), locked_by_first(run, ranks):
        if ranks.is_first:
            write_json(run / "environment.json", collect()[0])
        if not train(config, data, run, progress=progress, loggers=loggers):
            return None
        ranks.leave()
        return evaluate(config, data, run, progress=progress) if ranks.is_first else {}


def evaluate(config: TrainConfig, data: ImageData, run: Path, *, progress: bool = False) -> dict[str, Any]:
    """Measure a finished run. Write results.json, samples.png, curves.png and the network in diffusers' format."""
    if progress:
        print("the training is saved; measuring the averaged weights", file=sys.stderr, flush=True)
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
    with folder_written_whole(run / "model") as folder:
        model.save(folder)
    rows = read_csv(run / "metrics.csv")
    if rows:
        title = f"{data.name}, {config.label}, {config.timestep_sampling} timesteps, seed {config.seed}"
        save_curves(rows, intervals(clusters), title, run / "curves.png")
    write_json(run / "results.json", results)  # last: it says that the run is finished
    return results


def spread_of(qualities: list[Quality]) -> dict[str, dict[str, float]]:
    """Return the mean and the standard deviation of each metric over sampling seeds (0 for a single seed)."""
    columns = {
        name: np.array([getattr(quality, name) for quality in qualities]) for name in ("fd", "precision", "recall")
    }
    return {
        name: {"mean": float(values.mean()), "sd": float(values.std(ddof=1)) if len(values) > 1 else 0.0}
        for name, values in columns.items()
    }


def closing_table(results: dict[str, Any], eval_seeds: int) -> str:
    """Return the results as text, beside the anchors of the same data."""
    spread = {
        name: f"{results[name]['mean']:.3g}" + (f" ± {results[name]['sd']:.2g}" if eval_seeds > 1 else "")
        for name in ("fd", "precision", "recall")
    }
    seeds = f"{eval_seeds} seed{'s' if eval_seeds > 1 else ''}"
    rows = [(f"samples, {seeds} of {results['eval_samples']}", *spread.values())]
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
        "FD (lower is better) is the Frechet distance to the train images in the features of a small CNN trained on",
        "them. It is not an FID. It depends on the number of images (for the held-out images, their number), so",
        "compare it only between runs. Precision and recall: higher is better. All use the averaged (EMA) weights.",
    ]
    return "\n".join(lines)
