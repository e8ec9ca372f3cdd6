"""FAMO (Liu et al., "Fast Adaptive Multitask Optimization", NeurIPS 2023): equal improvement rates, from the losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from antdiff._checks import as_count, as_number, as_state, state_tensor
from antdiff.balancing.base import About, LossBalancer, masked_softmax

_BETAS, _EPS = (0.9, 0.999), 1e-8  # Adam's defaults; an absolute eps is fine because logits have no unit


class FAMO(LossBalancer):
    """Weights ``c z_i / losses_i`` with sum 1, where z is the softmax of logits that follow the improvements.

    After each step, Adam moves the logits against the improvement ``log losses_before - log losses_after``, so that a
    cluster that improves more than the others loses weight. The paper evaluates the losses a second time on the same
    batch: call :meth:`update` with them after the optimizer's step. Without this call, the losses of the next step are
    used, which saves the second forward pass and is noisier.

    Args:
        k: Number of clusters.
        lr: Learning rate of the logits, 0.025 by default as in the paper.
        weight_decay: Weight decay of the logits (the paper's gamma), 0.01 by default. It forgets old improvements.
    """

    name = "famo"
    observes_first = True
    positive = True
    about = About(
        title="FAMO",
        paper="Liu et al., NeurIPS 2023",
        solves="keeps the relative improvement rates of all losses equal, and needs only the losses for it",
        when="K gradients cost too much, and the losses are not too noisy",
        invariant=True,
        published="The losses are evaluated again on the same batch after each step: call update(losses). The "
        "gradient of the model is clipped to norm 1, and weight_decay is 0.001 for QM9 and NYUv2. The "
        "authors' code adds 1e-8 to the losses, an absolute epsilon, and can subtract known minima; here "
        "neither.",
        torchjd="As the authors' code, with weight_decay=0.001.",
    )

    _logits: Tensor  # [K]
    _mean: Tensor  # [K], Adam's first moment
    _square: Tensor  # [K], Adam's second moment
    _before: Tensor | None  # losses [K] before the step, until the losses after the step are known

    def __init__(self, k: int, *, lr: float = 0.025, weight_decay: float = 0.01) -> None:
        super().__init__(k)
        self.lr = as_number("lr", lr, above=0, remedy="The paper uses 0.025.")
        self.weight_decay = as_number("weight_decay", weight_decay, least=0)
        self.reset()

    def weights(self, losses: Tensor, /) -> Tensor:
        self._check(losses)
        losses = losses.detach()
        present = losses != 0
        logits = self._logits.to(losses.device) - torch.where(present, losses, 1.0).double().log()
        return masked_softmax(logits, present).to(losses.dtype)  # z / losses, normalised to sum 1

    def observe(self, losses: Tensor, /) -> None:
        self._check(losses)
        if self._before is not None:
            self.update(losses)
        self._before = losses.detach().double()

    def update(self, losses: Tensor) -> None:
        """Update the logits with the losses ``[K]`` after the optimizer's step.

        Call it at most once per :meth:`loss`.

        Raises:
            RuntimeError: there are no losses from before the step.
        """
        self._check(losses)
        if self._before is None:
            raise RuntimeError(
                "update needs the losses from before the step, and there are none. Call loss or observe first."
            )
        before, after = self._before, losses.detach().double()
        self._before = None
        for name in ("_logits", "_mean", "_square"):
            setattr(self, name, getattr(self, name).to(after.device))
        improvement = before.log() - after.log()  # [K]
        # Ignore clusters that were empty before or after the step, and losses that are not finite.
        improvement = torch.where(improvement.isfinite(), improvement, 0.0)
        z = self._logits.softmax(0)
        gradient = z * (improvement - (z * improvement).sum()) + self.weight_decay * self._logits
        self._steps += 1
        self._mean = _BETAS[0] * self._mean + (1 - _BETAS[0]) * gradient
        self._square = _BETAS[1] * self._square + (1 - _BETAS[1]) * gradient.square()
        mean = self._mean / (1 - _BETAS[0] ** self._steps)
        root = (self._square / (1 - _BETAS[1] ** self._steps)).sqrt()
        self._logits = self._logits - self.lr * mean / (root + _EPS)

    def reset(self) -> None:
        self._steps = 0
        self._logits, self._mean, self._square = (torch.zeros(self.k, dtype=torch.float64) for _ in range(3))
        self._before = None

    def state_dict(self) -> dict[str, Any]:
        tensors = {name: getattr(self, f"_{name}") for name in ("logits", "mean", "square", "before")}
        return {"steps": self._steps, **{name: None if x is None else x.clone() for name, x in tensors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = ("logits", "mean", "square", "before")
        steps = as_count("state['steps']", as_state(state, "steps", *names)["steps"], 0)
        tensors = {
            name: None
            if name == "before" and state[name] is None
            else state_tensor(name, state[name], (self.k,)).clone()
            for name in names
        }
        self._steps = steps
        for name, x in tensors.items():
            setattr(self, f"_{name}", x)
