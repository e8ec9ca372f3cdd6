"""Networks for the tests of cluster gradients, which apply parameters to a batch in many ways, and a reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

K = 5
SIZES = [7, 1, 6, 0, 6]  # unequal; one cluster has a single sample, and one has none
B = sum(SIZES)


def cluster_ids(sizes: Sequence[int] = SIZES, *, shuffled: bool = False) -> Tensor:
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(7))] if shuffled else ids


def by_hand(model: nn.Module, per_sample: Tensor, cluster: Tensor, k: int = K) -> list[Tensor | None]:
    """Return J by its definition: the gradient of the mean loss of each cluster, computed by autograd."""
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(k):
        mask = cluster == i
        loss = (per_sample * mask).sum() / mask.sum().clamp(min=1)
        grads = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(trained, grads, strict=True)])
    J = iter([torch.stack(r) for r in zip(*rows, strict=True)])
    return [next(J) if p.requires_grad else None for p in model.parameters()]


def worst(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> float:
    """Return the largest relative error of a row of a parameter. A row that is zero in ``want`` must be zero.

    The error is relative to the norm of the row, or to 1e-3 of the largest row of any parameter if the row is smaller:
    the gradient of the bias of an attention key, for example, is zero up to rounding.
    """
    assert len(got) == len(want)
    error = 0.0
    largest = max(float(w.reshape(len(w), -1).norm(dim=1).max()) for w in want if w is not None)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is None or w is None:
            continue
        assert g.shape == w.shape
        difference, norm = (y.double().reshape(len(w), -1).norm(dim=1) for y in (g.double() - w.double(), w))
        assert difference[norm == 0].eq(0).all(), "an empty cluster has a gradient"
        error = max(error, float((difference / norm.clamp(min=1e-3 * largest)).max()))
    return error


def peak(step: Callable[[], Any]) -> int:
    """Return the peak memory in bytes of the tensors that ``step`` allocates, as reported by torch's allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


# ---- layers ----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A weight that is used three times, once transposed, a shared bias, and a vector and a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(torch.tanh(self.a(x))))
        return F.linear(h, self.a.weight.t(), self.a.bias) * self.scale + self.scale / 2 * self.gain


class WeightNorm(nn.Module):
    """Weights that are normalised before use, as in EDM2: the parameters themselves are not applied to samples."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.gain = nn.Parameter(torch.ones(()))
        self.c = nn.Parameter(torch.randn(4, 6, 3, 3))
        self.library = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.library(F.linear(x, F.normalize(self.w, dim=1) * (self.gain / 8**0.5)))
        c = self.c / (1e-4 + torch.linalg.vector_norm(self.c, dim=(1, 2, 3), keepdim=True))
        return F.conv2d(y.view(len(x), 6, 2, 4), c.to(y.dtype), padding=1)


class Token(nn.Module):
    """A class token expanded over the batch, a table computed from parameters only, positions, and ``x @ p``."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.table = nn.Linear(3, 8)
        self.register_buffer("grid", torch.randn(7, 3))
        self.positions = nn.Parameter(torch.randn(7, 8))
        self.m = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.table(self.grid)
        return (x + self.positions) @ self.m


