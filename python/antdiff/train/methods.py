"""The balancing method of a run: any of the registry, or vanilla, which is training as everyone does it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from antdiff import balancing


class BatchMean:
    """Vanilla in the shape of a balancing method: clusters count by their samples, so the loss is the batch's mean."""

    needs = "losses"
    shares: Tensor

    def loss(self, losses: Tensor, counts: Tensor) -> Tensor:
        """losses [K] and counts [K] -> the mean over the batch."""
        self.shares = (counts / counts.sum()).to(losses.dtype)  # [K]
        return (losses * counts).sum() / counts.sum()

    def weights(self, losses: Tensor) -> Tensor:
        """Each cluster's share [K] of the batch that :meth:`loss` was given: nobody chose it."""
        return self.shares

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no state."""


def make_balancer(
    name: str, k: int, optimizer: torch.optim.Optimizer, *, generator: torch.Generator, epoch: int
) -> Any:
    """The balancing method `name`; its own parameters, if it has any, join the optimizer.

    Of the run a method gets what its constructor names: the number of clusters `k`, the `generator` of its draws, and
    the number of steps in an `epoch`, the period of some papers.
    """
    method = BatchMean if name == "vanilla" else balancing.get(name)
    # Poisoned weights reach the finiteness check at the next row, which can say more than the op could.
    run = {"k": k, "generator": generator, "epoch": epoch, "nonfinite": "poison"}
    named = inspect.signature(method).parameters
    balancer = method(**{option: value for option, value in run.items() if option in named})
    if isinstance(balancer, torch.nn.Module):
        balancer.to(generator.device)
    for group in balancer.param_groups() if hasattr(balancer, "param_groups") else ():
        optimizer.add_param_group(group)
    return balancer
