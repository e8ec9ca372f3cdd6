"""Affinities from inner products of gradients, and what can be read off them. float64 on the CPU throughout.

The gradients of n timesteps are estimated twice, from independent halves a and b of the data, and G is the Gram matrix
of all 2n of them: ``[[A A^T, A B^T], [B A^T, B B^T]]``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def raw_cosine(G: Tensor) -> Tensor:
    """Cosines ``[n, n]`` of the gradients of both halves together, ``(a + b) / 2``; NaN where one is zero.

    With the same images and noise for all timesteps, the errors of two gradients are correlated, and long: the cosine
    is pulled towards that of the errors, which for distant timesteps is below that of the gradients.
    """
    n = len(G) // 2
    M = (G[:n, :n] + G[:n, n:] + G[n:, :n] + G[n:, n:]) / 4  # [n, n]
    return normalised(M)


def corrected_cosine(G: Tensor) -> Tensor:
    """Noise-corrected cosines ``[n, n]``: ``(<a_i, b_j> + <b_i, a_j>)/2 / sqrt(<a_i, b_i> <a_j, b_j>)``.

    Errors of the two halves are independent, so no product of two errors is left in an expectation: numerator and
    denominators are unbiased. NaN where ``<a_i, b_i>`` or ``<a_j, b_j>`` is not positive, for then the data do not
    tell the gradient from zero. The diagonal is 1; elsewhere an estimate may leave [-1, 1].
    """
    n = len(G) // 2
    return normalised((G[:n, n:] + G[n:, :n]) / 2)


def split_half_products(G: Tensor) -> Tensor:
    """``<a_i, b_i>`` ``[n]``: unbiased estimates of the squared norms of the gradients, and the denominators above."""
    return G.diagonal(len(G) // 2).clone()


def split_half_cosine(G: Tensor) -> Tensor:
    """``<a_i, b_i> / (|a_i| |b_i|)`` ``[n]``: how much of a half's gradient is signal. 1: all, 0: none."""
    n, norm = len(G) // 2, G.diagonal().sqrt()
    return split_half_products(G) / norm[:n] / norm[n:]


def normalised(M: Tensor) -> Tensor:
    """``M_ij / sqrt(M_ii M_jj)`` ``[..., n, n]``: symmetric, diagonal 1; NaN where M_ii or M_jj is not positive."""
    diagonal = M.diagonal(0, -2, -1)  # [..., n]
    scale = torch.where(diagonal > 0, diagonal, torch.nan).rsqrt()
    cosine = M * scale[..., None] * scale[..., None, :]
    cosine = (cosine + cosine.mT) / 2
    cosine.diagonal(0, -2, -1)[~scale.isnan()] = 1
    return cosine


def sketch_sd(G: Tensor, dim: int) -> Tensor:
    """Bound, to first order, on the standard deviation that sketching to ``dim`` numbers adds to
    :func:`corrected_cosine`, ``[n, n]``.

    Above some 0.2 what it leaves out counts, the curvature of the quotient near ``<a_i, b_i> = 0``, and the deviation
    may be more. To first order the error of the cosine c is that of the inner product with

        M = (S(a_i, b_j) + S(b_i, a_j)) / (2 sqrt(p_i p_j)) - c/2 (S(a_i, b_i) / p_i + S(a_j, b_j) / p_j),

    S(x, y) = (x y^T + y x^T) / 2 and p_i = <a_i, b_i>, whose variance is at most 2 |M|_F^2 / dim (see
    :mod:`antdiff.analysis.projection`). |M|_F follows from G. Without noise (a = b) this is (1 - c^2) / sqrt(dim).
    """
    n = len(G) // 2
    p, c = split_half_products(G), corrected_cosine(G)
    root = (p[:, None] * p).sqrt()
    A, B, I, J = 0, 1, 0, 1  # half, and side: a vector is one of a_i, b_i, a_j, b_j

    def inner(x: tuple[int, int], y: tuple[int, int]) -> Tensor:  # [n, n], or broadcast to it
        block = G[x[0] * n : (x[0] + 1) * n, y[0] * n : (y[0] + 1) * n]
        if x[1] == y[1]:
            return block.diagonal()[:, None] if x[1] == I else block.diagonal()[None]
        return block if x[1] == I else block.T

    terms = [
        (0.5 / root, (A, I), (B, J)),
        (0.5 / root, (B, I), (A, J)),
        (-c / (2 * p[:, None]), (A, I), (B, I)),
        (-c / (2 * p), (A, J), (B, J)),
    ]
    squared = torch.zeros_like(c)
    for f, x, y in terms:
        for g, z, w in terms:
            squared += f * g * (inner(x, z) * inner(y, w) + inner(x, w) * inner(y, z)) / 2
    return (2 * squared.clamp(min=0) / dim).sqrt()


