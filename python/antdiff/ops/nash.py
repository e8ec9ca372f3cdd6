"""NashMTL's bargaining weights, computed exactly from the Gram matrix.

Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022. The weights a > 0 solve ``G a = 1/a`` elementwise.
They are the minimum of the strictly convex ``1/2 a^T G a - sum_i log a_i``, which one Newton solve finds. The published
code solves a sequence of up to twenty linearised problems instead.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from antdiff._checks import as_choice, describe
from antdiff.ops._extension import _C, define, dense, traced
from antdiff.ops._problems import NonFinite, as_gram, checked, fake_weights, outputs
from antdiff.ops.combine import combine
from antdiff.ops.gram import Jacobian
from antdiff.ops.gram import gram as gram_of

Solver = Literal["newton", "cvxpy"]

# Clarabel's default tolerance for duality gap and feasibility is 1e-8. The error of the weights is about
# the square root of this tolerance.
_CVXPY_RESIDUAL = 1e-3
# kNashRidge and kNashStationary of csrc/core/nash.h have the same values.
_RIDGE = 1e-9
_STATIONARY = 64 * torch.finfo(torch.float64).eps


def nash_weights(gram: Tensor, *, solver: Solver = "newton", nonfinite: NonFinite = "raise") -> Tensor:
    """Compute weights a such that ``a^T J`` is the Nash bargaining direction for gradients J with Gram matrix ``gram``.

    At the solution, ``|a^T J|^2`` is the number of non-zero rows. The direction therefore has a fixed length: a
    learning rate is a step length, and clipping to norm 1, which is usual with NashMTL, always clips. The weights scale
    as 1/|J|; with a loss scaler, pass the Gram matrix of *unscaled* gradients.

    Zero rows get weight 0. If a convex combination of non-zero rows vanishes (a Pareto-stationary point), there is no
    solution. A ridge of 1e-9 relative to the diagonal then gives finite weights, and the combination of those rows is
    near zero. Such weights are never renormalised.

    Args:
        gram: float64 ``[..., k, k]``, symmetric up to rounding; its symmetric part is used. A non-contiguous input
            costs a copy. It is treated as a constant: no gradient flows through the weights.
        solver: ``"newton"`` (default) runs on the device of ``gram`` without a host-device sync, until
            ``max_i |a_i (G a)_i - 1| <= 1e-12`` or as close as the conditioning of ``gram`` allows in float64.
            ``"cvxpy"`` passes the same convex problem to Clarabel on the host; it needs the cvxpy package, and warns if
            that residual exceeds 1e-3. :func:`nash_residual` computes the residual of any weights.
        nonfinite: As in :func:`antdiff.ops.pcgrad_weights`.

    Returns:
        float64 ``[..., k]`` on the device of ``gram``.

    Raises:
        TypeError, ValueError: as :func:`antdiff.ops.pcgrad_weights`.
        ImportError: ``solver="cvxpy"`` and cvxpy cannot be imported.
        RuntimeError: ``solver="cvxpy"`` and Clarabel found no solution.
    """
    gram = as_gram(gram)
    poison = as_choice("nonfinite", nonfinite, ("raise", "poison")) == "poison"
    if as_choice("solver", solver, ("newton", "cvxpy")) == "cvxpy":
        solve = _cvxpy_weights
        if torch.compiler.is_compiling():  # a decorator would import all of Dynamo together with this package
            solve = torch.compiler.disable(solve)
        return solve(gram, poison)
    if traced(gram):
        return torch.ops.antdiff.nash_weights(gram, poison)  # type: ignore[no-any-return]
    return _weights(gram, poison)


def nash_residual(gram: Tensor, weights: Tensor) -> Tensor:
    """Compute ``max_i |a_i (G a)_i - 1|`` over the non-zero rows, the residual of the bargaining equation.

    Args:
        gram: float64 ``[..., k, k]``, as in :func:`nash_weights`.
        weights: a, float64 ``[..., k]`` on the device of ``gram``.

    Returns:
        float64 ``[...]`` on the device of ``gram``, without a host-device sync. The residual has no unit. Rounding
        alone gives about ``1e-16 * k`` times the condition number of the correlation matrix of ``gram``.
    """
    gram, weights = as_gram(gram), dense("weights", weights)
    if weights.dtype != torch.float64 or weights.shape != gram.shape[:-1] or weights.device != gram.device:
        raise ValueError(
            f"weights must be float64 {list(gram.shape[:-1])} on {gram.device}, one number per row of gram; got "
            f"{describe(weights)} on {weights.device}. Pass what nash_weights(gram) returns."
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
    """Compute NashMTL's direction for the gradients J: :func:`gram`, :func:`nash_weights`, :func:`combine` in one.

    Args:
        J: ``[k, P]`` or a list of ``[k, *shape]``, as in :func:`antdiff.ops.gram`.
        out: Tensors to overwrite with the direction, as in :func:`antdiff.ops.combine`.
        solver, nonfinite: As in :func:`nash_weights`.

    Returns:
        The direction, as :func:`combine` returns it, and the weights, float64 ``[k]``.
    """
    weights = nash_weights(gram_of(J), solver=solver, nonfinite=nonfinite)
    return combine(weights, J, out), weights  # type: ignore[arg-type]


def _weights(gram: Tensor, poison: bool) -> Tensor:
    weights, scratch = outputs(gram, _C.nash_scratch)
    _C.nash_weights(gram, poison, weights, scratch)
    return checked(weights)


# ---- the same convex problem, solved by cvxpy ------------------------------------------------------------------------


def _cvxpy_weights(gram: Tensor, poison: bool) -> Tensor:
    if traced(gram):
        raise TypeError("gram must be a plain tensor for solver='cvxpy', which runs on the host. Use solver='newton'.")
    host = gram.cpu()
    newton = _weights(host, poison)  # raises or poisons under the same conditions
    weights = torch.empty_like(newton)
    k = host.shape[-1]
    for G, result, valid in zip(host.view(-1, k, k), weights.view(-1, k), newton.view(-1, k), strict=True):
        result.copy_(_solve_with_cvxpy(G) if bool(valid.isfinite().all()) else valid)
    worst = float(nash_residual(host, weights).nan_to_num(0.0).max()) if weights.numel() else 0.0
    if worst > _CVXPY_RESIDUAL:
        warnings.warn(
            f"nash_weights(solver='cvxpy'): max |a * (G a) - 1| = {worst:.1e} after Clarabel. If a combination of rows "
            "vanishes, there is no solution; otherwise solver='newton' is more accurate.",
            RuntimeWarning,
            stacklevel=3,
        )
    return weights.to(gram.device)


def _solve_with_cvxpy(G: Tensor) -> Tensor:
    """Return the weights [k] of one valid Gram matrix [k, k] on the CPU."""
    rows = G.diagonal() > 0
    weights = torch.zeros(len(G), dtype=torch.float64)
    if not rows.any():
        return weights
    scale = G.diagonal()[rows].rsqrt()
    # The correlation matrix: scaling rows does not change the problem.
    C = G[rows][:, rows] * scale * scale[:, None]
    C = (C + C.T) / 2
    b = _minimise(C)
    if b is None:
        b = _minimise(C + _RIDGE * torch.eye(len(C), dtype=torch.float64))
    if b is None:
        raise RuntimeError("nash_weights(solver='cvxpy'): Clarabel found no solution. Use solver='newton'.")
    weights[rows] = scale * b
    return weights


def _minimise(C: Tensor) -> Tensor | None:
    """Return the minimiser of ``1/2 b^T C b - sum(log b)``, or None if Clarabel finds none; there may be none."""
    try:
        cp: Any = importlib.import_module("cvxpy")
    except ImportError as error:
        raise ImportError(
            f"solver='cvxpy' needs the cvxpy package, which could not be imported ({error}). "
            "Run `pip install cvxpy`, or use solver='newton', which needs no package."
        ) from error
    b: Any = cp.Variable(len(C))
    problem = cp.Problem(cp.Minimize(cp.quad_form(b, cp.psd_wrap(C.numpy())) / 2 - cp.sum(cp.log(b))))
    try:
        with warnings.catch_warnings():  # cvxpy warns of an inaccurate solution; we report its residual instead
            warnings.simplefilter("ignore", UserWarning)
            problem.solve(solver=cp.CLARABEL)
    except cp.error.SolverError:  # Clarabel gave up: treated as having no minimum
        return None
    if problem.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE) or not (b.value > 0).all():
        return None
    found = torch.from_numpy(b.value)
    # If the quadratic form vanishes up to rounding, Clarabel diverged along a combination of rows that is zero.
    return found if found @ C @ found > _STATIONARY * len(C) * found.square().sum() else None


# ---- torch.library: torch.compile, export, fake tensors --------------------------------------------------------------

define(
    "nash_weights(Tensor gram, bool poison) -> Tensor",
    lambda gram, poison: _weights(gram.contiguous(), poison),
    lambda gram, poison: fake_weights(gram),
)
