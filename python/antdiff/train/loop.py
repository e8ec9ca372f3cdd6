"""The training loop: short, top to bottom, and meant to be copied. Steps 1 to 5 of the loop are what your own needs.

Everything random has a generator of its own, all spawned from the run's seed, and every one of them is in the
checkpoint together with the weights, their average, the optimizer and the balancing method. A resumed run therefore
takes exactly the steps the uninterrupted one would have taken: bit for bit on a CPU with the same number of threads.
"""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antdiff import StratifiedTimesteps, TimestepClusters, ops
from antdiff.analysis import Telemetry
from antdiff.companions import RestrictedTimesteps
from antdiff.distributed import ClusterGradients, global_losses, reduce_gradients
from antdiff.gradients.routes import Route
from antdiff.train.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from antdiff.train.companions import Experts, cluster_weights, make_model, make_timesteps, parameter_groups, prompts_of
from antdiff.train.config import TrainConfig
from antdiff.train.data import ImageData, to_unit
from antdiff.train.distributed import Team
from antdiff.train.log import Logger, MetricLog
from antdiff.train.methods import make_balancer, write_direction
from antdiff.train.models import Denoiser, noise_schedule
from antdiff.train.progress import save_progress_grid

RANDOM_CHOICES = ("weights", "data", "noise", "timesteps", "balancing", "prompts")  # appended to, never reordered


class DivergenceError(RuntimeError):
    """A loss or a weight is no longer finite; the message says since when and which checkpoint is good."""


