"""Balancing methods that are a function of the Gram matrix: small convex programs and eigenproblems, solved exactly.

They share one kernel per device. It runs the whole solver on the device, in float64, with one problem per thread and
without a host-device sync.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from antdiff._checks import as_choice, check_generator
from antdiff.ops._extension import _C, define, dense, traced
from antdiff.ops._precision import entry_noise, precision_of
from antdiff.ops._problems import NonFinite, as_gram, checked, fake_weights, outputs
from antdiff.ops.pcgrad import Reduction

Method = Literal["upgrad", "dualproj", "aligned_mtl", "mgda", "cagrad", "imtl_g", "config", "fairgrad"]

_METHODS: tuple[str, ...] = get_args(Method)
_SPECTRAL = ("aligned_mtl", "imtl_g", "config")  # invert eigenvalues, and need to know which of them are zero
_SUMS = ("aligned_mtl", "config")  # published as a sum over the rows
_PARAMETERS = {"cagrad": ("c", 0.5), "fairgrad": ("alpha", 2.0)}


def gram_weights(
    gram: Tensor,
    method: Method,
    *,
    parameter: float | None = None,
    reduction: Reduction = "mean",
    precision: torch.dtype | None = None,
    nonfinite: NonFinite = "raise",
) -> Tensor:
    """Compute weights w such that ``w^T J`` is the direction of ``method`` for gradients J with Gram matrix ``gram``.

    =========== ==================================================================================================
    method      direction, of gradients g_i with mean g_0
    =========== ==================================================================================================
    upgrad      mean of the projections of the g_i onto the dual cone ``{d: <d, g_j> >= 0}`` (Quinton 2024)
    dualproj    projection of g_0 onto the dual cone (GEM, Lopez-Paz 2017)
    aligned_mtl g_0 after all non-zero singular values of J are set to the smallest one (Senushkin 2023)
    mgda        the shortest convex combination of the g_i (Desideri 2012, Sener 2018)
    cagrad      the d with ``|d - g_0| <= c |g_0|`` and the greatest ``min_i <d, g_i>`` (Liu 2021)
    imtl_g      equal projections onto all g_i, weights with sum 1 (Liu 2021)
    config      equal cosines with all g_i; its length is the mean of their projections onto it (Liu 2025: the sum)
    fairgrad    ``(G w)_i = w_i^(-1/alpha)``, alpha-fair utilities (Ban 2024); alpha = 1 is NashMTL
    =========== ==================================================================================================

    No method depends on the unit of J: multiplying J by a positive number gives the same weights, bit for bit if the
    number is a power of two. The weights of fairgrad are the exception; they scale as
    ``|J|^(-2 alpha / (1 + alpha))``. Zero rows are left out and get weight 0; exact MGDA, for example, would otherwise
    return zero as soon as one cluster is empty. The direction does not depend on the order of the rows. If rows are
    linearly dependent, several weights give the same direction, and the order decides which of them is returned.

    If the rows of J are linearly dependent, an eigenvalue of G is zero, and rounding moves it away from zero. Its
    inverse would shorten the direction of aligned_mtl, imtl_g and config to 1e-4 to 1e-8 of its length for rows in
    float32. These methods therefore treat an eigenvalue as zero if it is at most m r, where m is the number of non-zero
    rows and r is the relative rounding error of an entry. m r is relative to the largest eigenvalue of G (aligned_mtl),
    or to 1 for the correlation matrix (imtl_g, config). For float32 rows, r is 4 eps = 4.8e-7 of ``|g_i| |g_j|``, since
    the products are summed in float32. For float16 and bfloat16 rows, u^2 is added (2.4e-7 and 1.5e-5), since rounding
    every element of J by u moves a singular value of zero by u times the norm. For float64 rows, r is 2.2e-16
    (aligned_mtl) or 1.4e-14 (imtl_g, config).

    Args:
        gram: float64 ``[..., k, k]``, symmetric up to rounding; its symmetric part is used. A non-contiguous input
            costs a copy. It is treated as a constant: no gradient flows through the weights.
        method: One of the names above.
        parameter: c >= 0 of cagrad (default 0.5) or alpha > 0 of fairgrad (default 2). The other methods have none.
        reduction: ``"mean"`` (default) is ready for the update. ``"sum"``, for config and aligned_mtl only, is the
            authors' length, k times the mean.
        precision: The dtype of J, which decides which eigenvalues count as zero in aligned_mtl, imtl_g and config;
            see above. Default None: the dtype that :func:`antdiff.ops.precision_of` finds, which is that of J for a
            Gram matrix that comes directly from :func:`antdiff.ops.gram`, and float64 for any other. Under
            torch.compile, pass it.
        nonfinite: As in :func:`antdiff.ops.pcgrad_weights`.

    Returns:
        float64 ``[..., k]`` on the device of ``gram``, without a host-device sync. If the direction is not defined
        (imtl_g and config with gradients that are exactly opposed), the weights are 0. If it would be infinite
        (fairgrad at a Pareto-stationary point), the weights are finite and their direction is near zero.

    Raises:
        TypeError, ValueError: as :func:`antdiff.ops.pcgrad_weights`.
    """
    source, gram = gram, as_gram(gram)
    as_choice("method", method, _METHODS)
    option = _parameter(method, parameter)
    if method in _SPECTRAL:
        option = entry_noise(precision_of(source) if precision is None else precision)
    mean = as_choice("reduction", reduction, ("sum", "mean")) == "mean"
    if not mean and method not in _SUMS:
        raise ValueError(
            f"reduction must be 'mean' for method {method!r}, because only {' and '.join(_SUMS)} are published as a "
            "sum; got 'sum'. Leave it out."
        )
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
    """Compute the weights of GradVac's direction, and the targets for its next step.

    Wang et al., "Gradient Vaccine", ICLR 2021, algorithm 1: p_i starts from g_i and visits the other g_j in random
    order. If their cosine is below ``targets[i, j]``, a multiple of g_j is added to p_i to raise the cosine to the
    target. The target then moves to ``(1 - beta) target + beta cosine``. The direction is the mean of the p_i (in the
    paper, their sum). With targets of zero this is PCGrad.

    Args:
        gram: As in :func:`gram_weights`.
        targets: float64 with the shape and the device of ``gram``; zero in the first step. Not written to.
        beta: In [0, 1]. Default 0.01 as in the paper; 0 keeps the targets.
        generator: Draws the orders, as in :func:`antdiff.ops.pcgrad_weights`.
        reduction, nonfinite: As in :func:`antdiff.ops.pcgrad_weights`.

    Returns:
        The weights, float64 ``[..., k]``, and new targets with the shape of ``targets``. The weight of a zero row is
        1/k (1 with ``reduction="sum"``). Where the weights are NaN because of an invalid ``gram``, the targets are the
        old ones.

    Raises:
        TypeError, ValueError: as :func:`antdiff.ops.pcgrad_weights`, or beta is outside [0, 1].
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
        raise ValueError(f"beta must be in [0, 1]; got {beta}. The paper uses 0.01.")
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
            raise ValueError(
                f"parameter must be None for method {method!r}, which has none; got {value!r}. Leave it out."
            )
        return 0.0
    name, default = _PARAMETERS[method]
    if value is None:
        return default
    value = _number(f"parameter of {method}, {name},", value)
    if not math.isfinite(value) or value < 0 or (value == 0 and name == "alpha"):
        rule = "> 0" if name == "alpha" else ">= 0"
        raise ValueError(
            f"parameter of {method}, {name}, must be finite and {rule}; got {value!r}. The default is {default}."
        )
    return value


def _number(name: str, value: float) -> float:
    """Return ``value`` as a float. A tensor is refused, because reading it would wait for its device."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}. Pass a Python float.")
    return float(value) if abs(value) < 2**1000 else math.copysign(math.inf, value)


def _weights(gram: Tensor, method: str, option: float, mean: bool, poison: bool) -> Tensor:
    weights, scratch = outputs(gram, _C.gram_weights_scratch)
    _C.gram_weights(gram, method, option, None, None, poison, weights, scratch)
    checked(weights)
    if method == "config":  # the kernel computes the sum
        return weights.div_(gram.shape[-1]) if mean else weights
    return weights if mean else weights.mul_(gram.shape[-1])


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
