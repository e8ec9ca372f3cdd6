"""Interval experts: N small networks, one per interval of timesteps. Each sampling step runs one of them.

Source: Lee, Kim, Go, Jeong, Oh, Choi, "Multi-Architecture Multi-Expert Diffusion Models", AAAI 2024 (arXiv 2306.04990).
Expert n (0 = least noise) denoises I_n = [n T // N, (n+1) T // N). In training, it sees timesteps from

    q_n(t) = p_n 1[t in I_n] / |I_n| + (1 - p_n) / T,    p = (0.8, 0.4, 0.2, 0.1) for N = 4.

The noisier its interval, the more an expert learns from other timesteps, since nearly pure noise teaches little.
Removing little noise needs high frequencies, which convolutions pass; removing much noise needs low frequencies, which
attention passes. The share of convolution in the encoder's mixers therefore falls with the noise level (and with
depth). No official code exists. Comments mark the choices that the available descriptions leave open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from antdiff._checks import MOST_TIMESTEPS, as_count, as_device, as_module, as_number, as_tensor, check_draws, describe
from antdiff.clustering import TimestepClusters

P_OWN = (0.8, 0.4, 0.2, 0.1)
_WIDEST = 2**14  # channels; a wider layer would take gigabytes


class SoftIntervalSampler:
    """Sampler of timesteps per expert: from the expert's own interval with probability p_n, otherwise from all T.

    Example::

        sampler = SoftIntervalSampler()                 # four experts, T = 1000
        t = sampler.sample(0, B, device=device)         # for the expert of the least noise

    Args:
        n_experts: N, the number of experts.
        p: p_n for each expert, in [0, 1]. With 1, experts never leave their interval; with 0, they are N plain models.
        T: number of timesteps.
        clusters: intervals such as ANT's, with k = N and the same T. None: N intervals of equal length.

    Raises:
        ValueError: sizes do not agree, some p lies outside [0, 1], or n_experts lies outside [1, T].
    """

    def __init__(
        self,
        n_experts: int = 4,
        p: Sequence[float] = P_OWN,
        T: int = 1000,
        *,
        clusters: TimestepClusters | None = None,
    ) -> None:
        T, n_experts = as_count("T", T, most=MOST_TIMESTEPS), as_count("n_experts", n_experts, -(2**63))
        if not 1 <= n_experts <= T:
            raise ValueError(f"n_experts must be in [1, T={T}]; got {n_experts}.")
        if not isinstance(p, (list, tuple)):
            raise TypeError(f"p must be a list of probabilities, one per expert; got {describe(p)}.")
        p = [as_number("p", q) for q in p]
        if len(p) != n_experts or not all(0 <= q <= 1 for q in p):
            raise ValueError(f"p must be n_experts={n_experts} probabilities, one per expert; got {tuple(p)}.")
        self.bounds = list(_intervals(n_experts, T, clusters).bounds)
        self.p = tuple(float(q) for q in p)
        self.T = T

    def sample(
        self,
        expert: int,
        B: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw timesteps int64 [B] from q_expert."""
        low, high = self._interval(expert)
        B = as_count("B", B, most=MOST_TIMESTEPS)
        place = as_device("device", "cpu" if device is None else device)
        check_draws(generator, place)
        own = torch.rand(B, device=device, generator=generator) < self.p[expert]  # [B]
        inside = torch.randint(low, high, (B,), device=device, generator=generator)
        anywhere = torch.randint(self.T, (B,), device=device, generator=generator)
        return torch.where(own, inside, anywhere)

    def density(self, expert: int) -> Tensor:
        """Return the density q_expert(t): float64 [T], with sum 1."""
        low, high = self._interval(expert)
        q = torch.full((self.T,), (1 - self.p[expert]) / self.T, dtype=torch.float64)
        q[low:high] += self.p[expert] / (high - low)
        return q

    def _interval(self, expert: int) -> tuple[int, int]:
        _check_expert(expert, len(self.p))
        return self.bounds[expert], self.bounds[expert + 1]


