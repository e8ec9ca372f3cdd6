"""Denoising task routing: each timestep reads its own window of channels in every residual block.

Source: Park, Woo, Go, Kim, Kim, "Denoising Task Routing for Diffusion Models", ICLR 2024 (arXiv 2310.07138), section 4.

    z <- z + Block(m_t * z),    m_t[c] = 1  iff  start(t) <= c < start(t) + n
    n = floor(beta C),          start(t) = round((C - n) (t / (T-1))^alpha),   round half to even

Little noise reads the first n channels, much noise the last n; alpha > 1 leaves more of the shift to large t. The skip
path is not masked, no parameter is added. The window is exactly n wide, as in the released code; the printed formula
takes its upper end from t and its lower end from t - 1, and is now and then one channel wider or shifted.

The published gain is on DiT-S, B and L; the same recipe made DiT-XL worse (FID 9.40 -> 10.85, reported in the
Switch-DiT paper). A network is trained with its routing from the start: an unrouted checkpoint does not become a
routed one.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from antdiff._checks import as_choice, as_count

ALPHA = 4.0
BETA = 0.8
NAME = "channel_routing"  # of the routing among the attributes of the module whose forward takes the timestep
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma", "noise_labels")


def start_table(channels: int, T: int = 1000, alpha: float = ALPHA, beta: float = BETA) -> tuple[Tensor, int]:
    """First channel of each timestep's window, int64 [T], and the window's width n.

    Raises:
        ValueError: ``beta`` outside (0, 1], so small that no channel is left, ``alpha`` not positive, or T < 2.
    """
    width = _width(channels, alpha, beta)
    T = as_count("T", T, 2)
    start = np.rint(np.linspace(0, 1, T) ** alpha * (channels - width))  # rint rounds half to even
    return torch.from_numpy(start.astype(np.int64)), width


def route(block: Callable[..., Tensor], x: Tensor, mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x + (block(m x) - m x): any residual block, given as a function that includes its skip path, routed by hand.

    ``mask`` broadcasts against ``x``: :meth:`ChannelRouting.mask` [B, C] becomes [B, 1, C] or [B, C, 1, 1].
    """
    h = x * mask
    return block(h, *args, **kwargs) + (x - h)


