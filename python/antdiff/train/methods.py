"""The balancing method of a run: any of the registry, or vanilla, which is training as everyone does it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from antdiff import balancing, ops
from antdiff.distributed import ClusterGradients, global_losses, reduce_gradients


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


def write_direction(direction: Sequence[Tensor | None], model: torch.nn.Module) -> None:
    """What `combine` is to K weights: p.grad of every trainable parameter becomes its part of the direction."""
    parts = [d for d in direction if d is not None]
    for p, d in zip((p for p in model.parameters() if p.requires_grad), parts, strict=True):
        p.grad = d.to(p.dtype)


class BackwardResult(NamedTuple):
    losses: Tensor
    counts: Tensor
    weights: Tensor | None
    gram: Tensor | None


class BalancedBackward:
    """The one call of the loop, by way of the classes for gradients and for losses."""

    def __init__(self, model: nn.Module, balancer: Any, k: int, route: Any, skip_unused: bool) -> None:
        self.model, self.balancer, self.k = model, balancer, k
        self.gradients = ClusterGradients(model, k, route, scheme="all_reduce" if balancer.needs == "rows" else "auto")

    def __call__(self, loss_fn: Any, batch: Any, cluster: Tensor, *, counts: Any = None) -> BackwardResult:
        if self.balancer.needs == "losses":
            for p in self.model.parameters():
                p.grad = None
            losses, counts = global_losses(*ops.cluster_mean(loss_fn(*batch), cluster, self.k))
            self.balancer.loss(losses, counts).backward()
            reduce_gradients(self.model, skip_unused=True)
            return BackwardResult(losses.detach(), counts, self.balancer.weights(losses), None)
        J = self.gradients.compute(loss_fn, batch, cluster, counts=counts)
        G = self.gradients.gram(J)
        if self.balancer.needs == "gram":
            w = self.balancer.weights(G)
            self.gradients.combine(w, J)
        else:
            w = None
            write_direction(self.balancer.direction(J), self.model)
        return BackwardResult(self.gradients.losses, self.gradients.counts, w, G)

    def check(self) -> None:
        self.gradients.check()
