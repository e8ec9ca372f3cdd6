"""Clusters of timesteps: K contiguous intervals of 0..T-1, each trained as one task."""

from __future__ import annotations

import bisect
import json
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from antdiff import ops
from antdiff._checks import MOST_TIMESTEPS, as_choice, as_count, as_counts, as_number, as_path, as_tensor, describe
from antdiff._files import write_json

Array = Tensor | np.ndarray[Any, Any]

_FORMAT, _VERSION = "antdiff.TimestepClusters", 1


class TimestepClusters:
    """K contiguous, non-empty, half-open intervals ``[starts[i], starts[i+1])`` that cover timesteps 0..T-1.

    Timestep 0 has the least noise, so cluster 0 does too. Objects are immutable, compare by value and can be pickled.

    Clusters of continuous noise levels (EDM's sigma, flow matching's tau) also have ``edges``: the k-1 noise levels
    between neighbouring clusters. Then :meth:`cluster_of` accepts timesteps (integers) and noise levels (floats).

    Args:
        T: number of timesteps.
        starts: first timestep of each cluster, strictly ascending from 0.
        edges: noise levels between the clusters, ``[k-1]``, positive and strictly ascending. None: discrete timesteps.

    Raises:
        TypeError, ValueError: ``starts`` or ``edges`` break these rules.
    """

    __slots__ = ("_boundaries", "_bounds", "_edges")

    def __init__(self, T: int, starts: Sequence[int] | Tensor, *, edges: Sequence[float] | None = None) -> None:
        T = as_count("T", T, most=MOST_TIMESTEPS)
        if isinstance(starts, np.ndarray):
            starts = torch.from_numpy(np.ascontiguousarray(starts)) if starts.dtype.kind in "iu" else starts.tolist()
        values = tuple(as_counts("starts", starts))
        bounds = (*values, T)
        if not values or values[0] != 0 or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"starts must ascend strictly from 0 and stay below T={T}; got {list(values)}.")
        if edges is not None:
            if not isinstance(edges, (list, tuple)):
                raise TypeError(f"edges must be a list of numbers; got {describe(edges)}.")
            edges = tuple(as_number("edges", e, rule="positive and finite") for e in edges)
            if len(edges) != len(values) - 1:
                raise ValueError(
                    f"edges must have k-1={len(values) - 1} entries, one between neighbours; got {len(edges)}."
                )
            if any(not a < b for a, b in zip((0.0, *edges), (*edges, math.inf), strict=True)):
                raise ValueError(f"edges must ascend strictly and be positive and finite; got {list(edges)}.")
        self._bounds: tuple[int, ...] = bounds  # [k + 1]
        self._edges: tuple[float, ...] | None = edges  # [k - 1]
        self._boundaries: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    # ---- constructors ------------------------------------------------------------------------------------------------

    @classmethod
    def uniform(cls, T: int, k: int) -> TimestepClusters:
        """Return clusters of equal size, the optimum of ANT's timestep cost (the sum of distances to the centre).

        Cluster i starts at ``i * T // k``. Sizes differ by at most one, if k does not divide T. The dynamic program
        cannot do better: sizes m and m+1 often cost the same, so its optimum is one of many.
        """
        T, k = as_count("T", T, most=MOST_TIMESTEPS), as_count("k", k)
        if k > T:
            raise ValueError(f"k must be at most T, since no cluster may be empty; got k={k} with T={T}.")
        return cls(T, [i * T // k for i in range(k)])

    @classmethod
    def from_log_snr(
        cls,
        log_snr: Array,
        k: int,
        *,
        p: int = 1,
        weight: Array | None = None,
        min_size: int = 1,
        max_size: int | None = None,
    ) -> TimestepClusters:
        """Return clusters of nearly constant log-SNR, the exact optimum of ANT's SNR cost.

        The cost of a cluster is ``sum_t |log_snr[t] - log_snr[centre]|``.
        The centre is ``(l + r + 1) // 2`` for a cluster from l to r. ANT's script rounds ``(l + r + 1) / 2`` with ties
        to even, which moves a boundary by at most 1 timestep for T = 1000 and k = 5, and by at most 5 for T = 250.

        Args:
            log_snr: float ``[T]``, tensor or array, finite, falling with t (see :mod:`antdiff.diffusion.schedules`).
                Pass the logarithm: raw SNR would put nearly all timesteps into one cluster.
            k: number of clusters.
            p: 1 for the absolute distance to the median (ANT), 2 for the squared distance to the mean.
            weight: float ``[T]`` >= 0, how much each timestep counts. With ``p=1`` the centre is the weighted median.
            min_size, max_size: bounds on the number of timesteps per cluster. Default: no bounds.

        Raises:
            TypeError, ValueError: as :func:`antdiff.ops.interval_partition_values`; also if a value is not finite.
        """
        x = _as_float64("log_snr", log_snr, 1)
        bad = (~x.isfinite()).nonzero()
        if bad.numel():
            t, value = int(bad[0, 0]), x[bad[0, 0]].item()
            raise ValueError(
                f"log_snr must be finite; got {value} at t={t}."
                + (
                    " The SNR of this schedule is zero at that timestep, often the last one. Set its log-SNR to "
                    "that of its neighbour (log_snr[-1] = log_snr[-2])."
                    if value == -math.inf
                    else " Pass the natural logarithm of a positive, finite SNR."
                )
            )
        weight = None if weight is None else _as_float64("weight", weight, 1)
        starts, _ = ops.interval_partition_values(x, k, p=p, weight=weight, min_size=min_size, max_size=max_size)
        return cls(x.shape[0], starts)

    @classmethod
    def from_affinity(cls, tas: Array, k: int, *, min_size: int = 1, max_size: int | None = None) -> TimestepClusters:
        """Return clusters of timesteps with aligned gradients, the exact optimum of ANT's gradient cost.

        The cost of a cluster is ``-sum_t tas[centre, t]``.

        Args:
            tas: float ``[T, T]``, tensor or array, the task affinity scores of all pairs of timesteps.
            k, min_size, max_size: as in :meth:`from_log_snr`. For noisy affinities, set bounds; 0.5 and 1.5 times T/k
                are common.
        """
        affinity = _as_float64("tas", tas, 2)
        if affinity.shape[0] != affinity.shape[1] or not bool(affinity.isfinite().all()):
            raise ValueError(
                f"tas must be finite and have shape [T, T]; got {describe(affinity)}. Interpolate NaN entries."
            )
        starts, _ = ops.interval_partition_affinity(affinity, k, min_size=min_size, max_size=max_size)
        return cls(affinity.shape[0], starts)

    @classmethod
    def from_cost(cls, cost: Array, k: int, *, min_size: int = 1, max_size: int | None = None) -> TimestepClusters:
        """Return the optimal clusters for any interval cost ``[T, T]``; see :func:`antdiff.ops.interval_partition`."""
        starts, _ = ops.interval_partition(cost, k, min_size=min_size, max_size=max_size)
        return cls(int(cost.shape[0]), starts)

    @classmethod
    def from_sigmas(
        cls,
        sigmas: Array,
        k: int,
        *,
        p: int = 1,
        weight: Array | None = None,
        min_size: int = 1,
        max_size: int | None = None,
    ) -> TimestepClusters:
        """Return clusters of EDM noise levels, by log-SNR = -2 log(sigma).

        The edges are the geometric means of neighbouring levels.

        Args:
            sigmas: float ``[T]``, positive and strictly ascending. The levels of a sampler descend: flip them and leave
                out the final 0. Space them as training draws them, or pass their density as ``weight``.
            k, p, weight, min_size, max_size: as in :meth:`from_log_snr`.
        """
        sigma = _as_float64("sigmas", sigmas, 1)
        if not (sigma > 0).all() or not (sigma < math.inf).all():
            raise ValueError(
                f"sigmas must be positive and finite; got values from {sigma.min():.6g} to {sigma.max():.6g}. If they "
                "come from a sampler, leave out the final 0."
            )
        if not (sigma.diff() > 0).all():
            t = int((sigma.diff() <= 0).nonzero()[0, 0])
            raise ValueError(
                f"sigmas must ascend strictly, since t=0 has the least noise; got {sigma[t]:.6g} before "
                f"{sigma[t + 1]:.6g} at t={t}. If they come from a sampler, flip them: sigmas.flip(0)."
            )
        log_sigma = sigma.log()
        clusters = cls.from_log_snr(-2 * log_sigma, k, p=p, weight=weight, min_size=min_size, max_size=max_size)
        inner = clusters.starts[1:]
        return cls(clusters.T, clusters.starts, edges=((log_sigma[inner - 1] + log_sigma[inner]) / 2).exp().tolist())

    @classmethod
    def from_quantiles(
        cls, k: int, *, distribution: str = "lognormal", mean: float = -1.2, std: float = 1.2, T: int = 1000
    ) -> TimestepClusters:
        """Return clusters of equal probability under the distribution from which training draws noise levels.

        The T timesteps are bins of equal probability. The clusters are therefore uniform in t, and the edge below
        cluster i is the quantile ``starts[i] / T`` (``i / k`` if k divides T).

        Args:
            k: number of clusters.
            distribution: ``"lognormal"`` (EDM: log sigma ~ N(mean, std^2)), ``"logit-normal"`` (flow matching: noise
                fraction tau = sigmoid of N(mean, std^2)) or ``"uniform"`` (tau ~ U(0, 1); mean and std are not used).
            mean, std: parameters of the normal distribution, with std > 0. Default: EDM's P_mean and P_std.
            T: number of bins.
        """
        as_choice("distribution", distribution, ("lognormal", "logit-normal", "uniform"))
        clusters = cls.uniform(T, k)
        quantiles = [s / T for s in clusters._bounds[1:-1]]
        if distribution == "uniform":
            return cls(T, clusters.starts, edges=quantiles)
        mean = as_number("mean", mean)
        std = as_number("std", std)
        if not std > 0:
            raise ValueError(f"mean must be finite, and std finite and positive; got mean={mean} and std={std}.")
        normal = [mean + std * NormalDist().inv_cdf(q) for q in quantiles]
        if distribution == "lognormal":
            levels = np.exp(normal)
        else:
            levels = 1 / (1 + np.exp(np.negative(normal)))
        if not (np.isfinite(levels).all() and (levels > 0).all() and (np.diff(levels) > 0).all()):
            raise ValueError(
                f"mean and std must give distinct noise levels in float64; got mean={mean} and std={std}. "
                "EDM uses -1.2 and 1.2."
            )
        return cls(T, clusters.starts, edges=levels.tolist())

    # ---- properties --------------------------------------------------------------------------------------------------

    @property
    def T(self) -> int:  # noqa: N802
        """Number of timesteps."""
        return self._bounds[-1]

    @property
    def k(self) -> int:
        """Number of clusters."""
        return len(self._bounds) - 1

    @property
    def bounds(self) -> tuple[int, ...]:
        """The k + 1 boundaries: the starts of the clusters, then T."""
        return self._bounds

    @property
    def starts(self) -> Tensor:
        """First timestep of each cluster: int64 ``[k]`` on the CPU, a fresh copy."""
        return torch.tensor(self._bounds[:-1], dtype=torch.int64)

    @property
    def sizes(self) -> Tensor:
        """Number of timesteps of each cluster: int64 ``[k]`` on the CPU, a fresh copy."""
        return torch.tensor(self._bounds, dtype=torch.int64).diff()

    @property
    def edges(self) -> tuple[float, ...] | None:
        """The k-1 noise levels between neighbouring clusters, or None for discrete timesteps."""
        return self._edges

    @overload
    def cluster_of(self, t: Tensor) -> Tensor: ...
    @overload
    def cluster_of(self, t: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]: ...
    @overload
    def cluster_of(self, t: int | float) -> int: ...
    def cluster_of(self, t: Any) -> Any:
        """Return the cluster of each timestep or noise level.

        Args:
            t: a tensor of any shape on any device, a NumPy array, or one number. Integers are timesteps in ``[0, T)``.
                Floats are noise levels >= 0 and need clusters with edges.

        Returns:
            Cluster ids of the same kind and shape: an int64 tensor on the device of t, an int64 array, or an int.

        Raises:
            TypeError: t holds floats but the clusters have no edges, or t has another dtype.
            ValueError: t is out of range. On CUDA this check would cost a host-device sync and is left out: the id is
                then -1 or k, which :func:`antdiff.ops.cluster_loss` turns into NaN and reports through
                :func:`antdiff.ops.check_errors`.
        """
        if isinstance(t, Tensor):
            return self._cluster_of_tensor(t)
        if isinstance(t, np.ndarray):
            if t.size > MOST_TIMESTEPS and 0 in t.strides:
                raise ValueError(
                    f"t must not be a broadcast array of more than {MOST_TIMESTEPS} elements; got {t.shape}."
                )
            is_level = self._kind(t.dtype, np.issubdtype(t.dtype, np.floating), np.issubdtype(t.dtype, np.integer))
            levels = self._levels(is_level)
            ids = np.asarray(np.searchsorted(np.asarray(levels), t, side="right") - 1, dtype=np.int64)
            self._check(bool(((ids >= 0) & (ids < self.k)).all()), is_level, t)
            return ids
        if isinstance(t, (bool, np.bool_)) or not isinstance(t, (int, float, np.integer, np.floating)):
            raise TypeError(f"t must be a tensor, an array or a number; got {type(t).__name__}.")
        is_level = self._kind(type(t).__name__, isinstance(t, (float, np.floating)), True)
        id = bisect.bisect_right(self._levels(is_level), t.item() if isinstance(t, np.generic) else t) - 1
        if t != t:
            id = self.k
        self._check(0 <= id < self.k, is_level, t)
        return id

    def _cluster_of_tensor(self, t: Tensor) -> Tensor:
        as_tensor("t", t, kind="real")
        is_level = self._kind(t.dtype, t.is_floating_point(), t.dtype != torch.bool)
        if is_level:
            t = t.detach().to(torch.float64 if t.dtype == torch.float64 else torch.float32)
        else:
            t = t.to(torch.int64)
        key = (t.device, t.dtype)
        if key not in self._boundaries:
            self._boundaries[key] = torch.tensor(self._levels(is_level), dtype=t.dtype, device=t.device)  # [k + 1]
        # Both ends are boundaries too: a value outside the range gets id -1 or k, and NaN gets k.
        ids = torch.bucketize(t.contiguous(), self._boundaries[key], right=True) - 1
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check(bool(((ids >= 0) & (ids < self.k)).all()), is_level, t)
        return ids

    def _kind(self, dtype: object, is_float: bool, is_integer: bool) -> bool:
        if not is_float and not is_integer:
            raise TypeError(f"t must be integers (timesteps) or floats (noise levels); got {dtype}.")
        if is_float and self._edges is None:
            raise TypeError(
                f"t must be integers, since these clusters have no edges between noise levels; got {dtype}. Convert "
                "timesteps with .long(). For noise levels, make the clusters with from_sigmas or from_quantiles."
            )
        return is_float

    def _levels(self, is_level: bool) -> Sequence[float]:
        if not is_level:
            return self._bounds
        assert self._edges is not None
        return (0.0, *self._edges, math.inf)

    def _check(self, ok: bool, is_level: bool, t: Any) -> None:
        if ok:
            return
        received = f"values from {t.min()} to {t.max()}" if isinstance(t, (Tensor, np.ndarray)) else t
        if is_level:
            raise ValueError(f"t must be noise levels, finite and >= 0; got {received}. Pass integers for timesteps.")
        raise ValueError(
            f"t must lie in [0, T) with T={self.T}; got {received}. Timesteps are counted from 0: subtract 1 if yours "
            "start at 1."
        )

    # ---- equality, text, pickles -------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TimestepClusters):
            return NotImplemented
        return self._bounds == other._bounds and self._edges == other._edges

    def __hash__(self) -> int:
        return hash((self._bounds, self._edges))

    def __repr__(self) -> str:
        intervals = " ".join(f"[{a}, {b})" for a, b in pairwise(self._bounds))
        edges = "" if self._edges is None else "; edges " + " ".join(f"{e:.4g}" for e in self._edges)
        return f"TimestepClusters(T={self.T}, k={self.k}: {intervals}{edges})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.T, self._bounds[:-1], self._edges)  # leaves out the cached boundaries

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the clusters to a JSON file, atomically."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "T": self.T,
            "starts": list(self._bounds[:-1]),
            "edges": None if self._edges is None else list(self._edges),
        }
        write_json(as_path("path", path), content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TimestepClusters:
        """Read clusters that :meth:`save` has written.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is not JSON, does not contain clusters, has another version, or is damaged.
        """
        try:
            content = json.loads(as_path("path", path).read_text(encoding="utf-8"))
        except ValueError as error:  # includes UnicodeDecodeError, for files that are not text
            raise ValueError(
                f"{path} must be JSON written by TimestepClusters.save; reading it failed: {error}."
            ) from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"{path} must hold timestep clusters (format {_FORMAT!r}); it holds something else.")
        if content.get("version") != _VERSION:
            raise ValueError(
                f"{path} must be of version {_VERSION}; got {content.get('version')!r}. A newer antdiff may read it."
            )
        try:
            starts, edges = content["starts"], content.get("edges")
            if not isinstance(starts, list) or not (edges is None or isinstance(edges, list)):
                raise TypeError("starts must be a list, edges a list or null.")
            return cls(content["T"], starts, edges=edges)
        except KeyError as error:
            raise ValueError(f"{path} must hold T and starts; {error} is missing.") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def _restore(T: int, starts: Sequence[int], edges: Sequence[float] | None) -> TimestepClusters:
    return TimestepClusters(T, starts, edges=edges)


def _as_float64(name: str, x: object, ndim: int) -> Tensor:
    """Convert float tensors of any precision and device, with or without a gradient, to float64 on the CPU."""
    if isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating):
        x = torch.tensor(x, dtype=torch.float64)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        received = f"{x.dtype} {list(x.shape)}" if isinstance(x, (Tensor, np.ndarray)) else type(x).__name__
        raise TypeError(f"{name} must be a float tensor or NumPy array; got {received}.")
    if x.dim() != ndim or x.numel() == 0:
        raise ValueError(f"{name} must have shape [{', '.join('T' * ndim)}] with T >= 1; got {list(x.shape)}.")
    # A plain, contiguous copy, so that the solver finds no fault with what it would call by another name.
    x = as_tensor(name, x).detach().as_subclass(Tensor).to("cpu", torch.float64).contiguous()
    if bool((x.abs() > 2.0**960).any()) and not bool(x.isinf().any()):
        raise ValueError(f"{name} must be at most 2^960 in magnitude; got {x.abs().max().item():.3g}. Rescale it.")
    return x
