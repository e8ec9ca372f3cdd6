"""Run folders: make, extend and load them.

config.json  clusters.json  environment.json  metrics.csv  tensorboard/  samples/  checkpoints/
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from antdiff import TimestepClusters
from antdiff._command import command
from antdiff._files import write_atomically
from antdiff.diffusion import log_snr
from antdiff.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from antdiff.train.companions import Experts
from antdiff.train.config import TrainConfig, require_rows
from antdiff.train.devices import choose_device
from antdiff.train.models import Denoiser, noise_schedule
from antdiff.train.prepare import BASE, make_model


def make_clusters(clusters: str, k: int, log_snr: torch.Tensor) -> TimestepClusters:
    """Return the clusters that a setting names (timestep, log-snr, or a file) for a schedule's log-SNR, float64 [T].

    Raises:
        ValueError: the file does not exist, or has another T, or another number of clusters although `k` is not the
            default.
    """
    T = len(log_snr)
    if clusters == "timestep":
        return TimestepClusters.uniform(T, k)
    if clusters == "log-snr":
        return TimestepClusters.from_log_snr(log_snr, k)
    path = Path(clusters)
    if not path.is_file():
        raise ValueError(
            f"clusters must be timestep, log-snr or a saved clusters JSON; the file {clusters!r} does not exist"
        )
    loaded = TimestepClusters.load(path)
    if loaded.T != T:
        raise ValueError(f"clusters must cover the schedule's T={T} timesteps; {path} covers {loaded.T}")
    if k not in (loaded.k, TrainConfig().k):
        raise ValueError(f"k must agree with the clusters file or be left out; got k={k}, {path} has {loaded.k}")
    return loaded


def start_run(config: TrainConfig, run: Path) -> None:
    """Make the folder of a new run with its clusters and settings. Raise ValueError if it already holds a run."""
    if (run / "config.json").exists():
        resume_command = command("train", "--resume", run)
        raise ValueError(f"{run} already holds a run. Pass another --out, or resume it with: {resume_command}")
    choose_device(config.device)  # raises here, so that a wrong device leaves no folder behind
    clusters = make_clusters(config.clusters, config.k, log_snr(noise_schedule()))
    require_rows(clusters.k, config.batch_size)  # a file of clusters has its own k
    if config.specialist is not None and not 0 <= config.specialist < clusters.k:
        raise ValueError(f"specialist must be a cluster, one of 0 .. {clusters.k - 1}; got {config.specialist}")
    run.mkdir(parents=True, exist_ok=True)
    clusters.save(run / "clusters.json")
    write_atomically(run / "config.json", config.to_json().encode())


def start_patch(base: Path, run: Path, *, steps: int, lr: float, device: str) -> TrainConfig:
    """Make the folder of a run that patches the averaged network of the run `base`, and return its settings.

    The folder gets a copy of that network. The settings are those of `base`, except for `steps`, `lr`, `device` and the
    curriculum, which is not repeated.

    Raises:
        ValueError: `base` is not a run of a DiT or has no checkpoint, or `run` already holds a run.
    """
    config = TrainConfig.load(base / "config.json")
    if config.model != "dit" or config.experts or config.patch:
        kind = "a patched network" if config.patch else "experts" if config.experts else f"model {config.model}"
        raise ValueError(
            f"run must hold a DiT to patch (train it with --model dit), since prompts are added to tokens; got {kind}"
        )
    config = replace(config, patch=str(base), steps=steps, lr=lr, device=device, curriculum=False)
    path = latest_checkpoint(base / "checkpoints")
    if path is None:
        raise ValueError(f"{base} has no checkpoint yet: train it first with: {command('train', '--resume', base)}")
    state = load_checkpoint(path)
    start_run(config, run)
    save_checkpoint(run / BASE, int(state["step"]), {"model": averaged(state)})
    return config


def averaged(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the averaged weights of a checkpoint, under the names that the network has for them."""
    return {key.removeprefix("module."): value for key, value in state["ema"].items() if key.startswith("module.")}


def extend_run(run: Path, saved: TrainConfig, steps: int) -> None:
    """Save the new number of steps of a resumed run in its settings.

    Raises:
        ValueError: the run has already done more steps.
    """
    path = latest_checkpoint(run / "checkpoints")
    done = 0 if path is None else int(load_checkpoint(path)["step"])
    if steps < done:
        raise ValueError(f"steps must be at least {done}, the number that {run} has already done; got {steps}")
    if steps != saved.steps:
        write_atomically(run / "config.json", replace(saved, steps=steps).to_json().encode())


def load_model(
    run: Path, config: TrainConfig, shape: tuple[int, int, int], device: torch.device
) -> tuple[Denoiser | Experts, int]:
    """Return the averaged (EMA) network of a run's last checkpoint, in eval mode, and the step of the checkpoint.

    Raises:
        ValueError: the run has no checkpoint yet.
        CheckpointError: the checkpoint cannot be read.
    """
    path = latest_checkpoint(run / "checkpoints")
    if path is None:
        raise ValueError(f"{run} has no checkpoint yet: train it first with: {command('train', '--resume', run)}")
    state = load_checkpoint(path)
    model = make_model(config, shape, run, seed=0)
    model.load_state_dict(averaged(state))
    return model.to(device).eval(), int(state["step"])


def intervals(clusters: TimestepClusters) -> list[tuple[int, int]]:
    """Return the clusters as half-open intervals (start, stop)."""
    return list(pairwise(clusters.bounds))
