"""PCGrad (Yu et al., NeurIPS 2020): each gradient is projected away from the gradients it conflicts with."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from antdiff._checks import as_state, generator_state
from antdiff.balancing.base import About, GramBalancer
from antdiff.balancing.random import Draws
from antdiff.ops import pcgrad_weights
from antdiff.ops._problems import as_gram


class PCGrad(GramBalancer):
    """Weights of PCGrad's direction, the mean of the projected gradients; see :func:`antdiff.ops.pcgrad_weights`.

    The paper's direction is the sum of the projected gradients, which is K times as long.

    Args:
        generator: Draws the visiting orders, and must be on the device of the Gram matrix. By default the object
            creates its own generator on that device, seeded with ``seed``. In data-parallel training every rank must
            draw the same orders. The default does so; a global generator that depends on the rank would not.
        seed: Seed of the default generator, 0 by default.
        update_every, nonfinite: See :class:`GramBalancer`.
    """

    name = "pcgrad"
    about = About(
        title="PCGrad",
        paper="Yu et al., NeurIPS 2020",
        solves="removes from each gradient its component that conflicts with another gradient, one after the other in "
        "random order",
        when="conflicts are few and mild; without any conflict it is the plain mean",
        published="The sum of the projected gradients of loss / K, which is the mean used here. The authors' "
        "TensorFlow code and most others also visit j = i, which the algorithm of the paper does not: "
        "after two projections a gradient can conflict with itself. LibMTL adds 1e-8 to a denominator, "
        "so small gradients are not projected.",
        torchjd="The sum, K times this one, with orders from torch's global generator.",
    )

    def __init__(
        self,
        *,
        generator: torch.Generator | None = None,
        seed: int = 0,
        update_every: int = 1,
        nonfinite: Literal["raise", "poison"] = "raise",
    ) -> None:
        super().__init__(update_every=update_every, nonfinite=nonfinite)
        self._draws = Draws(generator, seed)

    @property
    def generator(self) -> torch.Generator | None:
        """The generator of the orders; None if the object creates its own and has not drawn yet."""
        return self._draws.generator

    def solve(self, gram: Tensor) -> Tensor:
        gram = as_gram(gram)
        return pcgrad_weights(gram, generator=self._draws.on(gram.device), nonfinite=self.nonfinite)

    def reset(self) -> None:
        super().reset()
        self._draws.reset()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self._draws.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        generator_state("generator", as_state(state, "calls", "last", "generator")["generator"])  # before restoring
        super().load_state_dict(state)
        self._draws.load_state_dict(state)
