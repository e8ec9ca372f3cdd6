"""Route ``split``: the network runs on the K slices of the batch in turn.

The network only has to treat its samples independently. The route holds the activations of one slice at a time and
retains no graph. It launches K times as many kernels, so it is as fast as ``grouped`` if a slice is large enough to
keep the device busy, and slower otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from antdiff.gradients.batch import ClusteredBatch, check_losses, cut
from antdiff.gradients.sinks import Sink


def split(
    loss_fn: Callable[..., Tensor],
    batch: Sequence[Any],
    clustered: ClusteredBatch,
    factors: Sequence[Tensor | float],
    sinks: list[Sink],
) -> list[Tensor | None]:
    """Add ``factors[i]`` times the gradient of the sum of cluster i's losses to row i of the sinks.

    Args:
        batch: sorted by cluster.

    Returns:
        The per-sample losses of each cluster, detached; None if the cluster is empty.
    """
    losses: list[Tensor | None] = []
    for i, (start, stop) in enumerate(clustered.slices()):
        if start == stop:
            losses.append(None)
            write_row(sinks, i, empty=True)
            continue
        for sink in sinks:
            sink.tensor.grad = None
        per_sample = loss_fn(*cut(batch, clustered.B, start, stop))
        check_losses(per_sample, stop - start)
        # backward() into an empty .grad, not autograd.grad: re-entrant checkpointing allows only backward(). Autograd
        # moves its own buffers into an empty .grad, so there is no addition.
        torch.autograd.backward((per_sample,), (torch.ones_like(per_sample) * factors[i],))
        write_row(sinks, i)
        losses.append(per_sample.detach())
    for sink in sinks:
        sink.fresh = False
    return losses


def write_row(sinks: list[Sink], i: int, *, empty: bool = False) -> None:
    """Write or add the parameters' ``.grad`` to row i, with one fused launch per kind of write."""
    reached: list[tuple[Sink, Tensor]] = []
    missed: list[Sink] = []
    for s in sinks:  # no function is called per parameter, since this runs K times per step
        grad = None if empty else s.tensor.grad
        if grad is None:
            missed.append(s)
        else:
            reached.append((s, grad if grad.layout is torch.strided else grad.to_dense()))  # sparse embeddings
            s.reached = True
    for fresh, write in ((True, torch._foreach_copy_), (False, torch._foreach_add_)):
        targets = [s.rows.select(0, i) for s, _ in reached if s.fresh is fresh]
        if targets:
            write(targets, [grad for s, grad in reached if s.fresh is fresh])
    zeros = [s.rows.select(0, i) for s in missed if s.fresh]
    if zeros:
        torch._foreach_zero_(zeros)
