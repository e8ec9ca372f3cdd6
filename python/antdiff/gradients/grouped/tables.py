"""Gradients of lookup tables, cluster by cluster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.grouped.slices import still
from antdiff.gradients.sinks import Sinks

if TYPE_CHECKING:
    from antdiff.gradients.grouped.mode import GroupedMode

Op = Callable[..., Any]


def embedding(
    mode: GroupedMode,
    func: Op,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not mode.varies(input) or mode.varies(weight) or scale_grad_by_freq:
        return NotImplemented
    out = func(input, still(weight), padding_idx, max_norm, norm_type)
    skip = None if padding_idx is None else padding_idx % weight.shape[0]
    return _look_up(mode, out, weight, input, skip)


def getitem(mode: GroupedMode, func: Op, table: Tensor, index: Any) -> Any:
    if not mode.trains(table) or not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        return NotImplemented
    return _look_up(mode, func(still(table), index), table, index % table.shape[0], None)


def index_select(mode: GroupedMode, func: Op, table: Tensor, dim: int, index: Tensor) -> Any:
    return NotImplemented if dim != 0 else getitem(mode, Tensor.__getitem__, table, index)


def _look_up(mode: GroupedMode, out: Tensor, table: Tensor, index: Tensor, skip: int | None) -> Tensor:
    m = mode.rows.repeats(index)
    if mode.probe is not None:
        out[mode.probe * m : (mode.probe + 1) * m] = torch.nan
    return mode.tap(out, partial(_table_grads, skip), (table,), index)


def _table_grads(skip: int | None, rows: ClusteredBatch, sinks: Sinks, grad: Tensor, index: Tensor) -> None:
    """The lookup's own backward, into a table of k V rows."""
    (sink,) = sinks
    if sink is None:
        return
    V = sink.tensor.shape[0]
    index = index.reshape(-1).long()
    grad = grad.reshape(index.numel(), -1)  # [n, D]
    if skip is not None:
        grad = grad * (index != skip)[:, None]
    index = index + V * rows.row_cluster(index.numel() // rows.B)
    sink.add_all(torch.ops.aten.embedding_dense_backward(grad, index, rows.k * V, -1, False))