class Repeated(nn.Module):
    """Tokens repeated in memory, and lookups with ids that the network creates, which happen to be B in number."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 2, 8))
        self.where = nn.Embedding(B, 8)
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        token = self.a(self.token.repeat(len(x), 1, 1))
        x = torch.cat([token, x], 1)  # [B, 8, 8]
        h = x.mean(1)[:, None] * torch.ones(1, B, 1, dtype=x.dtype)  # [B, B, 8]
        same = torch.full((len(x),), 3)
        return torch.cat([h + self.where(torch.arange(B)), x + self.where(same)[:, None]], 1)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(6, 6, 3, padding=1, groups=3, bias=False)
        self.up = nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1, output_padding=1)
        self.two = nn.Conv2d(4, 6, (1, 3), stride=(1, 2), padding="valid")
        self.even = nn.Conv2d(6, 4, (1, 2), padding="same", dilation=1)
        self.odd = nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular")
        self.up2 = nn.ConvTranspose2d(4, 4, 3, groups=2)
        self.three = nn.Conv3d(2, 3, 1, dilation=2)
        self.up3 = nn.ConvTranspose3d(3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(F.relu(self.one(x), inplace=True))[:, :, None]
        h = self.up2(self.odd(self.even(self.two(h))))
        return self.up3(self.three(h.unflatten(1, (2, 2)).tanh()))


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.layer = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)
        self.group = nn.GroupNorm(2, 6)
        self.instance = nn.InstanceNorm1d(6, affine=True)
        self.wide = nn.LayerNorm((6, 8))
        self.frozen = nn.BatchNorm1d(6).eval()
        self.no_bias = nn.LayerNorm(8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.group(self.rms(self.layer(self.a(x))))
        return self.no_bias(self.frozen(self.wide(self.instance(torch.sin(h)))) ** 2)


class Images(nn.Module):
    """GroupNorm and convolutions in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(6, 6, 3, padding=1)
        self.n = nn.GroupNorm(2, 6)
        self.b = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), 6, 2, 4).to(memory_format=torch.channels_last)
        return self.b(F.silu(self.n(self.a(x))))


class Products(nn.Module):
    """Several einsums, token mixing, addmm, products with vectors, and in-place arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.randn(8, 4))
        self.heads = nn.Parameter(torch.randn(2, 4, 5))
        self.mix = nn.Parameter(torch.randn(7, 6))
        self.per_head = nn.Parameter(torch.randn(2, 5, 3))
        self.v = nn.Parameter(torch.randn(3))
        self.bias = nn.Parameter(torch.randn(3))
        self.square = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("bnd,de->bne", torch.tanh(x), self.m)
        h = self.mix @ h  # [B, 7, 4]
        h = torch.einsum("... d, h d e -> ... h e", h, self.heads).transpose(1, 2)  # [B, 2, 7, 5]
        h = torch.matmul(h, self.per_head)  # [B, 2, 7, 3]
        h += self.bias
        h.mul_(1 + self.v)
        flat = h.flatten(1).unflatten(1, (-1, 3)).mean(1)  # [B, 3]
        return torch.addmm(self.bias, flat, self.square) * (h @ self.v).flatten(1).mean(1, keepdim=True)


class Elementwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.rand(6, 1) + 0.5)
        self.r = nn.Parameter(torch.randn(1, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.where(x > self.p, x, self.r) - self.q
        h = torch.lerp(h, self.p, 0.3) + torch.addcmul(self.r, x, self.q, value=0.5)
        h = 1 / (self.p + h.square()) + torch.maximum(h, self.r) ** 2 + self.q.expand(6, 8) * h.type_as(self.p)
        return torch.stack([h, self.r.expand(len(x), 6, 8)], 1)


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(11, 8, padding_idx=-1)
        self.table = nn.Parameter(torch.randn(11, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[:, :, 0] * 5).long().abs() % 11  # [B, 6]
        return self.label(ids) * x + self.table[ids[:, 0] - 3].flatten(1)[:, None] + self.table.index_select(
            0, ids[:, 1]
        ).flatten(1)[:, None]  # fmt: skip


class Attention(nn.Module):
    """scaled_dot_product_attention with a learned bias, a learned key and a learned value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.randn(2, 6, 7))
        self.extra = nn.Parameter(torch.randn(2, 1, 2, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)  # [B, 2, 6, 4]
        k, v = (torch.cat([y, e.expand(len(x), -1, -1, -1)], 2) for y, e in zip((k, v), self.extra, strict=True))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias).transpose(1, 2).flatten(2)