class ExpertBank(nn.Module):
    """N networks that are called as one: each sample goes to the expert of its timestep.

    Example::

        bank = ExpertBank(experts).offload("cuda")     # only the expert in use is on the GPU
        noise = bank(x, 999, class_labels=y)           # a sampling step: runs one expert, without a host-device sync

    If all samples share one t (an int, or a tensor with one element on the CPU), its expert runs on the whole batch.
    For t [B] the batch is split by expert. This waits for the device, each expert must return a tensor [B, ...], and
    arguments whose first dimension is B are split too.

    Soft intervals train an expert on timesteps outside its own interval. Set ``only = i`` for that: all samples then go
    to expert i.

    Args:
        experts: networks in the order of their intervals, least noise first.
        T: number of timesteps.
        clusters: the intervals, with k = N and the same T. None: intervals of equal length.

    Raises:
        ValueError: there are no experts, or the clusters have another k or T. Calling the bank raises a ValueError if t
            lies outside [0, T).
    """

    def __init__(
        self, experts: Sequence[nn.Module], T: int = 1000, *, clusters: TimestepClusters | None = None
    ) -> None:
        super().__init__()
        if not isinstance(experts, (list, tuple, nn.ModuleList)) or not all(isinstance(e, nn.Module) for e in experts):
            raise TypeError(f"experts must be a list of networks, torch.nn.Module; got {describe(experts)}.")
        if not experts:
            raise ValueError("experts must be at least one network; got none. Pass one per interval.")
        T = as_count("T", T, most=MOST_TIMESTEPS)
        self.clusters = _intervals(len(experts), T, clusters)
        self.experts = nn.ModuleList(experts)
        self.T = T
        self.bounds: Tensor
        self.register_buffer("bounds", torch.tensor(self.clusters.bounds), persistent=False)  # [N+1]
        self._home: torch.device | None = None
        self._device: torch.device | None = None
        self._resident: int | None = None
        self.only: int | None = None

    def expert_for(self, t: int) -> int:
        """Return the index of the expert whose interval contains t."""
        t = as_count("t", t, -(2**63))
        if not 0 <= t < self.T:
            raise ValueError(f"t must be a timestep, 0 <= t < T={self.T}; got {t}. Timesteps are counted from 0.")
        return self.clusters.cluster_of(t)

    def offload(self, device: torch.device | str, *, home: torch.device | str = "cpu") -> ExpertBank:
        """Run experts on ``device`` and keep the others on ``home``, for sampling. Returns the bank itself."""
        place, rest = as_device("device", device, present=False), as_device("home", home, present=False)
        _move(self.experts, rest)
        self._home, self._device, self._resident = rest, place, None
        return self

    def expert(self, i: int) -> nn.Module:
        """Return expert i. In an offloaded bank, first move it to the device and the previous expert back home."""
        _check_expert(i, len(self.experts))
        if self._device is not None and i != self._resident:
            if self._resident is not None:
                _move(self.experts[self._resident], self._home)
            _move(self.experts[i], self._device)
            self._resident = i
        return self.experts[i]

    def forward(self, x: Tensor, t: Tensor | int, *args: Any, **kwargs: Any) -> Any:
        """Run the expert of t.

        If t int64 [B] belongs to several experts, return their outputs as one tensor [B, ...], in batch order.
        """
        if self.only is not None:
            return self.expert(self.only)(x, t, *args, **kwargs)
        if not isinstance(t, Tensor):
            return self.expert(self.expert_for(t))(x, t, *args, **kwargs)
        as_tensor("t", t, kind="int")
        if t.numel() == 1 and t.device.type == "cpu":
            return self.expert(self.expert_for(int(t)))(x, t, *args, **kwargs)
        as_tensor("x", x, shape="[B, ...]", kind="real")
        if x.dim() == 0:
            raise ValueError("x must have shape [B, ...], one row per sample; got a 0-d tensor.")
        B = len(x)
        t = t.expand(B) if t.numel() == 1 else t
        if t.shape != (B,) or B == 0:
            raise ValueError(f"t must be one timestep, or int64 [B={B}]; got shape {list(t.shape)}.")
        ids = torch.searchsorted(self.bounds.to(t.device), t, right=True) - 1  # [B]
        present = ids.unique().tolist()  # the only host-device sync
        if present[0] < 0 or present[-1] >= len(self.experts):
            row = int(((t < 0) | (t >= self.T)).nonzero()[0])
            raise ValueError(
                f"t must be timesteps, 0 <= t < T={self.T}; got {int(t[row])} at row {row}. Timesteps are counted "
                "from 0."
            )
        if len(present) == 1:
            return self.expert(present[0])(x, t, *args, **kwargs)
        out: Tensor | None = None
        for i in present:
            rows = (ids == i).nonzero().squeeze(1)

            def select(value: Any, rows: Tensor = rows) -> Any:
                return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == B else value

            y = self.expert(i)(x[rows], t[rows], *map(select, args), **{name: select(v) for name, v in kwargs.items()})
            if not isinstance(y, Tensor):
                raise TypeError(
                    f"experts must return a tensor if t spans several intervals; got {type(y).__name__}. Wrap them, "
                    "for example to return output.sample."
                )
            # index_copy instead of assignment, so that gradients flow to every expert
            out = (y.new_zeros((B, *y.shape[1:])) if out is None else out).index_copy(0, rows, y)
        return out


