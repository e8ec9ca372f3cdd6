"""Denoising task routing: in every residual block, each timestep reads its own window of channels.

Source: Park, Woo, Go, Kim, Kim, "Denoising Task Routing for Diffusion Models", ICLR 2024 (arXiv 2310.07138), section 4.

    z <- z + Block(m_t * z),    m_t[c] = 1  iff  start(t) <= c < start(t) + n
    n = floor(beta C),          start(t) = round((C - n) (t / (T-1))^alpha),   round half to even

Timesteps with little noise read the first n channels, those with much noise the last n. alpha > 1 moves more of the
shift to large t. The skip path is not masked, and no parameter is added. The window is exactly n wide, as in the
released code. The printed formula takes its upper end from t and its lower end from t - 1, so that some windows are
shifted or wider by one channel.

The published gain is on DiT-S, B and L. The same settings made DiT-XL worse (FID 9.40 -> 10.85, reported in the
Switch-DiT paper). A network must be trained with its routing from the start: routing an unrouted checkpoint does not
work.
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

from antdiff._checks import (
    MOST_TIMESTEPS,
    as_choice,
    as_count,
    as_function,
    as_module,
    as_number,
    as_tensor,
    check_draws,
    describe,
)

ALPHA = 4.0
BETA = 0.8
NAME = "channel_routing"  # attribute for the routing, on the module whose forward takes the timestep
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma", "noise_labels")


def start_table(channels: int, T: int = 1000, alpha: float = ALPHA, beta: float = BETA) -> tuple[Tensor, int]:
    """Return the first channel of each timestep's window, int64 [T], and the width n of the windows.

    Raises:
        ValueError: ``beta`` lies outside (0, 1] or leaves no channel, ``alpha`` is not positive, or T < 2.
    """
    T = as_count("T", T, 2, MOST_TIMESTEPS)
    width = _width(channels, alpha, beta)
    start = np.rint(np.linspace(0, 1, T) ** alpha * (channels - width))  # rint rounds half to even
    return torch.from_numpy(start.astype(np.int64)), width


def route(block: Callable[..., Tensor], x: Tensor, mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Route one residual block by hand: return x + (block(m x) - m x).

    Args:
        block: function of x that includes the skip path of the residual block.
        x: input of the block.
        mask: m, which must broadcast against x. Reshape :meth:`ChannelRouting.mask` from [B, C] to [B, 1, C] or
            [B, C, 1, 1].
        args, kwargs: further arguments of ``block``.
    """
    as_function("block", block)
    as_tensor("x", x)
    as_tensor("mask", mask, kind="real")
    if x.device != mask.device or not _broadcasts(mask.shape, x.shape):
        raise ValueError(
            f"mask must broadcast to the shape of x, {list(x.shape)}, on its device; got {list(mask.shape)} on "
            f"{mask.device}. Reshape it to [B, 1, C] or [B, C, 1, 1]."
        )
    h = x * mask
    return block(h, *args, **kwargs) + (x - h)


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    return len(shape) <= len(target) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False)
    )


