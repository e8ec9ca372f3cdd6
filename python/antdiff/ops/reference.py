"""Plain PyTorch twins of all ops: same names and signatures, any device, differentiable by autograd.

They document what a kernel computes, and serve as the expected values of its tests (in float64) and as the baseline of
its benchmark. They import only torch and are written for readability rather than speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from antdiff.ops._precision import entry_noise, note, precision_of, with_precision


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
    d = (pred.to(dtype) - target.to(dtype)).unsqueeze(-1).flatten(1)  # [B, N]
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
    return note(torch.stack([x @ x.T for x in rows]).sum(0), tensors)


def gram_(out: Tensor, J: Tensor | Sequence[Tensor | None]) -> Tensor:
    """Twin of :func:`antdiff.ops.gram_`."""
    part = gram(J)
    return with_precision(out.add_(part), precision_of(out), precision_of(part))


def combine(
    weights: Tensor, J: Tensor | Sequence[Tensor | None], out: Tensor | Sequence[Tensor | None] | None = None
) -> Tensor | list[Tensor | None]:
    """Twin of :func:`antdiff.ops.combine`."""

    def combine_rows(x: Tensor, o: Tensor | None) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = torch.einsum("k,k...->...", weights.to(dtype), x.to(dtype))
        return y if o is None else o.copy_(y)

    if isinstance(J, Tensor):
        assert out is None or isinstance(out, Tensor)
        return combine_rows(J, out)
    outs = [None] * len(J) if out is None else list(out)
    return [None if x is None else combine_rows(x, o) for x, o in zip(J, outs, strict=True)]


# ---- weights from a Gram matrix --------------------------------------------------------------------------------------


def pcgrad_weights(
    gram: Tensor,
    perms: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    nonfinite: str = "raise",
) -> Tensor:
    """Twin of :func:`antdiff.ops.pcgrad_weights`."""
    bad = _bad_gram(gram, nonfinite)  # [...]
    if perms is None:
        # generator=None cannot be traced with dynamic shapes.
        options: dict[str, Any] = {} if generator is None else {"generator": generator}
        perms = pcgrad_perms(torch.rand(gram.shape, dtype=torch.float64, device=gram.device, **options))
    k = gram.shape[-1]
    zero = gram.diagonal(dim1=-2, dim2=-1) == 0  # [..., k]: zero rows, whose other entries are not used
    gram = gram.masked_fill(zero[..., None] | zero[..., None, :], 0.0)
    c = torch.eye(k, dtype=gram.dtype, device=gram.device).expand(gram.shape)  # [..., k, k]: p_i = sum_j c_ij g_j
    for s in range(k - 1):  # visit number s of every row i
        j = perms[..., s]  # [..., k]
        rows = gram.gather(-2, j[..., None].expand(gram.shape))  # [..., k, k]: G_j for each i
        norms = gram.diagonal(dim1=-2, dim2=-1).gather(-1, j)  # [..., k]: |g_j|^2
        products = (c * rows).sum(-1)  # [..., k]: <p_i, g_j>
        projection = torch.where((products < 0) & (norms > 0), -products / norms, 0.0)
        c = c.scatter_add(-1, j[..., None], projection[..., None])
    weights = c.sum(-2) if reduction == "sum" else c.mean(-2)
    return torch.where(bad[..., None], torch.nan, weights)


def pcgrad(
    J: Tensor | Sequence[Tensor | None],
    perms: Tensor | None = None,
    *,
    out: Tensor | Sequence[Tensor | None] | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    nonfinite: str = "raise",
) -> tuple[Tensor | list[Tensor | None], Tensor]:
    """Twin of :func:`antdiff.ops.pcgrad`."""
    weights = pcgrad_weights(gram(J), perms, generator=generator, reduction=reduction, nonfinite=nonfinite)
    return combine(weights, J, out), weights


def pcgrad_perms(keys: Tensor) -> Tensor:
    """Return the orders [..., k, k-1] that :func:`pcgrad_weights` draws: other rows by ascending keys [..., k, k]."""
    k = keys.shape[-1]
    self_last = keys.masked_fill(torch.eye(k, dtype=torch.bool, device=keys.device), torch.inf)
    return self_last.argsort(dim=-1, stable=True)[..., : k - 1]


def nash_weights(gram: Tensor, *, solver: str = "newton", nonfinite: str = "raise") -> Tensor:
    """Twin of :func:`antdiff.ops.nash_weights` for ``solver="newton"``: the damped Newton method of textbooks."""
    if solver != "newton":
        raise ValueError(f"solver must be 'newton' in the reference; got {solver!r}. Use antdiff.ops.nash_weights.")
    bad = _bad_gram(gram, nonfinite)  # [...]
    k = gram.shape[-1]
    weights = gram.new_full(gram.shape[:-1], torch.nan)
    for G, w, skip in zip(gram.reshape(-1, k, k), weights.view(-1, k), bad.reshape(-1), strict=True):
        if skip:
            continue
        rows = G.diagonal() > 0
        scale = G.diagonal()[rows].rsqrt()  # D: 1 / |g_i|
        C = G[rows][:, rows] * scale * scale[:, None]  # correlation matrix
        b = _nash_newton(C)
        if b is None:  # no solution, because a convex combination of the rows vanishes
            b = _nash_newton(C + 1e-9 * torch.eye(len(C)).to(C))
        w.zero_()
        w[rows] = torch.nan if b is None else scale * b
    return weights


def nash(
    J: Tensor | Sequence[Tensor | None],
    *,
    out: Tensor | Sequence[Tensor | None] | None = None,
    solver: str = "newton",
    nonfinite: str = "raise",
) -> tuple[Tensor | list[Tensor | None], Tensor]:
    """Twin of :func:`antdiff.ops.nash`."""
    weights = nash_weights(gram(J), solver=solver, nonfinite=nonfinite)
    return combine(weights, J, out), weights


def nash_residual(gram: Tensor, weights: Tensor) -> Tensor:
    """Twin of :func:`antdiff.ops.nash_residual`."""
    rows = gram.diagonal(dim1=-2, dim2=-1) > 0
    return torch.where(rows, (weights * torch.einsum("...ij, ...j -> ...i", gram, weights) - 1).abs(), 0.0).amax(-1)


def _nash_newton(C: Tensor) -> Tensor | None:
    """Return b > 0 with C b = 1/b, or None if Newton's method does not converge."""
    b, last = C.new_ones(len(C)), torch.inf
    for _ in range(64):
        gradient = C @ b - 1 / b
        step = torch.linalg.solve(C + torch.diag(b**-2), -gradient)
        decrement = float((-gradient @ step).clamp(min=0).sqrt())
        if decrement <= 1e-12 or (decrement < 0.25 and decrement > 0.5 * last):
            return b
        last = decrement if decrement < 0.25 else torch.inf
        b = b + step / (1 if decrement < 0.25 else 1 + decrement)
    return None


