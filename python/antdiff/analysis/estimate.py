"""Affinities from inner products of gradients, and statistics of them. All tensors are float64 on the CPU.

The gradients of n timesteps are estimated twice, from independent halves a and b of the data. G is the Gram matrix of
all 2n estimates, ``[[A A^T, A B^T], [B A^T, B B^T]]``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def raw_cosine(G: Tensor) -> Tensor:
    """Return the cosines ``[n, n]`` of the gradients of both halves together, ``(a + b) / 2``. NaN for zero gradients.

    All timesteps see the same images and noise, so the errors of two gradients are correlated. The errors are large
    compared with the gradients, so they pull the cosine towards the cosine of the errors. For distant timesteps, this
    is below the cosine of the true gradients.
    """
    n = len(G) // 2
    M = (G[:n, :n] + G[:n, n:] + G[n:, :n] + G[n:, n:]) / 4  # [n, n]
    return normalised(M)


def corrected_cosine(G: Tensor) -> Tensor:
    """Return noise-corrected cosines ``[n, n]``: ``(<a_i, b_j> + <b_i, a_j>)/2 / sqrt(<a_i, b_i> <a_j, b_j>)``.

    The errors of the two halves are independent, so products of two errors vanish in expectation, and numerator and
    denominators are unbiased. The result is NaN where ``<a_i, b_i>`` or ``<a_j, b_j>`` is not positive, since the data
    then cannot distinguish the gradient from zero. The diagonal is 1. Other estimates may lie outside [-1, 1].
    """
    n = len(G) // 2
    return normalised((G[:n, n:] + G[n:, :n]) / 2)


def split_half_products(G: Tensor) -> Tensor:
    """Return ``<a_i, b_i>`` ``[n]``, unbiased estimates of the squared gradient norms: the denominators above."""
    return G.diagonal(len(G) // 2).clone()


def split_half_cosine(G: Tensor) -> Tensor:
    """Return ``<a_i, b_i> / (|a_i| |b_i|)`` ``[n]``: the signal in the gradient of a half, from 0 (none) to 1 (all)."""
    n, norm = len(G) // 2, G.diagonal().sqrt()
    return split_half_products(G) / norm[:n] / norm[n:]


def normalised(M: Tensor) -> Tensor:
    """Return ``M_ij / sqrt(M_ii M_jj)`` ``[..., n, n]``, symmetric with diagonal 1; NaN unless M_ii, M_jj > 0."""
    diagonal = M.diagonal(0, -2, -1)  # [..., n]
    scale = torch.where(diagonal > 0, diagonal, torch.nan).rsqrt()
    cosine = M * scale[..., None] * scale[..., None, :]
    cosine = (cosine + cosine.mT) / 2
    cosine.diagonal(0, -2, -1)[~scale.isnan()] = 1
    return cosine


def sketch_sd(G: Tensor, dim: int) -> Tensor:
    """Return a first-order bound ``[n, n]`` on the standard deviation that a sketch adds to :func:`corrected_cosine`.

    Where the bound exceeds about 0.2, the true deviation may be larger, since the bound ignores the curvature of the
    quotient near ``<a_i, b_i> = 0``. To first order, the error of the cosine c is that of the inner product with

        M = (S(a_i, b_j) + S(b_i, a_j)) / (2 sqrt(p_i p_j)) - c/2 (S(a_i, b_i) / p_i + S(a_j, b_j) / p_j),

    with S(x, y) = (x y^T + y x^T) / 2 and p_i = <a_i, b_i>. Its variance is at most 2 |M|_F^2 / dim (see
    :mod:`antdiff.analysis.projection`), and |M|_F follows from G. Without noise (a = b) the bound is
    (1 - c^2) / sqrt(dim).

    Args:
        G: ``[2n, 2n]``.
        dim: size of the sketch.
    """
    n = len(G) // 2
    p, c = split_half_products(G), corrected_cosine(G)
    root = (p[:, None] * p).sqrt()
    A, B, I, J = 0, 1, 0, 1  # half and side: a vector is one of a_i, b_i, a_j, b_j

    def inner(x: tuple[int, int], y: tuple[int, int]) -> Tensor:  # [n, n], or broadcastable to it
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
    """Interpolate affinities ``[n, n]`` on a grid of timesteps to ``[T, T]``, all timesteps.

    The affinity is the Gram matrix of unit vectors, one per grid timestep. Between two grid timesteps the vector is
    their linear interpolation in t, rescaled to length 1; beyond the ends it is the vector of the end. The result is
    therefore symmetric with diagonal 1, equals the given values on the grid, and is continuous in both arguments. This
    includes the neighbourhood of the diagonal, where an interpolation of the matrix itself would not be continuous. The
    interpolation is in t rather than in log-SNR, since clusters are sums over t; between neighbours of a grid that is
    even in t, the two hardly differ.

    Timesteps whose affinities are NaN are removed from the grid.

    Args:
        affinity: float64 ``[n, n]``, symmetric with diagonal 1.
        timesteps: int64 ``[n]``, ascending in ``[0, T)``.
        T: number of timesteps.

    Raises:
        ValueError: no timestep is left, or neighbours have an affinity of at most -1 and cannot be interpolated.
    """
    keep = _without_nan(affinity)
    A, x = affinity[keep][:, keep], timesteps[keep].double()
    if not len(x):
        raise ValueError("affinity must be finite for at least one timestep; all are NaN. Take more images.")
    t = torch.arange(T, dtype=torch.float64)
    right = torch.searchsorted(x, t).clamp(1, max(1, len(x) - 1)) if len(x) > 1 else torch.zeros(T, dtype=torch.int64)
    left = (right - 1).clamp(min=0)
    share = ((t - x[left]) / (x[right] - x[left]).clamp(min=1)).clamp(0, 1)[:, None]  # [T, 1], of the right neighbour
    rows = (1 - share) * A[left] + share * A[right]  # [T, n]
    full = (1 - share.T) * rows[:, left] + share.T * rows[:, right]  # [T, T]
    if not bool((full.diagonal() > 0).all()):
        raise ValueError("affinity of neighbouring timesteps must be above -1; got less. Take more images.")
    return normalised((full + full.T) / 2)


def _without_nan(affinity: Tensor) -> Tensor:
    """Return the timesteps to keep: greedily drop the one with the most NaN entries until no entry is NaN."""
    keep = torch.arange(len(affinity))
    while len(keep):
        holes = affinity[keep][:, keep].isnan().sum(1)  # [n]
        worst = int(holes.argmax())
        if not holes[worst]:
            break
        keep = torch.cat([keep[:worst], keep[worst + 1 :]])
    return keep


_PAIRS = 20_000  # pairs per resample; a random subset of larger sets adds less than 0.01 to the spread


class Correlation(NamedTuple):
    """Spearman's rank correlation and its 95 % interval from a bootstrap over timesteps."""

    value: float
    low: float
    high: float


