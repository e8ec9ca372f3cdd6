"""How the settings of a run switch the companions on: what they change in its network and in its sampling of t."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
    """A bank of denoisers, in the place of one."""

    def save(self, folder: Path) -> None:
        """Write the weights of all experts: their encoders are no longer diffusers' own."""
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
    if name == "unet":  # a DiT has no convolutions whose share could vary: its experts have one architecture
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
    """The patch of a patched network."""
    return next((module for module in model.modules() if isinstance(module, MixtureOfPrompts)), None)


def parameter_groups(model: torch.nn.Module, lr: float) -> Any:
    """Return the parameters to optimize: all of them, or only those of a patch, with ten times `lr` for its gate."""
    prompts = prompts_of(model)
    return model.parameters() if prompts is None else prompts.param_groups(lr)


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


def importance_of(sampler: Sampler, device: torch.device) -> Callable[[], torch.Tensor]:
    """Return a function of the importance weight [K] that a sample of each cluster carries at the current step.

    The losses in the metrics are divided by it.
    """
    if isinstance(sampler, RestrictedTimesteps):
        return lambda: sampler.cluster_weights
    k = sampler.clusters.k
    fixed = torch.ones(k, device=device)
    if isinstance(sampler, StratifiedTimesteps) and sampler.importance:
        fixed = (sampler.clusters.sizes * (k / sampler.clusters.T)).to(fixed)
    return lambda: fixed
