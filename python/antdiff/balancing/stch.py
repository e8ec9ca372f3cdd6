"""STCH (Lin et al., "Smooth Tchebycheff Scalarization", ICML 2024): a smooth maximum of the losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from antdiff.balancing.base import About, LossBalancer, RunningMean, masked_softmax


class SmoothTchebycheff(LossBalancer):
    """Weights of ``mu log sum_i exp(f_i / mu)``, the smooth maximum of ``f_i = log(losses_i / first mean)``.

    Log losses relative to their start have no unit. Over the first ``warmup`` steps, which make that mean, the mean of
    the log losses is descended instead.

    Args:
        k: the number of clusters.
        mu: smoothing, > 0: towards 0 the maximum, for large values the mean of the log losses.
        warmup: steps whose losses are averaged.
    """

    name = "stch"
    about = About(
        title="Smooth Tchebycheff",
        paper="Lin et al., ICML 2024",
        solves="descends a smooth maximum of the losses relative to those of the first steps",
        when="the worst loss matters most",
        invariant=True,
        published="The warm-up is an epoch.",
    )

    _first: RunningMean

    def __init__(self, k: int, *, mu: float = 1.0, warmup: int = 500) -> None:
        super().__init__(k)
        if not mu > 0:
            raise ValueError(f"mu must be positive; got {mu}.")
        if warmup < 1:
            raise ValueError(f"warmup must be at least 1; got {warmup}.")
        self.mu = mu
        self.warmup = warmup
        self.reset()

    def weights(self, losses: Tensor, /) -> Tensor:
        self._check(losses)
        present = losses.detach() != 0
        logs = torch.where(present, losses.detach(), 1.0).double().log()  # [K]
        f = torch.zeros_like(logs)
        if self._first.steps == self.warmup:
            f = logs - self._first.value(otherwise=torch.ones_like(logs)).log()
        return (masked_softmax(f / self.mu, present) * (-logs).exp()).to(losses.dtype)

    def observe(self, losses: Tensor, /) -> None:
        if self._first.steps < self.warmup:
            self._first.add(losses)

    def reset(self) -> None:
        self._first = RunningMean(self.k)

    def state_dict(self) -> dict[str, Any]:
        return self._first.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first.load_state_dict(state)
