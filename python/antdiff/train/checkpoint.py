"""The checkpoints of a run: everything that it needs to be resumed, and what it was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from antdiff._checkpoints import CheckpointError, checkpoints, latest_checkpoint, load_checkpoint, save_checkpoint
from antdiff._command import command, warn
from antdiff._files import unused_name
from antdiff.data.recorded import differences
from antdiff.train.config import setting_differences

__all__ = [
    "CheckpointError", "DivergenceError", "RunState", "check_finite", "checkpoints", "latest_checkpoint",
    "load_checkpoint", "require_same_data", "save_checkpoint", "set_damaged_aside",
]  # fmt: skip


class DivergenceError(RuntimeError):
    """A loss or a weight is no longer finite. The message gives the step and the last good checkpoint."""


class RunState:
    """Everything that a run needs to be resumed, in checkpoints of its folder.

    Args:
        run: the run folder.
        origin: what the weights come from: ``settings`` (a dict), ``clusters`` (the content of clusters.json), and
            ``data``, a record of the images and their split. A checkpoint of another origin is refused.
        parts: objects with ``state_dict`` and ``load_state_dict``, by the name that a checkpoint has for them.
        generators: the random generators of the run.
        keep: the number of newest checkpoints to keep.
    """

    def __init__(
        self,
        run: Path,
        origin: Mapping[str, Any],
        parts: Mapping[str, Any],
        generators: Mapping[str, torch.Generator],
        *,
        keep: int,
    ) -> None:
        self.run, self.origin, self.parts, self.generators, self.keep = run, origin, parts, generators, keep

    def save(self, step: int) -> None:
        """Write the checkpoint of the state after `step`."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        rng = {name: generator.get_state() for name, generator in self.generators.items()}
        state = {"step": step, "origin": self.origin, "rng": rng, **states}
        save_checkpoint(self.run / "checkpoints", step, state, keep=self.keep)

    def restore(self) -> int:
        """Load the last checkpoint into the parts and generators and return its step, or 0 if there is none."""
        path = latest_checkpoint(self.run / "checkpoints")
        if path is None:
            return 0
        state = load_checkpoint(path)
        try:
            self._require_origin(path, state["origin"])
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            for name, generator in self.generators.items():
                generator.set_state(state["rng"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit the settings in {self.run}/config.json: {error}") from error
        return int(state["step"])

    def _require_origin(self, path: Path, saved: Mapping[str, Any]) -> None:
        """Raise CheckpointError if a checkpoint has another origin than this run."""
        found = setting_differences(self.origin["settings"], saved["settings"])
        if saved["clusters"] != self.origin["clusters"]:
            starts = self.origin["clusters"]["starts"], saved["clusters"]["starts"]
            found = ", ".join(filter(None, [found, f"clusters.json with starts {starts[0]} (saved: {starts[1]})"]))
        if found:
            raise CheckpointError(
                f"{path} does not fit the settings in {self.run}/config.json; got {found}. Start a new run in another "
                "folder, or restore the settings"
            )
        require_same_data(self.run, self.origin["data"], saved["data"])


def require_same_data(run: Path, now: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raise CheckpointError if the record of the images, or of their split, is not that of a checkpoint of `run`."""
    if found := differences(now, saved):
        remedy = f"or go on with the new ones: {command('train', '--resume', run, '--accept-changed-data')}"
        if now["shape"] != saved["shape"]:
            remedy = "since the network takes images of its own size only"
        raise CheckpointError(
            f"the data must be the images that {run} was trained on, with the same split; got {found}. Restore the "
            f"images, {remedy}"
        )


def set_damaged_aside(run: Path) -> None:
    """Rename a damaged last checkpoint if an earlier one can be read, and warn: the run goes on from that one.

    The caller holds the lock of the run.

    Raises:
        CheckpointError: the last checkpoint is damaged, and so is every earlier one.
    """
    paths = checkpoints(run / "checkpoints")
    while paths:
        path = paths.pop()
        try:
            load_checkpoint(path)
            return
        except CheckpointError as error:
            if not paths:
                raise
            aside = unused_name(path.with_name(f"{path.name}.damaged"))
            reason = str(error.__cause__ or "its content does not match its checksum")
            path.rename(aside)
            warn(f"{path} is damaged ({reason}). The file is kept as {aside.name}, and {paths[-1].name} is tried")


def check_finite(value: float, step: int, run: Path) -> None:
    """Raise DivergenceError if a loss or the weights are NaN or infinite, before they reach a checkpoint."""
    if math.isfinite(value):
        return
    good = latest_checkpoint(run / "checkpoints")
    last = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
    raise DivergenceError(
        f"the loss or the weights are not finite at step {step}; {last}. "
        "A new run with a smaller --lr may help; a resumed run keeps its own"
    )
