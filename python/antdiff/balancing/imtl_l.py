"""IMTL-L (Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021): a learned scale for each loss."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from antdiff.balancing.base import About, Needs


class IMTLL(nn.Module):
    """``loss = sum_i (exp(s_i) losses_i / K - s_i)`` with learnable s, zero at the start.

    Back-propagate :meth:`loss` into the model and s at once; give s its own optimizer group through
    :meth:`param_groups`. At the optimum ``exp(s_i) losses_i = K``: every scaled loss is the same. It is uncertainty
    weighting with -s in place of s, and without its factor 1/2.

    Args:
        k: the number of clusters.
        lr: learning rate of s; no weight decay, which would pull the scales to one.
    """

    name: ClassVar[str] = "imtl_l"
    needs: ClassVar[Needs] = "losses"
    scale: ClassVar[Literal["sum", "mean"]] = "sum"
    about: ClassVar[About] = About(
        title="IMTL-L",
        paper="Liu et al., ICLR 2021",
        solves="learns a scale for each loss that makes all of them equal",
        when="as uncertainty weighting",
    )

    def __init__(self, k: int, *, lr: float = 0.025) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}.")
        self.k = k
        self.lr = lr
        self.log_scale = nn.Parameter(torch.zeros(k))  # [K], s

    def loss(self, losses: Tensor, counts: Tensor | None = None) -> Tensor:
        """The scalar to back-propagate, from ``losses [K]``; a cluster with a count of 0 contributes nothing."""
        self._check(losses)
        terms = torch.exp(self.log_scale) * losses / self.k - self.log_scale  # [K]
        return terms.sum() if counts is None else torch.where(counts > 0, terms, 0.0).sum()

    def weights(self, losses: Tensor, /) -> Tensor:
        """``exp(s)`` detached, ``[K]`` in the dtype of ``losses``."""
        self._check(losses)
        return torch.exp(self.log_scale.detach()).to(losses)

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups to append to the optimizer's."""
        return [{"params": [self.log_scale], "lr": self.lr, "weight_decay": 0.0}]

    def reset(self) -> None:
        """Sets s to zero in place, so that an optimizer keeps it; the optimizer's own state of s is not touched."""
        with torch.no_grad():
            self.log_scale.zero_()

    def _check(self, losses: Tensor) -> None:
        if losses.shape != (self.k,):
            raise ValueError(f"losses must have shape [K] with K={self.k}; got {list(losses.shape)}.")

    def forward(self, losses: Tensor, counts: Tensor | None = None) -> Tensor:
        return self.loss(losses, counts)
