"""The training loop: short, readable from top to bottom, and meant to be copied. Your own loop needs steps 1 to 4.

Each random choice has its own generator, spawned from the run's seed. A checkpoint holds all generators together with
the weights, their average, the optimizer and the balancing method. A resumed run therefore takes exactly the steps that
the uninterrupted run would have taken: bit for bit on a CPU with the same number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from antdiff.data import ImageData
from antdiff.train.companions import Experts
from antdiff.train.config import TrainConfig
from antdiff.train.log import Logger
from antdiff.train.models import Denoiser
from antdiff.train.session import open_session


def train(
    config: TrainConfig, data: ImageData, run: Path, *, progress: bool = True, loggers: Sequence[Logger] = ()
) -> bool:
    """Train in the run folder `run`, from its last checkpoint or the start. Return False if a signal stopped it."""
    with open_session(config, data, run, progress=progress, loggers=loggers) as session:
        parts = session.parts
        loss_fn = partial(sample_losses, parts.model)
        for step in session.steps():  # after each step, this writes the checkpoints and grids that are due
            # 1. A batch, noised to timesteps whose clusters are known.
            x0, noise, t, cluster, weight, counts = parts.sample()  # [b, C, H, W] twice, then [b] each
            xt = parts.schedule.add_noise(x0, noise, t)

            # 2. Instead of loss.backward(): balance the cluster losses or gradients, and write every p.grad.
            parts.optimizer.zero_grad()
            result = parts.backward(loss_fn, (xt, noise, t, weight), cluster, counts=counts)

            # 3. Nothing else changes.
            parts.optimizer.step()
            parts.ema.update_parameters(parts.model)

            # 4. The losses, weights and conflicts of the clusters.
            session.log(step, result)
    return session.complete


def sample_losses(
    model: Denoiser | Experts, xt: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Return the per-sample loss [B]: the squared error of the noise estimate times the weight, plus a patch's own."""
    errors: torch.Tensor = (model(xt, t) - noise).square().flatten(1).mean(1) * weight
    return errors + model.auxiliary_loss()
