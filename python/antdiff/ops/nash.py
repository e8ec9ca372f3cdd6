"""NashMTL's bargaining weights from the Gram matrix, exactly.

Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022. The weights a > 0 solve ``G a = 1/a`` elementwise,
which is the minimum of the strictly convex ``1/2 a^T G a - sum_i log a_i``: one Newton solve, not the published
sequence of up to twenty linearised ones.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from antdiff._checks import as_choice
from antdiff.ops._extension import _C, define, dense, traced
from antdiff.ops._problems import NonFinite, as_gram, checked, fake_weights, outputs
from antdiff.ops.combine import combine
from antdiff.ops.gram import Jacobian
from antdiff.ops.gram import gram as gram_of

Solver = Literal["newton", "cvxpy"]

# Clarabel's default tolerance on duality gap and feasibility is 1e-8; the weights are off by about its square root.
_CVXPY_RESIDUAL = 1e-3
_RIDGE = 1e-9  # this and the next as in csrc/core/nash.h
_STATIONARY = 64 * torch.finfo(torch.float64).eps


def nash_weights(gram: Tensor, *, solver: Solver = "newton", nonfinite: NonFinite = "raise") -> Tensor:
    """Weights a with ``a^T J`` the Nash bargaining direction of the gradients J whose Gram matrix is ``gram``.

    At the solution ``|a^T J|^2`` is the number of non-zero rows, so the direction has a fixed length: a learning rate
    is a step length, and clipping to norm 1, usual with NashMTL, always clips. The weights scale as 1/|J|; pass the
    Gram matrix of *unscaled* gradients where a loss scaler is at work.

    Zero rows get weight 0. Where a convex combination of non-zero rows vanishes (a Pareto-stationary point) there is no
    solution; a ridge of 1e-9 relative to the diagonal then gives finite weights whose combination of those rows is near
    zero. Such weights are never renormalised.

    Args:
        gram: float64 ``[..., k, k]``, symmetric to rounding (its symmetric part is used); contiguous, or at the price
            of a copy. Taken as a constant: no gradient flows through the weights.
        solver: ``"newton"``, on the device of ``gram`` without synchronisation, to ``max_i |a_i (G a)_i - 1| <= 1e-12``
            or as near as the conditioning of ``gram`` lets float64 come; or ``"cvxpy"``, the same convex problem handed
            to Clarabel on the host (needs the cvxpy package), which warns where that residual exceeds 1e-3.
            :func:`nash_residual` gives the residual of either.
        nonfinite: as in :func:`antdiff.ops.pcgrad_weights`.

    Returns:
        float64 ``[..., k]`` on the device of ``gram``.

    Raises:
        TypeError, ValueError: as :func:`antdiff.ops.pcgrad_weights`.
        RuntimeError: ``solver="cvxpy"`` and Clarabel found no solution.
    """
    gram = as_gram(gram)
    poison = as_choice("nonfinite", nonfinite, ("raise", "poison")) == "poison"
    if as_choice("solver", solver, ("newton", "cvxpy")) == "cvxpy":
        solve = _cvxpy_weights
        if torch.compiler.is_compiling():  # decorating the function would import all of Dynamo with the package
            solve = torch.compiler.disable(solve)
        return solve(gram, poison)
    if traced(gram):
        return torch.ops.antdiff.nash_weights(gram, poison)  # type: ignore[no-any-return]
    return _weights(gram, poison)


def nash_residual(gram: Tensor, weights: Tensor) -> Tensor:
    """``max_i |a_i (G a)_i - 1|`` over the non-zero rows: how far ``weights [..., k]`` are from solving ``gram``.

    Returns float64 ``[...]``, on the device, without synchronisation. It is free of units: rounding gives about
    ``1e-16 * k`` times the condition number of the correlation matrix of ``gram``.
    """
    gram, weights = as_gram(gram), dense("weights", weights)
    if weights.dtype != torch.float64 or weights.shape != gram.shape[:-1] or weights.device != gram.device:
        raise ValueError(
            f"weights must be float64 {list(gram.shape[:-1])} on {gram.device}, one number for each row of gram; got "
            f"{weights.dtype} {list(weights.shape)} on {weights.device}."
        )
    products = weights * (gram @ weights[..., None])[..., 0]  # [..., k]
    error = torch.where(gram.diagonal(dim1=-2, dim2=-1) > 0, (products - 1).abs(), 0.0)
    return error.amax(dim=-1)


@overload
def nash(
    J: Tensor,
    *,
    out: Tensor | None = ...,
    solver: Solver = ...,
    nonfinite: NonFinite = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def nash(
    J: Sequence[Tensor | None],
    *,
    out: Sequence[Tensor | None] | None = ...,
    solver: Solver = ...,
    nonfinite: NonFinite = ...,
) -> tuple[list[Tensor | None], Tensor]: ...
def nash(
    J: Jacobian,
    *,
    out: Tensor | Sequence[Tensor | None] | None = None,
    solver: Solver = "newton",
    nonfinite: NonFinite = "raise",
) -> tuple[Tensor | list[Tensor | None], Tensor]:
    """NashMTL's direction of the gradients J: :func:`gram`, :func:`nash_weights` and :func:`combine` in one call.

    Args:
        J: ``[k, P]`` or a list of ``[k, *shape]``, as in :func:`antdiff.ops.gram`.
        out: where to write the direction, as in :func:`antdiff.ops.combine`.
        solver, nonfinite: as in :func:`nash_weights`.

    Returns:
        The direction as :func:`combine` returns it, and the weights float64 ``[k]``.
    """
    weights = nash_weights(gram_of(J), solver=solver, nonfinite=nonfinite)
    return combine(weights, J, out), weights  # type: ignore[arg-type]


def _weights(gram: Tensor, poison: bool) -> Tensor:
    weights, scratch = outputs(gram, _C.nash_scratch)
    _C.nash_weights(gram, poison, weights, scratch)
    return checked(weights)


# ---- the convex problem as cvxpy states it ---------------------------------------------------------------------------


def _cvxpy_weights(gram: Tensor, poison: bool) -> Tensor:
    if traced(gram):
        raise TypeError("gram must be a plain tensor for solver='cvxpy', which runs on the host. Use solver='newton'.")
    host = gram.cpu()
    newton = _weights(host, poison)  # raises or poisons by the same rules
    weights = torch.empty_like(newton)
    k = host.shape[-1]
    for G, result, valid in zip(host.view(-1, k, k), weights.view(-1, k), newton.view(-1, k), strict=True):
        result.copy_(_solve_with_cvxpy(G) if bool(valid.isfinite().all()) else valid)
    worst = float(nash_residual(host, weights).nan_to_num(0.0).max()) if weights.numel() else 0.0
    if worst > _CVXPY_RESIDUAL:
        warnings.warn(
            f"nash_weights(solver='cvxpy'): max |a * (G a) - 1| = {worst:.1e} after Clarabel. Where a combination of "
            "rows vanishes there is no solution; elsewhere solver='newton' comes nearer.",
            RuntimeWarning,
            stacklevel=3,
        )
    return weights.to(gram.device)


def _solve_with_cvxpy(G: Tensor) -> Tensor:
    """Weights [k] of one valid Gram matrix [k, k] on the CPU."""
    rows = G.diagonal() > 0
    weights = torch.zeros(len(G), dtype=torch.float64)
    if not rows.any():
        return weights
    scale = G.diagonal()[rows].rsqrt()
    C = G[rows][:, rows] * scale * scale[:, None]  # the correlation matrix: any scaling of J is the same problem
    C = (C + C.T) / 2
    b = _minimise(C)
    if b is None:
        b = _minimise(C + _RIDGE * torch.eye(len(C), dtype=torch.float64))
    if b is None:
        raise RuntimeError("nash_weights(solver='cvxpy'): Clarabel found no solution. Use solver='newton'.")
    weights[rows] = scale * b
    return weights


def _minimise(C: Tensor) -> Tensor | None:
    """The minimiser of ``1/2 b^T C b - sum(log b)``, or None if Clarabel finds none (there may not be one)."""
    try:
        cp: Any = importlib.import_module("cvxpy")
    except ImportError as error:
        raise ImportError(
            f"solver='cvxpy' needs the cvxpy package, which could not be imported ({error}). "
            "`pip install cvxpy`, or use solver='newton', which needs nothing."
        ) from error
    b: Any = cp.Variable(len(C))
    problem = cp.Problem(cp.Minimize(cp.quad_form(b, cp.psd_wrap(C.numpy())) / 2 - cp.sum(cp.log(b))))
    try:
        with warnings.catch_warnings():  # cvxpy's warning of an inaccurate solution: the residual says it in numbers
            warnings.simplefilter("ignore", UserWarning)
            problem.solve(solver=cp.CLARABEL)
    except cp.error.SolverError:  # Clarabel gave up: the same as no minimum
        return None
    if problem.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE) or not (b.value > 0).all():
        return None
    found = torch.from_numpy(b.value)
    # A form that vanishes to rounding: Clarabel ran off to infinity along a combination of rows that is zero.
    return found if found @ C @ found > _STATIONARY * len(C) * found.square().sum() else None


# ---- torch.library: torch.compile, export, fake tensors --------------------------------------------------------------

define(
    "nash_weights(Tensor gram, bool poison) -> Tensor",
    lambda gram, poison: _weights(gram.contiguous(), poison),
    lambda gram, poison: fake_weights(gram),
)
