"""The Gram matrix of K cluster gradients: everything a gradient-balancing method needs to know of them.

One read of J. The result is float64: products are summed in float32 over short chains only, and in float64 from there,
since a plain float32 matrix product is off by 2e-3 in the squared norms at P = 1e7, enough to change PCGrad's result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from antdiff.ops._extension import _C, define, dense, traced

# K gradients as the ops take them: one matrix [k, P], or a list of [k, *shape], one tensor (or None) per parameter.
Jacobian = Tensor | Sequence[Tensor | None]


def gram(J: Jacobian) -> Tensor:
    """``G = J J^T``, the inner products of K gradients.

    Args:
        J: ``[k, P]``, or one tensor ``[k, *shape]`` a parameter, in a list (None entries are skipped; P is the sum of
            their sizes, and nothing is concatenated). float32, float64, float16 or bfloat16, all of one k, dtype and
            device. Contiguous tensors are read as they lie; other strides cost one copy of that tensor. Treated as
            data: nothing is recorded for autograd, also where J requires grad.

    Returns:
        G float64 ``[k, k]``, exactly symmetric, on the device of J. The same bits from run to run on one device, and on
        the CPU for any number of threads. NaN and infinity in J show up in G, and so does
        what float32 products cannot hold: for other dtypes than float64, entries should lie between 1e-18 and 1e18 in
        size. A loss scale moves them there.

    Raises:
        TypeError, ValueError: no tensor in the list, or a wrong dtype, shape, device or layout.
    """
    tensors = as_tensors(J)
    if traced(*tensors):
        return torch.ops.antdiff.gram([x.detach() for x in tensors if x is not None])  # type: ignore[no-any-return]
    return _gram(tensors)


def gram_(out: Tensor, J: Jacobian) -> Tensor:
    """Adds the Gram matrix of J to ``out`` float64 ``[k, k]``, and returns ``out``.

    For gradients that come in chunks of columns or live in shards: G is the sum over chunks, whatever their dtypes, and
    for sharded parameters one all-reduce of k x k numbers finishes it. J is as in :func:`gram`; ``out`` must be
    contiguous and must not require grad.
    """
    tensors = as_tensors(J)
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor; got {type(out).__name__}. Start from torch.zeros(k, k, ...).")
    if out.requires_grad:
        raise ValueError("out must not require grad (it is written in place). Pass out.detach().")
    if traced(out, *tensors):
        torch.ops.antdiff.gram_(out, [x.detach() for x in tensors if x is not None])
    else:
        _accumulate(out, tensors)
    return out


# ---- plain calls -----------------------------------------------------------------------------------------------------


def as_tensors(J: object) -> list[Tensor | None]:
    """J as a list of contiguous tensors and None. Metadata only, but for the one copy of a non-contiguous tensor; the
    extension checks the rest."""
    if isinstance(J, Tensor):
        if J.dim() < 2:
            raise ValueError(
                f"J must be [k, P] or a list of [k, *shape]; got shape {list(J.shape)}. Stack the gradients."
            )
        tensors: list[Tensor | None] = [J]
    elif isinstance(J, (list, tuple)):
        tensors = list(J)
    else:
        raise TypeError(f"J must be a torch.Tensor [k, P] or a list of [k, *shape]; got {type(J).__name__}.")
    try:  # the whole list in one sweep of C calls; a model has hundreds of parameters
        if not torch.compiler.is_compiling() and all(map(Tensor.is_contiguous, tensors)):  # type: ignore[arg-type]
            return tensors
    except (TypeError, RuntimeError):  # None, sparse, or no tensor at all
        pass
    return [None if x is None else dense(f"J[{i}]" if len(tensors) > 1 else "J", x) for i, x in enumerate(tensors)]


def first_tensor(tensors: list[Tensor | None]) -> Tensor:
    for x in tensors:
        if isinstance(x, Tensor):
            if x.dim() < 1:
                raise ValueError("J must hold tensors [k, *shape]; got a 0-d tensor. Stack the gradients.")
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
