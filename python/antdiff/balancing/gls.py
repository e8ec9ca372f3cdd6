"""GLS (Chennupati et al., "MultiNet++", CVPR Workshops 2019): the geometric mean of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from antdiff.balancing.base import About, LossBalancer


class GeometricLoss(LossBalancer):
    """Weights ``M / (K losses_i)``, where M is the geometric mean of the losses and the value of :meth:`loss`."""

    name = "gls"
    positive = True
    about = About(
        title="Geometric loss",
        paper="Chennupati et al., CVPR Workshops 2019",
        solves="minimises the geometric mean of the losses, so that all fall at the same relative rate",
        when="in place of uncertainty weighting; it has nothing to learn and no state",
        invariant=True,
        published="A loss of zero makes the authors' loss and its gradient zero or NaN; here it is an empty "
        "cluster, and is left out.",
        torchjd="The same loss, with the same effect of a zero.",
    )

    def weights(self, losses: Tensor, /) -> Tensor:
        self._check(losses)
        losses = losses.detach()
        present = losses != 0
        n = present.sum()
        logs = torch.where(present, losses, 1.0).log()  # NaN for a negative loss, which has no geometric mean
        return torch.where(present, (logs.sum() / n - logs).exp() / n, 0.0)
