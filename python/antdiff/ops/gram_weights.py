"""Balancing methods that are one function of the Gram matrix: small convex programs and eigenproblems, solved exactly.

They share one kernel a device, which runs the whole solver there: float64, one problem a thread, no synchronisation.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from antdiff._checks import as_choice, check_generator
from antdiff.ops._extension import _C, define, dense, traced
from antdiff.ops._problems import NonFinite, as_gram, checked, fake_weights, outputs
from antdiff.ops.pcgrad import Reduction

Method = Literal["upgrad", "dualproj", "aligned_mtl", "mgda", "cagrad", "imtl_g", "config", "fairgrad"]

_METHODS: tuple[str, ...] = get_args(Method)
_PARAMETERS = {"cagrad": ("c", 0.5), "fairgrad": ("alpha", 2.0)}


def gram_weights(
    gram: Tensor,
    method: Method,
    *,
    parameter: float | None = None,
    reduction: Reduction = "mean",
    nonfinite: NonFinite = "raise",
) -> Tensor:
    """Weights w with ``w^T J`` the direction of ``method`` for the gradients J whose Gram matrix is ``gram``.

    ========== ============================================================================================
    method     direction, of gradients g_i with mean g_0
    ========== ============================================================================================
    upgrad     mean of the projections of the g_i onto the dual cone ``{d: <d, g_j> >= 0}`` (Quinton 2024)
    dualproj   projection of g_0 onto the dual cone (GEM, Lopez-Paz 2017)
    aligned_mtl  g_0 after all non-zero singular values of J are set to the least one (Senushkin 2023)
    mgda       the shortest convex combination of the g_i (Desideri 2012, Sener 2018)
    cagrad     of all d with ``|d - g_0| <= c |g_0|``, that with the greatest ``min_i <d, g_i>`` (Liu 2021)
    imtl_g     equal projections onto all g_i, weights of sum 1 (Liu 2021)
    config     equal cosines to all g_i, as long as the mean of its projections onto them (Liu 2025: their sum)
    fairgrad   ``(G w)_i = w_i^(-1/alpha)``, alpha-fair utilities (Ban 2024); alpha = 1 is NashMTL
    ========== ============================================================================================

    No method sees a unit: J times any positive number gives the same weights bit for bit where the number is a power of
    two (those of fairgrad scale as ``|J|^(-2 alpha / (1 + alpha))``). Zero rows are left out and get weight 0: exact
    MGDA, for one, would stop at the first empty cluster. The direction does not depend on the order of the rows; where
    rows are dependent, several weights give it, and which are returned does.

    Args:
        gram: float64 ``[..., k, k]``, symmetric to rounding (its symmetric part is used); contiguous, or at the price
            of a copy. Taken as a constant: no gradient flows through the weights.
        method: see above.
        parameter: c >= 0 of cagrad (default 0.5), alpha > 0 of fairgrad (default 2); the others have none.
        reduction: ``"mean"``, ready for the update; or, for config alone, ``"sum"``: the published length, k times it.
        nonfinite: as in :func:`antdiff.ops.pcgrad_weights`.

    Returns:
        float64 ``[..., k]`` on the device of ``gram``, without host synchronisation. Where the direction is not defined
        (imtl_g and config with gradients that oppose each other exactly) the weights are 0; where it would be infinite
        (fairgrad at a Pareto-stationary point) they are finite and their direction near zero.

    Raises:
        TypeError, ValueError: as :func:`antdiff.ops.pcgrad_weights`.
    """
    gram = as_gram(gram)
    as_choice("method", method, _METHODS)
    option = _parameter(method, parameter)
    mean = as_choice("reduction", reduction, ("sum", "mean")) == "mean"
    if not mean and method != "config":
        raise ValueError(f"reduction must be 'mean' for method {method!r}: only config is published as a sum.")
    poison = as_choice("nonfinite", nonfinite, ("raise", "poison")) == "poison"
    if traced(gram):
        return torch.ops.antdiff.gram_weights(gram, method, option, mean, poison)  # type: ignore[no-any-return]
    return _weights(gram, method, option, mean, poison)


def gradvac_weights(
    gram: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.01,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    nonfinite: NonFinite = "raise",
) -> tuple[Tensor, Tensor]:
    """Weights of GradVac's direction, and the targets for its next step.

    Wang et al., "Gradient Vaccine", ICLR 2021, algorithm 1: p_i starts from g_i and visits the other g_j in random
    order; where their cosine is below ``targets[i, j]`` it is raised to it by adding a multiple of g_j, and the target
    moves to ``(1 - beta) target + beta cosine``. The direction is the mean of the p_i (the paper: their sum).
    With targets of zero this is PCGrad.

    Args:
        gram: as in :func:`gram_weights`.
        targets: float64 of the shape of ``gram``; zero at first. Not written to.
        beta: in [0, 1]; 0.01 is the paper's, 0 keeps the targets.
        generator: draws the orders, as in :func:`antdiff.ops.pcgrad_weights`.
        reduction, nonfinite: as in :func:`antdiff.ops.pcgrad_weights`.

    Returns:
        weights float64 ``[..., k]``, a zero row's being 1/k (1 with ``"sum"``), and new targets like ``targets``:
        where the weights are NaN for a bad ``gram``, the old ones.

    Raises:
        TypeError, ValueError: as :func:`antdiff.ops.pcgrad_weights`; a beta outside [0, 1].
    """
    gram = as_gram(gram)
    targets = dense("targets", targets)
    if targets.dtype != torch.float64:
        raise TypeError(f"targets must be float64, like gram; got {targets.dtype}. Start from torch.zeros_like(gram).")
    if targets.shape != gram.shape or targets.device != gram.device:
        raise ValueError(
            f"targets must have the shape and device of gram, {list(gram.shape)} on {gram.device}; got "
            f"{list(targets.shape)} on {targets.device}. Start from torch.zeros_like(gram)."
        )
    if not 0 <= _number("beta", beta) <= 1:
        raise ValueError(f"beta must be in [0, 1]; got {beta}.")
    mean = as_choice("reduction", reduction, ("sum", "mean")) == "mean"
    poison = as_choice("nonfinite", nonfinite, ("raise", "poison")) == "poison"
    if generator is not None:
        check_generator(generator, gram.device)
    keys = torch.rand(gram.shape, dtype=torch.float64, device=gram.device, generator=generator)
    if traced(gram, targets):
        return torch.ops.antdiff.gradvac_weights(gram, targets, keys, beta, mean, poison)  # type: ignore[no-any-return]
    return _gradvac(gram, targets, keys, beta, mean, poison)


def _parameter(method: str, value: float | None) -> float:
    if method not in _PARAMETERS:
        if value is not None:
            raise ValueError(f"parameter must be None for method {method!r}, which has none; got {value!r}.")
        return 0.0
    name, default = _PARAMETERS[method]
    if value is None:
        return default
    value = _number(f"parameter of {method}, {name},", value)
    if not math.isfinite(value) or value < 0 or (value == 0 and name == "alpha"):
        rule = "> 0" if name == "alpha" else ">= 0"
        raise ValueError(f"parameter of {method}, {name}, must be finite and {rule}; got {value!r}.")
    return value


def _number(name: str, value: float) -> float:
    """``value`` as a float; a tensor is none, for reading it would wait for its device."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}. Pass a Python float.")
    return float(value)


