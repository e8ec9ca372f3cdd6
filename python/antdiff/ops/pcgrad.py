"""PCGrad on the Gram matrix: the weights of the projected gradients, with the visiting orders as an argument.

Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1. Everything the algorithm needs from
the P-long gradients is their Gram matrix, so the projections run on K x K numbers in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from antdiff._checks import as_choice, check_generator
from antdiff.ops._extension import _C, define, dense, traced
from antdiff.ops._problems import NonFinite, as_gram, checked, fake_weights, outputs
from antdiff.ops.combine import combine
from antdiff.ops.gram import Jacobian
from antdiff.ops.gram import gram as gram_of

Reduction = Literal["sum", "mean"]


def pcgrad_weights(
    gram: Tensor,
    perms: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    nonfinite: NonFinite = "raise",
) -> Tensor:
    """Weights w with ``w^T J`` the PCGrad direction of the gradients J whose Gram matrix is ``gram``.

    Row i starts from ``p_i = g_i`` and visits the other rows j in its order; where ``<p_i, g_j> < 0`` it subtracts
    ``<p_i, g_j> / |g_j|^2 g_j``, always with the original ``g_j``. The direction is the mean of the
    p_i (the paper: their sum), so that without conflict it is the gradient of the mean loss. Nothing is added to the
    denominator: rows scaled by powers of two give the same direction bit for bit, and zero rows are skipped (their own
    weight is 1/k, or 1 with ``"sum"``).

    Args:
        gram: float64 ``[..., k, k]``, symmetric to rounding (its symmetric part is used); contiguous, or at the price
            of a copy. Taken as a constant: no gradient flows through the weights.
        perms: int64 ``[..., k, k-1]``, in row i the order in which i visits the other rows. Default: row i visits by
            ascending ``keys[..., i, j]`` of ``keys = torch.rand(gram.shape, dtype=torch.float64)``.
        generator: draws the keys; on the device of ``gram``, default the global generator of that device. Register it
            with a CUDA graph to capture the call.
        reduction: ``"mean"``, ready for the update, or ``"sum"``, the paper's, k times it.
        nonfinite: what a bad ``gram`` does on the CPU: ``"raise"``, or ``"poison"`` for NaN weights of that problem
            alone (so that a ``GradScaler`` skips the step). On CUDA it always poisons; ``"poison"`` keeps it out of
            :func:`antdiff.ops.check_errors` too.

    Returns:
        float64 ``[..., k]`` on the device of ``gram``, without host synchronisation.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or option; on the CPU also a ``gram`` that is not finite,
            not symmetric, has a negative diagonal or ``|G_ij| > |g_i| |g_j|`` (each by more than 1/16, which is above
            the rounding of half precision), and orders that are none. On CUDA these give NaN weights, and are reported
            by :func:`antdiff.ops.check_errors`; ``ANTDIFF_CHECK=1`` in the environment raises at once.
    """
    gram = as_gram(gram)
    mean = as_choice("reduction", reduction, ("sum", "mean")) == "mean"
    poison = as_choice("nonfinite", nonfinite, ("raise", "poison")) == "poison"
    keys = None
    if perms is None:
        keys = _draw_keys(gram, generator)
    elif generator is not None:
        raise ValueError("generator draws the orders, so it must be None where perms are given. Drop one of the two.")
    else:
        perms = dense("perms", perms)
    if traced(gram, perms):
        return torch.ops.antdiff.pcgrad_weights(gram, perms, keys, mean, poison)  # type: ignore[no-any-return]
    return _weights(gram, perms, keys, mean, poison)


@overload
def pcgrad(
    J: Tensor,
    perms: Tensor | None = ...,
    *,
    out: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    reduction: Reduction = ...,
    nonfinite: NonFinite = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def pcgrad(
    J: Sequence[Tensor | None],
    perms: Tensor | None = ...,
    *,
    out: Sequence[Tensor | None] | None = ...,
    generator: torch.Generator | None = ...,
    reduction: Reduction = ...,
    nonfinite: NonFinite = ...,
) -> tuple[list[Tensor | None], Tensor]: ...
def pcgrad(
    J: Jacobian,
    perms: Tensor | None = None,
    *,
    out: Tensor | Sequence[Tensor | None] | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    nonfinite: NonFinite = "raise",
) -> tuple[Tensor | list[Tensor | None], Tensor]:
    """PCGrad's direction of the gradients J: :func:`gram`, :func:`pcgrad_weights` and :func:`combine` in one call.

    Args:
        J: ``[k, P]`` or a list of ``[k, *shape]``, as in :func:`antdiff.ops.gram`.
        out: where to write the direction, as in :func:`antdiff.ops.combine`.
        perms, generator, reduction, nonfinite: as in :func:`pcgrad_weights`.

    Returns:
        The direction as :func:`combine` returns it, and the weights float64 ``[k]``.
    """
    weights = pcgrad_weights(gram_of(J), perms, generator=generator, reduction=reduction, nonfinite=nonfinite)
    return combine(weights, J, out), weights  # type: ignore[arg-type]


def _draw_keys(gram: Tensor, generator: torch.Generator | None) -> Tensor:
    """[..., k, k] uniform numbers."""
    if generator is None:  # not passed on as None, which torch.compile cannot trace with dynamic shapes
        return torch.rand(gram.shape, dtype=torch.float64, device=gram.device)
    check_generator(generator, gram.device)
    return torch.rand(gram.shape, dtype=torch.float64, device=gram.device, generator=generator)


def _weights(gram: Tensor, perms: Tensor | None, keys: Tensor | None, mean: bool, poison: bool) -> Tensor:
    weights, scratch = outputs(gram, _C.pcgrad_scratch)
    _C.pcgrad_weights(gram, perms, keys, mean, poison, weights, scratch)
    return checked(weights)


# ---- torch.library: torch.compile, export, fake tensors --------------------------------------------------------------


def _library_weights(gram: Tensor, perms: Tensor | None, keys: Tensor | None, mean: bool, poison: bool) -> Tensor:
    perms = None if perms is None else perms.contiguous()
    keys = None if keys is None else keys.contiguous()
    return _weights(gram.contiguous(), perms, keys, mean, poison)


define(
    "pcgrad_weights(Tensor gram, Tensor? perms, Tensor? keys, bool mean, bool poison) -> Tensor",
    _library_weights,
    lambda gram, *_rest: fake_weights(gram),
)
