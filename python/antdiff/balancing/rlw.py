"""RLW (Lin et al., "Reasonable Effectiveness of Random Weighting", TMLR 2022): new random weights in each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from antdiff._checks import as_state, state_tensor
from antdiff.balancing.base import About, LossBalancer, check_losses, masked_softmax
from antdiff.balancing.random import Draws


class RandomLossWeighting(LossBalancer):
    """Weights that are the softmax of K standard normal numbers.

    Each call of :meth:`observe`, and so each call of :meth:`loss`, draws new numbers.

    Args:
        k: Number of clusters.
        generator, seed: As in :class:`PCGrad`.
    """

    name = "rlw"
    observes_first = True
    about = About(
        title="Random loss weighting",
        paper="Lin et al., TMLR 2022",
        solves="draws the weights as the softmax of normal numbers",
        when="as a control: a method that does not beat it does not balance",
        torchjd="`Random`, with torch's global generator.",
    )

    def __init__(self, k: int, *, generator: torch.Generator | None = None, seed: int = 0) -> None:
        super().__init__(k)
        self._draws = Draws(generator, seed)
        self._logits: Tensor | None = None  # [K]

    @property
    def generator(self) -> torch.Generator | None:
        """The generator of the weights; None if the object creates its own and has not drawn yet."""
        return self._draws.generator

    def weights(self, losses: Tensor, /) -> Tensor:
        self._check(losses)
        if self._logits is None:
            self.observe(losses)
        assert self._logits is not None
        return masked_softmax(self._logits.to(losses), losses.detach() != 0)

    def observe(self, losses: Tensor, /) -> None:
        check_losses(losses, self.k)
        generator = self._draws.on(losses.device)
        self._logits = torch.randn(self.k, generator=generator, device=losses.device)

    def reset(self) -> None:
        self._draws.reset()
        self._logits = None

    def state_dict(self) -> dict[str, Any]:
        return {**self._draws.state_dict(), "logits": None if self._logits is None else self._logits.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        logits = as_state(state, "generator", "logits")["logits"]
        if logits is not None:
            logits = state_tensor("logits", logits, (self.k,), kind="float").clone()
        self._draws.load_state_dict(state)
        self._logits = logits
