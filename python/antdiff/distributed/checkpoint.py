"""Checkpoints of a run on several ranks, sharded or not. They are saved on N ranks and loaded on M."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from antdiff._checks import as_count, as_path, as_state
from antdiff._files import sync_folder
from antdiff.distributed.ranks import Ranks, naming_lost_ranks

KEPT = 2  # the newest checkpoint and the one before


def save_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], *, group: dist.ProcessGroup | None = None
) -> Path:
    """Write ``folder/step-<step>`` with torch.distributed.checkpoint, then delete all checkpoints but the newest two.

    Every rank calls this function and writes its part to a temporary folder, which rank 0 renames when all ranks have
    written. If a rank dies before that, the earlier checkpoints are unchanged.

    Args:
        folder: the same on every rank, on a file system that all ranks share.
        step: the number of the training step.
        state: nested dicts of tensors, DTensors (the state dicts of a ``fully_shard`` model and its optimizer),
            numbers, strings and other objects that can be pickled. Values other than DTensors must be the same on
            every rank. Store a value that differs between ranks under one key per rank, such as ``f"rng{rank}"``.

    Returns:
        The path of the checkpoint.

    Raises:
        LostRankError: another rank has died or hangs.
        CheckpointException: a rank could not write (from torch.distributed.checkpoint).
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    ranks = Ranks(group)
    folder, step = as_path("folder", folder), as_count("step", step, 0)
    state = as_state(state)
    path, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # left by an interrupted save
    _barrier(ranks)
    with warnings.catch_warnings(), naming_lost_ranks("the save of a checkpoint"):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        save(dict(state), storage_writer=FileSystemWriter(temporary, sync_files=True), process_group=ranks.group)
    _barrier(ranks)
    if ranks.rank == 0:
        shutil.rmtree(path, ignore_errors=True)  # the same step may be saved again after a restart
        temporary.rename(path)
        sync_folder(folder)
        for old in _checkpoints(folder)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    _barrier(ranks)
    return path


def load_checkpoint(folder: Path, state: dict[str, Any], *, group: dist.ProcessGroup | None = None) -> int | None:
    """Read the newest checkpoint of ``folder`` into ``state``, on any number of ranks.

    Args:
        state: a dict with the same keys as were given to :func:`save_checkpoint`. Tensors and DTensors are filled in
            place, whatever their sharding is now; other values are replaced. Pass the results to ``load_state_dict``
            of the model and the optimizer.

    Returns:
        The step of the checkpoint, or None if the folder has no checkpoint. It is the same on every rank.

    Raises:
        LostRankError: another rank has died or hangs.
        CheckpointException: the checkpoint cannot be read, or does not have a key or shape of ``state`` (from
            torch.distributed.checkpoint).
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    folder = as_path("folder", folder)
    if not isinstance(state, dict):
        raise TypeError(f"state must be a dict, which the checkpoint fills; got {type(state).__name__}.")
    ranks = Ranks(group)
    found = _checkpoints(folder)
    newest: list[Path | None] = [found[-1] if found else None]
    if ranks.size > 1:  # rank 0 decides, since a network file system may show older listings to the others
        with naming_lost_ranks("the choice of a checkpoint"):
            dist.broadcast_object_list(newest, group=ranks.group, group_src=0)
    path = newest[0]
    if path is None:
        return None
    with warnings.catch_warnings(), naming_lost_ranks("the load of a checkpoint"):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            load(state, storage_reader=FileSystemReader(path), process_group=ranks.group)
        except CheckpointException as error:  # not an Exception
            first = next(iter(error.failures.values()))[0]
            raise ValueError(f"state must have the entries and shapes of {path}; {str(first)[:300]}") from error
    return int(path.name.removeprefix("step-"))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _barrier(ranks: Ranks) -> None:
    if ranks.size > 1:
        with naming_lost_ranks("a checkpoint"):
            dist.barrier(ranks.group)
