"""Networks, noise schedule and sampler. All come from diffusers; this file chooses their sizes and calls them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from antdiff.train.config import Model, T

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, ModelMixin


class Denoiser(torch.nn.Module):
    """A diffusers network behind one call, ``model(x [B, C, H, W], t int64 [B]) -> noise estimate [B, C, H, W]``."""

    def __init__(self, net: ModelMixin, *, class_conditional: bool) -> None:
        super().__init__()
        self.net = net
        self.class_conditional = class_conditional

    def save(self, folder: Path) -> None:
        """Write the network in the format of diffusers' ``from_pretrained``; of a patched network, only the patch."""
        prompts = getattr(self.net, "mixture_of_prompts", None)
        if prompts is None:
            self.net.save_pretrained(folder)
            return
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(prompts.state_dict(), folder / "patch.safetensors")

    def auxiliary_loss(self) -> torch.Tensor | float:
        """Return the term that a patch adds to the loss of the latest forward; 0 without a patch."""
        prompts = getattr(self.net, "mixture_of_prompts", None)
        return 0.0 if prompts is None else prompts.balancing_loss()  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.class_conditional:  # diffusers' DiT requires labels, so every image has class 0
            out = self.net(x, t, class_labels=torch.zeros_like(t), return_dict=False)[0]
        else:
            out = self.net(x, t, return_dict=False)[0]
        return out  # type: ignore[no-any-return]


def build_model(name: Model, channels: int, size: int, *, generator_seed: int) -> Denoiser:
    """Build a network for square images of `size` pixels, with weights drawn from `generator_seed`.

    Raises:
        ValueError: `size` cannot be halved as often as the UNet needs, or is not a multiple of the DiT's patch size.
    """
    require_size(name, size)
    with torch.random.fork_rng(devices=[]):  # initialisers draw from the global generator
        torch.manual_seed(generator_seed)
        return _unet(channels, size) if name == "unet" else _dit(channels, size)


def require_size(name: Model, size: int, width: int | None = None) -> None:
    """Raise ValueError if images of `size` pixels do not fit the network; see :func:`build_model`.

    Images of another `width` are not square.
    """
    if width not in (None, size):
        raise ValueError(
            f"images must be square, since the networks are built for squares; got {size}x{width} pixels. Pass a "
            "folder of image files, which are cropped to squares"
        )
    if name == "unet":
        divisor, reason = 2 ** (len(_unet_widths(size)) - 1), "for the UNet of this size"
    else:
        divisor, reason = _dit_patch(size), "the patch size of the DiT"
    if size % divisor:
        raise ValueError(f"image_size must be a multiple of {divisor}, {reason}; got {size}")


def _unet_widths(size: int) -> tuple[int, ...]:
    # 8x8 digits: two levels, 634,273 parameters. Larger images get more levels (halvings) and more channels.
    return (32, 64) if size <= 16 else (32, 64, 128) if size <= 32 else (64, 128, 128, 256)


def _dit_patch(size: int) -> int:
    return 2 if size <= 32 else 4


def _unet(channels: int, size: int) -> Denoiser:
    from diffusers import UNet2DModel

    widths = _unet_widths(size)
    net = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        norm_num_groups=8,
        # At 8x8 the receptive field already covers the image. From 28x28 on, attention at the lowest level is worth it.
        add_attention=size > 16,
        attention_head_dim=32,
    )
    return Denoiser(net, class_conditional=False)


def _dit(channels: int, size: int) -> Denoiser:
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        sample_size=size,
        patch_size=_dit_patch(size),
        in_channels=channels,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=16 if size <= 16 else 32,
        num_embeds_ada_norm=1,
    )
    for block in net.transformer_blocks:
        # diffusers drops a tenth of the labels, drawn from the global generator. With one class this only adds noise,
        # and a resumed run would differ from the uninterrupted one.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return Denoiser(net, class_conditional=True)


def noise_schedule() -> DDPMScheduler:
    """Return the cosine schedule (Nichol and Dhariwal, 2021) over T = 1000 timesteps, with noise prediction."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")


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
    """Draw `n` images in [-1, 1], float32 [n, C, H, W], by DDIM (eta 0) with `steps` evaluations of `model` per image.

    The starting noise is drawn from `generator`, and everything runs on its device. `model` is left in eval mode.
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
