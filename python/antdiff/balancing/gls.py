"""GLS (Chennupati et al., "MultiNet++", CVPR Workshops 2019): the geometric mean of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from antdiff.balancing.base import About, LossBalancer


class GeometricLoss(LossBalancer):
    """Weights ``M / (K losses_i)`` with M the geometric mean of the losses, which is also the value of :meth:`loss`."""

    name = "gls"
    about = About(
        title="Geometric loss",
        paper="Chennupati et al., CVPR Workshops 2019",
        solves="descends the geometric mean of the losses: all fall at one relative rate",
        when="as uncertainty weighting, without anything to learn; no state at all",
        invariant=True,
    )

    def weights(self, losses: Tensor, /) -> Tensor:
        self._check(losses)
        losses = losses.detach()
        present = losses != 0
        n = present.sum()
        logs = torch.where(present, losses, 1.0).log()  # a negative loss has no geometric mean: NaN
        return torch.where(present, (logs.sum() / n - logs).exp() / n, 0.0)
