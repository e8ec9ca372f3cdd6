"""The companions in a run: the networks and the samplers of timesteps that they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antdiff import StratifiedTimesteps, TimestepClusters, UniformTimesteps
from antdiff.clustering.timesteps import TimestepBatch
from antdiff.companions import (
    ExpertBank,
    MixtureOfPrompts,
    RestrictedTimesteps,
    SoftIntervalSampler,
    add_inception,
    patch_dit,
)
from antdiff.companions.experts import P_OWN
from antdiff.train.config import Model
from antdiff.train.models import Denoiser, build_model

Sampler = StratifiedTimesteps | UniformTimesteps | RestrictedTimesteps


# ---- networks ----------------------------------------------------------------------------------------------------


class Experts(ExpertBank):
    """A bank of denoisers with the interface of a :class:`Denoiser`."""

    def save(self, folder: Path) -> None:
        """Write the weights of all experts in one file, since diffusers has no format for their encoders."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "experts.safetensors")

    def auxiliary_loss(self) -> float:
        return 0.0


def make_experts(name: Model, channels: int, size: int, n: int, *, seed: int) -> Experts:
    """Build `n` experts for square images of `size` pixels, expert i with weights from `seed` + i."""
    return Experts([_expert(name, channels, size, i, n, seed + i) for i in range(n)])


def _expert(name: Model, channels: int, size: int, expert: int, n: int, seed: int) -> Denoiser:
    model = build_model(name, channels, size, generator_seed=seed)
    if name == "unet":  # a DiT has no convolutions whose share could vary, so its experts have one architecture
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_inception(model.net, expert, n)
    return model


def add_prompts(model: Denoiser) -> None:
    """Patch a DiT with a mixture of prompts."""
    net: Any = model.net
    tokens = (net.config.sample_size // net.config.patch_size) ** 2
    patch_dit(model, MixtureOfPrompts(len(net.transformer_blocks), tokens, net.inner_dim))


def prompts_of(model: torch.nn.Module) -> MixtureOfPrompts | None:
    """Return the patch of a patched network, or None."""
    return next((module for module in model.modules() if isinstance(module, MixtureOfPrompts)), None)


def parameter_groups(model: torch.nn.Module, lr: float) -> Any:
    """Return the parameters to optimize: all of them, or only those of a patch, with ten times `lr` for its gate."""
    prompts = prompts_of(model)
    return model.parameters() if prompts is None else prompts.param_groups(lr)


# ---- timesteps ---------------------------------------------------------------------------------------------------


class IntervalTimesteps(UniformTimesteps):
    """Timesteps of one cluster, drawn uniformly, for the training of a specialist."""

    def __init__(self, clusters: TimestepClusters, only: int) -> None:
        super().__init__(clusters)
        self.only = only

    def sample(
        self, B: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> TimestepBatch:
        """Draw B timesteps of the cluster, with weights of 1."""
        start, stop = self.clusters.bounds[self.only : self.only + 2]
        t = torch.randint(start, stop, (B,), device=device, generator=generator)
        return TimestepBatch(t, torch.full_like(t, self.only), torch.ones(B, device=t.device))


class ExpertTurns(UniformTimesteps):
    """Timesteps of the experts of a bank in turn. Each draw selects the one expert that is trained in this step."""

    def __init__(self, clusters: TimestepClusters, bank: ExpertBank) -> None:
        super().__init__(clusters)
        n = len(bank.experts)
        # The published p are for four experts. Other numbers of experts interpolate them over the same range of noise.
        p = np.interp(np.linspace(0, len(P_OWN) - 1, n), np.arange(len(P_OWN)), P_OWN).tolist()
        self.soft = SoftIntervalSampler(n, p, clusters.T)
        self.bank = bank
        self.turn = 0

    def sample(
        self, B: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> TimestepBatch:
        """Draw B timesteps of the expert whose turn it is, with weights of 1."""
        self.bank.only = self.turn
        t = self.soft.sample(self.turn, B, device=device, generator=generator)
        self.turn = (self.turn + 1) % len(self.bank.experts)
        return TimestepBatch(t, self.clusters.cluster_of(t), torch.ones(B, device=t.device))

    def state_dict(self) -> dict[str, int]:
        return {"turn": self.turn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.turn = int(state["turn"])


def importance_of(sampler: Sampler, device: torch.device) -> Callable[[], torch.Tensor]:
    """Return a function that gives the importance weight of each cluster's samples at the current step, [K].

    The losses of a step are divided by this weight before they are logged.
    """
    if isinstance(sampler, RestrictedTimesteps):
        return lambda: sampler.cluster_weights
    k = sampler.clusters.k
    fixed = torch.ones(k, device=device)
    if isinstance(sampler, StratifiedTimesteps) and sampler.importance:
        fixed = (sampler.clusters.sizes * (k / sampler.clusters.T)).to(fixed)
    return lambda: fixed
