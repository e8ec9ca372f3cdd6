"""PCGrad (Yu et al., NeurIPS 2020): each gradient loses what conflicts with the others, in random order."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from antdiff.balancing.base import GramBalancer
from antdiff.ops import pcgrad_weights


class PCGrad(GramBalancer):
    """Weights of PCGrad's direction ``sum_i p_i``; see :func:`antdiff.ops.pcgrad_weights`.

    Args:
        generator: draws the visiting orders; on the device of the Gram matrix. Default: one of the object's own, on
            that device, seeded with ``seed``. In data-parallel training every rank must draw the same orders, which the
            default does and a rank-dependent global generator would not.
        seed: of the default generator.
        update_every, nonfinite: see :class:`GramBalancer`.
    """

    name = "pcgrad"
    scale = "sum"

    def __init__(
        self,
        *,
        generator: torch.Generator | None = None,
        seed: int = 0,
        update_every: int = 1,
        nonfinite: Literal["raise", "poison"] = "raise",
    ) -> None:
        super().__init__(update_every=update_every, nonfinite=nonfinite)
        self.generator = generator  # None until the first Gram matrix shows the device
        self.seed = seed
        self._own = generator is None
        self._pending: Tensor | None = None  # a loaded state that waits for the generator

    def solve(self, gram: Tensor) -> Tensor:
        if self.generator is None or (self._own and self.generator.device != gram.device):
            self.generator = torch.Generator(gram.device).manual_seed(self.seed)
        if self._pending is not None:
            self.generator.set_state(self._pending)
            self._pending = None
        return pcgrad_weights(gram, generator=self.generator, nonfinite=self.nonfinite)

    def reset(self) -> None:
        super().reset()
        self._pending = None
        if self._own:
            self.generator = None

    def state_dict(self) -> dict[str, Any]:
        state = self._pending
        if state is None and self.generator is not None:
            state = self.generator.get_state()
        return {**super().state_dict(), "generator": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._pending = state["generator"]
        if self._pending is None and self._own:
            self.generator = None  # saved before the first draw: start from the seed
