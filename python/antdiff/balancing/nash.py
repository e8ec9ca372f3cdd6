"""NashMTL (Navon et al., ICML 2022): the direction on which the tasks agree in Nash bargaining."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from antdiff.balancing.base import About, GramBalancer
from antdiff.ops import nash_weights


class NashMTL(GramBalancer):
    """Weights of the exact bargaining solution; see :func:`antdiff.ops.nash_weights`.

    The direction has length ``sqrt(number of non-zero rows)`` for all gradients. ``max_norm=1``, which is usual with
    NashMTL, therefore divides by that root in every step. With or without it, the learning rate is a step length.

    Args:
        max_norm: If the direction is longer than this, scale it down to this length. Default None: do not scale.
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
        published="The weights are solved every 25 steps, and the direction is clipped to norm 1, so dividing the "
        "losses by K changes nothing. "
        "The published code iterates cvxpy with ECOS and often stops before the solution.",
        options=(("max_norm", 1.0), ("update_every", 25)),
    )

    def __init__(
        self,
        *,
        max_norm: float | None = None,
        solver: Literal["newton", "cvxpy"] = "newton",
        update_every: int = 1,
        nonfinite: Literal["raise", "poison"] = "raise",
    ) -> None:
        super().__init__(update_every=update_every, nonfinite=nonfinite)
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive; got {max_norm}. Pass None to leave the length unchanged.")
        self.max_norm = max_norm
        self.solver: Literal["newton", "cvxpy"] = solver

    def solve(self, gram: Tensor) -> Tensor:
        weights = nash_weights(gram, solver=self.solver, nonfinite=self.nonfinite)
        if self.max_norm is None:
            return weights
        # |J^T a|^2 = a^T G a. Rounding can make it negative if the direction vanishes.
        square = torch.einsum("...i, ...ij, ...j -> ...", weights, gram, weights).clamp(min=0)[..., None]
        return torch.where(square > self.max_norm**2, weights * (self.max_norm * square.rsqrt()), weights)
