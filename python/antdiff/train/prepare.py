"""The set-up of a run. It reads the settings once and returns the parts of the loop, which never sees the settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from antdiff import BalancedBackward, StratifiedTimesteps, TimestepClusters, UniformTimesteps
from antdiff._devices import choose_device
from antdiff._files import read_json
from antdiff.analysis import Telemetry
from antdiff.companions import ChannelRouting, Curriculum, ExpertBank, RestrictedTimesteps
from antdiff.companions.turns import ExpertTurns, IntervalTimesteps, Sampler, importance_of
from antdiff.data import ImageData
from antdiff.data.recorded import record
from antdiff.diffusion import log_snr
from antdiff.train.checkpoint import CheckpointError, RunState, latest_checkpoint, load_checkpoint
from antdiff.train.companions import Experts, add_prompts, make_experts, parameter_groups, prompts_of
from antdiff.train.config import TrainConfig
from antdiff.train.data import Batches
from antdiff.train.ema import MovingAverage
from antdiff.train.generators import make_generators
from antdiff.train.methods import make_balancer
from antdiff.train.models import Denoiser, build_model, noise_schedule, require_size
from antdiff.train.ranks import RunRanks

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

BASE = "base"  # folder of a patching run that holds the network it patches


@dataclass(frozen=True)
class Parts:
    """The parts of a run. B is the batch size of all ranks together, K the number of clusters."""

    ranks: RunRanks  # the processes of the run
    rows: slice  # this rank's rows of a batch
    batch_size: int  # B
    device: torch.device
    generators: dict[str, torch.Generator]
    schedule: DDPMScheduler
    batches: Batches
    model: Denoiser | Experts  # the network that is trained
    optimizer: torch.optim.Optimizer
    ema: MovingAverage
    timesteps: Sampler  # draws t, its cluster and its importance weight
    importance: Callable[[], torch.Tensor]  # the importance weight of each cluster at the current step, [K]
    curriculum: Curriculum | None  # restricts the timesteps
    backward: BalancedBackward  # takes the place of loss.backward()
    telemetry: Telemetry
    state: RunState  # everything that a checkpoint holds
    start: int  # the step of the checkpoint that the run is resumed from, or 0
    steps: int  # the last step
    log_every: int  # steps between two rows of metrics
    checkpoint_every: int
    grid_every: int  # steps between two grids of samples; 0: no grids
    sample_steps: int  # DDIM steps per sample of a grid
    shape: tuple[int, int, int]  # (C, H, W) of an image

    def sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Any]:
        """Draw a batch: images and noise [b, C, H, W], timesteps, their clusters and weights [b], and the counts [K].

        All ranks draw the same B samples, and each one takes its b rows of them. The counts are the samples per
        cluster as ``BalancedBackward`` takes them, None if they are not known beforehand.
        """
        x0, timesteps, rng = self.batches.next(self.device), self.timesteps, self.generators
        shares = timesteps.shares(self.batch_size) if isinstance(timesteps, StratifiedTimesteps) else None  # [K] ints
        batch = timesteps.sample(self.batch_size, device=self.device, generator=rng["timesteps"])  # [B] each
        noise = torch.randn((self.batch_size, *self.shape), generator=rng["noise"], device=self.device)
        t, cluster, weight = (values[self.rows] for values in batch)
        return x0, noise[self.rows], t, cluster, weight, self.ranks.counts(shares)


def prepare(config: TrainConfig, data: ImageData, run: Path) -> Parts:
    """Make the parts of a run from its settings, its data and its clusters.json, as its last checkpoint left them.

    Raises:
        ValueError: the settings do not fit the data or the number of ranks.
        CheckpointError: the last checkpoint cannot be read, or does not fit the settings.
    """
    # ---- the usual parts -----------------------------------------------------------------------------------------
    ranks = RunRanks()  # each rank takes its rows of every batch
    B, rows = config.batch_size, ranks.rows(config.batch_size)
    device = choose_device(config.device)
    rng = make_generators(config.seed, device)
    model = make_model(config, data.shape, run, seed=rng["weights"].initial_seed()).to(device)
    if (prompts := prompts_of(model)) is not None:
        prompts.generator = rng["prompts"]
    # Each of N experts is trained in every N-th step. The N-th root makes its average span as many of its own steps.
    ema = MovingAverage(model, config.ema ** (1 / max(1, config.experts)))
    optimizer = torch.optim.AdamW(parameter_groups(model, config.lr), lr=config.lr, weight_decay=0)
    batches = Batches(data.train, B, rng["data"], rows)

    # ---- the additions of antdiff: clusters of timesteps, their sampler, a balanced backward -----------------------
    clusters = TimestepClusters.load(run / "clusters.json")
    timesteps = make_timesteps(config, clusters, model, device)
    epoch = math.ceil(len(data.train) / B)
    balancer = make_balancer(config.method, clusters.k, optimizer, generator=rng["balancing"], epoch=epoch)
    # A patch's balancing loss belongs to a whole slice, not to a sample. Only split runs one slice per cluster.
    backward = BalancedBackward(
        model, balancer, clusters.k, "split" if config.patch else None, skip_unused=True,
        nonfinite="poison" if ranks.size == 1 else "raise",  # one process writes its row before it looks
    )  # fmt: skip
    telemetry = Telemetry(clusters.k, window=config.log_every, share=clusters.sizes / clusters.T, device=device)

    # ---- the state of a checkpoint -------------------------------------------------------------------------------
    saved = {"model": model, "ema": ema, "optimizer": optimizer, "batches": batches, "timesteps": timesteps,
             "balancer": balancer, "telemetry": telemetry}  # fmt: skip
    origin = {"settings": asdict(config), "clusters": read_json(run / "clusters.json"), "data": record(data)}
    state = RunState(run, origin, saved, rng, keep=config.keep_checkpoints)
    return Parts(
        ranks=ranks, rows=rows, batch_size=B, device=device, generators=rng, schedule=noise_schedule(), batches=batches,
        model=model, optimizer=optimizer, ema=ema, timesteps=timesteps, importance=importance_of(timesteps, device),
        curriculum=timesteps.curriculum if isinstance(timesteps, RestrictedTimesteps) else None, backward=backward,
        telemetry=telemetry, state=state, start=state.restore(), steps=config.steps, log_every=config.log_every,
        checkpoint_every=config.checkpoint_every, grid_every=config.grid_every, sample_steps=config.sample_steps,
        shape=data.shape,
    )  # fmt: skip


def make_model(config: TrainConfig, shape: tuple[int, int, int], run: Path, *, seed: int) -> Denoiser | Experts:
    """Build the network of a run for images of `shape` (C, H, W), with weights from `seed`.

    The weights of a patched network come from the run that it patches.

    Raises:
        ValueError: the network cannot take images of this size.
        CheckpointError: a patching run does not have its base.
    """
    channels, size, width = shape
    require_size(config.model, size, width)
    if config.experts:
        return make_experts(config.model, channels, size, config.experts, seed=seed)
    model = build_model(config.model, channels, size, generator_seed=seed)
    if config.routing:
        ChannelRouting(model.net)
    if config.patch:
        base = latest_checkpoint(run / BASE)
        if base is None:
            raise CheckpointError(
                f"{run}/{BASE} must hold the network that this run patches; it is missing. Run antdiff patch again"
            )
        model.load_state_dict(load_checkpoint(base)["model"])
        add_prompts(model)
    return model


def make_timesteps(
    config: TrainConfig, clusters: TimestepClusters, model: torch.nn.Module, device: torch.device
) -> Sampler:
    """Build the sampler of timesteps that the settings name."""
    if isinstance(model, ExpertBank):
        return ExpertTurns(clusters, model)
    if config.specialist is not None:
        return IntervalTimesteps(clusters, config.specialist)
    sampler: StratifiedTimesteps | UniformTimesteps = UniformTimesteps(clusters)
    if config.timestep_sampling != "uniform":
        # Every rank draws the timesteps of the whole batch and takes its rows in the loop.
        sampler = StratifiedTimesteps(
            clusters, importance=config.timestep_sampling == "stratified-weighted", group="local"
        )
    if not config.curriculum:
        return sampler
    x = log_snr(noise_schedule())  # [T]
    return Curriculum.from_log_snr(x, patience=config.patience, device=device).restrict(sampler)
