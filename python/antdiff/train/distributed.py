"""A run on the processes that torchrun started, or on one.

Every rank draws the timesteps, the noise and the order of the data for the whole batch, from the run's own generators,
and takes its part of them. So the run is the same, up to rounding, on any number of ranks, all ranks hold the same
state, and rank 0's checkpoint is everybody's, whatever number of ranks goes on from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from antdiff.distributed import contiguous_counts
from antdiff.distributed.ranks import Ranks, wait

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # for a step and a checkpoint of the slowest rank


class Team(Ranks):
    """The ranks of a run and what each of them does of a step of B samples."""

    @property
    def leads(self) -> bool:
        """Rank 0, which alone writes and prints."""
        return self.rank == 0

    def part(self, B: int) -> slice:
        """This rank's rows of a batch."""
        if self.size > B:
            raise ValueError(f"batch_size must be at least the number of ranks, {self.size}; got {B}")
        if self.size == 1:
            return slice(None)
        cuts = self._cuts(B)
        return slice(cuts[self.rank], cuts[self.rank + 1])

    def counts(self, shares: Any) -> Any:
        """Samples of each cluster, as ``ClusterGradients.compute`` takes them, of a batch that is sorted by cluster and
        has ``shares`` [K] of each: on each rank, [R][K]. None where the shares are unknown."""
        if self.size == 1 or shares is None:
            return shares
        return contiguous_counts(shares, [stop - start for start, stop in pairwise(self._cuts(sum(shares)))])

    def agree(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides; if it raises, the others leave without a word."""
        if self.size == 1:
            return decide()
        told: list[T | None] = [None]
        try:
            if self.leads:
                told = [decide()]
        finally:
            dist.broadcast_object_list(told, src=0)
        if told[0] is None:
            raise SystemExit(1)
        return told[0]

    def any(self, flag: bool, device: torch.device, *, now: bool) -> bool:
        """Whether the flag is set on some rank, alike on all of them, which ask each other where ``now`` is true."""
        if self.size == 1:
            return flag
        if not now:
            return False
        flags = torch.tensor([float(flag)], device=device)
        wait(self.all_reduce(flags), "the question whether to stop")
        return bool(flags.item())

    def part_ways(self) -> None:
        """The work that needs all ranks is done; what follows may take one of them long."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def _cuts(self, B: int) -> list[int]:
        return [r * B // self.size for r in range(self.size + 1)]


@contextmanager
def team() -> Iterator[Team]:
    """Joins the process group that torchrun describes in the environment, and leaves it; else a team of one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Team()
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # torchrun keeps one store through all restarts, in which the new ranks would find the addresses of the dead ones
    # (pytorch/pytorch#135712). On several nodes the count of restarts may differ between them: there torchrun itself
    # has to be told to make a new store, by TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield Team()
    finally:
        with suppress(RuntimeError):  # of a lost peer, which has been reported by now
            if dist.is_initialized():
                dist.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun has started this command again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
