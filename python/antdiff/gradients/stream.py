"""Route ``split`` on several ranks: each row is sent while the slice of the next cluster is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from antdiff.distributed.exchange import Exchange
from antdiff.gradients.batch import ClusteredBatch, check_losses, cut
from antdiff.gradients.parameters import dense_grads, isolated
from antdiff.gradients.routes import LossFn


def stream(
    loss_fn: LossFn,
    batch: Sequence[Any],
    clustered: ClusteredBatch,
    factor: Callable[[int], Tensor | float],
    exchange: Exchange,
    unsynchronised: Callable[[], AbstractContextManager[Any]],
    reached: set[int],
) -> Tensor:
    """Write ``factor(i)`` times the gradient of the sum of cluster i's losses to the exchange, for every i.

    Args:
        batch: sorted by cluster.
        factor: called after the forward of each slice that is not empty.
        unsynchronised: returns a context in which DistributedDataParallel reduces no gradients.
        reached: receives the id of every parameter that a sample of this rank has reached.

    Returns:
        The sum of each cluster's losses, float64 ``[k]``.
    """
    if exchange.lockstep and clustered.B == 0:
        raise ValueError("batch must hold a sample on every rank under FSDP2, whose ranks run in lockstep; got none.")
    params = exchange.params
    sums = torch.zeros(clustered.k, dtype=torch.float64, device=clustered.cluster.device)
    with isolated(params):
        for i, (start, stop) in enumerate(clustered.slices()):
            empty = start == stop
            if empty and not exchange.lockstep:
                exchange.write(i, None)
                continue
            start, stop = (0, 1) if empty else (start, stop)
            for p in params:
                p.grad = None
            with unsynchronised():
                per_sample = loss_fn(*cut(batch, clustered.B, start, stop))
                check_losses(per_sample, stop - start)
                scale = 0.0 if empty else factor(i) * exchange.averaging
                torch.autograd.backward((per_sample,), ((torch.ones_like(per_sample) * scale).to(per_sample.dtype),))
            dense_grads(params)
            reached.update(id(p) for p in params if p.grad is not None)
            exchange.write(i, [p.grad for p in params])
            if not empty:
                sums[i] = per_sample.detach().sum(dtype=torch.float64)
    return sums
