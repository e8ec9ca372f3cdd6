"""Shared tensors that are broadcast over the batch: biases, scales, positional embeddings, learned tokens.

The op runs on an expansion of the shared tensor over the rows of the batch, which copies nothing. Autograd sums the
gradient over every other broadcast dimension and returns one gradient per row. The functions here sum the rows of each
cluster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.grouped.recorder import Op, Recorder
from antdiff.gradients.sinks import Sinks

Lead = Sequence[int]  # the leading dimensions of a tensor, which count its rows


def elementwise(recorder: Recorder, func: Op, *args: Any, **kwargs: Any) -> Any:
    """Rule of ops that broadcast all of their tensors against each other."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if getattr(func, "__name__", "").endswith("_") and recorder.trains(args[0]) and not recorder.varies(args[0]):
        return NotImplemented  # the op would modify the parameter in place
    return _run(recorder, func, args, kwargs, max(x.dim() for x in tensors), batch_first=False)


def join(recorder: Recorder, func: Op, tensors: Any, dim: int = 0, *, out: Any = None) -> Any:
    """Rule of cat and stack along any dimension except the batch."""
    if out is not None or not isinstance(tensors, (tuple, list)) or not isinstance(dim, int):
        return NotImplemented
    ndim = max(x.dim() for x in tensors)
    result = ndim + (func is torch.stack)
    if dim % result == 0 or any(recorder.trains(x) and x.dim() != ndim for x in tensors):
        return NotImplemented
    return _run(recorder, func, (tensors, dim), {}, ndim)


def attention(recorder: Recorder, func: Op, *args: Any, **kwargs: Any) -> Any:
    """Rule of scaled_dot_product_attention with learned queries, keys, values or bias."""
    return _run(recorder, func, args, kwargs, 4)


def metadata(recorder: Recorder, func: Op, *args: Any, **kwargs: Any) -> Any:
    """Rule of comparisons, which have no gradient, and of ops that read only the dtype, device or shape of a tensor."""
    out = func(*args, **kwargs)
    if func in COMPARISONS or not recorder.trains(args[0]):
        return out
    return recorder.share(out, func, args)  # a shared tensor in the dtype, on the device or in the shape of another one


def gather(recorder: Recorder, func: Op, input: Tensor, dim: int, index: Tensor, **kwargs: Any) -> Any:
    """Rule of gather from a table that was expanded over the batch, along any other dimension."""
    if not isinstance(dim, int) or dim % input.dim() == 0 or not recorder.varies(index):
        return NotImplemented
    return _run(recorder, func, (input, dim, index), kwargs, input.dim())


def assign(recorder: Recorder, func: Op, target: Tensor, index: Any, value: Any) -> Any:
    """Rule of ``target[index] = value`` with a shared value, at positions that all samples share or given by a mask."""
    if not recorder.varies(target) or not recorder.trains(value):
        return NotImplemented
    lead = recorder.check(target, value).shape[:1]
    if recorder.lead > 1:
        return NotImplemented
    if isinstance(index, Tensor):
        if index.dtype != torch.bool or index.shape != target.shape[: index.dim()]:
            return NotImplemented
        mask = index.view(*index.shape, *[1] * (target.dim() - index.dim()))
        inner = target.dim() - index.dim()
        if value.dim() > inner and value.shape[: value.dim() - inner].numel() != 1:
            return NotImplemented  # one row per selected position
        return target.copy_(torch.where(mask, _expand(recorder, value, lead, target.dim()), target))
    first = index[0] if isinstance(index, tuple) and index else index
    if first is not Ellipsis and first != slice(None):
        return NotImplemented
    part = target[index]
    if part.dim() == 0 or part.shape[:1] != lead or value.dim() >= part.dim():
        return NotImplemented
    return func(target, index, _expand(recorder, value, lead, part.dim()))


def _run(
    recorder: Recorder, func: Op, args: tuple[Any, ...], kwargs: dict[str, Any], ndim: int, *, batch_first: bool = True
) -> Any:
    values = [x for v in (*args, *kwargs.values()) for x in (v if isinstance(v, (tuple, list)) else [v])]
    varying = [x for x in values if recorder.varies(x)]
    trained = [x for x in values if recorder.trains(x)]
    R = max((x.shape[0] for x in varying if 0 < x.dim() == ndim), default=0)
    if not R or any(_expand_shape(x, (R,), ndim) is None for x in trained):
        return NotImplemented
    rows = [x for x in varying if x.dim() == ndim and x.shape[0] == R]
    floats = [x for x in rows if x.is_floating_point() or x.is_complex()]  # masks have no rows of their own
    checked = [recorder.check(x, *trained) for x in floats or rows]
    lead = checked[0].shape[: recorder.lead]
    if len(lead) > 1 and (batch_first or any(_expand_shape(x, lead, ndim) is None for x in trained)):
        return NotImplemented
    expand = partial(_expand_all, recorder, lead, ndim)
    return func(*map(expand, args), **{name: expand(v) for name, v in kwargs.items()})


