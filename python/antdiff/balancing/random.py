"""The generator of a method that draws: the caller's, or one of the method's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from antdiff._checks import same_device


class Draws:
    """Where a method draws from, with the state that a resumed run needs.

    Args:
        generator: the caller's; on the device of what is balanced. Default: an own one on that device, seeded with
            ``seed``. In data-parallel training every rank must draw the same, which the default does and a
            rank-dependent global generator would not.
        seed: of the default generator.
    """

    def __init__(self, generator: torch.Generator | None, seed: int) -> None:
        self.generator = generator  # None until the first draw shows the device
        self.seed = seed
        self._own = generator is None
        self._pending: Tensor | None = None  # a loaded state that waits for the generator

    def on(self, device: torch.device) -> torch.Generator:
        """The generator, made on ``device`` if it is the method's own."""
        if self.generator is None or (self._own and not same_device(self.generator.device, device)):
            self.generator = torch.Generator(device).manual_seed(self.seed)
        if self._pending is not None:
            self.generator.set_state(self._pending)
            self._pending = None
        return self.generator

    def reset(self) -> None:
        """Back to the seed; a caller's generator is left alone."""
        self._pending = None
        if self._own:
            self.generator = None

    def state_dict(self) -> dict[str, Any]:
        state = self._pending
        if state is None and self.generator is not None:
            state = self.generator.get_state()
        return {"generator": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pending = state["generator"]
        if self._pending is None and self._own:
            self.generator = None  # saved before the first draw: start from the seed
