"""Functions that the ops on batches of K x K problems share: the check of ``gram``, and the allocation of outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from antdiff.ops._extension import checked, dense

__all__ = ["NonFinite", "as_gram", "checked", "fake_weights", "outputs"]

NonFinite = Literal["raise", "poison"]


def as_gram(gram: Tensor) -> Tensor:
    """Return ``gram`` contiguous and detached, or raise an error unless it is float64 ``[..., k, k]``."""
    gram = dense("gram", gram)
    if gram.device.type == "meta" and type(gram) is Tensor:
        raise TypeError("gram must be a tensor with values; got a meta tensor. Compute it with antdiff.ops.gram(J).")
    if gram.dtype != torch.float64:
        raise TypeError(
            f"gram must be float64, since lower precision changes the weights; got {gram.dtype}. "
            "Compute it with antdiff.ops.gram(J), or pass gram.double() if it exists only in lower precision."
        )
    shape = gram.shape
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] == 0:
        raise ValueError(
            f"gram must have shape [..., k, k] with k >= 1; got {list(shape)}. Compute it with antdiff.ops.gram(J)."
        )
    return gram.detach() if gram.requires_grad else gram


def outputs(gram: Tensor, scratch_size: Callable[[int, int], int]) -> tuple[Tensor, Tensor | None]:
    """Allocate the weights ``[..., k]``, and the global-memory workspace that a CUDA kernel needs for a large k."""
    weights = torch.empty(gram.shape[:-1], dtype=torch.float64, device=gram.device)
    scratch = None
    if gram.is_cuda:
        k = gram.shape[-1]
        if size := scratch_size(gram.numel() // (k * k), k):
            scratch = torch.empty(size, dtype=torch.float64, device=gram.device)
    return weights, scratch


def fake_weights(gram: Tensor) -> Tensor:
    return gram.new_empty(gram.shape[:-1])
