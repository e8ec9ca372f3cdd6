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

from antdiff import StratifiedTimesteps
from antdiff.data import ImageData
from antdiff.train.checkpoint import check_finite
from antdiff.train.companions import Experts
from antdiff.train.config import TrainConfig
from antdiff.train.log import Logger, Recorder
from antdiff.train.models import Denoiser
from antdiff.train.prepare import prepare
from antdiff.train.progress import save_progress_grid
from antdiff.train.ranks import RunRanks
from antdiff.train.run import locked_by_first
from antdiff.train.signals import stop_requests


def train(
    config: TrainConfig, data: ImageData, run: Path, *, progress: bool = True, loggers: Sequence[Logger] = ()
) -> bool:
    """Train in the folder `run` from its last checkpoint, or from the start. The folder already has a clusters.json.

    The folder receives rows of metrics.csv, TensorBoard events, sample grids and checkpoints. `loggers` receive the
    rows too. After SIGINT (Ctrl-C) or SIGTERM the current step finishes and a checkpoint is written. A second signal
    acts at once.

    Returns:
        True when all of config.steps are done, False when a signal stopped the run.

    Raises:
        DivergenceError: a loss or weight became NaN or infinite. The kept checkpoints are from before that.
        CheckpointError: a checkpoint could not be written or read.
    """
    with locked_by_first(run, RunRanks()):
        return _train(config, data, run, progress, loggers)


def _train(config: TrainConfig, data: ImageData, run: Path, progress: bool, loggers: Sequence[Logger]) -> bool:
    parts = prepare(config, data, run)
    B, rows, device, rng = parts.batch_size, parts.rows, parts.device, parts.generators
    model, timesteps, ranks, steps = parts.model, parts.timesteps, parts.ranks, parts.steps
    loss_fn = partial(sample_losses, model)
    recorder = Recorder(run, start=parts.start, steps=steps, active=ranks.is_first, progress=progress, also=loggers)
    with recorder, stop_requests(ignore_repeats=ranks.size > 1) as stop:
        model.train()
        for step in range(parts.start + 1, steps + 1):
            # 1. A batch, noised to timesteps whose clusters are known. All ranks draw the same B samples, and each one
            # takes its rows.
            x0 = parts.batches.next(device)  # [b, C, H, W]
            shares = timesteps.shares(B) if isinstance(timesteps, StratifiedTimesteps) else None  # [K] ints
            t, cluster, weight = timesteps.sample(B, device=device, generator=rng["timesteps"])  # [B] each
            noise = torch.randn((B, *data.shape), generator=rng["noise"], device=device)
            t, cluster, weight, noise = t[rows], cluster[rows], weight[rows], noise[rows]
            xt = parts.schedule.add_noise(x0, noise, t)

            # 2. Instead of loss.backward(): balance the cluster losses or gradients, and write every p.grad.
            parts.optimizer.zero_grad()
            result = parts.backward(loss_fn, (xt, noise, t, weight), cluster, counts=ranks.counts(shares))

            # 3. Nothing else changes.
            parts.optimizer.step()
            parts.ema.update_parameters(model)

            # 4. Log. The numbers stay on the device until a row is read.
            losses = result.losses / parts.importance()  # [K], without the importance weights
            if parts.curriculum is not None:
                parts.curriculum.update((losses * result.counts).sum() / result.counts.sum())
            parts.telemetry.add(losses, result.counts, result.weights, result.gram)
            recorder.advance()
            if step % parts.log_every == 0 or step == steps:
                row = parts.telemetry.read()
                if parts.curriculum is not None:
                    row["stage"] = float(parts.curriculum.stage)
                recorder.log(step, row)
                # Check after the row is written, so that it shows which loss is not finite. The first check names the
                # ranks.
                parts.backward.gradients.check()
                check_finite(row["loss"], step, run)

            # 5. Checkpoints and grids of samples.
            stopping = ranks.any(stop.is_set(), device, now=step % parts.log_every == 0)
            if step % parts.checkpoint_every == 0 or step == steps or stopping:
                check_finite(sum(p.detach().abs().sum().item() for p in model.parameters()), step, run)
                if ranks.is_first:
                    parts.state.save(step)
            if ranks.is_first and parts.grid_every and (step % parts.grid_every == 0 or step == steps):
                save_progress_grid(parts.ema.module, parts.schedule, data.shape, run, step, parts.sample_steps, device)
            if stopping:
                return step == steps
    return True


def sample_losses(
    model: Denoiser | Experts, xt: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Return the per-sample loss [B]: the mean squared error of the noise estimate times the sample's weight.

    A patched network adds the balancing loss of its patch.
    """
    errors: torch.Tensor = (model(xt, t) - noise).square().flatten(1).mean(1) * weight
    return errors + model.auxiliary_loss()
