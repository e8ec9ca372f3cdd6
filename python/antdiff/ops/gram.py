"""The Gram matrix of K cluster gradients, which is all that a gradient-balancing method needs to know of them.

It takes one read of J. Products are summed in float32 over short chains and in float64 beyond, because a plain float32
matrix product has an error of 2e-3 in the squared norms at P = 1e7, which is enough to change PCGrad's result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from antdiff._checks import describe
from antdiff.ops._extension import _C, define, dense, traced
from antdiff.ops._precision import note

# The gradients of k losses: one matrix [k, P], or a list with one tensor [k, *shape] (or None) per parameter.
Jacobian = Tensor | Sequence[Tensor | None]


def gram(J: Jacobian) -> Tensor:
    """Compute ``G = J J^T``, the inner products of k gradients.

    Args:
        J: A matrix ``[k, P]``, or a list with one tensor ``[k, *shape]`` per parameter. None entries of a list are
            skipped; P is then the total size per row, and nothing is concatenated. The dtype is float32, float64,
            float16 or bfloat16. All tensors have the same k, dtype and device. Contiguous tensors are read in place;
            a tensor with other strides costs one copy of it. Autograd records nothing, even if J requires grad.

    Returns:
        G, float64 ``[k, k]``, exactly symmetric, on the device of J. Every run on the same device returns the same
        bits, on the CPU for any number of threads. NaN and infinity in J appear in G. Float32 products can
        overflow or underflow: for dtypes other than float64, the magnitudes of entries should lie between 1e-18 and
        1e18. A loss scale moves them into this range. The tensor carries the dtype of J, see
        :func:`antdiff.ops.precision_of`, except under torch.compile.

    Raises:
        TypeError, ValueError: the list holds no tensor, or a dtype, shape, device or layout is wrong.
    """
    tensors = as_tensors(J)
    if traced(*tensors):
        return torch.ops.antdiff.gram([x.detach() for x in tensors if x is not None])  # type: ignore[no-any-return]
    return note(_gram(tensors), tensors)


def gram_(out: Tensor, J: Jacobian) -> Tensor:
    """Add the Gram matrix of J to ``out`` in place, and return ``out``.

    Use it for gradients that arrive in chunks of columns or that are sharded. G is the sum over the chunks, which may
    have different dtypes. For sharded parameters, one all-reduce of k x k numbers completes it.

    Args:
        out: float64 ``[k, k]``, contiguous, on the device of J. It must not require grad.
        J: As in :func:`gram`.

    Raises:
        TypeError, ValueError: as :func:`gram`, or ``out`` breaks a rule above.
    """
    tensors = as_tensors(J)
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor; got {type(out).__name__}. Start from torch.zeros(k, k, ...).")
    if not torch.compiler.is_compiling() and out.is_neg():
        raise ValueError("out must not be a negated view, because it is written in place. Pass a tensor of its own.")
    if out.requires_grad:
        raise ValueError("out must not require grad, because it is written in place. Pass out.detach().")
    if traced(out, *tensors):
        torch.ops.antdiff.gram_(out, [x.detach() for x in tensors if x is not None])
    else:
        _accumulate(out, tensors)
        note(out, tensors)
    return out


# ---- plain calls -----------------------------------------------------------------------------------------------------


def as_tensors(J: object) -> list[Tensor | None]:
    """Return J as a list of contiguous tensors and None.

    Only metadata is read, and a non-contiguous tensor is copied once. The extension checks everything else.
    """
    if isinstance(J, Tensor):
        if J.is_nested:
            raise TypeError("J must be a dense tensor [k, P] or a list of [k, *shape]; got a nested tensor. Stack it.")
        if J.dim() < 2:
            raise ValueError(
                f"J must be [k, P] or a list of [k, *shape]; got shape {list(J.shape)}. Stack the gradients."
            )
        tensors: list[Tensor | None] = [J]
    elif isinstance(J, (list, tuple)):
        tensors = list(J)
    else:
        raise TypeError(f"J must be a torch.Tensor [k, P] or a list of [k, *shape]; got {type(J).__name__}.")
    try:  # check the whole list with one map over a C function, since a model has hundreds of parameters
        if not torch.compiler.is_compiling() and all(map(Tensor.is_contiguous, tensors)):  # type: ignore[arg-type]
            return tensors if not any(map(Tensor.is_neg, tensors)) else [dense("J", x) for x in tensors]  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # an entry is None, sparse or not a tensor
        pass
    return [None if x is None else dense(f"J[{i}]" if len(tensors) > 1 else "J", x) for i, x in enumerate(tensors)]


_MOST_ROWS = 2**14  # G then takes 2 GiB


def first_tensor(tensors: list[Tensor | None]) -> Tensor:
    for x in tensors:
        if isinstance(x, Tensor):
            if x.dim() < 1:
                raise ValueError("J must hold tensors [k, *shape]; got a 0-d tensor. Stack the gradients.")
            if isinstance(x.shape[0], int) and x.shape[0] > _MOST_ROWS:
                raise ValueError(f"J must have at most {_MOST_ROWS} rows, since G is [k, k]; got {describe(x)}.")
            return x
    raise ValueError("J must hold at least one tensor; got an empty list or None entries only.")


def _scratch(k: int, device: torch.device) -> Tensor | None:
    if device.type != "cuda":
        return None
    return torch.empty(_C.gram_scratch(k, device.index), dtype=torch.float64, device=device)


def _gram(tensors: list[Tensor | None]) -> Tensor:
    x = first_tensor(tensors)
    k = x.shape[0]
    out = torch.empty(k, k, dtype=torch.float64, device=x.device)
    _C.gram(out, tensors, False, _scratch(k, x.device))
    return out


def _accumulate(out: Tensor, tensors: list[Tensor | None]) -> None:
    x = first_tensor(tensors)
    _C.gram(out, tensors, True, _scratch(x.shape[0], x.device))


# ---- torch.library: torch.compile, export, fake tensors --------------------------------------------------------------


def _fake_gram(J: list[Tensor]) -> Tensor:
    k = J[0].shape[0]
    return J[0].new_empty((k, k), dtype=torch.float64)


def _fake_accumulate(_out: Any, _J: Any) -> None:
    return None


define("gram(Tensor[] J) -> Tensor", lambda J: _gram(as_tensors(J)), _fake_gram)
define("gram_(Tensor(a!) out, Tensor[] J) -> ()", lambda out, J: _accumulate(out, as_tensors(J)), _fake_accumulate)
