"""Shared tensors that are broadcast over the batch: biases, scales, positional embeddings, learned tokens.

The op runs on an expansion of the shared tensor over the rows of the batch, which copies nothing. Autograd sums the
gradient over every other broadcast dimension and returns one gradient per row. The functions here sum the rows of each
cluster.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.grouped.recorder import Op, Recorder
from antdiff.gradients.sinks import Sinks


def elementwise(recorder: Recorder, func: Op, *args: Any, **kwargs: Any) -> Any:
    """Rule of ops that broadcast all of their tensors against each other."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if getattr(func, "__name__", "").endswith("_") and recorder.trains(args[0]) and not recorder.varies(args[0]):
        return NotImplemented  # the op would modify the parameter in place
    return _run(recorder, func, args, kwargs, max(x.dim() for x in tensors))


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
    R = recorder.check(target, value).shape[0]
    if isinstance(index, Tensor):
        if index.dtype != torch.bool or index.shape != target.shape[: index.dim()]:
            return NotImplemented
        mask = index.view(*index.shape, *[1] * (target.dim() - index.dim()))
        if value.dim() > target.dim() - index.dim():
            return NotImplemented  # one row per selected position
        return target.copy_(torch.where(mask, _expand(recorder, value, R, target.dim()), target))
    first = index[0] if isinstance(index, tuple) and index else index
    if first is not Ellipsis and first != slice(None):
        return NotImplemented
    part = target[index]
    if part.dim() == 0 or part.shape[0] != R or value.dim() >= part.dim():
        return NotImplemented
    return func(target, index, _expand(recorder, value, R, part.dim()))


def _run(recorder: Recorder, func: Op, args: tuple[Any, ...], kwargs: dict[str, Any], ndim: int) -> Any:
    values = [x for v in (*args, *kwargs.values()) for x in (v if isinstance(v, (tuple, list)) else [v])]
    varying = [x for x in values if recorder.varies(x)]
    trained = [x for x in values if recorder.trains(x)]
    R = max((x.shape[0] for x in varying if 0 < x.dim() == ndim), default=0)
    if not R or any(_expand_shape(x, R, ndim) is None for x in trained):
        return NotImplemented
    for x in varying:
        if x.dim() == ndim and x.shape[0] == R:
            recorder.check(x, *trained)
    expand = partial(_expand_all, recorder, R, ndim)
    return func(*map(expand, args), **{name: expand(v) for name, v in kwargs.items()})


def _expand_all(recorder: Recorder, R: int, ndim: int, value: Any) -> Any:
    # Not a closure: a closure that calls itself is a reference cycle. It would keep the recorder, and the K rows of all
    # tensors computed from parameters, alive until the garbage collector runs.
    if isinstance(value, (tuple, list)):
        return type(value)(_expand_all(recorder, R, ndim, x) for x in value)
    return _expand(recorder, value, R, ndim) if recorder.trains(value) else value


def _expand_shape(x: Tensor, R: int, ndim: int) -> list[int] | None:
    """Return the shape ``[R, ...]`` to which a shared tensor broadcasts in ``ndim`` dimensions, or None."""
    if x.dim() < ndim:
        return [R, *[1] * (ndim - x.dim() - 1), *x.shape]
    return [R, *x.shape[1:]] if x.dim() == ndim and x.shape[0] in (1, R) else None


def _expand(recorder: Recorder, x: Tensor, R: int, ndim: int) -> Tensor:
    shape = _expand_shape(x, R, ndim)
    assert shape is not None
    if x.dim() == ndim and x.shape[0] == R != 1:
        source = recorder.expanded_from(x)
        if source is None:
            return recorder.leaf(x, own_rows, x)
        return recorder.leaf(x, sum_rows, source)
    return recorder.leaf(x.detach().expand(shape), sum_rows, x)


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