def _weights(gram: Tensor, method: str, option: float, mean: bool, poison: bool) -> Tensor:
    weights, scratch = outputs(gram, _C.gram_weights_scratch)
    _C.gram_weights(gram, method, option, None, None, poison, weights, scratch)
    checked(weights)
    return weights.div_(gram.shape[-1]) if mean and method == "config" else weights


def _gradvac(
    gram: Tensor, targets: Tensor, keys: Tensor, beta: float, mean: bool, poison: bool
) -> tuple[Tensor, Tensor]:
    weights, scratch = outputs(gram, _C.gram_weights_scratch)
    targets = targets.detach().clone()
    _C.gram_weights(gram, "gradvac", beta, keys, targets, poison, weights, scratch)
    checked(weights)
    return weights.div_(gram.shape[-1]) if mean else weights, targets


# ---- torch.library: torch.compile, export, fake tensors --------------------------------------------------------------

define(
    "gram_weights(Tensor gram, str method, float option, bool mean, bool poison) -> Tensor",
    lambda gram, method, option, mean, poison: _weights(gram.contiguous(), method, option, mean, poison),
    lambda gram, *_rest: fake_weights(gram),
)
define(
    "gradvac_weights(Tensor gram, Tensor targets, Tensor keys, float beta, bool mean, bool poison) -> (Tensor, Tensor)",
    lambda gram, targets, keys, beta, mean, poison: _gradvac(
        gram.contiguous(), targets.contiguous(), keys.contiguous(), beta, mean, poison
    ),
    lambda gram, targets, *_rest: (fake_weights(gram), torch.empty_like(targets)),
)
