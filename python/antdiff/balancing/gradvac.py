"""GradVac (Wang et al., "Gradient Vaccine", ICLR 2021): cosines of gradients are raised to their running means."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from antdiff.balancing.base import About, GramBalancer
from antdiff.balancing.random import Draws
from antdiff.ops import gradvac_weights


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
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be in [0, 1]; got {beta}. Use 0.01 as in the paper, or 0.5.")
        self.beta = beta
        self.targets: Tensor | None = None  # [..., k, k]
        self._draws = Draws(generator, seed)

    @property
    def generator(self) -> torch.Generator | None:
        """The generator of the orders; None if the object creates its own and has not drawn yet."""
        return self._draws.generator

    def solve(self, gram: Tensor) -> Tensor:
        if self.targets is None or self.targets.shape != gram.shape:
            self.targets = torch.zeros_like(gram, requires_grad=False)
        weights, self.targets = gradvac_weights(
            gram,
            self.targets.to(gram.device),
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
        super().load_state_dict(state)
        self._draws.load_state_dict(state)
        self.targets = None if state["targets"] is None else state["targets"].clone()
