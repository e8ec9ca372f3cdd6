"""Networks, noise schedule and sampler, all from diffusers: here they are only sized and called."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from antdiff.train.config import Model

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, ModelMixin


class Denoiser(torch.nn.Module):
    """A diffusers network behind one call, ``model(x [B, C, H, W], t int64 [B]) -> noise estimate [B, C, H, W]``."""

    def __init__(self, net: ModelMixin, *, class_conditional: bool) -> None:
        super().__init__()
        self.net = net
        self.class_conditional = class_conditional

    def save(self, folder: Path) -> None:
        """Write the network where diffusers' ``from_pretrained`` finds it."""
        self.net.save_pretrained(folder)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.class_conditional:  # diffusers' DiT always takes labels: everything is class 0 here
            out = self.net(x, t, class_labels=torch.zeros_like(t), return_dict=False)[0]
        else:
            out = self.net(x, t, return_dict=False)[0]
        return out  # type: ignore[no-any-return]


def build_model(name: Model, channels: int, size: int, *, generator_seed: int) -> Denoiser:
    """A network sized for square images of `size` pixels, with weights drawn from `generator_seed`.

    Raises:
        ValueError: `size` cannot be halved (unet) or cut into patches (dit) as often as the network needs.
    """
    with torch.random.fork_rng(devices=[]):  # initialisers know only the global generator
        torch.manual_seed(generator_seed)
        return _unet(channels, size) if name == "unet" else _dit(channels, size)


def _unet(channels: int, size: int) -> Denoiser:
    from diffusers import UNet2DModel

    # 8x8 digits: two levels, 634,273 parameters. Larger images get a level (a halving) more, and wider ones.
    widths = (32, 64) if size <= 16 else (32, 64, 128) if size <= 32 else (64, 128, 128, 256)
    halvings = len(widths) - 1
    if size % 2**halvings:
        raise ValueError(f"image_size must be a multiple of {2**halvings} for the UNet of this size; got {size}")
    net = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        norm_num_groups=8,
        # At 8x8 the receptive field already covers the image; attention at the bottom pays from 28x28 on.
        add_attention=size > 16,
        attention_head_dim=32,
    )
    return Denoiser(net, class_conditional=False)


def _dit(channels: int, size: int) -> Denoiser:
    from diffusers import DiTTransformer2DModel

    patch = 2 if size <= 32 else 4
    if size % patch:
        raise ValueError(f"image_size must be a multiple of the DiT's patch size {patch}; got {size}")
    net = DiTTransformer2DModel(
        sample_size=size,
        patch_size=patch,
        in_channels=channels,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=16 if size <= 16 else 32,
        num_embeds_ada_norm=1,
    )
    for block in net.transformer_blocks:
        # diffusers drops a tenth of the labels, drawn from the global generator: with one class that is only noise,
        # and it would make a resumed run differ.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return Denoiser(net, class_conditional=True)


def noise_schedule() -> DDPMScheduler:
    """The cosine schedule (Nichol and Dhariwal, 2021) over T = 1000 timesteps, predicting the noise."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")


@torch.no_grad()
def draw_samples(
    model: torch.nn.Module,
    schedule: DDPMScheduler,
    n: int,
    shape: tuple[int, int, int],
    *,
    steps: int,
    generator: torch.Generator,
    batch_size: int = 500,
) -> torch.Tensor:
    """`n` images in [-1, 1], float32 [n, C, H, W], by DDIM (eta 0) with `steps` evaluations of `model` each.

    The starting noise comes from `generator`, on whose device everything runs.
    """
    from diffusers import DDIMScheduler

    ddim = DDIMScheduler.from_config(schedule.config)
    ddim.set_timesteps(steps)
    model.eval()
    batches = []
    for start in range(0, n, batch_size):
        b = min(batch_size, n - start)
        x = torch.randn(b, *shape, generator=generator, device=generator.device)
        for t in ddim.timesteps.tolist():
            noise = model(x, torch.full((b,), t, device=x.device))
            x = ddim.step(noise, t, x).prev_sample
        batches.append(x.clamp(-1, 1))
    return torch.cat(batches)


def count_parameters(model: torch.nn.Module) -> int:
    """P: the number of trainable parameters."""
    return sum(math.prod(p.shape) for p in model.parameters() if p.requires_grad)
