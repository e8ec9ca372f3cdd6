"""GradVac (Wang et al., "Gradient Vaccine", ICLR 2021): cosines of gradients are raised to their running means."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from antdiff._checks import as_number, as_state, generator_state, state_tensor
from antdiff.balancing.base import About, GramBalancer
from antdiff.balancing.random import Draws
from antdiff.ops import gradvac_weights
from antdiff.ops._problems import as_gram


class GradVac(GramBalancer):
    """Weights of GradVac's direction; see :func:`antdiff.ops.gradvac_weights`. The first step is PCGrad's.

    The direction is the mean of the modified gradients; the paper's is their sum, which is K times as long.

    Args:
        beta: How fast the targets follow the cosines, in [0, 1]. Default 0.01.
        generator, seed: Draw the visiting orders, as in :class:`PCGrad`.
        update_every, nonfinite: See :class:`GramBalancer`.
    """

    name = "gradvac"
    about = About(
        title="GradVac",
        paper="Wang et al., ICLR 2021",
        solves="raises the cosine of each pair of gradients to its running mean, as PCGrad raises it to zero",
        when="clusters agree most of the time, and a conflict within one batch is noise",
        published="beta = 0.01 is the paper's, with separate targets per layer. Later benchmarks use 0.5 and "
        "targets for the whole network, as here. The paper's direction is the sum, K times this one.",
        torchjd="The sum, with beta = 0.5 and 1e-8 added to denominators; otherwise the same steps.",
        options=(("beta", 0.5),),
    )

    def __init__(
        self,
        *,
        beta: float = 0.01,
        generator: torch.Generator | None = None,
        seed: int = 0,
        update_every: int = 1,
        nonfinite: Literal["raise", "poison"] = "raise",
    ) -> None:
        super().__init__(update_every=update_every, nonfinite=nonfinite)
        self.beta = as_number("beta", beta, least=0, most=1, remedy="Use 0.01 as in the paper, or 0.5.")
        self.targets: Tensor | None = None  # [..., k, k]
        self._draws = Draws(generator, seed)

    @property
    def generator(self) -> torch.Generator | None:
        """The generator of the orders; None if the object creates its own and has not drawn yet."""
        return self._draws.generator

    def solve(self, gram: Tensor) -> Tensor:
        gram = as_gram(gram)
        targets = self.targets
        if targets is None or targets.shape != gram.shape:
            targets = torch.zeros_like(gram)
        weights, self.targets = gradvac_weights(
            gram,
            targets.to(gram.device),
            beta=self.beta,
            generator=self._draws.on(gram.device),
            nonfinite=self.nonfinite,
        )
        return weights

    def reset(self) -> None:
        super().reset()
        self.targets = None
        self._draws.reset()

    def state_dict(self) -> dict[str, Any]:
        targets = None if self.targets is None else self.targets.clone()
        return {**super().state_dict(), **self._draws.state_dict(), "targets": targets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        targets = as_state(state, "calls", "last", "generator", "targets")["targets"]
        if targets is not None:
            targets = state_tensor("targets", targets, kind="float").clone()
        generator_state("generator", state["generator"])  # before anything is restored
        super().load_state_dict(state)
        self._draws.load_state_dict(state)
        self.targets = targets