class ChannelRouting:
    """Routes the residual blocks of ``model`` in place. The model is then called and sampled from as before.

    Example::

        routing = ChannelRouting(model)            # diffusers' DiTTransformer2DModel or UNet2DModel
        model(x, t)                                # every block reads t's window of channels
        routing.remove()

    A DiT block is masked once, at its input (attention and MLP together). In a UNet every residual block is masked on
    its residual branch, before the first normalisation, over the channels it is given: in the decoder those after the
    skip connection's concatenation; where the block changes the number of channels its skip convolution reads all of
    them. A self-attention layer is a residual block of its own. The paper describes neither of the last three.

    The window follows the timestep the model is called with. Samplers that skip steps have to pass the *original*
    index, as diffusers' do. Copies of the model (an EMA, for one) are routed too; the state dict is as before. A
    recomputation for activation checkpointing takes the timesteps of the latest forward: run each backward before the
    next forward, as ordinary steps do.

    Args:
        model: holds the blocks. Its ``forward`` (or that of the submodule diffusers' blocks are in) takes the timestep
            as an argument named ``timestep``, ``timesteps``, ``t``, ``sigma`` or ``noise_labels``: int [B], one number
            for all, or, with ``rank``, floats.
        T: number of timesteps.
        alpha, beta: shape of the shift, and share of the channels that are read.
        mode: ``"window"``, or ``"random"``: for each timestep n channels chosen once, the paper's baseline R-TR. Which
            blocks share a choice is not published; here those of equal width do, as they share the window.
        rank: for continuous time: maps the model's timestep argument [B] to the rank u of its noise level, float [B] in
            [0, 1], in place of t / (T-1). For flow matching u is the share of noise; for EDM's noise levels see
            :func:`edm_rank`. With ``"random"`` u is rounded to T levels.
        blocks: for other networks: pairs (module, width) of residual blocks that take x first and include their skip
            path.
        channel_dim: of x in ``blocks``.
        generator: of the random choice (on the CPU); without one, torch's global generator.

    Raises:
        ValueError: no recognisable blocks, a model that is already routed, or ``alpha``, ``beta``, T or ``mode`` out of
            range. Calling the model raises one for t outside [0, T): on the CPU always, on CUDA, where looking would
            cost a synchronisation, with ``ANTDIFF_CHECK=1``; without it the outputs of that sample are NaN.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        T: int = 1000,
        alpha: float = ALPHA,
        beta: float = BETA,
        mode: Literal["window", "random"] = "window",
        rank: Callable[[Tensor], Tensor] | None = None,
        blocks: Sequence[tuple[nn.Module, int]] | None = None,
        channel_dim: int = -1,
        generator: torch.Generator | None = None,
    ) -> None:
        as_choice("mode", mode, ("window", "random"))
        owner, points = (model, [_Point(m, c, channel_dim) for m, c in blocks]) if blocks else find_blocks(model)
        if hasattr(owner, NAME):
            raise ValueError(f"model must not be routed already; got one that is. Call model.{NAME}.remove() first.")
        self.alpha = alpha
        self.T = T
        self.rank = rank
        self.points = points
        self._argument = _timestep_argument(owner)
        widths = sorted({point.channels for point in points})
        self._starts: dict[int, Tensor] = {}  # [T] by number of channels
        self._sizes: dict[int, int] = {}
        self._choices: dict[int, Tensor] = {}  # bool [T, C], random mode
        for channels in widths:
            self._starts[channels], n = start_table(channels, T, alpha, beta)
            self._sizes[channels] = n
            if mode == "random":
                order = torch.rand(T, channels, generator=generator).argsort(1)  # [T, C]
                self._choices[channels] = order < n
        self._masks: dict[int, Tensor] = {}  # [B or 1, C] of the latest forward
        # Bound methods, so that a deep copy of the model gets hooks that belong to the copy.
        self._owner = owner
        setattr(owner, NAME, self)
        self._handles = [owner.register_forward_pre_hook(self._take_timestep, with_kwargs=True)]
        for point in points:
            self._handles += _RoutedBlock(self, point).attach()

    def mask(self, t: Tensor | float, channels: int) -> Tensor:
        """Which of ``channels`` each timestep reads: bool [B, C], rows of the window (or random) table.

        Args:
            t: what the model is called with: int [B] or one int in [0, T); with ``rank``, any float [B].
            channels: C, the width of one of the routed blocks.
        """
        if channels not in self._starts:
            raise ValueError(
                f"channels must be the width of a routed block, one of {sorted(self._starts)}; got {channels}."
            )
        index, bad = self._index(t)
        mask = self._mask(index, channels)
        return mask if bad is None else mask.float().masked_fill(bad[:, None], torch.nan)

    def remove(self) -> None:
        """Take the routing off the model again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if getattr(self._owner, NAME, None) is self:
            delattr(self._owner, NAME)

    def _take_timestep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, position = self._argument
        t = kwargs[name] if name in kwargs else args[position] if position < len(args) else None
        if t is None:
            raise ValueError(f"{name} must be given to the model: the routing follows it.")
        device = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 0), None)
        index, bad = self._index(t, device)
        for channels in self._starts:
            mask = self._mask(index, channels)
            # Never a wrong window in silence: without a synchronisation NaN is the only way to say so.
            self._masks[channels] = mask if bad is None else mask.float().masked_fill(bad[:, None], torch.nan)

    def _index(self, t: Tensor | float, device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
        """Rows of the tables int64 [B], or ranks float64 [B] for a window in continuous time; and which are bad."""
        t = torch.as_tensor(t, device=device).reshape(-1)  # [B] or [1]
        if self.rank is not None:
            u = self.rank(t).double()
            bad = ~((u >= 0) & (u <= 1))
            what, index = "rank(timestep) must be in [0, 1]", u.clamp(0, 1).nan_to_num(0)
            if self._choices:
                index = (index * (self.T - 1)).round().long()
        else:
            bad = (t < 0) | (t >= self.T)
            if t.is_floating_point():  # some samplers pass whole numbers as floats
                bad |= t != t.round()
            what = f"t must be a whole number with 0 <= t < T={self.T} (for continuous time give rank=)"
            index = (
                t.clamp(0, self.T - 1).nan_to_num(0).long() if t.is_floating_point() else t.clamp(0, self.T - 1).long()
            )
        if torch.compiler.is_compiling() or (t.device.type != "cpu" and os.environ.get("ANTDIFF_CHECK") != "1"):
            return index, bad
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(f"{what}; got {t[row].item():g} at row {row}.")
        return index, None

    def _mask(self, index: Tensor, channels: int) -> Tensor:
        if self._choices:
            self._choices[channels] = self._choices[channels].to(index.device)
            choice: Tensor = self._choices[channels][index]
            return choice
        if index.is_floating_point():
            start = (index**self.alpha * (channels - self._sizes[channels])).round()
        else:
            self._starts[channels] = self._starts[channels].to(index.device)  # copied once
            start = self._starts[channels][index]
        c = torch.arange(channels, device=index.device)
        mask: Tensor = (c >= start[:, None]) & (c < start[:, None] + self._sizes[channels])
        return mask


def edm_rank(p_mean: float = -1.2, p_std: float = 1.2) -> Callable[[Tensor], Tensor]:
    """The rank of EDM's noise level sigma in its training distribution: u = Phi((ln sigma - p_mean) / p_std).

    For networks that are called with c_noise = ln(sigma) / 4, compose: ``lambda c: edm_rank()(torch.exp(4 * c))``.
    """

    def rank(sigma: Tensor) -> Tensor:
        u: Tensor = torch.special.ndtr((sigma.double().log() - p_mean) / p_std)
        return u

    return rank


# ---- where the masks go ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """Where one residual block is masked: ``whole`` blocks hold their skip path, the others are its residual branch."""

    module: nn.Module
    channels: int
    channel_dim: int
    whole: bool = True


class _RoutedBlock:
    """The hooks of one block. ``_skipped`` is what passed it by, kept from its input to its output."""

    def __init__(self, routing: ChannelRouting, point: _Point) -> None:
        self.routing = routing
        self.point = point
        self._skipped: Tensor | None = None

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        if not self.point.whole:
            return [self.point.module.register_forward_pre_hook(self._mask_branch)]
        return [
            self.point.module.register_forward_pre_hook(self._mask_input, with_kwargs=True),
            self.point.module.register_forward_hook(self._add_skipped),
        ]

    def _mask_branch(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * self._mask(args[0]), *args[1:])

    def _mask_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not args:
            raise ValueError("a routed block must be given x as its first positional argument; got only keywords.")
        h = args[0] * self._mask(args[0])
        self._skipped = args[0] - h
        return (h, *args[1:]), kwargs

    def _add_skipped(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        skipped, self._skipped = self._skipped, None
        assert skipped is not None  # _mask_input has just run
        return output + skipped

    def _mask(self, x: Tensor) -> Tensor:
        point = self.point
        mask = self.routing._masks.get(point.channels)
        if mask is None or x.shape[point.channel_dim] != point.channels or mask.shape[0] not in (1, len(x)):
            came = f"x {list(x.shape)}" + ("" if mask is None else f" and {mask.shape[0]} timesteps")
            raise ValueError(
                f"a routed block must run inside its model, on x with {point.channels} channels in dimension "
                f"{point.channel_dim} and one timestep a sample; got {came}."
            )
        shape = [1] * x.dim()
        shape[0], shape[point.channel_dim] = mask.shape
        return mask.view(shape) if mask.dtype == torch.bool else mask.view(shape).to(x.dtype)


def find_blocks(model: nn.Module) -> tuple[nn.Module, list[_Point]]:
    """The diffusers network in ``model`` (itself, or one submodule) and its residual blocks.

    Raises:
        ValueError: no DiTTransformer2DModel or UNet2DModel in it, or more than one.
    """
    found = [module for module in model.modules() if type(module).__name__ in ("DiTTransformer2DModel", "UNet2DModel")]
    if len(found) != 1:
        raise ValueError(
            f"model must hold one DiTTransformer2DModel or UNet2DModel of diffusers; {type(model).__name__} holds "
            f"{len(found)}. For another network name its residual blocks: blocks=[(module, width), ...]."
        )
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    points = []
    for module in found[0].modules():
        if isinstance(module, BasicTransformerBlock):
            points.append(_Point(module, module.dim, channel_dim=-1))
        elif isinstance(module, ResnetBlock2D):  # its first normalisation begins the residual branch
            points.append(_Point(module.norm1, module.norm1.num_channels, channel_dim=1, whole=False))
        elif isinstance(module, Attention) and module.residual_connection and module.group_norm is not None:
            points.append(_Point(module.group_norm, module.group_norm.num_channels, channel_dim=1, whole=False))
    return found[0], points


def _timestep_argument(module: nn.Module) -> tuple[str, int]:
    """Name and position of the timestep among the arguments of ``module.forward``."""
    names = list(inspect.signature(module.forward).parameters)
    for name in TIMESTEP_NAMES:
        if name in names:
            return name, names.index(name)
    raise ValueError(
        f"{type(module).__name__}.forward must take the timestep as one of {', '.join(TIMESTEP_NAMES)}; it takes "
        f"{', '.join(names)}. Route the submodule that does, or rename the argument."
    )


def _width(channels: int, alpha: float, beta: float) -> int:
    if not (0 < beta <= 1 and int(beta * channels) >= 1):
        raise ValueError(f"beta must be in (0, 1] and keep at least one of {channels} channels; got {beta}.")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be positive and finite; got {alpha}.")
    return int(beta * channels)
