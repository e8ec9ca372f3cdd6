"""How the settings of a run switch the companions on: what they change in its network and in its sampling of t."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from antdiff import StratifiedTimesteps, TimestepClusters, UniformTimesteps
from antdiff.clustering.timesteps import TimestepBatch
from antdiff.companions import (
    ChannelRouting,
    Curriculum,
    ExpertBank,
    MixtureOfPrompts,
    RestrictedTimesteps,
    SoftIntervalSampler,
    add_inception,
    patch_dit,
)
from antdiff.companions.experts import P_OWN
from antdiff.diffusion import log_snr
from antdiff.train.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from antdiff.train.config import TrainConfig
from antdiff.train.models import Denoiser, build_model, noise_schedule

BASE = "base"  # folder of a patching run that holds the network it patches

Sampler = StratifiedTimesteps | UniformTimesteps | RestrictedTimesteps


# ---- networks ----------------------------------------------------------------------------------------------------


class Experts(ExpertBank):
    """A bank of denoisers, in the place of one."""

    def save(self, folder: Path) -> None:
        """Write the weights of all experts: their encoders are no longer diffusers' own."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "experts.safetensors")

    def auxiliary_loss(self) -> float:
        return 0.0


def make_model(config: TrainConfig, shape: tuple[int, int, int], run: Path, *, seed: int) -> Denoiser | Experts:
    """The network of a run for images of `shape` (C, H, W), with weights from `seed` (a patched one: from its base).

    Raises:
        ValueError: images that the network cannot take.
        CheckpointError: a patching run without its base.
    """
    channels, size, _ = shape
    if config.experts:
        return Experts([_expert(config, channels, size, i, seed + i) for i in range(config.experts)])
    model = build_model(config.model, channels, size, generator_seed=seed)
    if config.routing:
        ChannelRouting(model.net)
    if config.patch:
        base = latest_checkpoint(run / BASE)
        if base is None:
            raise CheckpointError(f"{run}/{BASE} must hold the network that this run patches; it is not there")
        model.load_state_dict(load_checkpoint(base)["model"])
        net: Any = model.net
        tokens = (net.config.sample_size // net.config.patch_size) ** 2
        patch_dit(model, MixtureOfPrompts(len(net.transformer_blocks), tokens, net.inner_dim))
    return model


def _expert(config: TrainConfig, channels: int, size: int, expert: int, seed: int) -> Denoiser:
    model = build_model(config.model, channels, size, generator_seed=seed)
    if config.model == "unet":  # a DiT has no convolutions to share out: its experts are alike
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_inception(model.net, expert, config.experts)
    return model


def prompts_of(model: torch.nn.Module) -> MixtureOfPrompts | None:
    """The patch of a patched network."""
    return next((module for module in model.modules() if isinstance(module, MixtureOfPrompts)), None)


def parameter_groups(model: torch.nn.Module, config: TrainConfig) -> Any:
    """What the optimizer trains: everything, or of a patched network the patch, its gate at ten times the rate."""
    prompts = prompts_of(model)
    return model.parameters() if prompts is None else prompts.param_groups(config.lr)


# ---- timesteps ---------------------------------------------------------------------------------------------------


class IntervalTimesteps(UniformTimesteps):
    """Timesteps of one cluster alone, uniformly drawn: what a specialist is trained on."""

    def __init__(self, clusters: TimestepClusters, only: int) -> None:
        super().__init__(clusters)
        self.only = only

    def sample(
        self, B: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> TimestepBatch:
        """Timesteps of the cluster, with weights of 1."""
        start, stop = self.clusters.bounds[self.only : self.only + 2]
        t = torch.randint(start, stop, (B,), device=device, generator=generator)
        return TimestepBatch(t, torch.full_like(t, self.only), torch.ones(B, device=t.device))


class ExpertTurns(UniformTimesteps):
    """The experts of a bank in turn: each step draws one expert's timesteps and trains that expert alone on them."""

    def __init__(self, clusters: TimestepClusters, bank: ExpertBank) -> None:
        super().__init__(clusters)
        n = len(bank.experts)
        # The published p are for four experts; for another number they are spread over the same range of noise.
        p = [_between(P_OWN, i / (n - 1) if n > 1 else 0.0) for i in range(n)]
        self.soft = SoftIntervalSampler(n, p, clusters.T)
        self.bank = bank
        self.turn = 0

    def sample(
        self, B: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> TimestepBatch:
        """Timesteps of the expert whose turn it is, with weights of 1."""
        self.bank.only = self.turn
        t = self.soft.sample(self.turn, B, device=device, generator=generator)
        self.turn = (self.turn + 1) % len(self.bank.experts)
        return TimestepBatch(t, self.clusters.cluster_of(t), torch.ones(B, device=t.device))

    def state_dict(self) -> dict[str, int]:
        return {"turn": self.turn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.turn = int(state["turn"])


def _between(values: tuple[float, ...], u: float) -> float:
    """Linear interpolation of `values` at u in [0, 1] of their length."""
    x = u * (len(values) - 1)
    i = min(int(x), len(values) - 2)
    return values[i] + (x - i) * (values[i + 1] - values[i])


def make_timesteps(
    config: TrainConfig, clusters: TimestepClusters, model: torch.nn.Module, device: torch.device
) -> Sampler:
    """The sampler of timesteps the settings name."""
    if isinstance(model, ExpertBank):
        return ExpertTurns(clusters, model)
    if config.specialist is not None:
        return IntervalTimesteps(clusters, config.specialist)
    sampler: StratifiedTimesteps | UniformTimesteps = UniformTimesteps(clusters)
    if config.timestep_sampling != "uniform":
        sampler = StratifiedTimesteps(clusters, importance=config.timestep_sampling == "stratified-weighted")
    if not config.curriculum:
        return sampler
    x = log_snr(noise_schedule())  # [T]
    return Curriculum.from_log_snr(x, patience=config.patience, device=device).restrict(sampler)


def cluster_weights(sampler: Sampler, device: torch.device) -> Iterator[torch.Tensor]:
    """For step after step the weight [K] that a row of each cluster carries, to be taken off again in the metrics."""
    k = sampler.clusters.k
    fixed = torch.ones(k, device=device)
    if isinstance(sampler, StratifiedTimesteps) and sampler.importance:
        fixed = (sampler.clusters.sizes * (k / sampler.clusters.T)).to(fixed)
    while True:
        yield sampler.cluster_weights if isinstance(sampler, RestrictedTimesteps) else fixed
