"""The mean of the clusters' losses: no balancing, under the interface of the methods."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from antdiff.balancing.base import About, Needs


class Linear:
    """Weight 1 for every cluster; with the 1/K of a sum-type method, the gradient of the mean of the cluster losses.

    Args:
        k: the number of clusters, checked against the losses; default any.
    """

    name: ClassVar[str] = "linear"
    needs: ClassVar[Needs] = "losses"
    scale: ClassVar[Literal["sum", "mean"]] = "sum"
    about: ClassVar[About] = About(
        title="Linear",
        paper="-",
        solves="the mean of the losses",
        when="always: what the others must beat",
    )

    def __init__(self, k: int | None = None) -> None:
        self.k = k

    def weights(self, losses: Tensor, /) -> Tensor:
        """Ones ``[K]`` in the dtype and on the device of ``losses [K]``."""
        if losses.dim() != 1 or (self.k is not None and len(losses) != self.k):
            rule = "[K]" if self.k is None else f"[K] with K={self.k}"
            raise ValueError(f"losses must have shape {rule}; got {list(losses.shape)}.")
        return torch.ones_like(losses, requires_grad=False)

    def loss(self, losses: Tensor, counts: Tensor | None = None) -> Tensor:
        """The scalar to back-propagate: ``sum_i losses_i / K``. An empty cluster's loss is 0 already."""
        return (self.weights(losses) * losses).sum() / len(losses)

    def reset(self) -> None:
        """There is no state."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no state."""
