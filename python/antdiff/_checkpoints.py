"""Checkpoint files: one safetensors file per checkpoint, for any nested state.

Nested state dicts become named tensors and a JSON tree in the metadata of the file. Reading a checkpoint therefore
never unpickles anything, and any safetensors reader finds the weights under ``model/...`` and ``ema/...``. Files are
written atomically: a crash or a full disk leaves the previous checkpoint untouched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from antdiff._files import digest, write_atomically

FORMAT = "antdiff-3"
KEPT = 2  # with a second one, a corrupt checkpoint costs checkpoint_every steps, not the run


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message names the last good one."""


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, keep: int = KEPT) -> Path:
    """Write ``folder/step-<step>.safetensors`` atomically, then delete all but the newest `keep`.

    Args:
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.

    Raises:
        CheckpointError: the file could not be written, for example to a full disk. Earlier checkpoints are unchanged.
    """
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(_flatten(state, "", tensors))
    payload = save(tensors, {"format": FORMAT, "tree": tree, "sha256": _digest(tensors, tree)})
    path = folder / f"step-{step:08d}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, payload)
    except OSError as error:
        good = latest_checkpoint(folder)
        remedy = f"the last good one is {good}; free some space and resume from it" if good else "no earlier one exists"
        raise CheckpointError(f"could not write checkpoint {path} ({error.strerror or error}); {remedy}") from error
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `save_checkpoint` wrote. Its tensors are on the CPU.

    Raises:
        CheckpointError: the file is unreadable, truncated, changed on the disk, or not an antdiff checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: reading a mapped file that somebody has shortened meanwhile would end the process by SIGBUS.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error}){_remedy(path)}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not an antdiff checkpoint of format {FORMAT}. Another version may read it")
    if metadata["sha256"] != _digest(tensors, metadata["tree"]):
        raise CheckpointError(f"checkpoint {path} is corrupt: its content does not match its checksum{_remedy(path)}")
    state = _unflatten(json.loads(metadata["tree"]), tensors)
    assert isinstance(state, dict)  # save_checkpoint takes a mapping
    return state


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the most steps in `folder`, or None."""
    paths = checkpoints(folder)
    return paths[-1] if paths else None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def _remedy(path: Path) -> str:
    earlier = [other for other in checkpoints(path.parent) if other < path]
    return f". Delete it to resume from {earlier[-1].name}" if earlier else ""


def _digest(tensors: Mapping[str, torch.Tensor], tree: str) -> str:
    return digest(tree, *(part for key in sorted(tensors) for part in (key, tensors[key])))


def _flatten(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return a JSON tree of `value` and add its tensors to `tensors`, under the names in the leaves of the tree.

    Keys of dicts may be ints, as in the state of an optimizer.
    """
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[key, _flatten(item, f"{path}/{key}".lstrip("/"), tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_flatten(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(
        f"a checkpoint holds tensors, numbers, strings, dicts and lists; got {type(value).__name__} at {path}"
    )


def _unflatten(node: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content}
    if kind == "list":
        return [_unflatten(item, tensors) for item in content]
    if kind == "tuple":
        return tuple(_unflatten(item, tensors) for item in content)
    return content
