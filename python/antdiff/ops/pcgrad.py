"""PCGrad on the Gram matrix: the weights of the projected gradients, with the visiting orders as an argument.

Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1. The algorithm depends on the gradients
of length P only through their Gram matrix, so the projections run on K x K numbers in float64.
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
    """Compute weights w such that ``w^T J`` is PCGrad's direction for gradients J with the Gram matrix ``gram``.

    Row i starts from ``p_i = g_i`` and visits the other rows j in its order. If ``<p_i, g_j> < 0``, it subtracts
    ``<p_i, g_j> / |g_j|^2 g_j``, always with the original ``g_j``. The direction is the mean of the p_i (in the paper,
    their sum), so that without conflict it is the gradient of the mean loss. Nothing is added to the denominator:
    scaling rows by powers of two gives the same direction bit for bit. Zero rows are skipped; their own weight is 1/k,
    or 1 with ``reduction="sum"``. A row is zero if its diagonal entry of G is zero. Its other
    entries are then not used: they are zeros too, unless ``|g_i|^2`` underflows and the products do not.

    Args:
        gram: float64 ``[..., k, k]``, symmetric up to rounding; its symmetric part is used. A non-contiguous input
            costs a copy. It is treated as a constant: no gradient flows through the weights.
        perms: int64 ``[..., k, k-1]``; row i is the order in which row i visits the other rows. Default None: draw
            ``keys = torch.rand(gram.shape, dtype=torch.float64)``; row i visits by ascending ``keys[..., i, j]``.
        generator: Draws the keys. It must be on the device of ``gram``; default None is the global generator of that
            device. To capture the call in a CUDA graph, register the generator with the graph.
        reduction: ``"mean"`` (default) is ready for the update. ``"sum"`` is the paper's, k times the mean.
        nonfinite: How an invalid ``gram`` is handled on the CPU. ``"raise"`` (default) raises. ``"poison"`` gives NaN
            weights for that problem only, so that a ``GradScaler`` skips the step. On CUDA the weights are always
            poisoned; ``"poison"`` then also keeps the error out of :func:`antdiff.ops.check_errors`.

    Returns:
        float64 ``[..., k]`` on the device of ``gram``, without a host-device sync.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option is wrong. On the CPU also if ``gram`` is not finite, has
            a negative diagonal, is not symmetric, or has ``|G_ij| > |g_i| |g_j|``, or if ``perms`` are not permutations
            of the other rows. The tolerance of the last two rules for ``gram`` is ``|g_i| |g_j| / 16``, which is above
            the rounding error of half precision. On CUDA these cases give NaN weights and are reported by
            :func:`antdiff.ops.check_errors`; with ``ANTDIFF_CHECK=1`` in the environment they raise immediately.
    """
    gram = as_gram(gram)
    mean = as_choice("reduction", reduction, ("sum", "mean")) == "mean"
    poison = as_choice("nonfinite", nonfinite, ("raise", "poison")) == "poison"
    keys = None
    if perms is None:
        keys = _draw_keys(gram, generator)
    elif generator is not None:
        raise ValueError("generator draws the orders, so it must be None if perms are given. Pass only one of the two.")
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
    """Compute PCGrad's direction for the gradients J: :func:`gram`, :func:`pcgrad_weights`, :func:`combine` in one.

    Args:
        J: ``[k, P]`` or a list of ``[k, *shape]``, as in :func:`antdiff.ops.gram`.
        out: Tensors to overwrite with the direction, as in :func:`antdiff.ops.combine`.
        perms, generator, reduction, nonfinite: As in :func:`pcgrad_weights`.

    Returns:
        The direction, as :func:`combine` returns it, and the weights, float64 ``[k]``.
    """
    weights = pcgrad_weights(gram_of(J), perms, generator=generator, reduction=reduction, nonfinite=nonfinite)
    return combine(weights, J, out), weights  # type: ignore[arg-type]


def _draw_keys(gram: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw uniform numbers [..., k, k]."""
    if generator is None:  # torch.compile cannot trace generator=None with dynamic shapes
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
