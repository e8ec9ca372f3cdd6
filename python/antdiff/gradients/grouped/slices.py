"""Any op whose samples are independent: weight gradients without a formula, and what all rules share."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.grouped.recorder import Op, Recorder, detached
from antdiff.gradients.sinks import Sinks


def by_slices(recorder: Recorder, func: Op, *args: Any, **kwargs: Any) -> Any:
    """Without a formula: the backward runs the op again on each cluster's rows. Costs one more forward of this op."""
    items = [*args, *kwargs.values()]
    if any(isinstance(x, (tuple, list)) and any(isinstance(y, Tensor) for y in x) for x in items):
        return NotImplemented
    at = [i for i, x in enumerate(items) if recorder.varies(x)]
    trained = [i for i, x in enumerate(items) if recorder.trains(x)]
    for i in at:
        recorder.check(items[i], *(items[j] for j in trained))
    fixed = [None if i in at else detached(x) for i, x in enumerate(items)]
    n = len(args)

    def call(values: list[Any]) -> Any:
        return func(*values[:n], **dict(zip(kwargs, values[n:], strict=True)))

    out = call([items[i] if i in at else x for i, x in enumerate(fixed)])
    if not isinstance(out, Tensor):
        return NotImplemented
    recorder.clustered.repeats(out)
    device = out.device.type
    autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    write = partial(_slice_grads, call, fixed, at, trained, autocast)
    return recorder.tap(out, write, tuple(items[i] for i in trained), *(items[i] for i in at))


def _slice_grads(
    call: Op,
    fixed: list[Any],
    at: list[int],
    trained: list[int],
    autocast: tuple[bool, torch.dtype],
    clustered: ClusteredBatch,
    sinks: Sinks,
    grad: Tensor,
    *varying: Tensor,
) -> None:
    wanted = [(j, sink) for j, sink in zip(trained, sinks, strict=True) if sink is not None]
    each: list[list[Tensor | None]] = []
    for g, *parts in clustered.pieces(grad, *varying):
        values = list(fixed)
        for j, part in zip(at, parts, strict=True):
            values[j] = part
        for j, _ in wanted:
            values[j] = fixed[j].detach().requires_grad_(True)
        grads: list[Tensor | None] = [None] * len(wanted)
        if len(g):
            with torch.enable_grad(), torch.autocast(g.device.type, autocast[1], autocast[0]):
                out = call(values)
            grads = list(torch.autograd.grad(out, [values[j] for j, _ in wanted], g, allow_unused=True))
        each.append(grads)
    for (_, sink), *rows_of in zip(wanted, *each, strict=True):
        sink.add_rows(rows_of)