def gram_weights(
    gram: Tensor,
    method: str,
    *,
    parameter: float | None = None,
    reduction: str = "mean",
    precision: torch.dtype | None = None,
    nonfinite: str = "raise",
) -> Tensor:
    """Twin of :func:`antdiff.ops.gram_weights`. Quadratic programs are solved by trying all 2^k sets of rows."""
    bad = _bad_gram(gram, nonfinite)  # [...]
    k = gram.shape[-1]
    solve = _GRAM_METHODS[method]
    if method in ("aligned_mtl", "imtl_g", "config"):
        parameter = entry_noise(precision_of(gram) if precision is None else precision)
    weights = gram.new_zeros(gram.shape[:-1])
    for G, w, skip in zip(gram.reshape(-1, k, k), weights.view(-1, k), bad.reshape(-1), strict=True):
        rows = G.diagonal() > 0
        if skip:
            w.fill_(torch.nan)
        elif rows.any():
            unit = G.diagonal().max()  # only the weights of fairgrad depend on the unit; see below
            w[rows] = solve(G[rows][:, rows] / unit, k, parameter)
            if method == "fairgrad":
                alpha = 2.0 if parameter is None else parameter
                w.mul_(unit ** (-alpha / (1 + alpha)))
    if method == "config":
        return weights / k if reduction == "mean" else weights
    return weights if reduction == "mean" else weights * k


def _nonnegative_qp(H: Tensor, c: Tensor) -> Tensor:
    """Return argmin over x >= 0 of ``1/2 x^T H x + c^T x``, the best of the stationary points on all sets of rows."""
    m = len(c)
    used = ((torch.arange(2**m)[:, None] >> torch.arange(m)) & 1).to(H)  # [2^m, m]
    blocks = H * used[:, :, None] * used[:, None, :] + torch.diag_embed(1 - used)  # [2^m, m, m]
    x = torch.linalg.lstsq(blocks, (-c * used)[..., None], rcond=1e-13, driver="gelsd").solution[..., 0]  # [2^m, m]
    feasible = (x >= -1e-12 * x.abs().amax(1, keepdim=True)).all(1)
    x = x.clamp(min=0)
    objective = 0.5 * ((x @ H) * x).sum(1) + x @ c
    best: Tensor = x[torch.where(feasible, objective, torch.inf).argmin()]
    return best


