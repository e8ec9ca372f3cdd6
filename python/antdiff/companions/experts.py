"""Interval experts: N small networks, each for one interval of timesteps, one of them a sampling step.

Source: Lee, Kim, Go, Jeong, Oh, Choi, "Multi-Architecture Multi-Expert Diffusion Models", AAAI 2024 (arXiv 2306.04990).
Expert n (0 = least noise) denoises I_n = [n T // N, (n+1) T // N), and while training sees

    q_n(t) = p_n 1[t in I_n] / |I_n| + (1 - p_n) / T,    p = (0.8, 0.4, 0.2, 0.1) for N = 4:

the noisier its interval, the more it learns from images elsewhere, since nearly pure noise teaches little. Denoising
little noise takes high frequencies, which convolutions pass; much noise low ones, which attention passes: so the share
of convolution in the encoder's mixers falls with the noise level (and with depth). No official code exists; what the
available descriptions leave open is marked where it is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from antdiff.clustering import TimestepClusters

P_OWN = (0.8, 0.4, 0.2, 0.1)


class SoftIntervalSampler:
    """Timesteps for each expert: from its own interval with probability p_n, else from all of them.

    Example::

        sampler = SoftIntervalSampler()                 # four experts, T = 1000
        t = sampler.sample(0, B, device=device)         # for the expert of the least noise

    Args:
        n_experts: N.
        p: p_n for each expert, in [0, 1]. 1: experts that never leave their interval; 0: N plain models.
        T: number of timesteps.
        clusters: intervals other than N equal ones, such as ANT's; its k and T then have to be N and T.

    Raises:
        ValueError: sizes that do not agree, p outside [0, 1], n_experts outside [1, T].
    """

    def __init__(
        self,
        n_experts: int = 4,
        p: Sequence[float] = P_OWN,
        T: int = 1000,
        *,
        clusters: TimestepClusters | None = None,
    ) -> None:
        if not 1 <= n_experts <= T:
            raise ValueError(f"n_experts must be in [1, T={T}]; got {n_experts}.")
        if len(p) != n_experts or not all(0 <= q <= 1 for q in p):
            raise ValueError(f"p must be n_experts={n_experts} probabilities, one an expert; got {tuple(p)}.")
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
        """Timesteps int64 [B] drawn from q_expert."""
        low, high = self._interval(expert)
        own = torch.rand(B, device=device, generator=generator) < self.p[expert]  # [B]
        inside = torch.randint(low, high, (B,), device=device, generator=generator)
        anywhere = torch.randint(self.T, (B,), device=device, generator=generator)
        return torch.where(own, inside, anywhere)

    def density(self, expert: int) -> Tensor:
        """q_expert(t), float64 [T]; sums to 1."""
        low, high = self._interval(expert)
        q = torch.full((self.T,), (1 - self.p[expert]) / self.T, dtype=torch.float64)
        q[low:high] += self.p[expert] / (high - low)
        return q

    def _interval(self, expert: int) -> tuple[int, int]:
        _check_expert(expert, len(self.p))
        return self.bounds[expert], self.bounds[expert + 1]


class ExpertBank(nn.Module):
    """N networks behind one call; each sample goes to the expert of its timestep.

    Example::

        bank = ExpertBank(experts).offload("cuda")     # only the expert in use is on the GPU
        noise = bank(x, 999, class_labels=y)           # a sampling step: one expert, no look at t on the device

    With one t for all (an int, or a tensor with one element on the CPU) the expert runs on the whole batch. With t [B]
    the batch is split by expert, which waits for the device, and each expert must return a tensor [B, ...]; arguments
    whose first dimension is B are split too.

    Soft intervals train an expert on timesteps that are not its own: with ``only = i`` all samples go to expert i.

    Args:
        experts: in the order of their intervals, least noise first.
        T: number of timesteps.
        clusters: intervals other than equal ones.

    Raises:
        ValueError: no experts, or clusters of another k or T. Calling raises one for t outside [0, T).
    """

    def __init__(
        self, experts: Sequence[nn.Module], T: int = 1000, *, clusters: TimestepClusters | None = None
    ) -> None:
        super().__init__()
        if not experts:
            raise ValueError("experts must be at least one network; got none.")
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
        """The expert whose interval holds t."""
        if not 0 <= t < self.T:
            raise ValueError(f"t must be a timestep, 0 <= t < T={self.T}; got {t}.")
        return self.clusters.cluster_of(t)

    def offload(self, device: torch.device | str, *, home: torch.device | str = "cpu") -> ExpertBank:
        """Run experts on ``device``, keep those not in use at ``home``; for sampling. Returns self."""
        self._home, self._device, self._resident = torch.device(home), torch.device(device), None
        self.experts.to(self._home)
        return self

    def expert(self, i: int) -> nn.Module:
        """Expert i, brought to its device (and the one before it sent home) where the bank is offloaded."""
        _check_expert(i, len(self.experts))
        if self._device is not None and i != self._resident:
            if self._resident is not None:
                self.experts[self._resident].to(self._home)
            self.experts[i].to(self._device)
            self._resident = i
        return self.experts[i]

    def forward(self, x: Tensor, t: Tensor | int, *args: Any, **kwargs: Any) -> Any:
        """What the expert of t returns; for t int64 [B] of several experts the tensors [B, ...] put back in order."""
        if self.only is not None:
            return self.expert(self.only)(x, t, *args, **kwargs)
        if not isinstance(t, Tensor) or (t.numel() == 1 and t.device.type == "cpu"):
            return self.expert(self.expert_for(int(t)))(x, t, *args, **kwargs)
        B = len(x)
        t = t.expand(B) if t.numel() == 1 else t
        if t.shape != (B,):
            raise ValueError(f"t must be one timestep, or int64 [B={B}]; got shape {list(t.shape)}.")
        ids = torch.searchsorted(self.bounds.to(t.device), t, right=True) - 1  # [B]
        present = ids.unique().tolist()  # the one wait for the device
        if present[0] < 0 or present[-1] >= len(self.experts):
            row = int(((t < 0) | (t >= self.T)).nonzero()[0])
            raise ValueError(f"t must be timesteps, 0 <= t < T={self.T}; got {int(t[row])} at row {row}.")
        if len(present) == 1:
            return self.expert(present[0])(x, t, *args, **kwargs)
        out: Tensor | None = None
        for i in present:
            rows = (ids == i).nonzero().squeeze(1)

            def part(value: Any, rows: Tensor = rows) -> Any:
                return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == B else value

            y = self.expert(i)(x[rows], t[rows], *map(part, args), **{name: part(v) for name, v in kwargs.items()})
            if not isinstance(y, Tensor):
                raise TypeError(f"experts must return a tensor for t of several intervals; got {type(y).__name__}.")
            # index_copy, not assignment: gradients flow to every expert
            out = (y.new_zeros((B, *y.shape[1:])) if out is None else out).index_copy(0, rows, y)
        return out


def _intervals(n: int, T: int, clusters: TimestepClusters | None) -> TimestepClusters:
    """The intervals of n experts: ``clusters`` if they fit, by default n intervals as equal as integers allow."""
    if clusters is None:
        return TimestepClusters.uniform(T, n)
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
        raise ValueError(f"expert must be one of 0 .. {n - 1}; got {i}.")


# ---- an architecture for each expert -----------------------------------------------------------------------------


class InceptionMixer2d(nn.Module):
    """iFormer's token mixer (Si et al., NeurIPS 2022): convolution and max-pooling beside pooled self-attention.

    The d input channels are split into d_h for high frequencies, in two halves, and d_l for low ones:

        Y_1 = GELU(FC(MaxPool3(Z_1))),  Y_2 = GELU(DWConv3(FC(Z_2))),  Y_l = Up(MHSA(AvgPool(Z_l)))
        Y = FC(Y_c + DWConv3(Y_c)),  Y_c = [Y_1, Y_2, Y_l]

    Each half doubles, so Y_c has 2 d_h + d_l channels. [B, d, H, W] -> [B, d, H, W], any H and W.

    Args:
        dim: d, even.
        high_ratio: d_h / d that is asked for; d_l is the nearest whole number of heads that leaves both parts
            something.
        head_dim: channels of an attention head, even.
        pool: average pooling (and nearest up-sampling) of the low branch; 1: none.

    Raises:
        ValueError: a ratio outside (0, 1), an odd ``dim`` or ``head_dim``, ``dim`` with no room for a head and two more
            channels, or ``pool`` below 1.
    """

    def __init__(self, dim: int, high_ratio: float, head_dim: int = 32, pool: int = 2) -> None:
        super().__init__()
        if not 0 < high_ratio < 1:
            raise ValueError(f"high_ratio must be in (0, 1); got {high_ratio}.")
        if dim % 2 or head_dim % 2 or head_dim < 2 or dim < head_dim + 2:
            raise ValueError(f"dim and head_dim must be even with dim >= head_dim + 2; got {dim} and {head_dim}.")
        if pool < 1:
            raise ValueError(f"pool must be at least 1; got {pool}.")
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
        """x [B, d, H, W] -> [B, d, H, W]."""
        z1, z2, low = x.split([self.high // 2, self.high // 2, self.low], dim=1)
        y1 = F.gelu(self.pooled(F.max_pool2d(z1, 3, stride=1, padding=1)))
        y2 = F.gelu(self.convolved(z2))
        y = torch.cat([y1, y2, self._attend(low)], dim=1)  # [B, 2 d_h + d_l, H, W]
        mixed: Tensor = self.out(y + self.mix(y))
        return mixed

    def _attend(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        # ceil_mode keeps the last row and column of an odd size; the average counts only what is there.
        x = F.avg_pool2d(x, self.pool, ceil_mode=True, count_include_pad=False)  # [B, d_l, h, w]
        q, k, v = rearrange(self.qkv(x), "b (three heads d) h w -> three b heads (h w) d", three=3, heads=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)  # [B, heads, hw, head_dim]
        y = rearrange(y, "b heads (h w) d -> b (heads d) h w", h=x.shape[2])
        return F.interpolate(self.attended(y), size=size, mode="nearest")


def high_ratio_schedule(expert: int, stage: int, n_experts: int = 4, n_stages: int = 4) -> float:
    """Share d_h / d of the high-frequency channels in one encoder stage of one expert (both counted from 0).

    Known of the published table (four experts, four stages), as d_h : d_l: the first expert 5:8 in the second stage
    and 1:3 in the fourth, the last expert 1:4 and 1:15. Everything between and beyond is geometric interpolation of
    d_h / d_l, a choice of ours; other numbers of experts and stages are spread over the same span.
    """
    _check_expert(expert, n_experts)
    if not 0 <= stage < n_stages:
        raise ValueError(f"stage must be one of 0 .. {n_stages - 1}; got {stage}.")
    e = expert / (n_experts - 1) if n_experts > 1 else 0.0  # 0 the least noise, 1 the most
    s = 1 + 3 * stage / (n_stages - 1) if n_stages > 1 else 2.0  # position among the published four stages
    second = (5 / 8) ** (1 - e) * (1 / 4) ** e
    fourth = (1 / 3) ** (1 - e) * (1 / 15) ** e
    odds = second * (fourth / second) ** ((s - 2) / 2)
    return float(odds / (1 + odds))


class InceptionBlock2d(nn.Module):
    """x + Mixer(Norm(x)), then x + MLP(Norm(x)); a learned scale on both is zero at first, so it starts as identity."""

    def __init__(self, dim: int, high_ratio: float, head_dim: int = 32, *, mlp_ratio: int = 2, groups: int = 8) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, dim)
        self.mixer = InceptionMixer2d(dim, high_ratio, head_dim)
        self.norm2 = nn.GroupNorm(groups, dim)
        self.mlp = nn.Sequential(nn.Conv2d(dim, mlp_ratio * dim, 1), nn.GELU(), nn.Conv2d(mlp_ratio * dim, dim, 1))
        self.scale = nn.Parameter(torch.zeros(2, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, d, H, W] -> [B, d, H, W]."""
        x = x + self.scale[0] * self.mixer(self.norm1(x))
        out: Tensor = x + self.scale[1] * self.mlp(self.norm2(x))
        return out


