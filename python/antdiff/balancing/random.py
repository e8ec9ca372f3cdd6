"""Random generators of the methods that draw: either the caller's generator, or one that the method creates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from antdiff._checks import as_generator, as_seed, as_state, generator_state, same_device


class Draws:
    """A random generator together with the state that a resumed run needs.

    Args:
        generator: The caller's generator, on the device of the balanced tensors. If None, a generator is created on
            that device and seeded with ``seed``. In data-parallel training every rank must draw the same numbers. The
            default does so; a global generator that depends on the rank would not.
        seed: Seed of the default generator.
    """

    def __init__(self, generator: torch.Generator | None, seed: int) -> None:
        self.generator = as_generator("generator", generator)  # None until the first draw, which determines the device
        self.seed = as_seed("seed", seed)
        self._creates = generator is None
        self._pending: Tensor | None = None  # a loaded state, applied when the generator is created

    def on(self, device: torch.device) -> torch.Generator:
        """Return the generator. If it is not the caller's, create it on ``device`` when necessary."""
        if self.generator is None or (self._creates and not same_device(self.generator.device, device)):
            self.generator = torch.Generator(device).manual_seed(self.seed)
        if self._pending is not None:
            self.generator.set_state(self._pending)
            self._pending = None
        return self.generator

    def reset(self) -> None:
        """Return to the seed. A caller's generator is not changed."""
        self._pending = None
        if self._creates:
            self.generator = None

    def state_dict(self) -> dict[str, Any]:
        state = self._pending
        if state is None and self.generator is not None:
            state = self.generator.get_state()
        return {"generator": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pending = generator_state("generator", as_state(state, "generator")["generator"])
        if self._pending is None and self._creates:
            self.generator = None  # the state was saved before the first draw
