"""The mean of the cluster losses: no balancing, with the interface of a balancing method."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from antdiff._checks import MOST_TIMESTEPS, as_count
from antdiff.balancing.base import About, Needs, check_losses


class Linear:
    """Weight 1/K for every cluster, so that the update is the gradient of the mean of the cluster losses.

    Args:
        k: Number of clusters, checked against the losses. Default None: any number.
    """

    name: ClassVar[str] = "linear"
    needs: ClassVar[Needs] = "losses"
    about: ClassVar[About] = About(
        title="Linear",
        paper="-",
        solves="the mean of the losses",
        when="always, as the baseline that the other methods must beat",
        torchjd="`Mean`. `Sum` and `Constant` are not methods here: multiply the learning rate or the losses.",
    )

    def __init__(self, k: int | None = None) -> None:
        self.k = None if k is None else as_count("k", k, most=MOST_TIMESTEPS)

    def weights(self, losses: Tensor, /) -> Tensor:
        """Return ``1/K`` for each of ``losses [K]``, in their dtype and on their device."""
        check_losses(losses, self.k)
        return torch.full_like(losses, 1 / len(losses), requires_grad=False)

    def loss(self, losses: Tensor, counts: Tensor | None = None) -> Tensor:
        """Return the scalar to back-propagate, ``sum_i losses_i / K``. The loss of an empty cluster is 0."""
        check_losses(losses, self.k)
        return losses.sum() / len(losses)

    def reset(self) -> None:
        """Do nothing: the method has no state."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the method has no state."""
