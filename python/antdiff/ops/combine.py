"""The combination of K cluster gradients: the second and last pass over J, which writes directly into ``p.grad``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from antdiff._checks import describe
from antdiff.ops._extension import _C, define, dense, traced
from antdiff.ops.gram import Jacobian, as_tensors, first_tensor


@overload
def combine(weights: Tensor, J: Tensor, out: Tensor | None = None) -> Tensor: ...
@overload
def combine(
    weights: Tensor, J: Sequence[Tensor | None], out: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]: ...
def combine(
    weights: Tensor, J: Jacobian, out: Tensor | Sequence[Tensor | None] | None = None
) -> Tensor | list[Tensor | None]:
    """Compute ``weights^T J``, the update direction of a balancing method.

    Args:
        weights: float64 ``[k]``, on the device of J; float32 is converted. The kernel reads them on the device, so
            there is no host-device sync.
        J: ``[k, P]`` or a list of ``[k, *shape]``, as in :func:`antdiff.ops.gram`. Autograd records nothing, even if J
            requires grad.
        out: Tensors to overwrite: one ``[P]`` for a matrix J, or a list of ``[*shape]`` for a list J, with None where J
            has None. Entries may be ``p.grad``. They must be contiguous, have dtype float32 or the dtype of J, not
            require grad, and share no memory with J or with each other. Default None: allocate new tensors.

    Returns:
        ``out``, or new tensors in the dtype of J (float32 for half-precision J): ``[P]`` for a matrix, a list for a
        list. Sums are accumulated in float32 (float64 for float64 J), in row order, and rounded once, so every run
        returns the same bits. All rows are read: an infinity or NaN in a row with weight 0 gives NaN, never a silently
        wrong update.

    Raises:
        TypeError, ValueError: the dtype, shape, device or layout of an argument is wrong.
    """
    tensors = as_tensors(J)
    k = first_tensor(tensors).shape[0]
    weights = _as_weights(weights, k)
    if out is None:
        if traced(weights, *tensors):
            made = iter(torch.ops.antdiff.combine(weights, [x.detach() for x in tensors if x is not None]))
            outs: list[Tensor | None] = [None if x is None else next(made) for x in tensors]
        else:
            outs = _outputs(tensors)
            _C.combine(weights, tensors, outs)
        return outs[0] if isinstance(J, Tensor) else outs  # type: ignore[return-value]
    outs = _checked_outputs(out, J, tensors)
    if traced(weights, *tensors, *outs):
        torch.ops.antdiff.combine_out(
            weights, [x.detach() for x in tensors if x is not None], [o for o in outs if o is not None]
        )
    else:
        _C.combine(weights, tensors, outs)
    return out if isinstance(out, (Tensor, list)) else outs


# ---- plain calls -----------------------------------------------------------------------------------------------------


def _as_weights(weights: object, k: int | torch.SymInt) -> Tensor:
    w = dense("weights", weights).detach()
    return w.double() if w.dtype == torch.float32 else w


def _outputs(tensors: list[Tensor | None]) -> list[Tensor | None]:
    dtype = first_tensor(tensors).dtype
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    return [None if x is None else torch.empty(x.shape[1:], dtype=dtype, device=x.device) for x in tensors]


def _checked_outputs(out: object, J: object, tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Return ``out`` as a list that has None exactly where J has None. The extension checks the tensors themselves."""
    if isinstance(J, Tensor) != isinstance(out, Tensor) or not isinstance(out, (Tensor, list, tuple)):
        raise TypeError(
            f"out must be a torch.Tensor for a matrix J and a list for a list; got {type(out).__name__} for "
            f"{type(J).__name__}. Leave it out to allocate the result."
        )
    outs: list[Tensor | None] = [out] if isinstance(out, Tensor) else list(out)
    if len(outs) != len(tensors):
        raise ValueError(
            f"out must be as long as J; got {len(outs)} entries for {len(tensors)}. Pass one per parameter."
        )
    for i, (o, x) in enumerate(zip(outs, tensors, strict=True)):
        if (o is None) != (x is None):
            raise ValueError(
                f"out[{i}] must be None exactly where J[{i}] is None; got {describe(o)} for {describe(x)}. "
                "Pass p.grad of trainable parameters and None for frozen ones."
            )
        if isinstance(o, Tensor) and not torch.compiler.is_compiling() and o.is_neg():
            raise ValueError(
                f"out[{i}] must not be a negated view, because it is overwritten. Pass a tensor of its own."
            )
        if o is not None and getattr(o, "requires_grad", False):
            raise ValueError(
                f"out[{i}] must not require grad, because it is overwritten. Pass p.grad, or .detach() it."
            )
    return outs


# ---- torch.library: torch.compile, export, fake tensors --------------------------------------------------------------


def _combine(weights: Tensor, J: list[Tensor]) -> list[Tensor | None]:
    tensors = as_tensors(J)
    outs = _outputs(tensors)
    _C.combine(weights, tensors, outs)
    return outs


def _combine_out(weights: Tensor, J: list[Tensor], out: list[Tensor]) -> None:
    _C.combine(weights, as_tensors(J), list(out))


def _fake_combine(_weights: Tensor, J: list[Tensor]) -> list[Tensor | None]:
    return _outputs(list(J))


def _fake_combine_out(_weights: Any, _J: Any, _out: Any) -> None:
    return None


define("combine(Tensor weights, Tensor[] J) -> Tensor[]", _combine, _fake_combine)
define("combine_out(Tensor weights, Tensor[] J, Tensor(a!)[] out) -> ()", _combine_out, _fake_combine_out)