def _onto_dual_cone(G: Tensor, e: Tensor) -> Tensor:
    """Return the coefficients of the projection of ``e^T J`` onto ``{d: J d >= 0}``."""
    scale = G.diagonal().rsqrt()
    return e + scale * _nonnegative_qp(G * scale * scale[:, None], scale * (G @ e))


def _min_norm(G: Tensor) -> Tensor:
    """Return the point of the simplex with the least ``a^T G a``, by scaling the optimum of a problem over a >= 0."""
    scale = G.diagonal().rsqrt()
    sigma = scale / scale.max()
    a = sigma * _nonnegative_qp(G * scale * scale[:, None] + sigma * sigma[:, None], -sigma)
    return a / a.sum()


def _upgrad(G: Tensor, k: int, _parameter: float | None) -> Tensor:
    return torch.stack([_onto_dual_cone(G, e) for e in torch.eye(len(G)).to(G)]).sum(0) / k


def _dualproj(G: Tensor, k: int, _parameter: float | None) -> Tensor:
    return _onto_dual_cone(G, torch.ones_like(G[0]) / k)


def _aligned_mtl(G: Tensor, k: int, noise: float | None) -> Tensor:
    values, V = torch.linalg.eigh(G)
    keep = values > max(torch.finfo(G.dtype).eps, noise or 0.0) * len(G) * values.max()
    V, values = V[:, keep], values[keep]
    w: Tensor = V @ ((values.min() / values).sqrt() * V.sum(0)) / k
    return w


def _mgda(G: Tensor, k: int, _parameter: float | None) -> Tensor:
    return _min_norm(G)


def _cagrad(G: Tensor, k: int, c: float | None) -> Tensor:
    """Bisect for nu with ``|J^T x| = c |g_0|``; x / nu are the least-norm weights of the rows ``nu g_i + g_0``.

    The projection of g_0 onto the dual cone bounds nu. It is the result if a convex combination of the rows vanishes.
    """
    c = 0.5 if c is None else c
    b = G.sum(1) / k  # <g_i, g_0>
    square = b.sum() / k  # |g_0|^2
    x = _onto_dual_cone(G, torch.full_like(b, 1 / k)) - 1 / k
    low, high = 1e-30, 1e30
    if x @ G @ x <= c * c * square:
        scale = G.diagonal().rsqrt()
        S = G * scale * scale[:, None]  # correlations
        a = _min_norm(S)
        if a @ S @ a <= 64 * torch.finfo(G.dtype).eps * len(G) * (a * a).sum():
            return x + 1 / k
        low = max(low, float(x.sum()))
    else:
        high = float(x.sum())
    for _ in range(90):
        nu = (low * high) ** 0.5
        x = nu * _min_norm(nu * nu * G + nu * (b + b[:, None]) + square)
        low, high = (nu, high) if x @ G @ x < c * c * square else (low, nu)
    return x + 1 / k


