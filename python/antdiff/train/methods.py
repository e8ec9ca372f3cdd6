"""The balancing method of a run: any method of the registry, or vanilla, which is ordinary training."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from antdiff import balancing


class BatchMean:
    """Vanilla as a balancing method: each cluster counts by its number of samples, so the loss is the batch mean."""

    needs = "losses"
    shares: Tensor

    def loss(self, losses: Tensor, counts: Tensor) -> Tensor:
        """Return the mean over the batch of `losses` [K] with `counts` [K] samples."""
        self.shares = (counts / counts.sum()).to(losses.dtype)  # [K]
        return (losses * counts).sum() / counts.sum()

    def weights(self, losses: Tensor) -> Tensor:
        """Return each cluster's share of the batch that :meth:`loss` was given, [K]. `losses` are not used."""
        return self.shares

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept the empty state."""


def make_balancer(
    name: str, k: int, optimizer: torch.optim.Optimizer, *, generator: torch.Generator, epoch: int
) -> Any:
    """Build the balancing method `name`, and add its own parameters, if it has any, to the optimizer.

    The constructor receives those of the following arguments that it accepts: the number of clusters `k`, the
    `generator` of its random draws, and the number of steps per `epoch`, which is the update period of some papers.
    """
    method = BatchMean if name == "vanilla" else balancing.get(name)
    # With "poison", NaN weights reach the check at the next row, which has a more helpful message than the op.
    options = {"k": k, "generator": generator, "epoch": epoch, "nonfinite": "poison"}
    accepted = inspect.signature(method).parameters
    balancer = method(**{name: value for name, value in options.items() if name in accepted})
    if isinstance(balancer, torch.nn.Module):
        balancer.to(generator.device)
    for group in balancer.param_groups() if hasattr(balancer, "param_groups") else ():
        optimizer.add_param_group(group)
    return balancer
