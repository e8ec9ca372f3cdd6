"""DWA (Liu et al., "End-to-End Multi-Task Learning", CVPR 2019): losses that fall slowly get more weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from antdiff._checks import as_count, as_number, as_state, state_tensor
from antdiff.balancing.base import About, LossBalancer, RunningMean, check_losses


class DynamicWeightAverage(LossBalancer):
    """Weights ``softmax(r / temperature)``, where r_i is the ratio of the mean losses of the last two epochs.

    r_i is the mean loss of cluster i over the last epoch, divided by its mean loss over the epoch before. The paper's
    weights are K times these, for a loss that is divided by K. During the first two epochs all weights are equal.

    Args:
        k: Number of clusters.
        temperature: Positive; 2 (default) is the paper's.
        epoch: Number of steps over which losses are averaged, 500 by default. The paper uses an epoch; since a
            diffusion loss is noisy, use as many steps as its mean needs to settle.
    """

    name = "dwa"
    positive = True
    about = About(
        title="Dynamic weight average",
        paper="Liu et al., CVPR 2019",
        solves="weights each loss by the softmax of its rate of change from one epoch to the next",
        when="some losses still fall and others have stalled",
        published="The paper's weights are K times these. The mean runs over a number of steps, not an epoch.",
        torchjd="K times these weights. An epoch ends when step() is called.",
    )

    _mean: RunningMean
    _means: Tensor  # [2, K], means of the last epoch and of the epoch before; 0 means none yet

    def __init__(self, k: int, *, temperature: float = 2.0, epoch: int = 500) -> None:
        super().__init__(k)
        self.temperature = as_number("temperature", temperature, above=0, remedy="The paper uses 2.")
        self.epoch = as_count("epoch", epoch)
        self.reset()

    def weights(self, losses: Tensor, /) -> Tensor:
        self._check(losses)
        last, before = self._means.to(losses.device)
        rates = torch.where((last > 0) & (before > 0), last / before, 1.0)  # [K]
        weights = (rates / self.temperature).softmax(0).to(losses.dtype)
        return torch.where((losses.detach() < 0).any(), torch.nan, weights)

    def observe(self, losses: Tensor, /) -> None:
        check_losses(losses, self.k)
        self._mean.add(losses)
        if self._mean.steps == self.epoch:
            last = self._means.to(losses.device)[0]
            self._means = torch.stack([self._mean.value(otherwise=last), last])
            self._mean = RunningMean(self.k)

    def reset(self) -> None:
        self._mean = RunningMean(self.k)
        self._means = torch.zeros(2, self.k, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {**self._mean.state_dict(), "means": self._means.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        means = state_tensor("means", as_state(state, "means")["means"], (2, self.k), kind="float")
        self._mean.load_state_dict(state)
        self._means = means.clone()
