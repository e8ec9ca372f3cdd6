"""The precision of a Gram matrix: the dtype of the gradients that it was computed from.

G is float64 for every J, but its error is that of the elements of J and of the arithmetic for the dtype of J. The ops
that compute G record the dtype as an attribute of the tensor, so that ``weights(gram(J))`` knows it. Only this tensor
has the attribute. The result of an operation on it, such as a copy or a sum, does not.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_ATTRIBUTE = "antdiff_precision"
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # by increasing error of G


def with_precision(gram: Tensor, *dtypes: torch.dtype) -> Tensor:
    """Record on a Gram matrix that its gradients have these dtypes, and return the same tensor.

    Call it on a Gram matrix that went through other operations, such as a sum over ranks, or that was computed without
    :func:`antdiff.ops.gram`. Of several dtypes, the least precise one counts.

    Raises:
        TypeError: ``gram`` is not a tensor.
        ValueError: no dtype is given, or one is not one of float64, float32, float16 and bfloat16.
    """
    if not dtypes:
        raise ValueError("dtypes must name at least one dtype; got none. Pass the dtype of the gradients.")
    least = max(map(_checked, dtypes), key=_DTYPES.index)
    if least != precision_of(gram):
        setattr(gram, _ATTRIBUTE, least)
    return gram


def precision_of(gram: Tensor) -> torch.dtype:
    """Return the dtype that :func:`antdiff.ops.gram` or :func:`with_precision` has recorded, else float64.

    Raises:
        TypeError: ``gram`` is not a tensor.
    """
    if not isinstance(gram, Tensor):
        raise TypeError(f"gram must be a tensor; got {type(gram).__name__}. Pass the result of ops.gram.")
    dtype: torch.dtype = getattr(gram, _ATTRIBUTE, torch.float64)
    return dtype


def entry_noise(precision: torch.dtype) -> float:
    """Return the error of an entry G_ij of gradients of this dtype relative to ``|g_i| |g_j|``; 0 for float64.

    Measured errors of float32 products, for P up to 1e5, are at most 1.4 eps for float32 rows and 4 eps for bfloat16
    rows, and move an eigenvalue of zero by at most 0.6 k eps. Rounding the elements of J by u moves a singular value of
    zero by at most u times the norm of J, and its square by at most k u^2. The kernel has its own thresholds for
    float64, and uses them for 0.
    """
    if _checked(precision) == torch.float64:
        return 0.0
    products = 4 * torch.finfo(torch.float32).eps
    return products if precision == torch.float32 else products + (torch.finfo(precision).eps / 2) ** 2


def _checked(dtype: torch.dtype) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:
        raise ValueError(
            f"precision must be one of {', '.join(map(str, _DTYPES))}; got {dtype!r}. Pass the dtype of the gradients."
        )
    return dtype


def note(gram: Tensor, tensors: Iterable[Tensor | None]) -> Tensor:
    """Record the dtypes of ``tensors`` on ``gram``, in addition to its recorded precision, and return ``gram``."""
    return with_precision(gram, precision_of(gram), *{x.dtype for x in tensors if x is not None})
