"""UPGrad (Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024): a mean of projections."""

from __future__ import annotations

from torch import Tensor

from antdiff.balancing.base import About, GramBalancer
from antdiff.ops import gram_weights


class UPGrad(GramBalancer):
    """Weights of the mean over i of the projections of g_i onto ``{d: <d, g_j> >= 0 for all j}``, exactly.

    See :func:`antdiff.ops.gram_weights`. The arguments are those of :class:`GramBalancer`.
    """

    name = "upgrad"
    about = About(
        title="UPGrad",
        paper="Quinton and Rey, 2024",
        solves="projects each gradient onto the cone of directions in which no loss rises, and takes the mean of these "
        "projections",
        when="as the first method to try: no loss rises, and without conflict nothing is lost",
        conflict_free=True,
        torchjd="The weights are those of G / trace(G) + 1e-4 I, and the mean if trace(G) < 1e-4. Here they are "
        "exact for every G.",
    )

    def solve(self, gram: Tensor) -> Tensor:
        return gram_weights(gram, "upgrad", nonfinite=self.nonfinite)
