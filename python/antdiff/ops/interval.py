"""Exact partition of T ordered points into k contiguous, non-empty intervals at the least total cost.

The interval clustering of ANT (Go et al., NeurIPS 2023, equation 1). Every function here returns ``starts`` int64
``[k]`` on the CPU, 0-based and ascending from 0 (interval i is ``[starts[i], starts[i+1])``, the last one ends at T),
and the total cost. Ties go to the smallest start in each cell of the dynamic program: the same input gives the same
starts on every machine. Runs on the CPU without the GIL; Ctrl-C stops it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from antdiff._checks import as_count
from antdiff.ops._extension import _C, dense

Array = Tensor | np.ndarray[Any, np.dtype[np.float64]]

_LARGEST = 2.0**960  # keeps prefix sums, and the constant that rounds to a grid, far from overflow


def interval_partition(cost: Array, k: int, *, min_size: int = 1, max_size: int | None = None) -> tuple[Tensor, float]:
    """The optimum for any cost of an interval, in O(k T^2).

    Args:
        cost: float64 ``[T, T]`` on the CPU (tensor or array); ``cost[l, r]`` of the inclusive interval l..r. May be
            negative; +inf forbids the interval; entries with r < l are ignored. Non-contiguous input is copied.
        k: number of intervals, ``1 <= k <= T``.
        min_size, max_size: least and most points in an interval; default 1 and T, which bound nothing.

    Returns:
        ``starts`` int64 ``[k]`` and the total cost.

    Raises:
        TypeError: cost is not a float64 tensor or array, or a size is no int.
        ValueError: a wrong shape or device, NaN or -inf at some r >= l, ``k`` or sizes that no partition of T points
            meets, or +inf entries that forbid every partition.
    """
    cost = _square("cost", cost)
    sizes = _sizes(cost.shape[0], k, min_size, max_size)
    return _solve(_C.interval_cost, (cost,), sizes)


def interval_partition_all(
    cost: Array, k: int, *, min_size: int = 1, max_size: int | None = None
) -> list[tuple[Tensor, float]]:
    """The optimum for every number of intervals from 1 to k, for the time of one.

    Arguments and errors are those of :func:`interval_partition`, with one difference: a number of intervals that the
    sizes or +inf entries make impossible raises nothing.

    Returns:
        k pairs; pair ``i - 1`` is ``interval_partition(cost, i)``, or an empty ``starts`` and +inf where there is none.
    """
    cost = _square("cost", cost)
    T = cost.shape[0]
    k, min_size, max_size = _counts(T, k, min_size, max_size)
    starts = torch.empty(k, k, dtype=torch.int64)  # row i-1 begins with the i starts
    totals = torch.empty(k, dtype=torch.float64)
    _C.interval_cost(cost, k, min_size, max_size, starts, totals)
    return [
        (starts[i, : i + 1 if total < float("inf") else 0].clone(), total) for i, total in enumerate(totals.tolist())
    ]


def interval_partition_values(
    x: Array, k: int, *, p: int = 1, weight: Array | None = None, min_size: int = 1, max_size: int | None = None
) -> tuple[Tensor, float]:
    """The optimum where the cost of an interval is the distance of its values to their centre.

    ``p=1``: sum of ``weight |x - m|``, m the (weighted) median: k-medians. Without weights m is
    ``x[(l + r + 1) // 2]``, as in ANT's log-SNR cost. ``p=2``: sum of ``weight (x - m)^2``, m the (weighted) mean:
    k-means. For monotone x, rising or falling, either costs O(k T log T) time and O(k T) memory.

    Values (and weights) for ``p=1`` are rounded to a grid of about 2^-51 T max|x|, on which all sums are exact: the
    result is the exact optimum of the rounded values, ties included. For ``p=2`` it is optimal to rounding.

    x that is not monotone: ``p=2`` takes O(k T^2); ``p=1`` keeps ANT's centre ``x[(l + r + 1) // 2]`` (then no median)
    and takes O(k T^2) time and T^2 memory; ``p=1`` with weights raises.

    Args:
        x: float64 ``[T]`` on the CPU, finite (tensor or array).
        k, min_size, max_size: as in :func:`interval_partition`.
        p: 1 or 2.
        weight: float64 ``[T]`` on the CPU, finite, >= 0, with a positive sum; default ones.

    Returns:
        ``starts`` int64 ``[k]`` and the total cost.

    Raises:
        TypeError, ValueError: as :func:`interval_partition`, and where a rule above does not hold.
    """
    x = _finite("x", _float64("x", x, 1, "[T]"))
    p = as_count("p", p)
    if p > 2:
        raise ValueError(f"p must be 1 (absolute distance) or 2 (squared distance); got {p}.")
    if weight is not None:
        weight = _weight(weight, x.shape[0])
    sizes = _sizes(x.shape[0], k, min_size, max_size)
    step = x.diff()
    rises, falls = bool((step >= 0).all()), bool((step <= 0).all())
    if not rises and not falls:
        if p == 2:
            return _solve(_C.interval_values, (x, weight, p, True), sizes)
        if weight is None:
            return _solve(_C.interval_affinity, (-(x[:, None] - x).abs(),), sizes)  # [T, T]
        up, down = int((step > 0).nonzero()[0]), int((step < 0).nonzero()[0])
        raise ValueError(
            f"x must be monotone for p=1 with weights; it rises after index {up} and falls after index {down}. "
            "Leave out the weights, use p=2, or pass the cost matrix that you mean to interval_partition."
        )
    return _solve(_C.interval_values, (x if rises else -x, weight, p, False), sizes)


def interval_partition_affinity(
    affinity: Array, k: int, *, min_size: int = 1, max_size: int | None = None
) -> tuple[Tensor, float]:
    """The optimum for ANT's gradient cost, ``-sum_{t=l..r} affinity[c, t]`` with ``c = (l + r + 1) // 2``.

    Rows of costs are made as they are needed, in O(k T^2) time and O(k T) memory. Affinities are rounded to a grid of
    2^-51 T max|affinity|, on which all sums are exact.

    Args:
        affinity: float64 ``[T, T]`` on the CPU, finite; task affinity scores, for instance.
        k, min_size, max_size: as in :func:`interval_partition`.

    Returns:
        ``starts`` int64 ``[k]`` and the total cost.

    Raises:
        TypeError, ValueError: as :func:`interval_partition`.
    """
    affinity = _finite("affinity", _square("affinity", affinity))
    return _solve(_C.interval_affinity, (affinity,), _sizes(affinity.shape[0], k, min_size, max_size))


# ---- checks ----------------------------------------------------------------------------------------------------------


def _solve(solver: Any, data: tuple[Any, ...], sizes: tuple[int, int, int]) -> tuple[Tensor, float]:
    starts = torch.empty(sizes[0], dtype=torch.int64)
    total = torch.empty(1, dtype=torch.float64)
    solver(*data, *sizes, starts, total)
    return starts, total.item()


def _float64(name: str, x: object, ndim: int, shape: str) -> Tensor:
    """``x`` as a contiguous CPU tensor; a copy only where its strides ask for one."""
    if isinstance(x, np.ndarray):
        if x.dtype != np.float64:
            raise TypeError(f"{name} must be float64; got a {x.dtype} array. Convert it with .astype(numpy.float64).")
        x = torch.from_numpy(x if x.flags.writeable and min(x.strides, default=0) >= 0 else x.copy())
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a float64 tensor or NumPy array {shape}; got {type(x).__name__}.")
    if x.dtype != torch.float64:
        raise TypeError(f"{name} must be float64; got {x.dtype}. Convert it with .double().")
    if x.requires_grad:
        raise ValueError(f"{name} must not require grad: a partition has no gradient. Pass {name}.detach().")
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, where the partition runs; got {x.device}. Call .cpu().")
    if x.dim() != ndim or x.numel() == 0:
        raise ValueError(f"{name} must have shape {shape} with T >= 1; got {list(x.shape)}.")
    return dense(name, x)


def _square(name: str, x: object) -> Tensor:
    x = _float64(name, x, 2, "[T, T]")
    if x.shape[0] != x.shape[1]:
        raise ValueError(f"{name} must have shape [T, T], one row and one column a point; got {list(x.shape)}.")
    return x


def _finite(name: str, x: Tensor) -> Tensor:
    least, most = x.aminmax()  # one pass and no copy: x may be [T, T]
    if not (least >= -_LARGEST and most <= _LARGEST):  # NaN fails both
        at = (~(x.abs() <= _LARGEST)).nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite (and at most 2^960 in size); got {x[tuple(at)].item()} at {at}.")
    return x


def _weight(weight: object, T: int) -> Tensor:
    weight = _finite("weight", _float64("weight", weight, 1, "[T]"))
    if weight.shape[0] != T:
        raise ValueError(f"weight must have shape [T], one number a point of x; got {weight.shape[0]} with T={T}.")
    if (weight < 0).any():
        at = int((weight < 0).nonzero()[0])
        raise ValueError(f"weight must not be negative; got {weight[at].item()} at {at}.")
    if not weight.any():
        raise ValueError("weight must have a positive sum; all entries are 0.")
    return weight


def _counts(T: int, k: int, min_size: int, max_size: int | None) -> tuple[int, int, int]:
    k, min_size = as_count("k", k), as_count("min_size", min_size)
    if k > T:
        raise ValueError(f"k must be at most T, since no interval is empty; got k={k} with T={T}.")
    max_size = T if max_size is None else min(T, as_count("max_size", max_size))
    if max_size < min_size:
        raise ValueError(
            f"min_size must be at most max_size and T; got min_size={min_size}, max_size={max_size}, T={T}."
        )
    return k, min_size, max_size


def _sizes(T: int, k: int, min_size: int, max_size: int | None) -> tuple[int, int, int]:
    k, min_size, max_size = _counts(T, k, min_size, max_size)
    if not k * min_size <= T <= k * max_size:
        raise ValueError(
            f"sizes must satisfy k * min_size <= T <= k * max_size; got k={k}, min_size={min_size}, "
            f"max_size={max_size}, T={T}. Change k or the sizes."
        )
    return k, min_size, max_size
