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


def interval_partition(cost: Tensor, k: int, *, min_size: int = 1, max_size: int | None = None) -> tuple[Tensor, float]:
    """Twin of :func:`antdiff.ops.interval_partition`."""
    starts, total = interval_partition_all(cost, k, min_size=min_size, max_size=max_size)[k - 1]
    if not starts.numel():
        raise ValueError(f"cost must allow a partition into k={k} intervals of {min_size} to {max_size} points.")
    return starts, total


def interval_partition_all(
    cost: Tensor, k: int, *, min_size: int = 1, max_size: int | None = None
) -> list[tuple[Tensor, float]]:
    """Twin of :func:`antdiff.ops.interval_partition_all`."""
    T = cost.shape[0]
    size = torch.arange(T)[None, :] - torch.arange(T)[:, None] + 1  # [T, T], of the interval l..r
    allowed = (size >= min_size) & (size <= (max_size or T))
    cost = torch.where(allowed, cost, torch.inf)  # [l, r]
    best, first = [cost[0]], [torch.zeros(T, dtype=torch.int64)]  # a layer: [T] over r, with j + 1 intervals
    for _ in range(1, k):
        before = torch.cat([cost.new_full((1,), torch.inf), best[-1][:-1]])  # [T], best cost of points 0..l-1
        candidates = before[:, None] + cost  # [l, r]
        first.append(candidates.argmin(dim=0))  # the smallest l among equals
        best.append(candidates.amin(dim=0))
    results = []
    for j in range(k):
        total, starts, r = best[j][-1].item(), [0] * (j + 1), T - 1
        for i in range(j, 0, -1):
            starts[i] = int(first[i][r])
            r = starts[i] - 1
        results.append((torch.tensor(starts if total < float("inf") else [], dtype=torch.int64), total))
    return results


def interval_partition_values(
    x: Tensor, k: int, *, p: int = 1, weight: Tensor | None = None, min_size: int = 1, max_size: int | None = None
) -> tuple[Tensor, float]:
    """Twin of :func:`antdiff.ops.interval_partition_values`."""
    T = x.shape[0]
    w = torch.ones_like(x) if weight is None else weight
    if p == 1 and weight is None:
        return interval_partition_affinity(-(x[:, None] - x).abs(), k, min_size=min_size, max_size=max_size)
    if p == 1:
        cost = x.new_full((T, T), torch.inf)
        for m in range(T):  # the median is one of the points
            sums = _prefix(w * (x - x[m]).abs())
            cost = torch.minimum(cost, sums[None, 1:] - sums[:-1, None])
    else:
        x = x - x.mean()
        sum_w, sum_wx, sum_wxx = (s[None, 1:] - s[:-1, None] for s in map(_prefix, (w, w * x, w * x * x)))
        cost = torch.where(sum_w > 0, (sum_wxx - sum_wx.square() / sum_w).clamp(min=0), 0)
    return interval_partition(cost, k, min_size=min_size, max_size=max_size)


def interval_partition_affinity(
    affinity: Tensor, k: int, *, min_size: int = 1, max_size: int | None = None
) -> tuple[Tensor, float]:
    """Twin of :func:`antdiff.ops.interval_partition_affinity`."""
    T = affinity.shape[0]
    l, r = torch.arange(T)[:, None], torch.arange(T)[None, :]
    sums = torch.nn.functional.pad(affinity.cumsum(dim=1), (1, 0))  # [T, T + 1]
    centre = (l + r + 1) // 2  # [T, T]
    return interval_partition(sums[centre, l] - sums[centre, r + 1], k, min_size=min_size, max_size=max_size)


def _prefix(x: Tensor) -> Tensor:
    """Sums of the first 0..T entries, [T + 1]."""
    return torch.nn.functional.pad(x.cumsum(dim=0), (1, 0))
