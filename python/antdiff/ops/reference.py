"""Plain PyTorch twins of every op: same names, same signatures, any device, differentiable by autograd.

They are the documentation of what a kernel computes, the oracle of its tests (in float64) and the baseline of its
benchmark. They import torch alone and are written to be read, not to be fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cluster_loss(
    pred: Tensor,
    target: Tensor,
    cluster: Tensor,
    k: int,
    weight: Tensor | None = None,
    *,
    kind: str = "mse",
    delta: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Twin of :func:`antdiff.ops.cluster_loss`."""
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    d = (pred.to(dtype) - target.to(dtype)).flatten(1)  # [B, N]
    if kind == "mse":
        error = d.square()
    elif kind == "huber":
        error = torch.where(d.abs() <= delta, 0.5 * d.square(), delta * (d.abs() - 0.5 * delta))
    else:
        error = d.abs()
    return cluster_mean(error.mean(dim=1), cluster, k, weight)


def cluster_mean(per_sample: Tensor, cluster: Tensor, k: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Twin of :func:`antdiff.ops.cluster_mean`."""
    if per_sample.dtype in (torch.float16, torch.bfloat16):
        per_sample = per_sample.float()
    weighted = per_sample if weight is None else per_sample * weight  # [B]
    counts = torch.bincount(cluster, minlength=k)  # [k]
    sums = weighted.new_zeros(k).index_add(0, cluster, weighted)  # [k]
    return sums / counts.clamp(min=1), counts


def cluster_loss_and_grad(
    pred: Tensor,
    target: Tensor,
    cluster: Tensor,
    k: int,
    weight: Tensor | None = None,
    *,
    cluster_weight: Tensor | None = None,
    kind: str = "mse",
    delta: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of :func:`antdiff.ops.cluster_loss_and_grad`."""
    with torch.enable_grad():
        leaf = pred.detach().requires_grad_()
        losses, counts = cluster_loss(leaf, target, cluster, k, weight, kind=kind, delta=delta)
        total = losses.sum() if cluster_weight is None else (losses * cluster_weight).sum()
        (grad,) = torch.autograd.grad(total, leaf)
    return losses.detach(), counts, grad


def gram(J: Tensor | Sequence[Tensor | None]) -> Tensor:
    """Twin of :func:`antdiff.ops.gram`."""
    tensors = [J] if isinstance(J, Tensor) else [x for x in J if x is not None]
    rows = [x.double().unsqueeze(-1).flatten(1) for x in tensors]  # each [k, numel]
    return torch.stack([x @ x.T for x in rows]).sum(0)


def gram_(out: Tensor, J: Tensor | Sequence[Tensor | None]) -> Tensor:
    """Twin of :func:`antdiff.ops.gram_`."""
    return out.add_(gram(J))


def combine(
    weights: Tensor, J: Tensor | Sequence[Tensor | None], out: Tensor | Sequence[Tensor | None] | None = None
) -> Tensor | list[Tensor | None]:
    """Twin of :func:`antdiff.ops.combine`."""

    def one(x: Tensor, o: Tensor | None) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = torch.einsum("k,k...->...", weights.to(dtype), x.to(dtype))
        return y if o is None else o.copy_(y)

    if isinstance(J, Tensor):
        assert out is None or isinstance(out, Tensor)
        return one(J, out)
    outs = [None] * len(J) if out is None else list(out)
    return [None if x is None else one(x, o) for x, o in zip(J, outs, strict=True)]
