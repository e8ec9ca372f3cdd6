"""Folders of results: each is made once, belongs to one command, and is locked while a process writes in it.

The lock is an advisory lock of the operating system on the file ``antdiff.lock`` inside the folder. It ends with the
process that holds it, however that process ends. The file itself stays: it says who wrote last, and that the folder
holds results of antdiff and not files of the user.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

MARKER = "antdiff.lock"
READING = 1.0  # seconds to wait for an owner that holds the lock and has not written its name yet
_held: set[tuple[str, int]] = set()  # the folders that a thread of this process has locked


class FolderInUseError(RuntimeError):
    """Another process writes in the folder. The message names it."""


def new_folder(stem: Path) -> Path:
    """Make and return the first folder ``<stem>-<number>`` that does not exist. No two processes get the same one."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        folder = stem.with_name(f"{stem.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError  # count() does not end


def owner(folder: Path) -> dict[str, Any]:
    """Return what the lock file says about the process that last locked the folder; empty if it says nothing."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def holds_results(folder: Path) -> bool:
    """Return whether a command of antdiff wrote the folder: a run, a comparison or an analysis."""
    return (folder / MARKER).is_file() or all((folder / name).is_file() for name in ("config.json", "clusters.json"))


@contextmanager
def locked(folder: Path, kind: str, **details: str) -> Iterator[None]:
    """Hold the lock of `folder` inside the block. A thread may lock a folder that it has locked already.

    Args:
        folder: an existing folder.
        kind: what the folder holds, in words ("run"). A folder keeps its first kind.
        details: further facts about this process for the lock file.

    Raises:
        FolderInUseError: another process, or another thread, holds the lock.
        ValueError: the folder holds results of another kind.
    """
    key = (os.path.realpath(folder), threading.get_ident())
    if key in _held:
        yield
        return
    handle = _acquire(folder, kind, details)
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        os.close(handle)


@contextmanager
def output_folder(folder: Path, kind: str, names: Iterable[str]) -> Iterator[None]:
    """Make `folder` for results of `kind`, which have these `names`, and hold its lock inside the block.

    Raises:
        ValueError: the folder holds files with these names that no earlier call made, or results of another kind.
            Nothing has been written.
        FolderInUseError: see :func:`locked`.
    """
    require_folder(folder)
    if not (folder / MARKER).is_file():
        refuse_files(folder, kind, names)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, kind):
        yield


def require_folder(folder: Path) -> None:
    """Raise ValueError if a folder cannot be made at this path, since a file is in its place."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder; {folder} is a file. Pass another --out")


def refuse_files(folder: Path, kind: str, names: Iterable[str]) -> None:
    """Raise ValueError if `folder` holds one of the `names`, which results of `kind` would overwrite."""
    found = [name for name in names if os.path.lexists(folder / name)]
    if found:
        raise ValueError(
            f"out must not hold files that a {kind} would overwrite; {folder} holds {', '.join(found)}. "
            "Pass another --out, or move these files away"
        )


def _acquire(folder: Path, kind: str, details: dict[str, str]) -> int:
    """Lock the folder, write this process into its lock file, and return the handle of the file."""
    before = owner(folder).get("kind", kind)
    if before != kind:
        raise ValueError(f"{folder} holds a {before}, so it cannot hold a {kind}. Pass another --out")
    handle = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise FolderInUseError(_in_use(folder)) from None
    except OSError as error:
        warnings.warn(
            f"{folder} is on a file system without locks ({error.strerror}). Make sure that no other process uses it",
            stacklevel=4,
        )
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    text = json.dumps({"kind": kind, "pid": os.getpid(), "host": socket.gethostname(), "since": since, **details})
    os.ftruncate(handle, 0)
    os.pwrite(handle, (text + "\n").encode(), 0)
    return handle


def _in_use(folder: Path) -> str:
    deadline = time.monotonic() + READING
    while not (found := owner(folder)) and time.monotonic() < deadline:
        time.sleep(0.02)
    who = f"process {found.get('pid', 'unknown')} on {found.get('host', 'an unknown host')}"
    return (
        f"{folder} is in use: {who} has been writing in it since {found.get('since', 'an unknown time')}. "
        "Wait until that process ends, or stop it"
    )
