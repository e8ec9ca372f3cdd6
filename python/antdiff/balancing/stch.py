"""STCH (Lin et al., "Smooth Tchebycheff Scalarization", ICML 2024): a smooth maximum of the losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from antdiff._checks import as_count
from antdiff.balancing.base import About, LossBalancer, RunningMean, masked_softmax


class SmoothTchebycheff(LossBalancer):
    """Weights of ``mu log sum_i exp(f_i / mu)``, the smooth maximum of ``f_i = log(losses_i / early mean)``.

    Log losses relative to an early mean have no unit. Until there is one the mean of the log losses is descended: for
    ``warmup`` epochs, and one more, over which the losses are averaged. The paper's formula has the losses themselves;
    the logarithm, the warm-up and the defaults are those of its code for multi-task learning.

    Args:
        k: the number of clusters.
        mu: smoothing, > 0: towards 0 the maximum, for large values the mean of the log losses.
        warmup: epochs before the one whose losses are averaged, >= 0.
        epoch: its steps.
    """

    name = "stch"
    about = About(
        title="Smooth Tchebycheff",
        paper="Lin et al., ICML 2024",
        solves="descends a smooth maximum of the losses relative to an early mean",
        when="the worst loss matters most",
        invariant=True,
        published="K times this loss, and K times the mean log loss in the warm-up: the same to Adam.",
    )

    _seen: int
    _early: RunningMean

    def __init__(self, k: int, *, mu: float = 1.0, warmup: int = 4, epoch: int = 500) -> None:
        super().__init__(k)
        if not mu > 0:
            raise ValueError(f"mu must be positive; got {mu}.")
        self.mu = mu
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
        self._seen += 1
        if 0 < self._seen - self.warmup * self.epoch <= self.epoch:
            self._early.add(losses)

    def reset(self) -> None:
        self._seen = 0
        self._early = RunningMean(self.k)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen, **self._early.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = int(state["seen"])
        self._early.load_state_dict(state)