def gap_correlation(
    affinity: Tensor, position: Tensor, *, resamples: int = 500, generator: torch.Generator | None = None
) -> Correlation:
    """Return Spearman's correlation of affinity with the gap ``|position_i - position_j|`` over all pairs i < j.

    It is negative if the first observation of Go et al. holds. Pairs that share a timestep are not independent, so the
    bootstrap draws timesteps with replacement and takes the pairs of different timesteps among them. Its interval
    describes how much the value depends on the grid. It does not cover other images, noise or training seeds.

    Args:
        affinity: float64 ``[n, n]``, n >= 3. NaN entries are ignored.
        position: ``[n]``: timesteps, or their log-SNR.
        resamples: number of bootstrap resamples.
        generator: random numbers of the bootstrap, on the CPU; default torch's global generator.

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
        if np.ptp(values) == 0 or np.ptp(gaps) == 0:  # ranks are undefined
            return float("nan")
        return float(spearmanr(gaps, values).statistic)

    value = correlation(np.arange(n))
    if np.isnan(value):
        raise ValueError("affinity must have three different finite pairs; got fewer. Take more timesteps or images.")
    bootstrap = []
    for _ in range(resamples):
        at = torch.randint(n, (n,), generator=generator).numpy()
        pairs: np.ndarray | slice = slice(None)
        if len(left) > _PAIRS:
            pairs = torch.randint(len(left), (_PAIRS,), generator=generator).numpy()
        bootstrap.append(correlation(at, pairs))
    low, high = np.nanquantile(bootstrap, [0.025, 0.975])
    return Correlation(value, float(low), float(high))