def train(
    config: TrainConfig, data: ImageData, run: Path, *, progress: bool = True, loggers: Sequence[Logger] = ()
) -> bool:
    """Train into the folder `run`, going on from its last checkpoint if it has one. Its clusters.json is there already.

    Leaves metrics.csv, TensorBoard events, sample grids and checkpoints there; `loggers` get the rows too. SIGINT
    (Ctrl-C) and SIGTERM let the current step finish and a checkpoint be written; the second one acts at once.

    Returns:
        True when all of config.steps are done, False when a signal stopped the run.

    Raises:
        DivergenceError: a loss or weight became NaN or infinite. The checkpoints kept are from before that.
        CheckpointError: a checkpoint could not be written or read.
    """
    from tqdm import tqdm

    # ---- the usual parts -----------------------------------------------------------------------------------------
    team = Team()  # one process, or those that torchrun started: each takes its part of every batch
    part = team.part(config.batch_size)  # a slice of its rows
    device = choose_device(config.device)
    rng = generators(config.seed, device)
    schedule = noise_schedule()
    model = make_model(config, data.shape, run, seed=rng["weights"].initial_seed()).to(device)
    # An expert is trained every N-th step: its average reaches back as many steps of its own.
    ema = MovingAverage(model, config.ema ** (1 / max(1, config.experts)))
    if (prompts := prompts_of(model)) is not None:
        prompts.generator = rng["prompts"]
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, weight_decay=0)
    B = config.batch_size
    batches = Batches(data.train, B, rng["data"], part)

    # ---- what antdiff adds: clusters of timesteps, a sampler of them, cluster gradients, a balancing method ------
    clusters = TimestepClusters.load(run / "clusters.json")
    K = clusters.k
    timesteps = make_timesteps(config, clusters, model, device)
    curriculum = timesteps.curriculum if isinstance(timesteps, RestrictedTimesteps) else None
    epoch = math.ceil(len(data.train) / B)
    balancer = make_balancer(config.method, K, optimizer, generator=rng["balancing"], epoch=epoch)
    # The balancing loss of a patch is of a whole slice, not of a sample: only split hands it a cluster at a time.
    route: Route = "split" if config.patch or team.size > 1 else "auto"
    # GradDrop looks at all of J, so every rank holds it.
    gradients = ClusterGradients(model, K, route, scheme="all_reduce" if balancer.needs == "rows" else "auto")

    # ---- what has to survive an interruption ---------------------------------------------------------------------
    importance = cluster_weights(timesteps, device)
    telemetry = Telemetry(K, window=config.log_every, share=clusters.sizes / clusters.T, device=device)
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "batches": batches, "timesteps": timesteps,
             "balancer": balancer, "telemetry": telemetry}  # fmt: skip
    start = restore(run, parts, rng)
    stack = ExitStack()
    if team.leads:
        log = MetricLog(run, start=start, also=loggers)
        stack.callback(log.close)
    stop = stack.enter_context(stop_requests(patient=team.size > 1))
    bar = stack.enter_context(
        tqdm(total=config.steps, initial=start, unit="step", disable=not (progress and team.leads), dynamic_ncols=True)
    )

    with stack:
        model.train()
        for step in range(start + 1, config.steps + 1):
            # 1. A batch, noised to timesteps whose clusters are known.
            x0 = batches.next(device)  # [B, C, H, W]; of several ranks, each takes its part of what all draw alike
            drawn = next(importance)  # [K]
            shares = timesteps.shares(B) if isinstance(timesteps, StratifiedTimesteps) else None  # [K] ints
            t, cluster, weight = timesteps.sample(B, device=device, generator=rng["timesteps"])  # each [B]
            t, cluster, weight = t[part], cluster[part], weight[part]
            noise = torch.randn((B, *x0.shape[1:]), generator=rng["noise"], device=device)[part]
            xt = schedule.add_noise(x0, noise, t)

            if balancer.needs != "losses":
                # 2a. K cluster gradients for about one backward: J, a list of [K, *shape].
                batch, shares = (xt, noise, t, weight), team.counts(shares)
                J = gradients.compute(partial(sample_losses, model), batch, cluster, counts=shares)
                # 3a. Their K x K inner products are all that a balancing method looks at.
                G = gradients.gram(J)
                losses, counts = gradients.losses, gradients.counts
                if balancer.needs == "gram":
                    # 4a. Every p.grad becomes the weighted sum of its K gradients.
                    w = balancer.weights(G)
                    gradients.combine(w, J)
                else:  # but for GradDrop, which chooses for each parameter: there are no weights to log
                    write_direction(balancer.direction(J), model)
                    w = torch.full_like(losses, torch.nan)
            else:
                # 2b. K losses from one forward, one backward of what the method makes of them.
                optimizer.zero_grad()
                losses, counts = ops.cluster_loss(model(xt, t), noise, cluster, K, weight)
                losses, counts = global_losses(losses, counts)
                (balancer.loss(losses, counts) + model.auxiliary_loss() / team.size).backward()
                reduce_gradients(model, skip_unused=True)
                G, w = None, balancer.weights(losses)

            # 5. Nothing else changes.
            optimizer.step()
            ema.update_parameters(model)

            unweighted = losses.detach() / drawn  # [K]
            if curriculum is not None:
                curriculum.update((unweighted * counts).sum() / counts.sum())
            telemetry.add(unweighted, counts, w, G)
            bar.update()
            if step % config.log_every == 0 or step == config.steps:
                row = telemetry.read()
                if curriculum is not None:
                    row["stage"] = float(curriculum.stage)
                if team.leads:
                    log.log(step, row)
                gradients.check()  # both after the row, which shows where it happened; of several ranks this names one
                check_finite(row["loss"], step, run)
                each = " | clusters " + " ".join(f"{row[f'loss_{i}']:.3f}" for i in range(K)) if K <= 10 else ""
                bar.set_postfix_str(f"loss {row['loss']:.3f}{each}")
            stopping = team.any(stop.is_set(), device, now=step % config.log_every == 0)
            if step % config.checkpoint_every == 0 or step == config.steps or stopping:
                check_finite(sum(p.detach().abs().sum().item() for p in model.parameters()), step, run)
                if team.leads:
                    state = snapshot(step, parts, rng)
                    save_checkpoint(run / "checkpoints", step, state, keep=config.keep_checkpoints)
            if team.leads and config.grid_every and (step % config.grid_every == 0 or step == config.steps):
                save_progress_grid(ema.module, schedule, data.shape, run, step, config.sample_steps, device)
            if stopping:
                return step == config.steps
    return True


