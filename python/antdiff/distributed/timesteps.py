"""Stratified timesteps for several ranks: each rank gets a contiguous chunk, so that it holds few clusters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from antdiff import clustering
from antdiff.clustering.timesteps import TimestepBatch
from antdiff.distributed.ranks import Ranks


class StratifiedTimesteps(clustering.StratifiedTimesteps):
    """:class:`antdiff.StratifiedTimesteps` of the batch of all ranks, of which each takes its chunk.

    Every rank draws the whole batch's timesteps, from generators in the same state, sorted by cluster; rank r keeps the
    rows from ``sum(sizes[:r])`` on. Nothing is sent, one process and any number of ranks train on the same timesteps,
    and every rank knows what the others hold::

        sampler = antdiff.distributed.StratifiedTimesteps(clusters, importance=True)

        counts = sampler.counts(len(x0))                   # of all ranks, for compute(..., counts=counts)
        t, cluster, weight = sampler.sample(len(x0))       # of this rank

    With R a multiple of K and K dividing B R, a rank holds one cluster.

    Args:
        clusters, importance: see :class:`antdiff.StratifiedTimesteps`.
        seed: of the default generator, the same on every rank.
        group: the ranks; default all.
    """

    def __init__(
        self,
        clusters: clustering.TimestepClusters,
        importance: bool = False,
        *,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(clusters, importance)
        self.ranks, self.seed = Ranks(group), seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def sample(
        self,
        B: int | Sequence[int],
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> TimestepBatch:
        """This rank's rows of a batch; advances the rotation of the rows left over.

        Args:
            B: rows of this rank, as many as every other has; or the rows of each rank, R ints, where they differ.
            device: as in :meth:`antdiff.StratifiedTimesteps.sample`.
            generator: in the same state on every rank; default one seeded with ``seed``.

        Returns:
            As :meth:`antdiff.StratifiedTimesteps.sample`, of this rank.
        """
        sizes = self._sizes(B)
        if generator is None:
            generator = self._generator(torch.device("cpu" if device is None else device))
        start = sum(sizes[: self.ranks.rank])
        whole = super().sample(sum(sizes), device=device, generator=generator)
        return TimestepBatch(*(x[start : start + sizes[self.ranks.rank]] for x in whole))

    def counts(self, B: int | Sequence[int]) -> list[list[int]]:
        """Rows of each cluster on each rank in the next step, R lists of K; ``B`` as in :meth:`sample`."""
        sizes = self._sizes(B)
        return contiguous_counts(self.shares(sum(sizes)), sizes)

    def state_dict(self) -> dict[str, Any]:
        """Where the rotation stands, and the default generators, the same on every rank."""
        return {**super().state_dict(), "generators": {str(d): g.get_state() for d, g in self._generators.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state`` was taken, on any number of ranks; that of a single-process sampler serves too."""
        super().load_state_dict(state)
        for device, at in state.get("generators", {}).items():
            self._generator(torch.device(device)).set_state(at)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def _sizes(self, B: int | Sequence[int]) -> list[int]:
        sizes = [B] * self.ranks.size if isinstance(B, int) else list(B)
        if len(sizes) != self.ranks.size:
            raise ValueError(
                f"B must be this rank's rows, or the rows of each of the {self.ranks.size} ranks; got {B}."
            )
        return sizes


def contiguous_counts(shares: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Rows of each cluster in each chunk of a batch that is sorted by cluster: R lists of K.

    Args:
        shares: rows of each cluster, K ints.
        sizes: rows of each chunk, R ints of the same sum.
    """
    edges = [0, *itertools.accumulate(shares)]
    cuts = [0, *itertools.accumulate(sizes)]
    return [
        [max(0, min(stop, right) - max(start, left)) for left, right in itertools.pairwise(edges)]
        for start, stop in itertools.pairwise(cuts)
    ]
