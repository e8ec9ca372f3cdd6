"""Run folders: make, extend and load them.

config.json  clusters.json  environment.json  metrics.csv  tensorboard/  samples/  checkpoints/  antdiff.lock
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from antdiff import TimestepClusters
from antdiff._command import command, warn
from antdiff._devices import choose_device
from antdiff._files import write_atomically, write_json
from antdiff._folders import holds_results, locked, refuse_files, require_folder
from antdiff.data import ImageData, load_data
from antdiff.data.recorded import record, with_recorded_split
from antdiff.diffusion import log_snr
from antdiff.distributed.launch import launch
from antdiff.train.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    require_same_data,
    save_checkpoint,
    set_damaged_aside,
)
from antdiff.train.companions import Experts
from antdiff.train.config import TrainConfig, require_rows
from antdiff.train.models import Denoiser, noise_schedule, require_size
from antdiff.train.prepare import BASE, make_model
from antdiff.train.ranks import RunRanks

RUN = "run"  # the kind of folder
RUN_FILES = (
    "config.json", "clusters.json", BASE, "environment.json", "metrics.csv", "tensorboard", "wandb-id", "samples",
    "checkpoints", "results.json", "samples.png", "curves.png", "model", "report.html", "analysis",
)  # fmt: skip


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


def start_run(
    config: TrainConfig,
    folder: Path | Callable[[], Path],
    *,
    base: tuple[int, Mapping[str, torch.Tensor]] | None = None,
) -> Path:
    """Make the folder of a new run with its clusters and settings, and return it.

    Args:
        folder: the run folder, or a function that makes one. It is called after all settings have been checked, so that
            a wrong setting leaves no folder behind.
        base: the step and the weights of the network that the run patches.

    Raises:
        ValueError: a setting does not fit, or the folder holds a run or files that a run would overwrite.
        FolderInUseError: another process makes the same folder.
    """
    choose_device(config.device)
    clusters = make_clusters(config.clusters, config.k, log_snr(noise_schedule()))
    require_rows(clusters.k, config.batch_size, config.log_every)  # a file of clusters has its own k
    if config.specialist is not None and not 0 <= config.specialist < clusters.k:
        raise ValueError(f"specialist must be a cluster, one of 0 .. {clusters.k - 1}; got {config.specialist}")
    run = folder if isinstance(folder, Path) else folder()
    require_unused(run)
    run.mkdir(parents=True, exist_ok=True)
    with locked_run(run):
        require_unused(run)  # again, since another process may have been faster
        clusters.save(run / "clusters.json")
        if base is not None:
            save_checkpoint(run / BASE, base[0], {"model": base[1]})
        write_atomically(run / "config.json", config.to_json().encode())  # last: from here on the folder holds a run
    return run


def require_unused(run: Path) -> None:
    """Raise ValueError if `run` holds a run, or files that a run would overwrite."""
    require_folder(run)
    if holds_results(run) and (run / "config.json").exists():
        resume_command = command("train", "--resume", run)
        raise ValueError(f"{run} already holds a run. Pass another --out, or resume it with: {resume_command}")
    # A start that was killed before it wrote config.json leaves these, and the next start writes them again.
    started = ("clusters.json", BASE) if holds_results(run) else ()
    refuse_files(run, RUN, (name for name in RUN_FILES if name not in started))


def locked_run(run: Path) -> AbstractContextManager[None]:
    """Hold the lock of a run folder inside the block; see :func:`antdiff._folders.locked`."""
    return locked(run, RUN, launch=launch())


@contextmanager
def locked_by_first(run: Path, ranks: RunRanks) -> Iterator[None]:
    """Let rank 0 hold the lock of a run folder inside the block. If it cannot, the other ranks exit with status 1.

    A damaged last checkpoint is set aside first; see :func:`antdiff.train.checkpoint.set_damaged_aside`.
    """
    with ExitStack() as stack:

        def lock() -> bool:
            stack.enter_context(locked_run(run))
            set_damaged_aside(run)
            return True

        ranks.from_first(lock)
        yield


def averaged(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the averaged weights of a checkpoint, under the names that the network has for them."""
    return {key.removeprefix("module."): value for key, value in state["ema"].items() if key.startswith("module.")}


