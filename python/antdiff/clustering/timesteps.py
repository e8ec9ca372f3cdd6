"""Samplers of timesteps for a training step. Both return (t, cluster, weight), so that a loop can swap them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from antdiff._checks import as_count
from antdiff.clustering.clusters import TimestepClusters

_KEEP = 64  # layouts to keep: k of them serve one batch size


class TimestepBatch(NamedTuple):
    """What a sampler returns."""

    t: Tensor  # int64 [B]
    cluster: Tensor  # int64 [B]
    weight: Tensor  # float32 [B]


class _Layout(NamedTuple):
    """What is the same in every step with one batch size and rotation, on the device."""

    start: Tensor  # int64 [B], first timestep of the row's cluster
    size: Tensor  # int64 [B], timesteps in it
    cluster: Tensor  # int64 [B]
    weight: Tensor  # float32 [B]


class StratifiedTimesteps:
    """Draws each cluster's share of a batch uniformly from its interval; rows are grouped by cluster, in order.

    Of a batch of B rows each cluster gets B // k, and the B % k rows left over go to as many clusters, starting where
    the last step stopped: over k steps of one B every cluster gets exactly B rows. With B < k some clusters get no row
    in a step.

    Stratifying changes the density of t from uniform to ``p(t) = n_c / (B |I_c|)``, with n_c the cluster's rows and
    ``|I_c|`` its size: short intervals are visited more often. With ``importance=False`` that is left as it is and all
    weights are 1 (ANT: every cluster counts the same, however long). With ``importance=True`` a row of cluster c has
    weight ``k |I_c| / T``, which undoes the change where losses are means over each cluster: for
    ``loss_c = sum_{b in c} w_b L(t_b) / n_c``, as ``ops.cluster_loss`` computes it, ``(1/k) sum_c loss_c`` is an
    unbiased estimate of the mean of L over uniform t, since ``(1/k) (k |I_c| / T) E_{I_c} L`` sums to that mean. The
    weight does not depend on n_c, and its mean over the clusters is 1. (With B < k a step lacks clusters, whose losses
    are then 0: take ``sum_c loss_c / B`` in place of ``/ k``.)

    Args:
        clusters: the intervals.
        importance: whether weights undo the change of density.
    """

    def __init__(self, clusters: TimestepClusters, importance: bool = False) -> None:
        _require_clusters(clusters)
        self.clusters = clusters
        self.importance = bool(importance)
        self._offset = 0  # the cluster that gets the next row left over
        self._layouts: dict[tuple[int, int, torch.device], _Layout] = {}

    def sample(
        self, B: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> TimestepBatch:
        """One batch of timesteps; advances the rotation of the rows left over.

        On CUDA nothing waits for the device, except where a (B, rotation) is met for the first time.

        Args:
            B: number of rows, at least 1.
            device: where the result is; default the generator's, else the CPU.
            generator: source of randomness, on the same device; default torch's global one of that device.

        Returns:
            ``t`` int64 ``[B]``, ``cluster`` int64 ``[B]`` ascending, ``weight`` float32 ``[B]``.

        Raises:
            TypeError, ValueError: B is no positive int, or the generator is on another device.
        """
        B = as_count("B", B)
        device = _device(device, generator)
        layout = self._layout(B, device)
        self._offset = (self._offset + B) % self.clusters.k
        t = layout.start + _below(layout.size, generator)
        return TimestepBatch(t, layout.cluster.clone(), layout.weight.clone())

    def shares(self, B: int) -> list[int]:
        """Rows that each cluster gets in the next step of B rows."""
        k = self.clusters.k
        return [B // k + ((c - self._offset) % k < B % k) for c in range(k)]

    def state_dict(self) -> dict[str, int]:
        """Where the rotation stands. The generator has a state of its own."""
        return {"k": self.clusters.k, "offset": self._offset}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state`` was taken.

        Raises:
            ValueError: it is not the state of a sampler with as many clusters.
        """
        k, offset = state.get("k"), state.get("offset")
        if k != self.clusters.k or not isinstance(offset, int) or not 0 <= offset < k:
            raise ValueError(f"state must be that of a sampler with k={self.clusters.k} clusters; got {dict(state)}.")
        self._offset = offset

    def _layout(self, B: int, device: torch.device) -> _Layout:
        key = (B, self._offset if B % self.clusters.k else 0, device)
        if key not in self._layouts:
            if len(self._layouts) >= _KEEP + self.clusters.k:
                self._layouts.clear()
            sizes = self.clusters.sizes  # [k]
            cluster = torch.arange(self.clusters.k).repeat_interleave(torch.tensor(self.shares(B)))  # [B]
            weight = sizes.double() * self.clusters.k / self.clusters.T if self.importance else torch.ones_like(sizes)
            rows = self.clusters.starts[cluster], sizes[cluster], cluster, weight.float()[cluster]
            self._layouts[key] = _Layout(*(x.to(device) for x in rows))
        return self._layouts[key]


class UniformTimesteps:
    """Draws t uniformly from 0..T-1, as ordinary diffusion training does; clusters get rows as it falls out.

    Same interface as :class:`StratifiedTimesteps`; rows are not grouped, and weights are 1.
    """

    def __init__(self, clusters: TimestepClusters) -> None:
        _require_clusters(clusters)
        self.clusters = clusters

    def sample(
        self, B: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> TimestepBatch:
        """One batch of timesteps; arguments, result and errors as in :meth:`StratifiedTimesteps.sample`."""
        B = as_count("B", B)
        device = _device(device, generator)
        t = torch.randint(self.clusters.T, (B,), device=device, generator=generator)
        return TimestepBatch(t, self.clusters.cluster_of(t), torch.ones(B, dtype=torch.float32, device=device))

    def state_dict(self) -> dict[str, int]:
        """Empty: each draw is independent of the last."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accepts the state of a uniform sampler, which is empty."""
        if state:
            raise ValueError(f"state must be that of a uniform sampler, which is empty; got {dict(state)}.")


def _below(size: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform integers in ``[0, size)``, a different size a row: int64 ``[B]``.

    62 random bits modulo the size: always inside the interval, where scaling a float could round up to its end. The
    chance of a value is off by less than size / 2^62 of itself.
    """
    bits = torch.randint(1 << 62, size.shape, device=size.device, generator=generator)
    return bits.remainder_(size)


def _device(device: torch.device | str | None, generator: torch.Generator | None) -> torch.device:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}.")
    if device is None:
        return torch.device("cpu") if generator is None else generator.device
    device = torch.device(device)
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"generator must be on the device of the result, {device}; got one on {generator.device}. "
            f"Make it with torch.Generator('{device.type}')."
        )
    return device


def _require_clusters(clusters: object) -> None:
    if not isinstance(clusters, TimestepClusters):
        raise TypeError(f"clusters must be a TimestepClusters; got {type(clusters).__name__}.")
