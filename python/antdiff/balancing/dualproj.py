"""DualProj, the rule of GEM (Lopez-Paz and Ranzato, NeurIPS 2017): the mean gradient projected out of all conflicts."""

from __future__ import annotations

from torch import Tensor

from antdiff.balancing.base import About, GramBalancer
from antdiff.ops import gram_weights


class DualProj(GramBalancer):
    """Weights of the projection of the mean gradient onto ``{d: <d, g_j> >= 0 for all j}``, exactly.

    See :func:`antdiff.ops.gram_weights`. The arguments are those of :class:`GramBalancer`.
    """

    name = "dualproj"
    about = About(
        title="DualProj",
        paper="Lopez-Paz and Ranzato, NeurIPS 2017",
        solves="the mean gradient, projected onto the cone of directions in which no loss rises",
        when="the mean should change as little as possible",
        conflict_free=True,
        published="GEM projects the gradient of the current task away from conflicts with a memory, with quadprog "
        "and 1e-3 added to the diagonal of G. Here the mean gradient is projected, as in TorchJD.",
        torchjd="The same ridge and the same limit as for `upgrad`. Here the projection is exact.",
    )

    def solve(self, gram: Tensor) -> Tensor:
        return gram_weights(gram, "dualproj", nonfinite=self.nonfinite)
