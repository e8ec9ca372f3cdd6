"""Route ``loop``: one forward on the whole batch, then one backward per cluster over the retained graph.

This is the plain definition of cluster gradients, and the only route for a network that mixes samples (BatchNorm,
batch-wise losses). A step costs (1 + 2K)/3 of a plain step. The other routes are tested against this one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.sinks import Sink
from antdiff.gradients.split import write_row


def loop(per_sample: Tensor, clustered: ClusteredBatch, factors: Sequence[Tensor | float], sinks: list[Sink]) -> None:
    """Add ``factors[i]`` times the gradient of the sum of cluster i's losses to row i of the sinks.

    Args:
        per_sample: ``[B]``, with the graph of the whole batch. The samples may be in any order.
    """
    last = max((i for i, size in enumerate(clustered.sizes) if size), default=0)
    masks = clustered.one_hot(per_sample.dtype)  # [k, B]
    for i, size in enumerate(clustered.sizes):
        for sink in sinks:
            sink.tensor.grad = None
        if size:
            torch.autograd.backward((per_sample,), (masks[i] * factors[i],), retain_graph=i < last)
        write_row(sinks, i, empty=not size)
    for sink in sinks:
        sink.fresh = False
