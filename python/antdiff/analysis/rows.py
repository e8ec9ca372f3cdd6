"""The state of a computation on the disk, from which an interrupted one resumes bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from antdiff._files import write_atomically, write_npz


class ResumableRows:
    """The rows of gradients ``[2, n, D]``, in memory or in a file, and how many of them are done.

    The folder holds ``rows.bin``, ``progress.json`` (the computation, the checkpoint, and how many of its timesteps are
    done) and one ``checkpoint-<c>.npz`` per finished checkpoint. Rows reach the disk before the progress that counts
    them, and the other files are replaced atomically.

    Args:
        folder: folder of the state, created if it is missing. None keeps the rows in memory and saves nothing.
        fingerprint: identifies everything that the rows depend on, except the weights.
        shape, dtype: shape and dtype of the rows.

    Raises:
        ValueError: the folder holds the state of another computation.
    """

    def __init__(self, folder: Path | None, fingerprint: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self._state: dict[str, Any] = {}
        self._file: np.memmap[Any, Any] | None = None
        if folder is None:
            self.rows = torch.empty(shape, dtype=dtype)
            return
        folder.mkdir(parents=True, exist_ok=True)
        progress, rows = folder / "progress.json", folder / "rows.bin"
        if progress.exists():
            self._state = json.loads(progress.read_text())
            if self._state.get("fingerprint") != fingerprint:
                raise self._other("other data, noise, timesteps, loss settings, network or sketch")
        size = int(np.prod(shape)) * dtype.itemsize
        complete = rows.exists() and rows.stat().st_size == size
        numpy_dtype = np.dtype(str(dtype).removeprefix("torch."))
        self._file = np.memmap(rows, numpy_dtype, "r+" if complete else "w+", shape=shape)
        self.rows = torch.from_numpy(self._file)
        if not complete:
            self._state.pop("done", None)

    def finished(self, checkpoint: int, weights: str) -> dict[str, Tensor] | None:
        """Return the results of this checkpoint, or None if it is not finished."""
        path = self._result(checkpoint)
        if path is None or not path.exists():
            return None
        with np.load(path) as archive:
            if str(archive["weights"]) != weights:
                raise self._other(f"other weights of checkpoint {checkpoint}")
            return {name: torch.from_numpy(archive[name]) for name in archive.files if name != "weights"}

    def done(self, checkpoint: int, weights: str) -> int:
        """Return the number of timesteps of this checkpoint whose rows are complete."""
        if self._state.get("checkpoint") != checkpoint or "done" not in self._state:
            return 0
        if self._state["weights"] != weights:
            raise self._other(f"other weights of checkpoint {checkpoint}")
        return int(self._state["done"])

    def advance(self, checkpoint: int, weights: str, done: int) -> None:
        """Record that the rows of the first ``done`` timesteps of this checkpoint are complete."""
        if self._file is None or self.folder is None:
            return
        self._file.flush()
        state = {"fingerprint": self.fingerprint, "checkpoint": checkpoint, "weights": weights, "done": done}
        write_atomically(self.folder / "progress.json", json.dumps(state).encode())

    def finish(self, checkpoint: int, weights: str, arrays: dict[str, Tensor]) -> None:
        """Save the results of this checkpoint."""
        path = self._result(checkpoint)
        if path is not None:
            write_npz(path, {"weights": np.array(weights), **{k: v.numpy() for k, v in arrays.items()}})

    def _result(self, checkpoint: int) -> Path | None:
        return None if self.folder is None else self.folder / f"checkpoint-{checkpoint}.npz"

    def _other(self, what: str) -> ValueError:
        return ValueError(
            f"{self.folder} holds the state of another computation ({what}). Give another folder, or delete this one."
        )
