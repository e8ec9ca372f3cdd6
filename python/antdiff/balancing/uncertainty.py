"""Uncertainty weighting (Kendall et al., CVPR 2018): a learned log-variance per cluster loss."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from antdiff._checks import MOST_TIMESTEPS, as_count, as_number, as_tensor
from antdiff.balancing.base import About, Needs, check_losses


class UncertaintyWeighting(nn.Module):
    """The loss ``sum_i 1/2 (exp(-s_i) losses_i / K + s_i)`` with learnable s, initialised to zero.

    The method needs only the losses. Back-propagate :meth:`loss` into the model and s together, and add s to the
    optimizer as a group of its own through :meth:`param_groups`. At the optimum ``s_i = log(losses_i / K)``, so that
    the model minimises the sum of ``1/2 log losses_i``. With the initial s, the gradient is half the gradient of the
    mean loss; Adam is invariant to this factor.

    Args:
        k: Number of clusters.
        lr: Learning rate of s, 0.025 by default as in ANT. s has no weight decay, which would pull the variances to
            one.
    """

    name: ClassVar[str] = "uw"
    needs: ClassVar[Needs] = "losses"
    about: ClassVar[About] = About(
        title="Uncertainty weighting",
        paper="Kendall et al., CVPR 2018",
        solves="learns a variance per loss; at the optimum of the variances it minimises the mean log loss",
        when="K gradients cost too much; or before any other method, because it costs nothing",
        published="ANT's loss, sum 1/2 (exp(-s) loss / K + s) with lr 0.025, is the default. Without the division "
        "by K, s shifts by log K, and the gradient of the model at the optimum is the same.",
        torchjd="Without the division by K, and its parameter is left to the user's optimizer.",
    )

    factor: ClassVar[float] = 0.5

    def __init__(self, k: int, *, lr: float = 0.025) -> None:
        super().__init__()
        self.k = as_count("k", k, most=MOST_TIMESTEPS)
        self.lr = as_number("lr", lr, above=0)
        self.log_variance = nn.Parameter(torch.zeros(k))  # [K], s

    def loss(self, losses: Tensor, counts: Tensor | None = None) -> Tensor:
        """Return the scalar to back-propagate.

        Args:
            losses: float ``[K]``, attached to the model's graph.
            counts: Number of samples per cluster, int64 ``[K]``. A cluster without samples contributes nothing, and
                its s gets no gradient. Default None: no cluster is empty.
        """
        check_losses(losses, self.k)
        if counts is not None:
            as_tensor("counts", counts, kind="real")
            if counts.shape != losses.shape:
                raise ValueError(f"counts must have the shape of losses, [{self.k}]; got {list(counts.shape)}.")
        terms = self.factor * (torch.exp(-self.log_variance) * losses / self.k + self.log_variance)  # [K]
        return terms.sum() if counts is None else torch.where(counts > 0, terms, 0.0).sum()

    def weights(self, losses: Tensor, /) -> Tensor:
        """Return ``1/2 exp(-s) / K``, detached, ``[K]`` in the dtype of ``losses``.

        The gradient of :meth:`loss` with respect to the model is the sum of ``weights_i`` times the gradient of
        ``losses_i``.
        """
        check_losses(losses, self.k)
        return (self.factor * torch.exp(-self.log_variance.detach()) / self.k).to(losses)

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups to add to the optimizer."""
        return [{"params": [self.log_variance], "lr": self.lr, "weight_decay": 0.0}]

    def reset(self) -> None:
        """Set s to zero in place, so that an optimizer keeps it. The optimizer's state of s is not changed."""
        with torch.no_grad():
            self.log_variance.zero_()

    def forward(self, losses: Tensor, counts: Tensor | None = None) -> Tensor:
        return self.loss(losses, counts)
