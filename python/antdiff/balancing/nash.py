"""NashMTL (Navon et al., ICML 2022): the direction on which the tasks agree in Nash bargaining."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from antdiff._checks import as_choice, as_number
from antdiff.balancing.base import About, GramBalancer
from antdiff.ops import nash_weights
from antdiff.ops._problems import as_gram
from antdiff.ops.pcgrad import Reduction


class NashMTL(GramBalancer):
    """Weights of the exact bargaining solution; see :func:`antdiff.ops.nash_weights`.

    At a solution the direction has length ``sqrt(number of non-zero rows)`` for all gradients. ``max_norm=1``, which is
    usual with NashMTL, therefore divides by that root whenever a step solves. With or without it, the learning rate is
    a step length. With ``reduction="mean"`` the length is at most ``1 / sqrt(K)``, so ``max_norm=1`` changes nothing
    when a step solves. Between two solutions the weights are those of an earlier step, and the direction can have any
    length.

    Args:
        max_norm: If the direction is longer than this, scale it down to this length, in every step. Between two
            solutions, :meth:`weights` needs the Gram matrix of the step to do so, and returns the weights without
            scaling if it gets none. :class:`antdiff.BalancedBackward`, which has no Gram matrix then, scales ``p.grad``
            and the weights that it reports. Default None: do not scale.
        reduction: ``"sum"`` (default) for the solution itself, or ``"mean"`` to divide it by K before the length is
            limited, which gives the gradient of ``sum_i weights_i losses_i / K``, as in ANT.
        solver: ``"newton"`` (default) or ``"cvxpy"``.
        update_every: Default 1. The published implementations solve every 1 or every 25 steps, because their solver
            is slow.
        nonfinite: See :class:`GramBalancer`.
    """

    name = "nash"
    about = About(
        title="NashMTL",
        paper="Navon et al., ICML 2022",
        solves="the Nash bargaining solution: w > 0 with G w = 1/w, a direction of fixed length",
        when="the losses have very different units, and a fixed step length is welcome",
        invariant=True,
        conflict_free=True,
        published="ANT solves every 25 steps and divides by K, so a solution has length 1 / sqrt(K). It clips "
        "every step to norm 1, which has an effect only on the 24 steps between two solutions (and "
        "divides by norm + 1e-6; the clip here is exact). The code of NashMTL solves every step and does "
        "not divide by K, so its clip always has an effect: use max_norm=1.0 alone. Both iterate cvxpy "
        "with ECOS and often stop before the solution: in 24 of 72 sets of conflicting gradients G w = "
        "1/w did not hold.",
        torchjd="The authors' loop with max_norm=1 and ECOS. A solver that fails leaves the weights of the last "
        "step; here the solution is exact for one row, for zero rows and for every scale.",
        options=(("max_norm", 1.0), ("reduction", "mean"), ("update_every", 25)),
    )

    def __init__(
        self,
        *,
        max_norm: float | None = None,
        reduction: Reduction = "sum",
        solver: Literal["newton", "cvxpy"] = "newton",
        update_every: int = 1,
        nonfinite: Literal["raise", "poison"] = "raise",
    ) -> None:
        super().__init__(update_every=update_every, nonfinite=nonfinite)
        if max_norm is not None:
            max_norm = as_number("max_norm", max_norm, above=0, remedy="Pass None to leave the length unchanged.")
        as_choice("reduction", reduction, ("sum", "mean"))
        as_choice("solver", solver, ("newton", "cvxpy"))
        self.max_norm = max_norm
        self.reduction: Reduction = reduction
        self.solver: Literal["newton", "cvxpy"] = solver

    def solve(self, gram: Tensor) -> Tensor:
        weights = nash_weights(gram, solver=self.solver, nonfinite=self.nonfinite)
        return weights if self.reduction == "sum" else weights / gram.shape[-1]

    def weights(self, gram: Tensor | None = None, /) -> Tensor:
        if gram is not None:
            as_gram(gram)
            last = self._last
            if not self.due and last is not None and gram.shape[:-1] != last.shape:
                raise ValueError(
                    f"gram must have the shape of the last solution, {[*last.shape, last.shape[-1]]}; got "
                    f"{list(gram.shape)}. Call reset() before another number of clusters."
                )
        weights = super().weights(gram)
        if self.max_norm is None or gram is None:
            return weights
        # |J^T a|^2 = a^T G a. Rounding can make it negative if the direction vanishes.
        square = torch.einsum("...i, ...ij, ...j -> ...", weights, as_gram(gram), weights).clamp(min=0)[..., None]
        return torch.where(square.sqrt() > self.max_norm, weights * (self.max_norm * square.rsqrt()), weights)