class ChannelRouting:
    """Routing of the residual blocks of ``model``, in place. The model is then called and sampled from as before.

    Example::

        routing = ChannelRouting(model)            # diffusers' DiTTransformer2DModel or UNet2DModel
        model(x, t)                                # every block reads the channels of t's window
        routing.remove()

    A DiT block is masked once, at its input, for attention and MLP together. In a UNet, every residual block is masked
    on its residual branch, before the first normalisation, over the channels of its input. The paper does not describe
    the following three cases. A block of the decoder is masked after the concatenation of the skip connection. If a
    block changes the number of channels, its skip convolution reads all of them. A self-attention layer counts as a
    residual block.

    The window follows the timestep that the model is called with. Samplers that skip steps must pass the *original*
    index, as diffusers' samplers do. Copies of the model, such as an EMA, are routed too. The state dict does not
    change. Recomputation for activation checkpointing uses the timesteps of the latest forward pass, so run each
    backward pass before the next forward pass.

    Args:
        model: the network. Its ``forward``, or that of the submodule that contains diffusers' blocks, takes the
            timestep as an argument named ``timestep``, ``timesteps``, ``t``, ``sigma`` or ``noise_labels``: int [B], or
            one number for all samples. With ``rank`` these can be floats.
        T: number of timesteps.
        alpha: exponent of the shift.
        beta: share of the channels that each timestep reads.
        mode: ``"window"``, or ``"random"`` for the paper's baseline R-TR, which chooses n channels per timestep once.
            Every block has its own choice, as in the released code.
        rank: function for continuous time. It maps the model's timestep argument [B] to the rank u of its noise level,
            float [B] in [0, 1], which replaces t / (T-1). For flow matching, u is the share of noise; for EDM's noise
            levels see :func:`edm_rank`. With ``"random"``, u is rounded to T levels.
        blocks: residual blocks of networks that are not diffusers', as pairs (module, width). A block takes x as its
            first argument and includes its skip path.
        channel_dim: dimension of the channels of x in ``blocks``.
        generator: generator of the random choice, on the CPU. None: torch's global generator.

    Raises:
        ValueError: ``model`` has no known blocks or is routed already, or ``alpha``, ``beta``, T or ``mode`` is out of
            range. Calling the model with t outside [0, T) raises a ValueError on the CPU. On CUDA this check would cost
            a host-device sync and runs only with ``ANTDIFF_CHECK=1``; without it, the outputs of that sample are NaN.
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
        as_module("model", model)
        T = as_count("T", T, 2, MOST_TIMESTEPS)
        if rank is not None:
            as_function("rank", rank)
        channel_dim = as_count("channel_dim", channel_dim, -8, 8)
        check_draws(generator, torch.device("cpu"))
        owner, points = (model, _given_blocks(blocks, channel_dim)) if blocks is not None else find_blocks(model)
        if hasattr(owner, NAME):
            path = next((name for name, module in model.named_modules() if module is owner and name), "")
            place = f"model.get_submodule({path!r})" if path else "model"
            raise ValueError(f"model must not be routed already; got one that is. Call {place}.{NAME}.remove() first.")
        self.alpha = alpha
        self.T = T
        self.rank = rank
        self.points = points
        self._argument = _timestep_argument(owner)
        widths = sorted({point.channels for point in points})
        self._starts: dict[int, Tensor] = {}  # number of channels to int64 [T]
        self._sizes: dict[int, int] = {}
        for channels in widths:
            self._starts[channels], self._sizes[channels] = start_table(channels, T, alpha, beta)
        # bool [T, C] per block and number of its channels, in random mode
        self._choices: dict[tuple[int, int], Tensor] = {}
        if mode == "random":
            for i, point in enumerate(points):
                order = torch.rand(T, point.channels, generator=generator).argsort(1)  # [T, C]
                self._choices[i, point.channels] = order < self._sizes[point.channels]
        # The masks [B or 1, C] of the latest forward pass. Blocks of equal width share a window, but not a choice.
        self._masks: dict[tuple[int, int], Tensor] = {}
        # Hooks are bound methods, so that a deep copy of the model gets hooks that belong to the copy.
        self._owner = owner
        setattr(owner, NAME, self)
        self._handles = [owner.register_forward_pre_hook(self._take_timestep, with_kwargs=True)]
        for i, point in enumerate(points):
            self._handles += _RoutedBlock(self, point, self._key(i, point.channels)).attach()

    def mask(self, t: Tensor | float, channels: int, block: int = 0) -> Tensor:
        """Return the channels that each timestep reads: bool [B, C].

        Args:
            t: timestep argument of the model: int [B] or one int in [0, T). With ``rank``, any float [B].
            channels: C, the width of one of the routed blocks.
            block: index among the blocks of this width, in the order in which they were found or given. Blocks of
                equal width differ only in random mode.
        """
        channels, block = as_count("channels", channels), as_count("block", block, -(2**63))
        if channels not in self._starts:
            raise ValueError(
                f"channels must be the width of a routed block, one of {sorted(self._starts)}; got {channels}."
            )
        same = [i for i, point in enumerate(self.points) if point.channels == channels]
        if not 0 <= block < len(same):
            raise ValueError(
                f"block must be in [0, {len(same)}), as {len(same)} routed blocks have width {channels}; got {block}. "
                "Count the blocks of each width from 0."
            )
        index, bad = self._index(t)
        mask = self._mask(index, self._key(same[block], channels))
        return mask if bad is None else mask.float().masked_fill(bad[:, None], torch.nan)

    def remove(self) -> None:
        """Remove the routing from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if getattr(self._owner, NAME, None) is self:
            delattr(self._owner, NAME)

    def _take_timestep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, position = self._argument
        t = kwargs[name] if name in kwargs else args[position] if position < len(args) else None
        if t is None:
            raise ValueError(f"{name} must be a timestep, which the routing follows; got None. Pass it to the model.")
        device = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 0), None)
        index, bad = self._index(t, device)
        for key in self._choices or [self._key(0, channels) for channels in self._starts]:
            mask = self._mask(index, key)
            # A bad timestep must not read a wrong window silently. Without a sync, only NaN can report it.
            self._masks[key] = mask if bad is None else mask.float().masked_fill(bad[:, None], torch.nan)

    def _index(self, t: Tensor | float, device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
        """Return rows of the tables, int64 [B], or float64 ranks for continuous windows; and which of them are invalid.

        The second value is None if the check has run here.
        """
        if isinstance(t, np.ndarray) and t.dtype.kind not in "iuf":
            raise TypeError(f"t must be timesteps, integers or floats; got an array of {t.dtype}.")
        if not isinstance(t, (Tensor, np.ndarray)):
            t = as_number("t", t) if isinstance(t, (float, np.floating)) else as_count("t", t, -(2**63))
        t = torch.as_tensor(t, device=device)
        as_tensor("t", t, kind="real")
        t = t.reshape(-1)  # [B] or [1]
        if self.rank is not None:
            u = self.rank(t)
            as_tensor("rank(timestep)", u, dims=1, shape="[B]", kind="real")
            u = u.double()
            bad = ~((u >= 0) & (u <= 1))
            rule, index = "rank(timestep) must be in [0, 1]", u.clamp(0, 1).nan_to_num(0)
            if self._choices:
                index = (index * (self.T - 1)).round().long()
        else:
            bad = (t < 0) | (t >= self.T)
            if t.is_floating_point():  # some samplers pass whole numbers as floats
                bad |= t != t.round()
            rule = f"t must be a whole number with 0 <= t < T={self.T} (for continuous time, pass rank=)"
            index = (
                t.clamp(0, self.T - 1).nan_to_num(0).long() if t.is_floating_point() else t.clamp(0, self.T - 1).long()
            )
        if torch.compiler.is_compiling() or (t.device.type != "cpu" and os.environ.get("ANTDIFF_CHECK") != "1"):
            return index, bad
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(f"{rule}; got {t[row].item():g} at row {row}.")
        return index, None

    def _key(self, i: int, channels: int) -> tuple[int, int]:
        """Return the key of the mask of block i."""
        return (i if self._choices else -1, channels)

    def _mask(self, index: Tensor, key: tuple[int, int]) -> Tensor:
        channels = key[1]
        if self._choices:
            self._choices[key] = self._choices[key].to(index.device)  # a copy only on the first call
            choice: Tensor = self._choices[key][index]
            return choice
        if index.is_floating_point():
            start = (index**self.alpha * (channels - self._sizes[channels])).round()
        else:
            self._starts[channels] = self._starts[channels].to(index.device)  # a copy only on the first call
            start = self._starts[channels][index]
        c = torch.arange(channels, device=index.device)
        mask: Tensor = (c >= start[:, None]) & (c < start[:, None] + self._sizes[channels])
        return mask


def edm_rank(p_mean: float = -1.2, p_std: float = 1.2) -> Callable[[Tensor], Tensor]:
    """Return the function that ranks EDM noise levels in their training distribution.

    The rank of sigma is u = Phi((ln sigma - p_mean) / p_std). If a network is called with c_noise = ln(sigma) / 4, pass
    ``lambda c: edm_rank()(torch.exp(4 * c))``.
    """

    p_mean, p_std = as_number("p_mean", p_mean), as_number("p_std", p_std, above=0)

    def rank(sigma: Tensor) -> Tensor:
        u: Tensor = torch.special.ndtr((sigma.double().log() - p_mean) / p_std)
        return u

    return rank


# ---- where the masks go ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """Place of a mask: a residual block with its skip path (``whole``), or the first module of a residual branch."""

    module: nn.Module
    channels: int
    channel_dim: int
    whole: bool = True


class _RoutedBlock:
    """Hooks of one block. ``_skipped`` is the masked-out part of its input, kept until it is added to the output."""

    def __init__(self, routing: ChannelRouting, point: _Point, key: tuple[int, int]) -> None:
        self.routing = routing
        self.point = point
        self.key = key  # key of the mask in ChannelRouting._masks
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
            raise ValueError(
                "x must be the first positional argument of a routed block; got only keyword arguments. Call the block "
                "as block(x, ...)."
            )
        h = args[0] * self._mask(args[0])
        self._skipped = args[0] - h
        return (h, *args[1:]), kwargs

    def _add_skipped(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        skipped, self._skipped = self._skipped, None
        assert skipped is not None  # _mask_input has set it
        return output + skipped

    def _mask(self, x: Tensor) -> Tensor:
        point = self.point
        mask = self.routing._masks.get(self.key)
        if mask is None or x.shape[point.channel_dim] != point.channels or mask.shape[0] not in (1, len(x)):
            received = f"x {list(x.shape)}" + ("" if mask is None else f" and {mask.shape[0]} timesteps")
            raise ValueError(
                f"x must be the input of a routed block inside its model, with {point.channels} channels in dimension "
                f"{point.channel_dim} and one timestep per sample; got {received}. Check the widths and channel_dim "
                "passed to ChannelRouting."
            )
        shape = [1] * x.dim()
        shape[0], shape[point.channel_dim] = mask.shape
        return mask.view(shape) if mask.dtype == torch.bool else mask.view(shape).to(x.dtype)


def find_blocks(model: nn.Module) -> tuple[nn.Module, list[_Point]]:
    """Return the diffusers network in ``model`` (itself, or one submodule) and the places of its masks.

    Raises:
        ValueError: ``model`` contains no DiTTransformer2DModel or UNet2DModel, or more than one.
    """
    found = [module for module in model.modules() if type(module).__name__ in ("DiTTransformer2DModel", "UNet2DModel")]
    if len(found) != 1:
        raise ValueError(
            f"model must hold one DiTTransformer2DModel or UNet2DModel of diffusers; {type(model).__name__} holds "
            f"{len(found)}. For another network, pass its residual blocks: blocks=[(module, width), ...]."
        )
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    points = []
    for module in found[0].modules():
        if isinstance(module, BasicTransformerBlock):
            points.append(_Point(module, module.dim, channel_dim=-1))
        elif isinstance(module, ResnetBlock2D):  # the residual branch begins with the first normalisation
            points.append(_Point(module.norm1, module.norm1.num_channels, channel_dim=1, whole=False))
        elif isinstance(module, Attention) and module.residual_connection and module.group_norm is not None:
            points.append(_Point(module.group_norm, module.group_norm.num_channels, channel_dim=1, whole=False))
    return found[0], points


def _timestep_argument(module: nn.Module) -> tuple[str, int]:
    """Return the name and position of the timestep among the arguments of ``module.forward``."""
    names = list(inspect.signature(module.forward).parameters)
    for name in TIMESTEP_NAMES:
        if name in names:
            return name, names.index(name)
    raise ValueError(
        f"{type(module).__name__}.forward must take the timestep as one of {', '.join(TIMESTEP_NAMES)}; it takes "
        f"{', '.join(names)}. Pass the submodule that takes the timestep as model, or rename the argument."
    )


def _given_blocks(blocks: object, channel_dim: int) -> list[_Point]:
    pairs = blocks if isinstance(blocks, (list, tuple)) else []
    if not pairs or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise TypeError(f"blocks must be a list of pairs (module, width); got {describe(blocks)}.")
    return [
        _Point(as_module("every module of blocks", module), as_count("every width of blocks", width), channel_dim)
        for module, width in pairs
    ]


def _width(channels: int, alpha: float, beta: float) -> int:
    channels = as_count("channels", channels, most=2**20)
    alpha, beta = as_number("alpha", alpha, remedy="The paper uses 4."), as_number("beta", beta)
    if not (0 < beta <= 1 and int(beta * channels) >= 1):
        raise ValueError(
            f"beta must be in (0, 1] and keep at least one of {channels} channels; got {beta}. The paper uses 0.8."
        )
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be positive and finite; got {alpha}. The paper uses 4.")
    return int(beta * channels)
