"""PCGrad (Yu et al., NeurIPS 2020): each gradient loses what conflicts with the others, in random order."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from antdiff.balancing.base import About, GramBalancer
from antdiff.balancing.random import Draws
from antdiff.ops import pcgrad_weights


class PCGrad(GramBalancer):
    """Weights of PCGrad's direction, the mean of the projected gradients; see :func:`antdiff.ops.pcgrad_weights`.

    The paper's direction is their sum, K times as long.

    Args:
        generator: draws the visiting orders; on the device of the Gram matrix. Default: one of the object's own, on
            that device, seeded with ``seed``. In data-parallel training every rank must draw the same orders, which the
            default does and a rank-dependent global generator would not.
        seed: of the default generator.
        update_every, nonfinite: see :class:`GramBalancer`.
    """

    name = "pcgrad"
    about = About(
        title="PCGrad",
        paper="Yu et al., NeurIPS 2020",
        solves="removes from each gradient what conflicts with another, one after the other in random order",
        when="conflicts are few and mild; without any it is the plain mean",
        published="The same with loss / K, as here; most code visits j = i too, a defect.",
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
        """What draws the orders; None before the first draw of an own one."""
        return self._draws.generator

    def solve(self, gram: Tensor) -> Tensor:
        return pcgrad_weights(gram, generator=self._draws.on(gram.device), nonfinite=self.nonfinite)

    def reset(self) -> None:
        super().reset()
        self._draws.reset()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self._draws.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._draws.load_state_dict(state)
