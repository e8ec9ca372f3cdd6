"""Files that are written whole or not at all, and digests that name their contents."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def write_atomically(path: Path, payload: bytes) -> None:
    """Write a file so that ``path`` holds either its previous content or all of ``payload``, even after a power cut.

    The payload goes to a temporary file in the same folder (a rename cannot cross file systems), is flushed to the
    disk, and is renamed. If the write fails, the temporary file is deleted and ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that the renames inside it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_npz(path: Path, arrays: Mapping[str, Any], *, compress: bool = True) -> None:
    """Write named arrays as an ``.npz`` file, atomically."""
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def digest(*parts: str | Tensor) -> str:
    """Return the SHA-256 (hex) of strings and tensors, in order. A tensor counts with its dtype, shape and values."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            sha.update(f"{part.dtype} {tuple(part.shape)}".encode())
            sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            sha.update(part.encode())
    return sha.hexdigest()
