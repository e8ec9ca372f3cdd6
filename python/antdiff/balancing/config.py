"""ConFIG (Liu et al., "ConFIG: Towards Conflict-free Training", ICLR 2025): equal cosines with all gradients."""

from __future__ import annotations

from torch import Tensor

from antdiff.balancing.base import About, SummedBalancer
from antdiff.ops import gram_weights


class ConFIG(SummedBalancer):
    """Weights of the direction that has equal cosines with all gradients.

    The length of the direction is the mean of the gradients' projections onto it. The published length is the sum of
    the projections, which is K times as long and without conflict about the length of K gradients together. The
    cosines are equal if the gradients are linearly independent; otherwise they are equal in the least-squares sense.

    See :func:`antdiff.ops.gram_weights`. The arguments are those of :class:`SummedBalancer`.
    """

    name = "config"
    about = About(
        title="ConFIG",
        paper="Liu et al., ICLR 2025",
        solves="equal cosines with all gradients; the length is the mean of their projections onto the direction",
        when="the losses have very different units and should all fall at the same relative rate",
        invariant=True,
        conflict_free=True,
        published="The published length is the sum of the projections, which is K times their mean. The authors' "
        "code takes a pseudo-inverse of the unit gradients, whose default threshold cuts off everything "
        "for P > 8.4e6 in float32; here C, which is K x K, is inverted.",
        torchjd="The sum and the same pseudo-inverse; the same direction up to 1.3e-10 |g| in float64.",
        options=(("reduction", "sum"),),
    )

    def solve(self, gram: Tensor) -> Tensor:
        return gram_weights(gram, "config", reduction=self.reduction, nonfinite=self.nonfinite)