class _ThenInception(nn.Module):
    """A UNet's residual block with an inception block behind it."""

    def __init__(self, resnet: nn.Module, block: InceptionBlock2d) -> None:
        super().__init__()
        self.resnet = resnet
        self.block = block

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        out: Tensor = self.block(self.resnet(x, temb))
        return out


def add_inception(unet: nn.Module, expert: int, n_experts: int, *, head_dim: int | None = None) -> nn.Module:
    """Give the encoder of diffusers' UNet2DModel the mixers of one expert, in place; returns ``unet``.

    One inception block behind the last residual block of each encoder stage, with :func:`high_ratio_schedule`'s share
    of convolution; the decoder stays as it is. The number of blocks is not published: one is the least that does it.

    Args:
        head_dim: of the attention; None: an eighth of each stage's channels, which lets the share follow the schedule.

    Raises:
        ValueError: ``unet`` has no encoder stages with residual blocks, or an unknown expert.
    """
    stages = [m for m in getattr(unet, "down_blocks", []) if len(getattr(m, "resnets", []))]
    if not stages:
        raise ValueError(
            "unet must be diffusers' UNet2DModel, with down_blocks that hold resnets; got "
            f"{type(unet).__name__}, which has none."
        )
    for s, stage in enumerate(stages):
        last: Any = stage.resnets[-1]
        dim = int(last.out_channels)
        ratio = high_ratio_schedule(expert, s, n_experts, len(stages))
        block = InceptionBlock2d(dim, ratio, head_dim or max(2, dim // 16 * 2), groups=last.norm2.num_groups)
        stage.resnets[-1] = _ThenInception(last, block)
    return unet
