"""CAGrad (Liu et al., "Conflict-Averse Gradient Descent", NeurIPS 2021): near the mean, best for the worst-off."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from antdiff.balancing.base import About, GramBalancer
from antdiff.ops import gram_weights


class CAGrad(GramBalancer):
    """Weights of the d with ``|d - g_0| <= c |g_0|`` and the greatest ``min_i <d, g_i>``, g_0 the mean, exactly.

    Args:
        c: the radius relative to the mean gradient, >= 0; 0 is the mean, from 1 on no loss rises to first order.
        update_every, nonfinite: see :class:`GramBalancer`.
    """

    name = "cagrad"
    about = About(
        title="CAGrad",
        paper="Liu et al., NeurIPS 2021",
        solves="of all directions within c |mean| of the mean gradient, that which helps the worst-off cluster most",
        when="the mean works, but one cluster lags",
        published="Some code divides the direction by 1 + c^2; the paper does not.",
    )

    def __init__(
        self, *, c: float = 0.5, update_every: int = 1, nonfinite: Literal["raise", "poison"] = "raise"
    ) -> None:
        super().__init__(update_every=update_every, nonfinite=nonfinite)
        if not c >= 0:
            raise ValueError(f"c must be at least 0; got {c}.")
        self.c = c

    def solve(self, gram: Tensor) -> Tensor:
        return gram_weights(gram, "cagrad", parameter=self.c, nonfinite=self.nonfinite)
