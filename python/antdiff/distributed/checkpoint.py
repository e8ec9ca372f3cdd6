"""Checkpoints of a run on several ranks, sharded or not: saved on N of them, loaded on M."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from antdiff._files import sync_folder
from antdiff.distributed.ranks import Ranks, answering

KEPT = 2  # the newest, and the one before


def save_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], *, group: dist.ProcessGroup | None = None
) -> Path:
    """Writes ``folder/step-<step>`` by torch.distributed.checkpoint, then deletes all but the newest two.

    Every rank calls it and writes its part. It is written beside its place and renamed by rank 0 when all have done: a
    rank that dies on the way leaves the earlier checkpoints as they were.

    Args:
        folder: the same on every rank, on a file system that all see.
        step: its number.
        state: nested dicts of tensors, DTensors (the state dicts of a ``fully_shard`` model and its optimizer),
            numbers, strings, and what else can be pickled. What is no DTensor has to be the same on every rank; what a
            rank has of its own goes under a key of its own, such as ``f"rng{rank}"``.

    Raises:
        LostRankError: another rank has died or hangs.
        CheckpointException: of torch.distributed.checkpoint, where some rank could not write.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    ranks = Ranks(group)
    path, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of a save that was cut short
    _together(ranks)
    with warnings.catch_warnings(), answering("the save of a checkpoint"):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        save(dict(state), storage_writer=FileSystemWriter(temporary, sync_files=True), process_group=ranks.group)
    _together(ranks)
    if ranks.rank == 0:
        shutil.rmtree(path, ignore_errors=True)  # the same step again, after a restart
        temporary.rename(path)
        sync_folder(folder)
        for old in _checkpoints(folder)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    _together(ranks)
    return path


def load_checkpoint(folder: Path, state: dict[str, Any], *, group: dist.ProcessGroup | None = None) -> int | None:
    """Reads the newest checkpoint of ``folder`` into ``state``, on any number of ranks.

    Args:
        state: as given to :func:`save_checkpoint`, of the same keys: tensors and DTensors are filled in place, however
            they are sharded now; other values are replaced. Give a model what was read with ``load_state_dict``.

    Returns:
        Its step, or None where the folder has none; the same on every rank.

    Raises:
        LostRankError: another rank has died or hangs.
        CheckpointException: of torch.distributed.checkpoint: unreadable, or keys or shapes that it does not hold.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    ranks = Ranks(group)
    found = _checkpoints(folder)
    newest: list[Path | None] = [found[-1] if found else None]
    if ranks.size > 1:  # rank 0 decides: a network file system may show the others an older listing
        with answering("the choice of a checkpoint"):
            dist.broadcast_object_list(newest, group=ranks.group, group_src=0)
    path = newest[0]
    if path is None:
        return None
    with warnings.catch_warnings(), answering("the load of a checkpoint"):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        load(state, storage_reader=FileSystemReader(path), process_group=ranks.group)
    return int(path.name.removeprefix("step-"))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _together(ranks: Ranks) -> None:
    if ranks.size > 1:
        with answering("a checkpoint"):
            dist.barrier(ranks.group)
