"""MGDA (Desideri 2012; Sener and Koltun, NeurIPS 2018): the convex combination of the gradients with the least norm."""

from __future__ import annotations

from torch import Tensor

from antdiff.balancing.base import About, GramBalancer
from antdiff.ops import gram_weights


class MGDA(GramBalancer):
    """Weights in the simplex with the least ``|w^T J|``, exactly and not by Frank-Wolfe. Zero rows are left out.

    See :func:`antdiff.ops.gram_weights`; the arguments are those of :class:`GramBalancer`.
    """

    name = "mgda"
    about = About(
        title="MGDA",
        paper="Sener and Koltun, NeurIPS 2018",
        solves="the shortest convex combination of the gradients",
        when="a Pareto-stationary point is the goal; slow, since the cluster with the shortest gradient rules",
        conflict_free=True,
    )

    def solve(self, gram: Tensor) -> Tensor:
        return gram_weights(gram, "mgda", nonfinite=self.nonfinite)