def sample_losses(
    model: Denoiser | Experts, xt: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of each sample's noise estimate times its weight, [B]."""
    errors: torch.Tensor = (model(xt, t) - noise).square().flatten(1).mean(1) * weight
    return errors + model.auxiliary_loss()


# ---- the parts ---------------------------------------------------------------------------------------------------


class Batches:
    """Endless batches of float [B, C, H, W] in [-1, 1]: a fresh permutation an epoch, batches across its border."""

    def __init__(
        self, images: torch.Tensor, batch_size: int, generator: torch.Generator, part: slice = slice(None)
    ) -> None:
        self.images = images  # uint8 [N, C, H, W]
        self.part = part  # of each batch that a rank takes
        self.batch_size = batch_size
        self.generator = generator
        self.left = torch.empty(0, dtype=torch.int64)  # what remains of the current epoch's permutation

    def next(self, device: torch.device) -> torch.Tensor:
        while len(self.left) < self.batch_size:
            self.left = torch.cat([self.left, torch.randperm(len(self.images), generator=self.generator)])
        rows, self.left = self.left[: self.batch_size], self.left[self.batch_size :]
        return to_unit(self.images[rows[self.part]].to(device, non_blocking=True))

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.left = state["left"]


class MovingAverage(torch.nn.Module):
    """A copy of a network, `module`, whose weights are the exponential moving average of the network's.

    The first update takes the weights as they are; after n of them the decay is (1 + n) / (10 + n), at most `decay`.
    torch's AveragedModel does the same, but moves its count to the device of the weights and back in every step, for
    which the host has to wait.
    """

    n_averaged: torch.Tensor  # updates so far, [], always on the CPU

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)
        self.decay = decay
        self.register_buffer("n_averaged", torch.tensor(0, device="cpu"))

    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        """Take in the weights of `model`, and its buffers as they are. Waits for nothing."""
        n = int(self.n_averaged)
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - decay)
        for kept, current in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(current)
        self.n_averaged += 1


def choose_device(name: str) -> torch.device:
    """The torch device of a setting; a ValueError names a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<n>; got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices (antdiff info)"
        )
    return device


@contextmanager
def sensible_threads(image_size: int, device: torch.device) -> Iterator[None]:
    """While open, small images on a CPU use one thread, unless OMP_NUM_THREADS says otherwise.

    A step on 8x8 images is hundreds of operations of some ten microseconds: a second thread gains next to nothing, and
    on a machine with other work its spinning barriers slow a run tenfold. Larger images keep torch's own number.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" and image_size <= 16 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def generators(seed: int, device: torch.device) -> dict[str, torch.Generator]:
    """One independent generator for each random choice, all from one seed; the data's order is drawn on the CPU."""
    children = np.random.SeedSequence(seed).spawn(len(RANDOM_CHOICES))
    on_cpu = ("weights", "data")
    return {
        name: torch.Generator("cpu" if name in on_cpu else device).manual_seed(
            int(child.generate_state(1, np.uint64)[0] >> 1)
        )
        for name, child in zip(RANDOM_CHOICES, children, strict=True)
    }


# ---- stopping, and going on --------------------------------------------------------------------------------------


def snapshot(step: int, parts: Mapping[str, Any], rng: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """Everything that a run needs to go on after `step`."""
    states = {name: part.state_dict() for name, part in parts.items()}
    return {"step": step, "rng": {name: generator.get_state() for name, generator in rng.items()}, **states}


def restore(run: Path, parts: Mapping[str, Any], rng: Mapping[str, torch.Generator]) -> int:
    """Put the last checkpoint of `run`, if there is one, into the parts and generators; the step it is from, or 0."""
    path = latest_checkpoint(run / "checkpoints")
    if path is None:
        return 0
    state = load_checkpoint(path)
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        for name, generator in rng.items():
            generator.set_state(state["rng"][name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit the settings in {run}/config.json: {error}") from error
    return int(state["step"])


def check_finite(value: float, step: int, run: Path) -> None:
    """Stop a run whose loss or weights are NaN or infinite before that reaches a checkpoint."""
    if math.isfinite(value):
        return
    good = latest_checkpoint(run / "checkpoints")
    kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint before it"
    raise DivergenceError(
        f"the loss or the weights are not finite at step {step}; {kept}. "
        "A new run with a smaller --lr may help; a resumed one keeps its own"
    )


@contextmanager
def stop_requests(*, patient: bool = False) -> Iterator[threading.Event]:
    """While open, the first SIGINT or SIGTERM sets the event; the next one raises KeyboardInterrupt at once, unless
    `patient`: a rank gets two of them for one Ctrl-C, the terminal's and torchrun's."""
    requested = threading.Event()

    def on_signal(signum: int, frame: object) -> None:
        if requested.is_set() and not patient:
            raise KeyboardInterrupt
        requested.set()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield requested
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