def last_state(run: Path) -> dict[str, Any] | None:
    """Return the content of a run's last checkpoint, or None if it has none yet."""
    path = latest_checkpoint(run / "checkpoints")
    return None if path is None else load_checkpoint(path)


def require_state(run: Path) -> dict[str, Any]:
    """Return the content of a run's last checkpoint. Raise ValueError if it has none yet."""
    state = last_state(run)
    if state is None:
        raise ValueError(f"{run} has no checkpoint yet: train it first with: {command('train', '--resume', run)}")
    return state


def load_settings(run: Path) -> TrainConfig:
    """Return the settings of a run. If its config.json is damaged, warn and return those of its last checkpoint.

    Raises:
        ValueError: the folder is not a run, or its config.json is damaged and there is no checkpoint yet.
    """
    try:
        return TrainConfig.load(run / "config.json")
    except ValueError as error:
        state = last_state(run)
        if state is None:
            raise
        warn(f"{error}. The settings in the last checkpoint are used")
        return TrainConfig(**state["origin"]["settings"])


def load_run_data(config: TrainConfig, run: Path | None = None, *, accept_changes: bool = False) -> ImageData:
    """Load the data of a run, split into training and held-out images as its last checkpoint says.

    Args:
        run: the run folder; None for a new run.
        accept_changes: whether images may have changed since the last checkpoint. The checkpoint then records the new
            ones, and the run goes on with a new epoch of them.

    Raises:
        ValueError: the data cannot be loaded, do not fit the network, or are too few to be measured.
        CheckpointError: the images have changed, and that is not accepted.
    """
    data = load_data(config.data, image_size=config.image_size)
    state = None if run is None else last_state(run)
    if state is not None:
        data = with_recorded_split(data, state["origin"]["data"])
    require_size(config.model, *data.shape[1:])
    for part, images in (("training", data.train), ("held-out", data.held_out)):
        if len(images) < 2:
            raise ValueError(f"data must have at least 2 {part} images, for their covariance; got {len(images)}")
    if run is None or state is None:
        return data
    now, saved = record(data), state["origin"]["data"]
    if not accept_changes or now["shape"] != saved["shape"]:
        require_same_data(run, now, saved)
    elif now["digest"] != saved["digest"]:
        state["origin"]["data"] = now
        state["batches"]["left"] = torch.empty(0, dtype=torch.int64)  # the old rows mean other images now
        save_checkpoint(run / "checkpoints", int(state["step"]), state, keep=config.keep_checkpoints)
    return data


def reopen_run(run: Path, config: TrainConfig) -> None:
    """Save the settings of a resumed run, which may have more steps than before, and restore a damaged clusters.json.

    Raises:
        ValueError: the run has already done more steps, or its clusters.json cannot be restored.
    """
    state = last_state(run)
    done = 0 if state is None else int(state["step"])
    if config.steps < done:
        raise ValueError(f"steps must be at least {done}, the number that {run} has already done; got {config.steps}")
    write_atomically(run / "config.json", config.to_json().encode())
    try:
        TimestepClusters.load(run / "clusters.json")
    except (OSError, ValueError) as error:
        if state is None:
            raise
        warn(f"{error} The clusters in the last checkpoint are used")
        write_json(run / "clusters.json", state["origin"]["clusters"])


def load_model(
    run: Path, config: TrainConfig, shape: tuple[int, int, int], device: torch.device
) -> tuple[Denoiser | Experts, int]:
    """Return the averaged (EMA) network of a run's last checkpoint, in eval mode, and the step of the checkpoint.

    Raises:
        ValueError: the run has no checkpoint yet.
        CheckpointError: the checkpoint cannot be read.
    """
    state = require_state(run)
    model = make_model(config, shape, run, seed=0)
    model.load_state_dict(averaged(state))
    return model.to(device).eval(), int(state["step"])


def intervals(clusters: TimestepClusters) -> list[tuple[int, int]]:
    """Return the clusters as half-open intervals (start, stop)."""
    return list(pairwise(clusters.bounds))
