"""Weight gradients without a formula, for any op that treats samples independently."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.grouped.recorder import Op, Recorder, detached
from antdiff.gradients.sinks import Sinks


def by_slices(recorder: Recorder, func: Op, *args: Any, **kwargs: Any) -> Any:
    """Rule that reruns the op on the rows of each cluster in the backward, which costs one more forward of the op."""
    items = [*args, *kwargs.values()]
    if any(isinstance(x, (tuple, list)) and any(isinstance(y, Tensor) for y in x) for x in items):
        return NotImplemented
    varying = [i for i, x in enumerate(items) if recorder.varies(x)]
    trained = [i for i, x in enumerate(items) if recorder.trains(x)]
    for i in varying:
        recorder.check(items[i], *(items[j] for j in trained))
    fixed = [None if i in varying else detached(x) for i, x in enumerate(items)]
    n = len(args)

    def call(values: list[Any]) -> Any:
        return func(*values[:n], **dict(zip(kwargs, values[n:], strict=True)))

    out = call([items[i] if i in varying else x for i, x in enumerate(fixed)])
    if not isinstance(out, Tensor):
        return NotImplemented
    if recorder.lead > 1:
        return NotImplemented
    if recorder.probe is None and recorder.rows is not None:
        recorder.rows.repeats(out)  # raises if the output has no rows per sample
    device = out.device.type
    autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    write = partial(_slice_grads, call, fixed, varying, trained, autocast)
    return recorder.tap(out, write, tuple(items[i] for i in trained), *(items[i] for i in varying))


def _slice_grads(
    call: Op,
    fixed: list[Any],
    varying: list[int],
    trained: list[int],
    autocast: tuple[bool, torch.dtype],
    clustered: ClusteredBatch,
    sinks: Sinks,
    grad: Tensor,
    *saved: Tensor,
) -> None:
    """Write the gradients of the arguments at positions ``trained`` of ``call``.

    Args:
        fixed: the arguments of ``call``, with None for the varying ones.
        varying: positions of the varying arguments, whose tensors are ``saved``.
        autocast: whether autocast was enabled in the forward, and its dtype.
    """
    wanted = [(j, sink) for j, sink in zip(trained, sinks, strict=True) if sink is not None]
    per_cluster: list[list[Tensor | None]] = []
    for g, *parts in clustered.pieces(grad, *saved):
        values = list(fixed)
        for j, part in zip(varying, parts, strict=True):
            values[j] = part
        for j, _ in wanted:
            values[j] = fixed[j].detach().requires_grad_(True)
        grads: list[Tensor | None] = [None] * len(wanted)
        if len(g):
            with torch.enable_grad(), torch.autocast(g.device.type, autocast[1], autocast[0]):
                out = call(values)
            grads = list(torch.autograd.grad(out, [values[j] for j, _ in wanted], g, allow_unused=True))
        per_cluster.append(grads)
    for (_, sink), *rows in zip(wanted, *per_cluster, strict=True):
        sink.add_rows(rows)
