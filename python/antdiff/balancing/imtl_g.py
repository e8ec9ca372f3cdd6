"""IMTL-G (Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021): equal projections onto all gradients."""

from __future__ import annotations

from torch import Tensor

from antdiff.balancing.base import About, GramBalancer
from antdiff.ops import gram_weights


class IMTLG(GramBalancer):
    """Weights with sum 1 and either sign whose direction d has equal projections ``<d, g_i> / |g_i|``.

    The weights are 0 if no such direction exists because gradients are exactly opposed.

    See :func:`antdiff.ops.gram_weights`. The arguments are those of :class:`GramBalancer`.
    """

    name = "imtl_g"
    about = About(
        title="IMTL-G",
        paper="Liu et al., ICLR 2021",
        solves="weights with sum 1 whose combination has equal projections onto all gradients",
        when="the losses have very different units; the method is unstable near opposed gradients",
        invariant=True,
        published="The authors' closed form inverts a matrix of K - 1 rows, which does not exist for linearly "
        "dependent gradients. Here such gradients have equal projections in the least-squares sense.",
        torchjd="The pseudo-inverse of G, and zero weights if their sum is below 1e-12, which is an absolute "
        "epsilon. If equal projections do not exist, it solves for the products with the gradients and "
        "not for the cosines, which then depends on the scale of single losses: up to 27 |g| apart on "
        "matrices of low rank.",
    )

    def solve(self, gram: Tensor) -> Tensor:
        return gram_weights(gram, "imtl_g", nonfinite=self.nonfinite)
