"""Exact partition of T ordered points into k contiguous, non-empty intervals with the lowest total cost.

This is the interval clustering of ANT (Go et al., NeurIPS 2023, equation 1). Every function returns the total cost and
``starts``, int64 ``[k]`` on the CPU, 0-based and ascending from 0: interval i is ``[starts[i], starts[i+1])``, and the
last interval ends at T. Ties are resolved in favour of the smallest start in each cell of the dynamic program, so the
same input gives the same starts on every machine. The functions run on the CPU, release the GIL, and can be interrupted
with Ctrl-C.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from antdiff._checks import as_count, as_tensor
from antdiff.ops._extension import _C, dense

Array = Tensor | np.ndarray[Any, np.dtype[np.float64]]

_LARGEST = 2.0**960  # keeps the prefix sums and the constant that rounds to a grid far from overflow


def interval_partition(cost: Array, k: int, *, min_size: int = 1, max_size: int | None = None) -> tuple[Tensor, float]:
    """Find the optimal partition for an arbitrary cost per interval, in O(k T^2).

    Args:
        cost: float64 ``[T, T]`` on the CPU, a tensor or a NumPy array. ``cost[l, r]`` is the cost of the interval l..r,
            both ends included. It may be negative; +inf forbids the interval. Entries with r < l are ignored.
            Non-contiguous input is copied.
        k: Number of intervals, ``1 <= k <= T``.
        min_size, max_size: Smallest and largest number of points per interval. The defaults 1 and T are no
            restriction.

    Returns:
        ``starts``, int64 ``[k]``, and the total cost.

    Raises:
        TypeError: cost is not a float64 tensor or array, or a size is not an int.
        ValueError: the shape or the device is wrong; an entry with r >= l is NaN or -inf; no partition of T points
            satisfies ``k`` and the sizes; or +inf entries forbid every partition.
    """
    cost = _square("cost", cost)
    sizes = _sizes(cost.shape[0], k, min_size, max_size)
    return _solve(_C.interval_cost, (cost,), sizes)


def interval_partition_all(
    cost: Array, k: int, *, min_size: int = 1, max_size: int | None = None
) -> list[tuple[Tensor, float]]:
    """Find the optimal partition for every number of intervals from 1 to k, in the time of the one for k.

    Arguments and errors are those of :func:`interval_partition`, with one exception: a number of intervals that the
    sizes or +inf entries make impossible does not raise.

    Returns:
        A list of k pairs. Pair ``i - 1`` is ``interval_partition(cost, i)``, or an empty ``starts`` and +inf if there
        is no such partition.
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
    """Find the optimal partition if the cost of an interval is the distance of its values to their centre.

    With ``p=1`` the cost is the sum of ``weight |x - m|``, where m is the (weighted) median: k-medians. Without weights
    m is ``x[(l + r + 1) // 2]``, as in ANT's log-SNR cost. With ``p=2`` the cost is the sum of ``weight (x - m)^2``,
    where m is the (weighted) mean: k-means. For monotone x, ascending or descending, both take O(k T log T) time and
    O(k T) memory.

    For ``p=1``, values and weights are rounded to a grid of about 2^-51 T max|x| on which all sums are exact. The
    result is the exact optimum for the rounded values, including ties. For ``p=2`` it is optimal up to rounding.

    If x is not monotone, ``p=2`` takes O(k T^2) time. ``p=1`` keeps ANT's centre ``x[(l + r + 1) // 2]``, which is then
    not a median, and takes O(k T^2) time and T^2 memory; with weights it raises.

    Args:
        x: float64 ``[T]`` on the CPU, finite, a tensor or a NumPy array.
        k, min_size, max_size: As in :func:`interval_partition`.
        p: 1 (default) or 2.
        weight: float64 ``[T]`` on the CPU, finite, non-negative, with a positive sum. Default None: ones.

    Returns:
        ``starts``, int64 ``[k]``, and the total cost.

    Raises:
        TypeError, ValueError: as :func:`interval_partition`, and if an argument breaks a rule above.
    """
    x = _finite("x", _float64("x", x, 1, "[T]"))
    p = as_count("p", p)
    if p > 2:
        raise ValueError(f"p must be 1 or 2; got {p}. Use 1 for the absolute and 2 for the squared distance.")
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
            f"x must be monotone for p=1 with weights; got x that rises after index {up} and falls after index {down}. "
            "Leave out the weights, use p=2, or pass a cost matrix to interval_partition."
        )
    return _solve(_C.interval_values, (x if rises else -x, weight, p, False), sizes)