class MultiHead(nn.Module):
    """nn.MultiheadAttention as self-attention and cross-attention, with masks, with learned keys, in both layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)
        self.pair = nn.MultiheadAttention(8, 4, add_bias_kv=True, add_zero_attn=True, bias=False)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        length = torch.arange(6) >= 5
        h, attention = self.own(x, x, x, attn_mask=torch.ones(6, 6).tril() == 0)
        h = h + self.cross(h, x[..., :4], x[..., :4], need_weights=False, key_padding_mask=length.expand(len(x), 6))[0]
        s, other = h.transpose(0, 1), x.transpose(0, 1)
        mask = torch.linspace(-1, 1, 36, dtype=x.dtype).view(6, 6).repeat(4 * len(x), 1, 1)
        h = h + self.pair(s, other, other, attn_mask=mask)[0].transpose(0, 1)
        return self.encoder(h) + attention.mean(1)[..., None]


class Partly(nn.Module):
    """Frozen and unused parameters, a frozen layer in the middle, and a parameter that only one cluster uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.part = nn.Linear(8, 8)
        self.part.weight.requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(3))
        self.rare = nn.Embedding(50, 8)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[:, 0, 0] * 40).long().abs() % 50
        return self.part(torch.tanh(self.frozen(torch.tanh(self.first(x))))) * self.rare(ids)[:, None]


class Rows(nn.Module):
    """Tokens folded into the batch dimension and back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.Linear(8, 8, bias=False)
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(self.a(x.flatten(0, 1))) + self.shift
        return self.b(h).unflatten(0, (len(x), 6))


LAYERS: list[Callable[[], nn.Module]] = [Tied, WeightNorm, Token, Repeated, Convolutions, Norms, Images, Products,
    Elementwise, Tables, Attention, MultiHead, Partly, Rows]  # fmt: skip


class Checkpointed(nn.Module):
    """A checkpointed layer after an ordinary one."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.into, self.inner, self.reentrant = nn.Linear(8, 8), inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, self.into(x), use_reentrant=self.reentrant)


# ---- small diffusion networks ----------------------------------------------------------------------------------------


def timestep_features(t: Tensor, width: int) -> Tensor:
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=t.dtype, device=t.device) / (width // 2))
    angles = t[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.qkv, self.out, self.condition = nn.Linear(d, 3 * d), nn.Linear(d, d), nn.Linear(d, 6 * d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.condition(F.silu(c))[:, None].chunk(6, -1)
        h = self.norm(x) * (1 + scale) + shift
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))


class DiT(nn.Module):
    """Patches, timestep and label embeddings, and adaLN blocks, for ``x [B, 4, size, size], t [B], y [B]``."""

    def __init__(
        self,
        d: int = 32,
        depth: int = 2,
        heads: int = 2,
        size: int = 8,
        reentrant: bool | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed, self.y = nn.Conv2d(4, d, 2, 2), nn.Embedding(11, d)
        self.positions = nn.Parameter(0.1 * torch.randn(1, (size // 2) ** 2, d))
        self.t = nn.Sequential(nn.Linear(64, d), nn.SiLU(), nn.Linear(d, d))
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(depth))
        self.out, self.size, self.reentrant, self.drop = nn.Linear(d, 16), size, reentrant, nn.Dropout(drop)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        c = self.t(timestep_features(t, 64)) + self.y(y)
        for block in self.blocks:
            h = block(h, c) if self.reentrant is None else checkpoint(block, h, c, use_reentrant=self.reentrant)
            h = self.drop(h)
        n = self.size // 2
        return self.out(h).view(-1, n, n, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def diffusion_batch(n: int = B, size: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return x, t, y and noise."""
    g = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, n, 4, size, size, generator=g, dtype=torch.float64).to(dtype)
    return (
        x,
        torch.rand(n, generator=g, dtype=torch.float64).to(dtype) * 1000,
        torch.randint(0, 11, (n,), generator=g),
        noise,
    )


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Perturb all parameters: with a parameter that is exactly zero or one, a wrong gradient could look right."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))
    return model


def denoising(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, t, y, noise: (model(x, t, y) - noise).flatten(1).square().mean(1)


# ---- networks of diffusers -------------------------------------------------------------------------------------------


def unet(*widths: int) -> nn.Module:
    """Return a UNet with attention at every resolution except the first, or at its only resolution."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=11,
        down_block_types=("DownBlock2D", "AttnDownBlock2D")[-len(widths) :],
        up_block_types=("AttnUpBlock2D", "UpBlock2D")[: len(widths)],
        attention_head_dim=8,
    )


def transformer() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
