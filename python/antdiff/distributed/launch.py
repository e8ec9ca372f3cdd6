"""Processes that torchrun has started: their group, and whether it has started them again."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

TIMEOUT = timedelta(minutes=10)  # for a step and a checkpoint of the slowest rank


@contextmanager
def torchrun_group() -> Iterator[None]:
    """Join the process group that torchrun describes in the environment, and leave it at the end of the block.

    Without torchrun there is one process and no group.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
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
        yield
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
