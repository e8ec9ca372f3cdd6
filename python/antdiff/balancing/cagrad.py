"""CAGrad (Liu et al., "Conflict-Averse Gradient Descent", NeurIPS 2021): near the mean, best for the worst cluster."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from antdiff._checks import as_number
from antdiff.balancing.base import About, GramBalancer
from antdiff.ops import gram_weights


class CAGrad(GramBalancer):
    """Weights of the direction d that maximises ``min_i <d, g_i>`` subject to ``|d - g_0| <= c |g_0|``, exactly.

    Here g_0 is the mean gradient.

    Args:
        c: Radius relative to the length of the mean gradient, at least 0. Default 0.5. With 0 the direction is the
            mean; with 1 or more, no loss rises to first order.
        update_every, nonfinite: See :class:`GramBalancer`.
    """

    name = "cagrad"
    about = About(
        title="CAGrad",
        paper="Liu et al., NeurIPS 2021",
        solves="among all directions within c |mean| of the mean gradient, the one that helps the worst cluster most",
        when="the mean works, but one cluster lags behind",
        published="The authors' code divides the direction by 1 + c^2 unless told otherwise; the paper does not. "
        "It solves with SLSQP and 1e-8 under a root, which is an absolute epsilon; here the solution is "
        "exact.",
        torchjd="Clarabel, up to 2e-5 |g| from the solution. The direction is zero if trace(G) < 1e-4, or if a "
        "convex combination of the gradients is shorter than 1e-4 |J|. There, the projection of the mean "
        "onto the cone in which no loss rises is as good for the worst cluster, and is taken here.",
    )

    def __init__(
        self, *, c: float = 0.5, update_every: int = 1, nonfinite: Literal["raise", "poison"] = "raise"
    ) -> None:
        super().__init__(update_every=update_every, nonfinite=nonfinite)
        self.c = as_number("c", c, least=0, remedy="The paper uses values between 0 and 1.")

    def solve(self, gram: Tensor) -> Tensor:
        return gram_weights(gram, "cagrad", parameter=self.c, nonfinite=self.nonfinite)
