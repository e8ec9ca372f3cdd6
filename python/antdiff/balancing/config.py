"""ConFIG (Liu et al., "ConFIG: Towards Conflict-free Training", ICLR 2025): equal cosines to all gradients."""

from __future__ import annotations

from torch import Tensor

from antdiff.balancing.base import About, GramBalancer
from antdiff.ops import gram_weights


class ConFIG(GramBalancer):
    """Weights of the direction with equal cosines to all gradients, as long as the mean of its projections onto them.

    The published length is the sum of the projections, K times that: without conflict about K gradients. The cosines
    are equal where the rows are independent, and as nearly so as the rows allow (in the least-squares sense) elsewhere.

    See :func:`antdiff.ops.gram_weights`; the arguments are those of :class:`GramBalancer`.
    """

    name = "config"
    about = About(
        title="ConFIG",
        paper="Liu et al., ICLR 2025",
        solves="equal cosines to all gradients, as long as the mean of its projections onto them",
        when="losses of very different units that should all fall at one relative rate",
        invariant=True,
        conflict_free=True,
        published="The published length is the sum of the projections, K times the mean.",
    )

    def solve(self, gram: Tensor) -> Tensor:
        return gram_weights(gram, "config", nonfinite=self.nonfinite)