def interval_partition_affinity(
    affinity: Array, k: int, *, min_size: int = 1, max_size: int | None = None
) -> tuple[Tensor, float]:
    """Find the optimal partition for ANT's gradient cost, ``-sum_{t=l..r} affinity[c, t]``, ``c = (l + r + 1) // 2``.

    Rows of costs are computed when they are needed, in O(k T^2) time and O(k T) memory. Affinities are rounded to a
    grid of 2^-51 T max|affinity| on which all sums are exact.

    Args:
        affinity: float64 ``[T, T]`` on the CPU, finite; for example task affinity scores.
        k, min_size, max_size: As in :func:`interval_partition`.

    Returns:
        ``starts``, int64 ``[k]``, and the total cost.

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
    """Return ``x`` as a contiguous float64 CPU tensor. It is copied only if its strides require it."""
    if isinstance(x, np.ndarray):
        if x.dtype != np.float64:
            raise TypeError(f"{name} must be float64; got a {x.dtype} array. Convert it with .astype(numpy.float64).")
        if any(step == 0 and size > 1 for step, size in zip(x.strides, x.shape, strict=True)):
            raise ValueError(
                f"{name} must not overlap itself; got shape {list(x.shape)} with strides {x.strides}. Copy it."
            )
        x = torch.from_numpy(x if x.flags.writeable and min(x.strides, default=0) >= 0 else x.copy())
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a float64 tensor or NumPy array {shape}; got {type(x).__name__}. "
            "Convert it with numpy.asarray(..., dtype=numpy.float64)."
        )
    if x.dtype != torch.float64:
        raise TypeError(f"{name} must be float64; got {x.dtype}. Convert it with .double().")
    if x.requires_grad:
        raise ValueError(f"{name} must not require grad, because a partition has no gradient. Pass {name}.detach().")
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, where the partition runs; got {x.device}. Call .cpu().")
    if x.dim() != ndim or x.numel() == 0:
        raise ValueError(f"{name} must have shape {shape} with T >= 1; got {list(x.shape)}. Drop or add dimensions.")
    return as_tensor(name, dense(name, x))


def _square(name: str, x: object) -> Tensor:
    x = _float64(name, x, 2, "[T, T]")
    if x.shape[0] != x.shape[1]:
        raise ValueError(
            f"{name} must have shape [T, T]; got {list(x.shape)}. It needs one row and one column per point."
        )
    return x


def _finite(name: str, x: Tensor) -> Tensor:
    least, most = x.aminmax()  # one pass without a copy, because x may be [T, T]
    if not (least >= -_LARGEST and most <= _LARGEST):  # NaN fails both comparisons
        at = (~(x.abs() <= _LARGEST)).nonzero()[0].tolist()
        raise ValueError(
            f"{name} must be finite, and at most 2^960 in magnitude; got {x[tuple(at)].item()} at {at}. "
            "Rescale it or remove the entry."
        )
    return x


def _weight(weight: object, T: int) -> Tensor:
    weight = _finite("weight", _float64("weight", weight, 1, "[T]"))
    if weight.shape[0] != T:
        raise ValueError(
            f"weight must have shape [T] with T={T}; got {weight.shape[0]} numbers. Pass one number per point of x."
        )
    if (weight < 0).any():
        at = int((weight < 0).nonzero()[0])
        raise ValueError(f"weight must not be negative; got {weight[at].item()} at {at}. Use 0 to ignore a point.")
    if not weight.any():
        raise ValueError("weight must have a positive sum; got only zeros. Leave it out to weight all points equally.")
    return weight


def _counts(T: int, k: int, min_size: int, max_size: int | None) -> tuple[int, int, int]:
    k, min_size = as_count("k", k), as_count("min_size", min_size)
    if k > T:
        raise ValueError(f"k must be at most T, because no interval may be empty; got k={k} with T={T}. Lower k.")
    max_size = T if max_size is None else min(T, as_count("max_size", max_size))
    if max_size < min_size:
        raise ValueError(
            f"min_size must be at most max_size and T; got min_size={min_size}, max_size={max_size}, T={T}. "
            "Lower min_size."
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