def _move(module: nn.Module, device: torch.device | None) -> None:
    try:
        module.to(device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"device and home must be devices of this machine with enough memory; got {device}. torch says: {reason}"
        ) from error


def _intervals(n: int, T: int, clusters: TimestepClusters | None) -> TimestepClusters:
    """Return ``clusters`` if they fit n experts and T; for None, n intervals as equal as integers allow."""
    if clusters is None:
        if n > T:
            raise ValueError(f"experts must be at most T={T}, since no interval may be empty; got {n}.")
        return TimestepClusters.uniform(T, n)
    if not isinstance(clusters, TimestepClusters):
        raise TypeError(f"clusters must be TimestepClusters; got {describe(clusters)}.")
    if (clusters.k, clusters.T) != (n, T):
        raise ValueError(
            f"clusters must have one interval per expert, k={n}, and T={T}; got k={clusters.k} and T={clusters.T}. "
            f"Make them with {n} clusters of {T} timesteps, or change the number of experts or T."
        )
    return clusters


def _check_expert(i: int, n: int) -> None:
    if isinstance(i, bool) or not isinstance(i, int):
        raise TypeError(f"expert must be an int; got {type(i).__name__}.")
    if not 0 <= i < n:
        raise ValueError(f"expert must be one of 0 .. {n - 1}; got {i}. Experts are counted from 0.")


# ---- one architecture per expert ---------------------------------------------------------------------------------