def _expand_all(recorder: Recorder, lead: Lead, ndim: int, value: Any) -> Any:
    # Not a closure: a closure that calls itself is a reference cycle. It would keep the recorder, and the K rows of all
    # tensors computed from parameters, alive until the garbage collector runs.
    if isinstance(value, (tuple, list)):
        return type(value)(_expand_all(recorder, lead, ndim, x) for x in value)
    return _expand(recorder, value, lead, ndim) if recorder.trains(value) else value


def _expand_shape(x: Tensor, lead: Lead, ndim: int) -> list[int] | None:
    """Return the shape ``[*lead, ...]`` to which a shared tensor broadcasts in ``ndim`` dimensions, or None."""
    own, rest = _padded(x, ndim)[: len(lead)], _padded(x, ndim)[len(lead) :]
    fits = x.dim() <= ndim and all(n in (1, m) for n, m in zip(own, lead, strict=True))
    return [*lead, *rest] if fits else None


def _padded(x: Tensor, ndim: int) -> list[int]:
    return [*[1] * (ndim - x.dim()), *x.shape]


def _expand(recorder: Recorder, x: Tensor, lead: Lead, ndim: int) -> Tensor:
    while x.dim() > ndim:  # a value [1, ...] of an assignment
        x = x.squeeze(0)
    shape = _expand_shape(x, lead, ndim)
    assert shape is not None
    own = _padded(x, ndim)[: len(lead)]
    if all(n == 1 for n in own):
        return recorder.leaf(x.detach().expand(shape), sum_rows, x)
    if len(lead) > 1:
        return recorder.leaf(x.detach().expand(shape), partial(placed_rows, own, list(lead)), x)
    source = recorder.expanded_from(x)
    if source is None:
        return recorder.leaf(x, own_rows, x)
    return recorder.leaf(x, sum_rows, source)


def sum_rows(clustered: ClusteredBatch, sinks: Sinks, grad: Tensor) -> None:
    """Write the gradient of a shared tensor that was expanded over all rows of the batch."""
    for sink in sinks:
        if sink is not None:
            sink.add_sums(clustered, grad)


def own_rows(clustered: ClusteredBatch, sinks: Sinks, grad: Tensor) -> None:
    """Write the gradient of a shared tensor whose row r was applied only to row r of the batch."""
    ids = torch.arange(grad.shape[0], device=grad.device)
    grads = grad.new_zeros((clustered.k, *grad.shape))
    grads[clustered.row_cluster(clustered.repeats(grad)), ids] = grad
    for sink in sinks:
        if sink is not None:
            sink.add_all(grads)


def placed_rows(own: list[int], lead: list[int], clustered: ClusteredBatch, sinks: Sinks, grad: Tensor) -> None:
    """Write the gradient of a shared tensor that was expanded from its leading dimensions ``own`` to ``lead``."""
    entries = torch.arange(math.prod(own), device=grad.device).view(own).expand(lead).flatten()  # of each row
    rows = clustered.flat(grad)
    sums = rows.new_zeros(clustered.k * math.prod(own), *rows.shape[1:])
    sums.index_add_(0, clustered.cluster * math.prod(own) + entries, rows)
    for sink in sinks:
        if sink is not None:
            sink.add_all(sums)


def _functions(names: str) -> set[Op]:
    """Return every spelling of each named op: torch.x, Tensor.x, the in-place form, and the operators."""
    namespaces = (torch, Tensor, torch.special)
    spellings = [s for n in names.split() for s in (n, f"{n}_", f"__{n}__", f"__r{n}__", f"__i{n}__")]
    return {getattr(namespace, s) for namespace in namespaces for s in spellings if hasattr(namespace, s)}


ELEMENTWISE = _functions(
    "add sub subtract rsub mul multiply div divide true_divide truediv addcmul addcdiv lerp where pow float_power "
    "maximum minimum max min fmax fmin atan2 arctan2 hypot logaddexp logaddexp2 xlogy copysign remainder fmod "
    "masked_fill clamp clip clamp_min clamp_max"
)
COMPARISONS = _functions("eq ne lt le gt ge isclose equal allclose not_equal less less_equal greater greater_equal")
METADATA = _functions("type_as expand_as view_as reshape_as to") | COMPARISONS
