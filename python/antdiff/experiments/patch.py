"""A run that patches the network of another run with a mixture of prompts (DMP)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from antdiff.train.config import TrainConfig
from antdiff.train.run import averaged, require_state, start_run


def start_patch(
    base: Path, folder: Path | Callable[[], Path], *, steps: int, lr: float, device: str
) -> tuple[TrainConfig, Path]:
    """Make the folder of a run that patches the averaged network of the run `base`. Return its settings and the folder.

    The folder gets a copy of that network. The settings are those of `base`, except for `steps`, `lr`, `device` and the
    curriculum, which is not repeated.

    Args:
        folder: see :func:`antdiff.train.run.start_run`.

    Raises:
        ValueError: `base` is not a run of a DiT or has no checkpoint, or the folder cannot hold a new run.
    """
    config = TrainConfig.load(base / "config.json")
    if config.model != "dit" or config.experts or config.patch:
        kind = "a patched network" if config.patch else "experts" if config.experts else f"model {config.model}"
        raise ValueError(
            f"run must hold a DiT to patch (train it with --model dit), since prompts are added to tokens; got {kind}"
        )
    config = replace(config, patch=str(base), steps=steps, lr=lr, device=device, curriculum=False)
    state = require_state(base)
    return config, start_run(config, folder, base=(int(state["step"]), averaged(state)))
