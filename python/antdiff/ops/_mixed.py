"""The Gram matrix and the combination of cluster gradients whose dtypes differ from parameter to parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from antdiff.ops._precision import precision_of, with_precision
from antdiff.ops.combine import combine as _combine
from antdiff.ops.gram import gram as _gram


def gram(rows: Iterable[Tensor | None]) -> Tensor:
    """Return the Gram matrix of rows ``[k, *shape]`` whose dtypes may differ: the sum over the dtypes."""
    rows = list(rows)
    if len({x.dtype for x in rows if x is not None}) <= 1:  # as in almost every network
        return _gram(rows)
    first, *others = [_gram(group) for group in _by_dtype(rows)]
    for x in others:
        first += x
    return with_precision(first, *map(precision_of, (first, *others)))


def add_gram(total: Tensor, rows: Iterable[Tensor | None]) -> None:
    """Add the Gram matrix of further columns of J to ``total`` in place, and record the less precise dtype on it."""
    more = gram(rows)
    total += more
    with_precision(total, precision_of(total), precision_of(more))


def combine(weights: Tensor, rows: Sequence[Tensor | None], out: Sequence[Tensor | None]) -> None:
    """Write ``sum_i weights_i row_i`` to ``out``. Dtypes may differ between parameters, and between rows and ``out``.

    Args:
        rows: ``[k, *shape]`` per parameter, or None.
        out: contiguous ``[*shape]`` per parameter, None where ``rows`` has None.
    """
    if len({x.dtype for x in (*rows, *out) if x is not None}) <= 1:
        _combine(weights, rows, out=out)
        return
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for x, y in zip(rows, out, strict=True):
        if x is not None and y is not None:
            # ops.combine writes only the dtype of the rows or float32. Any other p.grad gets a rounded copy.
            exact = y.dtype if y.dtype in (x.dtype, torch.float32) else torch.promote_types(x.dtype, torch.float32)
            groups.setdefault((x.dtype, exact), []).append((x, y))
    for (_, exact), group in groups.items():
        to = [y if y.dtype == exact else torch.empty_like(y, dtype=exact) for _, y in group]
        _combine(weights, [x for x, _ in group], out=to)
        for x, (_, y) in zip(to, group, strict=True):
            if x is not y:
                y.copy_(x)


def _by_dtype(rows: Iterable[Tensor | None]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for x in rows:
        if x is not None:
            groups.setdefault(x.dtype, []).append(x)
    return list(groups.values())
