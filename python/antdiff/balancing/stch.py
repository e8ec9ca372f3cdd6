"""STCH (Lin et al., "Smooth Tchebycheff Scalarization", ICML 2024): a smooth maximum of the losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from antdiff._checks import as_count, as_number, as_state
from antdiff.balancing.base import About, LossBalancer, RunningMean, check_losses, masked_softmax


class SmoothTchebycheff(LossBalancer):
    """Weights of ``mu log sum_i exp(f_i / mu)``, the smooth maximum of ``f_i = log(losses_i / early mean)``.

    Log losses relative to an early mean have no unit. Until that mean is known, the mean of the log losses is
    minimised: for ``warmup`` epochs, and for one more epoch over which the losses are averaged. The formula in the
    paper uses the losses themselves; the logarithm, the warm-up and the defaults are those of the authors' code for
    multi-task learning.

    Args:
        k: Number of clusters.
        mu: Smoothing, positive, 1 by default. Towards 0 the objective becomes the maximum of the f_i; for large values
            it becomes the mean of the log losses.
        warmup: Number of epochs before the epoch whose losses are averaged, at least 0. Default 4.
        epoch: Number of steps per epoch, 500 by default.
    """

    name = "stch"
    positive = True
    about = About(
        title="Smooth Tchebycheff",
        paper="Lin et al., ICML 2024",
        solves="minimises a smooth maximum of the losses relative to an early mean",
        when="the worst loss matters most",
        invariant=True,
        published="The loss is K times this one, and K times the mean log loss during the warm-up. Adam is "
        "invariant to this factor. The paper's formula uses losses in place of their logarithms, and a "
        "preference vector; both need losses of one unit.",
        torchjd="The paper's formula, with preferences 1 / K.",
    )

    _seen: int
    _early: RunningMean

    def __init__(self, k: int, *, mu: float = 1.0, warmup: int = 4, epoch: int = 500) -> None:
        super().__init__(k)
        self.mu = as_number("mu", mu, above=0, remedy="The default is 1.")
        self.warmup = as_count("warmup", warmup, 0)
        self.epoch = as_count("epoch", epoch)
        self.reset()

    def weights(self, losses: Tensor, /) -> Tensor:
        self._check(losses)
        present = losses.detach() != 0
        logs = torch.where(present, losses.detach(), 1.0).double().log()  # [K]
        f = torch.zeros_like(logs)
        if self._early.steps == self.epoch:
            f = logs - self._early.value(otherwise=torch.ones_like(logs)).log()
        return (masked_softmax(f / self.mu, present) * (-logs).exp()).to(losses.dtype)

    def observe(self, losses: Tensor, /) -> None:
        check_losses(losses, self.k)
        self._seen += 1
        if 0 < self._seen - self.warmup * self.epoch <= self.epoch:
            self._early.add(losses)

    def reset(self) -> None:
        self._seen = 0
        self._early = RunningMean(self.k)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen, **self._early.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        seen = as_count("state['seen']", as_state(state, "seen")["seen"], 0)
        self._early.load_state_dict(state)
        self._seen = seen
