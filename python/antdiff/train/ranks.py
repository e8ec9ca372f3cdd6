"""A run on the processes that torchrun started, or on one process.

Every rank draws the timesteps, the noise and the order of the data for the whole batch, from the run's own generators,
and takes its rows of them. The run is therefore the same, up to rounding, on any number of ranks. All ranks hold the
same state, so rank 0's checkpoint serves all of them, and a run can be resumed on another number of ranks.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from antdiff.distributed import contiguous_counts
from antdiff.distributed.ranks import Ranks, wait

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # for a step and a checkpoint of the slowest rank


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


@contextmanager
def run_ranks() -> Iterator[RunRanks]:
    """Join the process group that torchrun describes in the environment, and leave it at the end of the block.

    Without torchrun there is one process and no group.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield RunRanks()
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # torchrun keeps one store through all restarts, in which the new ranks would find the addresses of the dead ones
    # (pytorch/pytorch#135712). A prefix per restart separates them. On several nodes the count of restarts may differ
    # between the nodes, so there torchrun itself has to make a new store: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield RunRanks()
    finally:
        with suppress(RuntimeError):  # raised for a lost peer, which has already been reported
            if dist.is_initialized():
                dist.destroy_process_group()


def is_restart() -> bool:
    """Return whether torchrun has started this command again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch() -> str:
    """Return a name for the torchrun process that started this rank, which it keeps through restarts; "" without one.

    The number of a process is used again after it has ended, so the name includes the time of its start.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    parent = os.getppid()
    try:
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        began = ""
    return f"torchrun {os.environ['TORCHELASTIC_RUN_ID']}, process {parent} on {socket.gethostname()}, {began}"
