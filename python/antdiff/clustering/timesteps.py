"""Samplers of timesteps for a training step. Both return (t, cluster, weight), so they can replace each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from antdiff._checks import (
    as_count,
    as_device,
    as_flag,
    as_generator,
    as_seed,
    as_state,
    as_tensor,
    describe,
    generator_state,
)
from antdiff.clustering.clusters import TimestepClusters
from antdiff.distributed.chunks import contiguous_counts
from antdiff.distributed.ranks import Group, Ranks

_MOST_SAMPLES = 2**24  # in one batch: more than any step holds, and few enough to be drawn
_KEEP = 64  # the number of layouts to cache; one batch size needs up to k of them


class TimestepBatch(NamedTuple):
    """A batch of timesteps, their clusters and the weights of their losses."""

    t: Tensor  # int64 [B]
    cluster: Tensor  # int64 [B]
    weight: Tensor  # float32 [B]


class _Layout(NamedTuple):
    """Tensors that are the same in every step with the same batch size and rotation, on the device."""

    start: Tensor  # int64 [B], the first timestep of each sample's cluster
    size: Tensor  # int64 [B], the number of timesteps in it
    cluster: Tensor  # int64 [B]
    weight: Tensor  # float32 [B]


class StratifiedTimesteps:
    """Draw each cluster's share of a batch uniformly from its interval. The samples are sorted by cluster.

    In a batch of B samples each cluster gets B // k. The remaining B % k samples go to as many clusters, starting where
    the last step stopped, so over k steps of the same B every cluster gets exactly B samples. If B < k, some clusters
    get no sample in a step.

    On several ranks the shares are those of the batch of all ranks. Every rank draws this whole batch from a generator
    in the same state, and rank r keeps a contiguous chunk of it that starts at sample ``sum(sizes[:r])``. Nothing is
    sent, any number of ranks train on the same timesteps as one process, and every rank knows the counts of all::

        counts = sampler.counts(len(x0))                   # of all ranks, for cluster_gradients(..., counts=counts)
        t, cluster, weight = sampler.sample(len(x0))       # of this rank

    With R ranks, R a multiple of K, and B R divisible by K, each rank holds one cluster.

    Stratification changes the density of t from uniform to ``p(t) = n_c / (B |I_c|)``, where n_c is the number of
    samples of the cluster and ``|I_c|`` the length of its interval, so short intervals are sampled more often. With
    ``importance=False`` all weights are 1 (ANT: every cluster counts the same, whatever its length). With
    ``importance=True`` a sample of cluster c has weight ``k |I_c| / T``, which undoes the change if losses are means
    over each cluster. For ``loss_c = sum_{b in c} w_b L(t_b) / n_c``, as ``ops.cluster_loss`` computes it,
    ``(1/k) sum_c loss_c`` is an unbiased estimate of the mean of L over uniform t, since
    ``(1/k) (k |I_c| / T) E_{I_c} L`` sums to that mean. The weight does not depend on n_c, and its mean over the
    clusters is 1. If B < k, a step lacks clusters, whose losses are then 0; use ``sum_c loss_c / B`` instead of
    ``/ k``.

    Args:
        clusters: the intervals.
        importance: whether the weights undo the change of density.
        seed: the seed of the generator that :meth:`sample` uses if it is called without one. None: torch's global
            generator of the device in one process, and seed 0 on several ranks, which must draw the same numbers.
        group: the ranks: a process group; None for the default group if torch.distributed is initialised, else one
            process; ``"local"`` for one process in any case.
    """

    def __init__(
        self, clusters: TimestepClusters, importance: bool = False, *, seed: int | None = None, group: Group = None
    ) -> None:
        _require_clusters(clusters)
        self.clusters = clusters
        self.importance = as_flag("importance", importance)
        self.ranks = Ranks(group)
        if seed is not None:
            seed = as_seed("seed", seed)
        self.seed = 0 if seed is None and self.ranks.size > 1 else seed
        self._offset = 0  # the cluster that gets the next remaining sample
        self._layouts: dict[tuple[int, int, torch.device], _Layout] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    def sample(
        self,
        B: int | Sequence[int],
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> TimestepBatch:
        """Draw one batch of timesteps, and advance the rotation of the remaining samples.

        On CUDA there is no host-device sync, except for the first use of a batch size and rotation.

        Args:
            B: the number of samples on this rank, at least 1 and the same on every rank; or the number on each rank,
                R ints.
            device: the device of the result. Default: the generator's, else the CPU.
            generator: the source of randomness, on the same device, and in the same state on every rank. Default: see
                ``seed``.

        Returns:
            ``t`` int64 ``[B]``, ``cluster`` int64 ``[B]`` ascending, ``weight`` float32 ``[B]``, of this rank.

        Raises:
            TypeError, ValueError: B is not a positive int or R ints, or the generator is on another device.
            RuntimeError: the process group was initialised after this sampler was made.
        """
        sizes = self._sizes(B)
        total = as_count("B", sum(sizes), most=_MOST_SAMPLES)
        as_generator("generator", generator)
        device = None if device is None else _device(device, generator)
        if generator is None and (
            self.seed is not None or self._generators
        ):  # the state of a seeded sampler was loaded
            generator = self._generator(torch.device("cpu" if device is None else device))
        device = _device(device, generator)
        layout = self._layout(total, device)
        self._offset = (self._offset + total) % self.clusters.k
        t = layout.start + _below(layout.size, generator)
        if self.ranks.size == 1:
            return TimestepBatch(t, layout.cluster.clone(), layout.weight.clone())
        start = sum(sizes[: self.ranks.rank])
        chunk = slice(start, start + sizes[self.ranks.rank])
        return TimestepBatch(t[chunk], layout.cluster[chunk].clone(), layout.weight[chunk].clone())

    def shares(self, B: int) -> list[int]:
        """Return each cluster's number of samples in the next step, K ints, for B samples over all ranks."""
        B, k = as_count("B", B, 0), self.clusters.k
        return [B // k + ((c - self._offset) % k < B % k) for c in range(k)]

    def counts(self, B: int | Sequence[int]) -> list[list[int]]:
        """Return each cluster's number of samples on each rank in the next step, R lists of K ints.

        ``B`` is the argument of :meth:`sample`.
        """
        sizes = self._sizes(B)
        return contiguous_counts(self.shares(sum(sizes)), sizes)

    def state_dict(self) -> dict[str, Any]:
        """Return the rotation and, if :meth:`sample` has used them, the states of the sampler's own generators.

        The state is the same on every rank. It does not contain a generator that is passed to :meth:`sample`.
        """
        state: dict[str, Any] = {"k": self.clusters.k, "offset": self._offset}
        if self._generators:
            state["generators"] = {str(d): g.get_state() for d, g in self._generators.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, on any number of ranks.

        If the state has generators, :meth:`sample` uses them even if this sampler has no seed.

        Raises:
            ValueError: it is not the state of a sampler with the same number of clusters.
        """
        k, offset = as_state(state).get("k"), state.get("offset")
        if type(k) is not int or k != self.clusters.k or type(offset) is not int or not 0 <= offset < k:
            raise ValueError(f"state must be that of a sampler with k={self.clusters.k} clusters; got {dict(state)}.")
        generators = state.get("generators", {})
        if not isinstance(generators, Mapping):
            raise TypeError(f"state['generators'] must be a dict; got {describe(generators)}.")
        loaded = {}
        for name, value in generators.items():
            device = as_device("every key of state['generators']", name)
            loaded[device] = generator_state(
                f"generators {name}", as_tensor("state['generators']", value, kind="int"), device
            )
        self._offset = offset
        for device, loaded_state in loaded.items():
            if loaded_state is not None:
                self._generator(device).set_state(loaded_state)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device.type == "cuda" and device.index is None:  # "cuda" and "cuda:0" share one generator
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed or 0)
        return self._generators[device]

    def _sizes(self, B: int | Sequence[int]) -> list[int]:
        """Return the number of samples on each rank."""
        self.ranks.require_all()
        if not isinstance(B, (list, tuple)):
            return [as_count("B", B)] * self.ranks.size
        if len(B) != self.ranks.size:
            raise ValueError(
                f"B must be the samples of this rank, or of each of the {self.ranks.size} ranks; got {list(B)}. "
                "Pass one int, or one int per rank."
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
            layout = self.clusters.starts[cluster], sizes[cluster], cluster, weight.float()[cluster]
            self._layouts[key] = _Layout(*(x.to(device) for x in layout))
        return self._layouts[key]


class UniformTimesteps:
    """Draw t uniformly from 0..T-1, as ordinary diffusion training does. The sizes of the clusters are random.

    The interface is that of :class:`StratifiedTimesteps`. Samples are not sorted by cluster, and weights are 1.
    """

    def __init__(self, clusters: TimestepClusters) -> None:
        _require_clusters(clusters)
        self.clusters = clusters

    def sample(
        self, B: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> TimestepBatch:
        """Draw one batch. Arguments, result and errors are those of :meth:`StratifiedTimesteps.sample`."""
        B = as_count("B", B, most=_MOST_SAMPLES)
        device = _device(device, generator)
        t = torch.randint(self.clusters.T, (B,), device=device, generator=generator)
        return TimestepBatch(t, self.clusters.cluster_of(t), torch.ones(B, dtype=torch.float32, device=device))

    def state_dict(self) -> dict[str, int]:
        """Return an empty dict, since each draw is independent of the last."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept the state of a uniform sampler, which is empty."""
        if as_state(state):
            raise ValueError(f"state must be that of a uniform sampler, which is empty; got {dict(state)}.")


def _below(size: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return uniform integers in ``[0, size)``, int64 ``[B]``, with one size per sample.

    They are 62 random bits modulo the size, which is always inside the interval; a scaled float could round up to its
    end. The relative error of a value's probability is less than size / 2^62.
    """
    bits = torch.randint(1 << 62, size.shape, device=size.device, generator=generator)
    return bits.remainder_(size)


def _device(device: torch.device | str | None, generator: torch.Generator | None) -> torch.device:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}.")
    if device is None:
        return torch.device("cpu") if generator is None else generator.device
    device = as_device("device", device, present=False)
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"generator must be on the device of the result, {device}; got one on {generator.device}. "
            f"Make it with torch.Generator('{device.type}')."
        )
    as_device("device", device)
    return device


def _require_clusters(clusters: object) -> None:
    if not isinstance(clusters, TimestepClusters):
        raise TypeError(f"clusters must be a TimestepClusters; got {type(clusters).__name__}.")
