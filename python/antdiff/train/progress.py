"""Grids of samples that a run draws while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from antdiff.data import to_uint8
from antdiff.plotting.images import save_grid
from antdiff.train.models import draw_samples

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

PROGRESS_IMAGES = 16


def save_progress_grid(
    model: torch.nn.Module,
    schedule: DDPMScheduler,
    shape: tuple[int, int, int],
    run: Path,
    step: int,
    sample_steps: int,
    device: torch.device,
) -> None:
    """Write 16 samples of `model` after `step` steps to ``<run>/samples/step-<step>.png``.

    They start from the same noise at every step and in every run, so that grids can be compared. The noise has its own
    generator, so that training is unaffected. `model` is left in the mode it was in.
    """
    was_training = model.training
    generator = torch.Generator(device).manual_seed(0)
    images = draw_samples(model, schedule, PROGRESS_IMAGES, shape, steps=sample_steps, generator=generator)
    model.train(was_training)
    path = run / "samples" / f"step-{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    save_grid(to_uint8(images), path, columns=8, side=40, gap=2)