def interpolate(affinity: Tensor, timesteps: Tensor, T: int) -> Tensor:
    """Affinities ``[T, T]`` of all timesteps from those ``[n, n]`` on a grid.

    The affinity is the Gram matrix of unit vectors, one a timestep of the grid. Between two of the grid the vector is
    taken to be their linear interpolation in t, of length 1 again, and beyond the ends it is that of the end. So the
    result is symmetric, has diagonal 1, equals the grid's values on the grid and is continuous in both arguments, next
    to the diagonal too (interpolating the matrix itself is not). In t and not in log-SNR, since clusters are sums over
    t, and between neighbours of a grid that is even in t the two hardly differ.

    Timesteps whose affinities are NaN are left out of the grid.

    Args:
        affinity: float64 ``[n, n]``, symmetric with diagonal 1.
        timesteps: int64 ``[n]``, ascending in ``[0, T)``.
        T: number of timesteps.

    Raises:
        ValueError: no timestep is left, or two neighbours have affinity -1 or less, between which nothing lies.
    """
    keep = _without_nan(affinity)
    A, x = affinity[keep][:, keep], timesteps[keep].double()
    if not len(x):
        raise ValueError("affinity must be finite for a timestep at least; all are NaN. Take more images.")
    t = torch.arange(T, dtype=torch.float64)
    right = torch.searchsorted(x, t).clamp(1, max(1, len(x) - 1)) if len(x) > 1 else torch.zeros(T, dtype=torch.int64)
    left = (right - 1).clamp(min=0)
    share = ((t - x[left]) / (x[right] - x[left]).clamp(min=1)).clamp(0, 1)[:, None]  # [T, 1], of the right one
    rows = (1 - share) * A[left] + share * A[right]  # [T, n]
    full = (1 - share.T) * rows[:, left] + share.T * rows[:, right]  # [T, T]
    if not bool((full.diagonal() > 0).all()):
        raise ValueError("affinity between neighbouring timesteps must be above -1; it is not. Take more images.")
    return normalised((full + full.T) / 2)


def _without_nan(affinity: Tensor) -> Tensor:
    """Indices of the timesteps to keep: the fewest are dropped, greedily, until no entry is NaN."""
    keep = torch.arange(len(affinity))
    while len(keep):
        holes = affinity[keep][:, keep].isnan().sum(1)  # [n]
        worst = int(holes.argmax())
        if not holes[worst]:
            break
        keep = torch.cat([keep[:worst], keep[worst + 1 :]])
    return keep


_PAIRS = 20_000  # of a resample: of more, as many at random, which adds less than 0.01 to its spread


class Correlation(NamedTuple):
    """Spearman's rank correlation and the 95 % interval of a bootstrap over timesteps."""

    value: float
    low: float
    high: float


def gap_correlation(
    affinity: Tensor, position: Tensor, *, resamples: int = 500, generator: torch.Generator | None = None
) -> Correlation:
    """Spearman's correlation of affinity and gap ``|position_i - position_j|`` over all pairs i < j (O1: negative).

    Pairs that share a timestep are not independent, so the bootstrap draws timesteps, with replacement, and takes the
    pairs of different ones among them. Its interval says how much the value depends on the grid; it knows nothing of
    other images, noise or training seeds.

    Args:
        affinity: float64 ``[n, n]``, n >= 3; NaN entries are left out.
        position: ``[n]``: timesteps, or their log-SNR.
        resamples: of the bootstrap.
        generator: of the bootstrap, on the CPU; default torch's global one.

    Raises:
        ValueError: fewer than three pairs.
    """
    from scipy.stats import spearmanr

    A, x = affinity.numpy(), position.double().numpy()

    n = len(A)
    left, right = np.triu_indices(n, 1)

    def correlation(at: np.ndarray, pairs: np.ndarray | slice = slice(None)) -> float:
        i, j = at[left[pairs]], at[right[pairs]]
        seen = (i != j) & np.isfinite(A[i, j])
        i, j = i[seen], j[seen]
        if len(i) < 3:
            return float("nan")
        values, gaps = A[i, j], np.abs(x[i] - x[j])
        if np.ptp(values) == 0 or np.ptp(gaps) == 0:  # no ranking, no correlation
            return float("nan")
        return float(spearmanr(gaps, values).statistic)

    value = correlation(np.arange(n))
    if np.isnan(value):
        raise ValueError("affinity must have at least three different finite pairs; take more timesteps or images.")
    bootstrap = []
    for _ in range(resamples):
        at = torch.randint(n, (n,), generator=generator).numpy()
        pairs: np.ndarray | slice = slice(None)
        if len(left) > _PAIRS:
            pairs = torch.randint(len(left), (_PAIRS,), generator=generator).numpy()
        bootstrap.append(correlation(at, pairs))
    low, high = np.nanquantile(bootstrap, [0.025, 0.975])
    return Correlation(value, float(low), float(high))
