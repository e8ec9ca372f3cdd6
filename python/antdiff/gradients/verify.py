"""Is the gradient of every cluster what it should be? A full check on one batch, before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from antdiff.gradients.audit import PrecisionObserver, compare
from antdiff.gradients.batch import ClusteredBatch, GroupingError, RowsError
from antdiff.gradients.grouped.mode import GroupedMode
from antdiff.gradients.probe import binary_codes, locate, probe, uncompiled
from antdiff.gradients.replay import repeatable
from antdiff.gradients.routes import Chosen, LossFn, Network, refuse_batch_norm, run
from antdiff.gradients.samples import Samples
from antdiff.gradients.sinks import GradientStore


def verify(
    route: Chosen, net: Network, loss_fn: LossFn, batch: Sequence[Any], clustered: ClusteredBatch, *, locates: bool
) -> float:
    """Probe a batch sorted by cluster, and compare all rows with ``loop``; see :meth:`ClusterGradients.verify`.

    Args:
        locates: whether ``grouped`` may find out where rows are.
    """
    refuse_batch_norm(route, net.model)
    if route == "loop":
        return 0.0
    device = clustered.cluster.device
    with repeatable(net.model, loss_fn) as replay:
        layouts = None
        try:
            with uncompiled(net):
                probe(route, net, loss_fn, batch, clustered, replay, binary_codes(clustered.B, device))
        except RowsError as first:
            if not locates:
                raise
            replay.rewind()
            try:
                layouts = locate(net, loss_fn, batch, clustered, replay).layouts
            except GroupingError as second:
                raise GroupingError(f"{first} {second}") from None
        got = GradientStore(net.model, clustered.k, None, reuse=net.compiled is None)
        want = GradientStore(net.model, clustered.k, None)
        replay.rewind()
        sinks = got.sinks(fresh=True)
        mode = None
        if layouts is not None:
            samples = Samples.of(batch, clustered.B).tensors()
            mode = GroupedMode(net.model, clustered, sinks, net.separable, batch=samples, layouts=layouts)
        run(route, net, loss_fn, batch, clustered, sinks, mode=mode)
        got.keep(sinks)
        if route == "split" and replay.drew():
            return float("nan")  # the slices drew other random numbers than the whole batch
        replay.rewind()
        with PrecisionObserver() as precision:
            run("loop", net, loss_fn, batch, clustered, want.sinks(fresh=True))
    low, worst = precision.low, 0.0
    for i, size in enumerate(clustered.sizes):
        if size:
            a, b = (
                {n: x[i] for (n, _), x in zip(store.named, store.tensors, strict=True) if x is not None}
                for store in (got, want)
            )
            found = compare(a, b, low)
            if found.excess > 1:
                raise GroupingError(
                    f"route {route!r} differs from 'loop' by {found.relative:.1e} in the gradient of {found.name} for "
                    f"cluster {i}: the samples are not independent, or their rows do not stand where the first "
                    "dimension says. Use route='loop'."
                )
            worst = max(worst, found.error)
    return worst
