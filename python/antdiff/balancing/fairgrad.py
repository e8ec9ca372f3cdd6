"""FairGrad (Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024): alpha-fair bargaining."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from antdiff._checks import as_number
from antdiff.balancing.base import About, GramBalancer
from antdiff.ops import gram_weights


class FairGrad(GramBalancer):
    """Weights w > 0 with ``(G w)_i = w_i^(-1/alpha)``, solved exactly.

    The weights scale as ``|J|^(-2 alpha / (1 + alpha))``.

    Args:
        alpha: Positive, 2 by default. 1 is NashMTL; larger values favour the clusters that gain least, and spread the
            weights over more orders of magnitude. For alpha of 8 or more, and for gradients whose lengths span more
            than 60 / alpha orders of magnitude, the iteration may stop before it reaches the solution.
        update_every, nonfinite: See :class:`GramBalancer`.
    """

    name = "fairgrad"
    about = About(
        title="FairGrad",
        paper="Ban and Ji, ICML 2024",
        solves="alpha-fair utilities: (G w)_i = w_i^(-1/alpha), w > 0",
        when="a compromise between NashMTL (alpha = 1) and MGDA (large alpha) is wanted",
        conflict_free=True,
        published="alpha = 2 is the value in the authors' scripts (the default of their parser is 1). The "
        "published code passes the equation to a least-squares solver, which may stop early.",
        torchjd="The authors' solver: within 3e-8 |g| where a solution exists and no combination of gradients "
        "vanishes. alpha = 0 is the mean there, and an error here: use `linear`.",
    )

    def __init__(
        self, *, alpha: float = 2.0, update_every: int = 1, nonfinite: Literal["raise", "poison"] = "raise"
    ) -> None:
        super().__init__(update_every=update_every, nonfinite=nonfinite)
        self.alpha = as_number("alpha", alpha, above=0, remedy="Use 1 for NashMTL.")

    def solve(self, gram: Tensor) -> Tensor:
        return gram_weights(gram, "fairgrad", parameter=self.alpha, nonfinite=self.nonfinite)
