"""Files that are written whole or not at all, and digests that name their contents."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TEMPORARY = ".antdiff-"  # the names of temporary files and folders begin with it


def write_atomically(path: Path, payload: bytes) -> None:
    """Write a file so that ``path`` holds either its previous content or all of ``payload``, even after a power cut.

    The payload goes to a temporary file in the same folder (a rename cannot cross file systems), is flushed to the
    disk, and is renamed. If the write fails, the temporary file is deleted and ``path`` is unchanged. A symbolic link
    stays, and the file that it points to is written. A device or a pipe, such as ``/dev/stdout``, is written directly.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(payload)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}.tmp")  # no two writers share it, in no process
    try:
        with temporary.open("xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


@contextmanager
def written_atomically(path: Path) -> Iterator[io.BytesIO]:
    """Give a buffer for a library that writes to a file object, and write its content to ``path`` at the end."""
    buffer = io.BytesIO()
    yield buffer
    write_atomically(path, buffer.getvalue())


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Give a temporary folder for a library that writes into folders, and move its files into ``folder`` at the end.

    Each file of ``folder`` holds its previous or its new content at any time, and other files in it stay.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=TEMPORARY) as temporary:
        yield Path(temporary)
        folder.mkdir(exist_ok=True)
        for path in sorted(Path(temporary).iterdir()):
            path.replace(folder / path.name)
    sync_folder(folder)


def unused_name(path: Path) -> Path:
    """Return `path`, or the first of ``<path>-2``, ``<path>-3``, ... that does not exist."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{number}") for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def remove_temporary(folder: Path) -> None:
    """Delete the temporary files in ``folder`` that killed processes have left. Nobody may write in it meanwhile."""
    for path in folder.glob(f"{TEMPORARY}*.tmp"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that the renames inside it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_npz(path: Path, arrays: Mapping[str, Any], *, compress: bool = True) -> None:
    """Write named arrays as an ``.npz`` file, atomically."""
    with written_atomically(path) as buffer:
        (np.savez_compressed if compress else np.savez)(buffer, **arrays)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raise ValueError if the file cannot be read, with its name and the place of the damage."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path} cannot be read ({error}). Restore it or delete it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds {type(found).__name__}. Restore it or delete it")
    return found


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
