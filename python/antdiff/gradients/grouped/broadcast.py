"""Shared tensors that meet the batch element by element or row by row: biases, scales, positional embeddings, tokens.

The op runs on a copy-free expansion of the shared tensor over the rows of the batch. Autograd sums the gradient over
every other broadcast dimension and hands it over row by row; the sum over each cluster's rows is taken here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.sinks import Sinks

if TYPE_CHECKING:
    from antdiff.gradients.grouped.mode import GroupedMode

Op = Callable[..., Any]


def elementwise(mode: GroupedMode, func: Op, *args: Any, **kwargs: Any) -> Any:
    """Ops that broadcast all of their tensors against each other."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if getattr(func, "__name__", "").endswith("_") and mode.trains(args[0]) and not mode.varies(args[0]):
        return NotImplemented  # in place on what the parameter is
    return _run(mode, func, args, kwargs, max(x.dim() for x in tensors))


def join(mode: GroupedMode, func: Op, tensors: Any, dim: int = 0, *, out: Any = None) -> Any:
    """cat and stack, along any dimension but the batch."""
    if out is not None or not isinstance(tensors, (tuple, list)) or not isinstance(dim, int):
        return NotImplemented
    ndim = max(x.dim() for x in tensors)
    result = ndim + (func is torch.stack)
    if dim % result == 0 or any(mode.trains(x) and x.dim() != ndim for x in tensors):
        return NotImplemented
    return _run(mode, func, (tensors, dim), {}, ndim)


def attention(mode: GroupedMode, func: Op, *args: Any, **kwargs: Any) -> Any:
    """scaled_dot_product_attention whose queries, keys, values or bias are learned."""
    return _run(mode, func, args, kwargs, 4)


def metadata(mode: GroupedMode, func: Op, *args: Any, **kwargs: Any) -> Any:
    """Ops that look at the dtype, device or shape of a parameter only, and comparisons, which have no gradient."""
    return func(*args, **kwargs) if not mode.trains(args[0]) or func in COMPARISONS else NotImplemented


def _run(mode: GroupedMode, func: Op, args: tuple[Any, ...], kwargs: dict[str, Any], ndim: int) -> Any:
    values = [x for v in (*args, *kwargs.values()) for x in (v if isinstance(v, (tuple, list)) else [v])]
    varying = [x for x in values if mode.varies(x)]
    trained = [x for x in values if mode.trains(x)]
    R = max((x.shape[0] for x in varying if 0 < x.dim() == ndim), default=0)
    if not R or any(_expand_shape(x, R, ndim) is None for x in trained):
        return NotImplemented
    for x in varying:
        if x.dim() == ndim and x.shape[0] == R:
            mode.check(x, *trained)
    each = partial(_expand_all, mode, R, ndim)
    return func(*map(each, args), **{name: each(v) for name, v in kwargs.items()})


def _expand_all(mode: GroupedMode, R: int, ndim: int, value: Any) -> Any:
    # No closure: one that calls itself is a cycle, which would hold the mode, and K rows of all that is computed from
    # parameters, until the garbage collector comes by.
    if isinstance(value, (tuple, list)):
        return type(value)(_expand_all(mode, R, ndim, x) for x in value)
    return _expand(mode, value, R, ndim) if mode.trains(value) else value


def _expand_shape(x: Tensor, R: int, ndim: int) -> list[int] | None:
    """The shape ``[R, ...]`` of a shared tensor that broadcasts to ``ndim`` dimensions."""
    if x.dim() < ndim:
        return [R, *[1] * (ndim - x.dim() - 1), *x.shape]
    return [R, *x.shape[1:]] if x.dim() == ndim and x.shape[0] in (1, R) else None


def _expand(mode: GroupedMode, x: Tensor, R: int, ndim: int) -> Tensor:
    shape = _expand_shape(x, R, ndim)
    assert shape is not None
    if x.dim() == ndim and x.shape[0] == R != 1:
        source = mode.source(x)
        if source is None:
            return mode.leaf(x, own_rows, x)
        return mode.leaf(x, sum_rows, source)
    return mode.leaf(x.detach().expand(shape), sum_rows, x)


def sum_rows(rows: ClusteredBatch, sinks: Sinks, grad: Tensor) -> None:
    for sink in sinks:
        if sink is not None:
            sink.add_all(rows.sums(grad))


def own_rows(rows: ClusteredBatch, sinks: Sinks, grad: Tensor) -> None:
    """The gradient of a shared tensor whose row r met row r of the batch alone."""
    ids = torch.arange(grad.shape[0], device=grad.device)
    each = grad.new_zeros((rows.k, *grad.shape))
    each[rows.row_cluster(rows.repeats(grad)), ids] = grad
    for sink in sinks:
        if sink is not None:
            sink.add_all(each)


def _functions(names: str) -> set[Op]:
    """Every spelling of an op: torch.x, Tensor.x, in place, and as an operator."""
    homes = (torch, Tensor, torch.special)
    spellings = [s for n in names.split() for s in (n, f"{n}_", f"__{n}__", f"__r{n}__", f"__i{n}__")]
    return {getattr(home, s) for home in homes for s in spellings if hasattr(home, s)}


ELEMENTWISE = _functions(
    "add sub subtract rsub mul multiply div divide true_divide truediv addcmul addcdiv lerp where pow float_power "
    "maximum minimum max min fmax fmin atan2 arctan2 hypot logaddexp logaddexp2 xlogy copysign remainder fmod "
    "masked_fill clamp clip clamp_min clamp_max"
)
COMPARISONS = _functions("eq ne lt le gt ge isclose equal allclose not_equal less less_equal greater greater_equal")
METADATA = _functions("type_as expand_as view_as reshape_as to") | COMPARISONS