def _equalise(G: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Return coefficients whose combination has equal inner products with all unit rows, and a rounding threshold.

    The coefficients are 0 if gradients are exactly opposed. The threshold is the rounding error of a sum of them,
    relative to its terms. ``noise`` is the error of an entry of the correlation matrix that the precision of J leaves.
    """
    scale, m = G.diagonal().rsqrt(), len(G)
    values, V = torch.linalg.eigh(G * scale * scale[:, None])  # correlations
    eps = 64 * torch.finfo(G.dtype).eps
    zero = max(eps, noise) * m
    V, values = V[:, values > zero], values[values > zero]
    rounding = max(eps, noise / 4) * m**2 / values.min()  # a typical error is at most a quarter of the bound
    on_range = V.sum(0)  # the coordinates of 1 along the eigenvectors
    if len(values) < m and on_range.square().sum() <= rounding**2 * m:
        on_range = torch.zeros_like(on_range)
    return scale * (V @ (on_range / values)), rounding


def _imtl_g(G: Tensor, k: int, noise: float | None) -> Tensor:
    w, rounding = _equalise(G, noise or 0.0)
    return torch.where(w.sum().abs() > rounding * w.abs().sum(), w / w.sum(), 0.0)


def _config(G: Tensor, k: int, noise: float | None) -> Tensor:
    w, _ = _equalise(G, noise or 0.0)
    return w * (G @ w).sum() / (w @ G @ w) if w.any() else w


def _fairgrad(G: Tensor, k: int, alpha: float | None) -> Tensor:
    """Minimise the convex ``1/2 w^T G w - sum_i w_i^p / p``, p = 1 - 1 / alpha, by Newton's method, halving steps."""
    alpha = 2.0 if alpha is None else alpha
    p = 1 - 1 / alpha

    def objective(w: Tensor) -> Tensor:
        return w @ G @ w / 2 - (w.log() if p == 0 else w**p / p).sum()

    w = G.diagonal() ** (-alpha / (1 + alpha))
    for _ in range(200):
        gradient = G @ w - w ** (-1 / alpha)
        step = torch.linalg.solve(G + torch.diag(w ** (-1 / alpha - 1) / alpha), -gradient)
        change, size = (step / w).abs().max(), 1.0
        # Near the optimum, differences of the objective are only rounding errors, so the full step is taken there.
        while change * size > 1e-3 and (
            (w + size * step).min() <= 0 or objective(w + size * step) > objective(w) + 1e-4 * size * gradient @ step
        ):
            size /= 2
        w = w + size * step
        if change <= 1e-15:
            break
    return w


_GRAM_METHODS = {
    "upgrad": _upgrad,
    "dualproj": _dualproj,
    "aligned_mtl": _aligned_mtl,
    "mgda": _mgda,
    "cagrad": _cagrad,
    "imtl_g": _imtl_g,
    "config": _config,
    "fairgrad": _fairgrad,
}


def gradvac_weights(
    gram: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.01,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    nonfinite: str = "raise",
) -> tuple[Tensor, Tensor]:
    """Twin of :func:`antdiff.ops.gradvac_weights`: the algorithm, pair of rows by pair of rows."""
    bad = _bad_gram(gram, nonfinite)  # [...]
    k = gram.shape[-1]
    perms = pcgrad_perms(torch.rand(gram.shape, dtype=torch.float64, device=gram.device, generator=generator))
    weights, targets = gram.new_full(gram.shape[:-1], torch.nan), targets.clone()
    batch = (
        gram.reshape(-1, k, k),
        perms.flatten(0, -3) if perms.dim() > 2 else perms[None],
        targets.view(-1, k, k),
        weights.view(-1, k),
    )
    for skip, G, orders, target, w in zip(bad.reshape(-1), *batch, strict=True):
        if skip:
            continue
        c = torch.eye(k).to(G)
        for i, order in enumerate(orders.tolist()):
            for j in order:
                if G[i, i] == 0 or G[j, j] == 0:
                    continue
                length = (c[i] @ G @ c[i]).clamp(min=0).sqrt()
                phi, t = float(c[i] @ G[j] / (length * G[j, j].sqrt())), float(target[i, j])
                if phi < t:
                    s, r = (1 - phi**2) ** 0.5, (1 - t**2) ** 0.5
                    c[i, j] += length * (t * s - phi * r) / (G[j, j].sqrt() * r)
                target[i, j] = (1 - beta) * t + beta * phi
        w.copy_(c.sum(0) if reduction == "sum" else c.mean(0))
    return weights, targets


def _bad_gram(gram: Tensor, nonfinite: str) -> Tensor:
    """Return which problems [...] are not a Gram matrix: an entry is not finite, or a diagonal entry is negative."""
    bad = ~gram.isfinite().all(-1).all(-1) | (gram.diagonal(dim1=-2, dim2=-1) < 0).any(-1)
    if nonfinite == "raise" and gram.device.type == "cpu" and bad.any():
        raise ValueError("gram must be finite with a non-negative diagonal; got one that is not. Pass J @ J.T.")
    return bad


def interval_partition(cost: Tensor, k: int, *, min_size: int = 1, max_size: int | None = None) -> tuple[Tensor, float]:
    """Twin of :func:`antdiff.ops.interval_partition`."""
    starts, total = interval_partition_all(cost, k, min_size=min_size, max_size=max_size)[k - 1]
    if not starts.numel():
        raise ValueError(
            f"cost must allow a partition into k={k} intervals of {min_size} to {max_size} points; got one that "
            "forbids every partition. Lower k, or replace +inf entries."
        )
    return starts, total


def interval_partition_all(
    cost: Tensor, k: int, *, min_size: int = 1, max_size: int | None = None
) -> list[tuple[Tensor, float]]:
    """Twin of :func:`antdiff.ops.interval_partition_all`."""
    T = cost.shape[0]
    size = torch.arange(T)[None, :] - torch.arange(T)[:, None] + 1  # [T, T], size of the interval l..r
    allowed = (size >= min_size) & (size <= (max_size or T))
    cost = torch.where(allowed, cost, torch.inf)  # [l, r]
    best, first = [cost[0]], [torch.zeros(T, dtype=torch.int64)]  # per layer j: [T] over r, for j + 1 intervals
    for _ in range(1, k):
        before = torch.cat([cost.new_full((1,), torch.inf), best[-1][:-1]])  # [T], lowest cost of points 0..l-1
        candidates = before[:, None] + cost  # [l, r]
        first.append(candidates.argmin(dim=0))  # the smallest l among ties
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
    """Return the sums of the first 0..T entries, [T + 1]."""
    return torch.nn.functional.pad(x.cumsum(dim=0), (1, 0))
