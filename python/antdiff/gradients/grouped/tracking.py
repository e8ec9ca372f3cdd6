"""Ops that place rows by the values of the batch, so that the sample of a row is unknown after them.

Under any other op the place of a row depends on shapes alone, so a probe of one batch (``gradients/probe.py``) holds
for all batches of the same structure. Under the ops of this file it depends on the values of the batch (packing by a
mask, routing of tokens to experts, sorting), so a probe says nothing about the next batch. The results of these ops are
*untracked*, and so is everything computed from them. An untracked tensor that meets a parameter is refused, and the
message names the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from antdiff.gradients.grouped.recorder import Op

Predicate = Callable[[Any], bool]


def _spellings(*names: str) -> set[Op]:
    return {getattr(home, name) for home in (torch, Tensor) for name in names if hasattr(home, name)}


# Always lose track of varying tensors: the number of rows depends on the values.
_PACKING = _spellings("masked_select", "nonzero", "argwhere", "unique", "unique_consecutive", "bincount")
# Lose track if they look up rows of samples. What is looked up in a table has the rows of the index.
_LOOKING_UP = _spellings("index_select", "gather", "take_along_dim")
_TAKING = _spellings("take")
# Lose track along dimension 0: the order of the rows depends on the values.
_SORTING = _spellings("sort", "argsort", "msort", "topk", "kthvalue", "mode", "median", "nanmedian")
_COUNTED = _spellings("topk", "kthvalue")  # whose second argument is a number, and not a dimension
# Lose track if they write rows of samples along dimension 0 by an index that varies.
_SCATTERING = _spellings(
    "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "index_add",
    "index_add_", "index_copy", "index_copy_", "index_fill", "index_fill_", "index_reduce", "index_reduce_",
)  # fmt: skip
_PUTTING = _spellings("index_put", "index_put_", "put", "put_", "masked_scatter", "masked_scatter_")
_REPEATING = _spellings("repeat_interleave")
# Move, join or cut rows. Their shapes and options are part of the structure of a batch.
_REARRANGING = _spellings(
    "cat", "concat", "concatenate", "stack", "vstack", "split", "split_with_sizes", "chunk", "tensor_split", "unbind",
    "narrow", "select", "roll", "flip", "index_select", "repeat", "repeat_interleave", "unfold", "__getitem__",
    "__setitem__", "transpose", "permute", "movedim", "swapaxes", "swapdims", "as_strided",
) | {F.pad}  # fmt: skip


# Every op that one of the two functions below has something to say about.
MOVES_ROWS = {torch.where, F.embedding}.union(
    _PACKING, _LOOKING_UP, _TAKING, _SORTING, _SCATTERING, _PUTTING, _REPEATING, _REARRANGING
)

# Make tensors from random numbers, or from values that Python has read. Their shape says nothing about their values.
DRAWING = _spellings(
    "randperm", "randint", "randint_like", "rand", "rand_like", "randn", "randn_like", "bernoulli", "multinomial",
    "tensor", "as_tensor", "asarray", "random_", "uniform_", "normal_", "bernoulli_",
)  # fmt: skip


def loses_track(
    func: Op, args: tuple[Any, ...], kwargs: dict[str, Any], varies: Predicate, from_batch: Predicate
) -> bool:
    """Return whether the values of the batch decide where ``func`` puts the rows of its first argument.

    Args:
        varies: whether the values of a tensor may differ from batch to batch.
        from_batch: whether a tensor has rows of samples. A table that ``loss_fn`` holds varies and has none: what is
            looked up in it has the rows of the index.
    """
    if func is Tensor.__getitem__:
        return from_batch(args[0]) and _index_moves_rows(args[0], args[1], varies)
    if func is Tensor.__setitem__:
        value = args[2]
        return (
            isinstance(value, Tensor)
            and value.numel() > 1
            and from_batch(value)
            and _index_moves_rows(args[0], args[1], varies)
        )
    named = len(args) + len(kwargs)
    if not args:
        args = tuple(kwargs[name] for name in ("input", "self", "condition") if name in kwargs)
    if func in _PACKING:
        return any(from_batch(x) for x in (*args, *kwargs.values()))
    if func in _TAKING:
        return from_batch(args[0])
    if func is F.embedding:
        return from_batch(kwargs.get("weight", args[-1] if len(args) < 2 else args[1]))
    if func in _SORTING:
        rest = args[2:] if func in _COUNTED else args[1:]
        return from_batch(args[0]) and _along_rows(args[0], rest, kwargs, default=-1)
    if func in _LOOKING_UP or func in _SCATTERING:
        index = kwargs.get("index", kwargs.get("indices", next((x for x in args[1:] if isinstance(x, Tensor)), None)))
        moved = (x for x in (*args, *kwargs.values()) if x is not index)
        moves = from_batch(args[0]) if func in _LOOKING_UP else any(map(from_batch, moved))
        return moves and varies(index) and _along_rows(args[0], args[1:], kwargs, default=None)
    if func in _PUTTING:
        flat = [y for x in args for y in (x if isinstance(x, (tuple, list)) else (x,))]
        return any(map(varies, flat[1:])) and any(map(from_batch, flat))
    if func in _REPEATING:
        return any(varies(x) for x in (*args[1:], *kwargs.values()))
    return func is torch.where and named == 1 and from_batch(args[0])


def _along_rows(x: Any, rest: tuple[Any, ...], kwargs: dict[str, Any], *, default: int | None) -> bool:
    """Return whether the ``dim`` of the call is dimension 0 of ``x``; true as well if the call names none."""
    dim = kwargs.get("dim", next((a for a in rest if isinstance(a, int) and not isinstance(a, bool)), default))
    if not isinstance(x, Tensor) or not isinstance(dim, int):
        return True
    return x.dim() < 2 or dim % x.dim() == 0


def _index_moves_rows(x: Any, index: Any, varies: Predicate) -> bool:
    """Return whether ``x[index]`` picks rows, along dimension 0, by a tensor that varies."""
    entries = index if isinstance(index, tuple) else (index,)
    if isinstance(index, list):
        entries = (index,)
    dim = 0
    for position, entry in enumerate(entries):
        if entry is None:
            continue
        if entry is Ellipsis:  # what follows counts from the end
            dim = x.dim() - sum(map(_dimensions, entries[position + 1 :]))
            continue
        if isinstance(entry, Tensor) and varies(entry):
            return dim == 0
        dim += _dimensions(entry)
    return False


def _dimensions(entry: Any) -> int:
    """Return how many dimensions an entry of an index stands for."""
    if entry is None:
        return 0
    return entry.dim() if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1


def writes_in_place(func: Op) -> bool:
    """Return whether ``func`` writes into its first argument: ``x.copy_(y)``, ``x[i] = y``, ``x += y``."""
    name = getattr(func, "__name__", "")
    return func is Tensor.__setitem__ or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def structure_of(func: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what decides where ``func`` puts rows: the shapes and options of ops that move them, None for others."""
    if func not in _REARRANGING:
        return None
    return (getattr(func, "__name__", ""), *map(_described, args), *((k, _described(v)) for k, v in kwargs.items()))


def _described(x: Any) -> Any:
    if isinstance(x, Tensor):
        return tuple(x.shape)
    if isinstance(x, (tuple, list)):
        return tuple(map(_described, x))
    if isinstance(x, np.ndarray):
        return (x.shape, x.tobytes()) if x.dtype.kind in "iub" else x.shape
    if isinstance(x, slice):
        return tuple(map(_described, (x.start, x.stop, x.step)))
    return x if isinstance(x, (int, float, str, bool, type(None))) else type(x).__name__
