"""A run on the processes of a group, or on one process.

Every rank draws the timesteps, the noise and the order of the data for the whole batch, from the run's own generators,
and takes its rows of them. The run is therefore the same, up to rounding, on any number of ranks. All ranks hold the
same state, so rank 0's checkpoint serves all of them, and a run can be resumed on another number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from antdiff.distributed import contiguous_counts
from antdiff.distributed.ranks import Ranks, wait

T = TypeVar("T")


class RunRanks(Ranks):
    """The ranks of a run, and how a batch of B samples is divided among them."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the only one that writes and prints."""
        return self.rank == 0

    def rows(self, B: int) -> slice:
        """Return this rank's rows of a batch."""
        if self.size > B:
            raise ValueError(f"batch_size must be at least the number of ranks, {self.size}; got {B}")
        if self.size == 1:
            return slice(None)
        bounds = self._bounds(B)
        return slice(bounds[self.rank], bounds[self.rank + 1])

    def counts(self, shares: Any) -> Any:
        """Return the samples per cluster as ``BalancedBackward`` takes them: of this process, or per rank [R][K].

        ``shares`` [K] are the samples per cluster of a whole batch that is sorted by cluster; None if they are unknown.
        """
        if self.size == 1 or shares is None:
            return shares
        return contiguous_counts(shares, [stop - start for start, stop in pairwise(self._bounds(sum(shares)))])

    def from_first(self, decide: Callable[[], T]) -> T:
        """Run `decide` on rank 0 and return its result on all ranks. If it raises, the others exit with status 1."""
        if self.size == 1:
            return decide()
        message: list[T | None] = [None]
        try:
            if self.is_first:
                message = [decide()]
        finally:
            dist.broadcast_object_list(message, src=0)
        if message[0] is None:
            raise SystemExit(1)
        return message[0]

    def any(self, flag: bool, device: torch.device, *, now: bool) -> bool:
        """Return on every rank whether the flag is set on any rank.

        Several ranks communicate only if ``now`` is true, and return False otherwise. ``now`` must be the same on all
        ranks.
        """
        if self.size == 1:
            return flag
        if not now:
            return False
        flags = torch.tensor([float(flag)], device=device)
        wait(self.all_reduce(flags), "the all-reduce of the stop flag")
        return bool(flags.item())

    def leave(self) -> None:
        """Destroy the process group, so that rank 0 can continue alone for longer than the timeout."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def _bounds(self, B: int) -> list[int]:
        return [r * B // self.size for r in range(self.size + 1)]
