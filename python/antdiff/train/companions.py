"""The companions in a run: the networks that they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from antdiff.companions import ExpertBank, MixtureOfPrompts, add_inception, patch_dit
from antdiff.train.config import Model
from antdiff.train.models import Denoiser, build_model


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