class InceptionMixer2d(nn.Module):
    """iFormer's token mixer (Si et al., NeurIPS 2022): convolution and max-pooling in parallel with pooled attention.

    The d input channels are split into d_h for high frequencies, in two halves, and d_l for low frequencies:

        Y_1 = GELU(FC(MaxPool3(Z_1))),  Y_2 = GELU(DWConv3(FC(Z_2))),  Y_l = Up(MHSA(AvgPool(Z_l)))
        Y = FC(Y_c + DWConv3(Y_c)),  Y_c = [Y_1, Y_2, Y_l]

    This is not weight for weight the released mixer. That one has no projection after the attention branch, and no
    biases in the layers of the convolution branch and in the last depthwise convolution.

    Each half doubles its channels, so Y_c has 2 d_h + d_l channels. [B, d, H, W] -> [B, d, H, W], for any H and W.

    Args:
        dim: d, the number of channels, even.
        high_ratio: requested d_h / d. d_l is rounded to whole heads, so that neither part is empty.
        head_dim: channels per attention head, even.
        pool: factor of the average pooling (and nearest up-sampling) in the low branch. 1: no pooling.

    Raises:
        ValueError: the ratio lies outside (0, 1), ``dim`` or ``head_dim`` is odd, ``dim`` is below ``head_dim + 2``, or
            ``pool`` is below 1.
    """

    def __init__(self, dim: int, high_ratio: float, head_dim: int = 32, pool: int = 2) -> None:
        super().__init__()
        high_ratio = as_number("high_ratio", high_ratio, above=0, below=1, remedy="See high_ratio_schedule.")
        dim, head_dim = as_count("dim", dim, most=_WIDEST), as_count("head_dim", head_dim)
        pool = as_count("pool", pool, most=_WIDEST)
        if dim % 2 or head_dim % 2 or head_dim < 2 or dim < head_dim + 2:
            raise ValueError(
                f"dim and head_dim must be even with dim >= head_dim + 2; got {dim} and {head_dim}. Choose a smaller "
                "head_dim or an even dim."
            )
        self.heads = min(max(round((1 - high_ratio) * dim / head_dim), 1), (dim - 2) // head_dim)
        self.low = self.heads * head_dim
        self.high = dim - self.low
        self.pool = pool
        mixed = 2 * self.high + self.low
        self.pooled = nn.Conv2d(self.high // 2, self.high, 1)
        self.convolved = nn.Sequential(
            nn.Conv2d(self.high // 2, self.high, 1), nn.Conv2d(self.high, self.high, 3, padding=1, groups=self.high)
        )
        self.qkv = nn.Conv2d(self.low, 3 * self.low, 1)
        self.attended = nn.Conv2d(self.low, self.low, 1)
        self.mix = nn.Conv2d(mixed, mixed, 3, padding=1, groups=mixed)
        self.out = nn.Conv2d(mixed, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens: x [B, d, H, W] -> [B, d, H, W]."""
        _check_image(x, self.out.weight, self.out.out_channels)
        z1, z2, low = x.split([self.high // 2, self.high // 2, self.low], dim=1)
        y1 = F.gelu(self.pooled(F.max_pool2d(z1, 3, stride=1, padding=1)))
        y2 = F.gelu(self.convolved(z2))
        y = torch.cat([y1, y2, self._attend(low)], dim=1)  # [B, 2 d_h + d_l, H, W]
        mixed: Tensor = self.out(y + self.mix(y))
        return mixed

    def _attend(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        # ceil_mode keeps the last row and column of an odd size; the average does not count padding.
        x = F.avg_pool2d(x, self.pool, ceil_mode=True, count_include_pad=False)  # [B, d_l, h, w]
        q, k, v = rearrange(self.qkv(x), "b (three heads d) h w -> three b heads (h w) d", three=3, heads=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)  # [B, heads, hw, head_dim]
        y = rearrange(y, "b heads (h w) d -> b (heads d) h w", h=x.shape[2])
        return F.interpolate(self.attended(y), size=size, mode="nearest")


def _check_image(x: object, like: Tensor, channels: int) -> None:
    x = as_tensor("x", x, shape="[B, d, H, W]")
    if x.device != like.device or (x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise TypeError(
            f"x must have the dtype and device of the weights, {like.dtype} on {like.device}; got {x.dtype} on "
            f"{x.device}. Convert it with .to()."
        )
    if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
        raise ValueError(f"x must have shape [B, d={channels}, H, W] with H, W >= 1; got {list(x.shape)}.")


def high_ratio_schedule(expert: int, stage: int, n_experts: int = 4, n_stages: int = 4) -> float:
    """Return the share d_h / d of high-frequency channels in one encoder stage of one expert (both counted from 0).

    Four entries of the published table (four experts, four stages) are known, as d_h : d_l: 5:8 in the second stage and
    1:3 in the fourth for the first expert, and 1:4 and 1:15 for the last expert. All other entries interpolate
    d_h / d_l geometrically, which is our choice. Other numbers of experts and stages are spread over the same range.
    """
    n_experts, n_stages = as_count("n_experts", n_experts), as_count("n_stages", n_stages)
    _check_expert(expert, n_experts)
    stage = as_count("stage", stage, -(2**63))
    if not 0 <= stage < n_stages:
        raise ValueError(f"stage must be one of 0 .. {n_stages - 1}; got {stage}. Stages are counted from 0.")
    e = expert / (n_experts - 1) if n_experts > 1 else 0.0  # 0 for the least noise, 1 for the most
    s = 1 + 3 * stage / (n_stages - 1) if n_stages > 1 else 2.0  # position among the four published stages, 1 to 4
    second = (5 / 8) ** (1 - e) * (1 / 4) ** e
    fourth = (1 / 3) ** (1 - e) * (1 / 15) ** e
    odds = second * (fourth / second) ** ((s - 2) / 2)
    return float(odds / (1 + odds))


class InceptionBlock2d(nn.Module):
    """Residual block: x + Mixer(Norm(x)), then x + MLP(Norm(x)).

    A learned scale on both branches is zero at first, so that the block starts as the identity.
    """

    def __init__(self, dim: int, high_ratio: float, head_dim: int = 32, *, mlp_ratio: int = 2, groups: int = 8) -> None:
        super().__init__()
        dim, mlp_ratio = as_count("dim", dim, most=_WIDEST), as_count("mlp_ratio", mlp_ratio, most=64)
        if dim % as_count("groups", groups):
            raise ValueError(f"groups must divide dim={dim}; got {groups}.")
        self.norm1 = nn.GroupNorm(groups, dim)
        self.mixer = InceptionMixer2d(dim, high_ratio, head_dim)
        self.norm2 = nn.GroupNorm(groups, dim)
        self.mlp = nn.Sequential(nn.Conv2d(dim, mlp_ratio * dim, 1), nn.GELU(), nn.Conv2d(mlp_ratio * dim, dim, 1))
        self.scale = nn.Parameter(torch.zeros(2, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply both branches: [B, d, H, W] -> [B, d, H, W]."""
        _check_image(x, self.scale, self.scale.shape[1])
        x = x + self.scale[0] * self.mixer(self.norm1(x))
        out: Tensor = x + self.scale[1] * self.mlp(self.norm2(x))
        return out


class _ThenInception(nn.Module):
    """Residual block of a UNet, followed by an inception block."""

    def __init__(self, resnet: nn.Module, block: InceptionBlock2d) -> None:
        super().__init__()
        self.resnet = resnet
        self.block = block

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        out: Tensor = self.block(self.resnet(x, temb))
        return out


def add_inception(unet: nn.Module, expert: int, n_experts: int, *, head_dim: int | None = None) -> nn.Module:
    """Add the mixers of one expert to the encoder of diffusers' UNet2DModel, in place. Returns ``unet``.

    One inception block is added after the last residual block of each encoder stage, with the share of convolution from
    :func:`high_ratio_schedule`. The decoder does not change. The number of blocks is not published; one per stage is
    the smallest possible.

    Args:
        unet: the network to change.
        expert: index of the expert, 0 for the least noise.
        n_experts: number of experts.
        head_dim: channels per attention head. None: an eighth of each stage's channels, so that the share can follow
            the schedule.

    Raises:
        ValueError: ``unet`` has no encoder stages with residual blocks, or the expert is unknown.
    """
    as_module("unet", unet)
    if head_dim is not None:
        head_dim = as_count("head_dim", head_dim)
    stages = [m for m in getattr(unet, "down_blocks", []) if len(getattr(m, "resnets", []))]
    if not stages:
        raise ValueError(
            "unet must be diffusers' UNet2DModel, with down_blocks that contain resnets; got "
            f"{type(unet).__name__}, which has none. Pass the UNet2DModel itself, not a wrapper."
        )
    blocks = []  # all of them, before the network is changed
    for s, stage in enumerate(stages):
        last: Any = stage.resnets[-1]
        dim = int(last.out_channels)
        ratio = high_ratio_schedule(expert, s, n_experts, len(stages))
        width = max(2, dim // 16 * 2) if head_dim is None else head_dim
        blocks.append(InceptionBlock2d(dim, ratio, width, groups=last.norm2.num_groups))
    for stage, block in zip(stages, blocks, strict=True):
        stage.resnets[-1] = _ThenInception(stage.resnets[-1], block)
    return unet
