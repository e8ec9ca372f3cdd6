"""Samplers of timesteps for a training step. Both return (t, cluster, weight), so that a loop can swap them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from antdiff._checks import as_count
from antdiff.clustering.clusters import TimestepClusters
from antdiff.distributed.chunks import contiguous_counts
from antdiff.distributed.ranks import Group, Ranks

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
    """Draw each cluster's share of a batch uniformly from its interval; rows are sorted by cluster.

    Of a batch of B rows each cluster gets B // k, and the B % k rows left over go to as many clusters, starting where
    the last step stopped: over k steps of the same B every cluster gets exactly B rows. With B < k some clusters get no
    row in a step.

    On several ranks the shares are those of the batch of all ranks, which every rank draws whole from a generator in
    the same state, and of which rank r keeps a contiguous chunk: the rows from ``sum(sizes[:r])`` on. So nothing is
    sent, one process and any number of ranks train on the same timesteps, and every rank knows the counts of all::

        counts = sampler.counts(len(x0))                   # of all ranks, for cluster_gradients(..., counts=counts)
        t, cluster, weight = sampler.sample(len(x0))       # of this rank

    With R ranks, R a multiple of K, and B R divisible by K, each rank holds one cluster.

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
        seed: of the generator that :meth:`sample` uses if it is given none. None: torch's global generator of the
            device in one process, and seed 0 on several ranks, which must draw the same numbers.
        group: the ranks: a process group; None for the default group if torch.distributed is initialised, else one
            process; ``"local"`` for one process in any case.
    """

    def __init__(
        self, clusters: TimestepClusters, importance: bool = False, *, seed: int | None = None, group: Group = None
    ) -> None:
        _require_clusters(clusters)
        self.clusters = clusters
        self.importance = bool(importance)
        self.ranks = Ranks(group)
        self.seed = 0 if seed is None and self.ranks.size > 1 else seed
        self._offset = 0  # the cluster that gets the next row left over
        self._layouts: dict[tuple[int, int, torch.device], _Layout] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    def sample(
        self,
        B: int | Sequence[int],
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> TimestepBatch:
        """Draw one batch of timesteps, and advance the rotation of the rows left over.

        On CUDA nothing waits for the device, except when a (B, rotation) is met for the first time.

        Args:
            B: number of rows of this rank, at least 1 and the same on every rank; or the rows of each rank, R ints.
            device: of the result; default the generator's, else the CPU.
            generator: source of randomness, on the same device, and in the same state on every rank; default see
                ``seed``.

        Returns:
            ``t`` int64 ``[B]``, ``cluster`` int64 ``[B]`` ascending, ``weight`` float32 ``[B]``, of this rank.

        Raises:
            TypeError, ValueError: B is not a positive int, or the generator is on another device.
        """
        sizes = self._sizes(B)
        whole = as_count("B", sum(sizes))
        if generator is None and (
            self.seed is not None or self._generators
        ):  # the state of a seeded sampler was loaded
            generator = self._generator(torch.device("cpu" if device is None else device))
        device = _device(device, generator)
        layout = self._layout(whole, device)
        self._offset = (self._offset + whole) % self.clusters.k
        t = layout.start + _below(layout.size, generator)
        if self.ranks.size == 1:
            return TimestepBatch(t, layout.cluster.clone(), layout.weight.clone())
        start = sum(sizes[: self.ranks.rank])
        mine = slice(start, start + sizes[self.ranks.rank])
        return TimestepBatch(t[mine], layout.cluster[mine].clone(), layout.weight[mine].clone())

    def shares(self, B: int) -> list[int]:
        """Return the rows that each cluster gets in the next step, whose batch of all ranks has B rows: K ints."""
        k = self.clusters.k
        return [B // k + ((c - self._offset) % k < B % k) for c in range(k)]

    def counts(self, B: int | Sequence[int]) -> list[list[int]]:
        """Return the rows of each cluster on each rank in the next step, R lists of K; ``B`` as in :meth:`sample`."""
        sizes = self._sizes(B)
        return contiguous_counts(self.shares(sum(sizes)), sizes)

    def state_dict(self) -> dict[str, Any]:
        """Return the rotation and, if :meth:`sample` has used them, the states of the sampler's own generators.

        It is the same on every rank. A generator that is passed to :meth:`sample` has a state of its own.
        """
        state: dict[str, Any] = {"k": self.clusters.k, "offset": self._offset}
        if self._generators:
            state["generators"] = {str(d): g.get_state() for d, g in self._generators.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, on any number of ranks.

        Raises:
            ValueError: it is not the state of a sampler with as many clusters.
        """
        k, offset = state.get("k"), state.get("offset")
        if k != self.clusters.k or not isinstance(offset, int) or not 0 <= offset < k:
            raise ValueError(f"state must be that of a sampler with k={self.clusters.k} clusters; got {dict(state)}.")
        self._offset = offset
        for device, generator_state in state.get("generators", {}).items():
            self._generator(torch.device(device)).set_state(generator_state)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed or 0)
        return self._generators[device]

    def _sizes(self, B: int | Sequence[int]) -> list[int]:
        """Return the rows of each rank."""
        self.ranks.require_all()
        if not isinstance(B, Sequence):
            return [as_count("B", B)] * self.ranks.size
        if len(B) != self.ranks.size:
            raise ValueError(
                f"B must be this rank's rows, or the rows of each of the {self.ranks.size} ranks; got {list(B)}."
            )
        return [as_count("B", size, least=0) for size in B]

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
