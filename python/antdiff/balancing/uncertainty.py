"""Uncertainty weighting (Kendall et al., CVPR 2018): a learned log-variance for each cluster's loss."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from antdiff._checks import as_count
from antdiff.balancing.base import About, Needs, check_losses


class UncertaintyWeighting(nn.Module):
    """``loss = sum_i 1/2 (exp(-s_i) losses_i / K + s_i)`` with learnable s, zero at the start.

    It needs the losses alone: back-propagate :meth:`loss` into the model and s at once, and give s its own optimizer
    group through :meth:`param_groups`. At the optimum ``s_i = log(losses_i / K)``, so the model descends the sum of
    ``1/2 log losses_i``. A new s halves the gradient of the mean loss; Adam does not notice.

    Args:
        k: the number of clusters.
        lr: learning rate of s, 0.025 as ANT trains it; without weight decay, which would pull the variances to one.
    """

    name: ClassVar[str] = "uw"
    needs: ClassVar[Needs] = "losses"
    about: ClassVar[About] = About(
        title="Uncertainty weighting",
        paper="Kendall et al., CVPR 2018",
        solves="learns a variance for each loss: in the end descends the mean log loss",
        when="K gradients cost too much, or before anything else: it costs nothing",
        published="ANT's loss, sum 1/2 (exp(-s) loss / K + s) with lr 0.025, is the default; without / K, s shifts by "
        "log K and the model's gradient is the same at the optimum.",
    )

    factor: ClassVar[float] = 0.5

    def __init__(self, k: int, *, lr: float = 0.025) -> None:
        super().__init__()
        self.k = as_count("k", k)
        self.lr = lr
        self.log_variance = nn.Parameter(torch.zeros(k))  # [K], s

    def loss(self, losses: Tensor, counts: Tensor | None = None) -> Tensor:
        """The scalar to back-propagate, from ``losses [K]``.

        Args:
            losses: float ``[K]``, attached to the model's graph.
            counts: samples of each cluster, int64 ``[K]``. A cluster without samples contributes nothing, neither a
                loss nor a pull on its s. Default: no cluster is empty.
        """
        check_losses(losses, self.k)
        terms = self.factor * (torch.exp(-self.log_variance) * losses / self.k + self.log_variance)  # [K]
        return terms.sum() if counts is None else torch.where(counts > 0, terms, 0.0).sum()

    def weights(self, losses: Tensor, /) -> Tensor:
        """``1/2 exp(-s) / K`` detached, ``[K]`` in the dtype of ``losses``: the gradient of :meth:`loss` in the model
        is ``sum_i weights_i`` times the gradient of ``losses_i``."""
        check_losses(losses, self.k)
        return (self.factor * torch.exp(-self.log_variance.detach()) / self.k).to(losses)

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups to append to the optimizer's."""
        return [{"params": [self.log_variance], "lr": self.lr, "weight_decay": 0.0}]

    def reset(self) -> None:
        """Sets s to zero in place, so that an optimizer keeps it; the optimizer's own state of s is not touched."""
        with torch.no_grad():
            self.log_variance.zero_()

    def forward(self, losses: Tensor, counts: Tensor | None = None) -> Tensor:
        return self.loss(losses, counts)
