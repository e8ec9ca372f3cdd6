"""Gradients of lookup tables, cluster by cluster."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.grouped.recorder import Op, Recorder, detached
from antdiff.gradients.sinks import Sinks


def embedding(
    recorder: Recorder,
    func: Op,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not recorder.varies(input) or recorder.varies(weight) or scale_grad_by_freq:
        return NotImplemented
    recorder.check(input, weight)
    out = func(input, detached(weight), padding_idx, max_norm, norm_type)
    skip = None if padding_idx is None else padding_idx % weight.shape[0]
    return _look_up(recorder, out, weight, input, skip)


def getitem(recorder: Recorder, func: Op, table: Tensor, index: Any) -> Any:
    if not recorder.trains(table) or not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        return NotImplemented
    recorder.check(index, table)
    return _look_up(recorder, func(detached(table), index), table, index % table.shape[0], None)


def index_select(recorder: Recorder, func: Op, table: Tensor, dim: int, index: Tensor) -> Any:
    return NotImplemented if dim != 0 else getitem(recorder, Tensor.__getitem__, table, index)


def _look_up(recorder: Recorder, out: Tensor, table: Tensor, index: Tensor, skip: int | None) -> Tensor:
    m = recorder.clustered.repeats(index)
    if recorder.probe is not None:
        out[recorder.probe.repeat_interleave(m)] = torch.nan
    return recorder.tap(out, partial(_table_grads, skip), (table,), index)


def _table_grads(skip: int | None, clustered: ClusteredBatch, sinks: Sinks, grad: Tensor, index: Tensor) -> None:
    """Run the backward of the lookup into one table of k V rows, V per cluster."""
    (sink,) = sinks
    if sink is None:
        return
    V = sink.tensor.shape[0]
    index = index.reshape(-1).long()
    grad = grad.reshape(index.numel(), -1)  # [n, D]
    if skip is not None:
        grad = grad * (index != skip)[:, None]
    index = index + V * clustered.row_cluster(index.numel() // clustered.B)
    sink.add_all(torch.ops.aten.embedding_dense_backward(grad, index, clustered.k * V, -1, False))
