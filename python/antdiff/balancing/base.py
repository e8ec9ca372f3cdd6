"""What a balancing method is to a training loop: the attributes it declares, and the state it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from antdiff._checks import as_count

Needs = Literal["gram", "losses", "rows"]


class About(NamedTuple):
    """A method's line in the table of the documentation (``docs/balancing.md``)."""

    title: str
    paper: str
    solves: str
    when: str  # it is worth a try
    invariant: bool = False  # the direction stays when single losses are rescaled
    conflict_free: bool = False  # no cluster's loss rises to first order: <d, g_i> >= 0 for all i
    published: str = ""  # how the runs of the literature differ
    options: tuple[tuple[str, Any], ...] = ()  # and the options that give them


@runtime_checkable
class Balancer(Protocol):
    """A method that chooses K weights, from K losses or from their K x K Gram matrix: ``needs`` says which.

    The weights multiply the cluster gradients in the update as they are. Methods that are published as a sum over K
    clusters divide by K themselves, so that without conflict the update is about the gradient of the mean loss and a
    learning rate keeps its meaning.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]  # "gram" or "losses"
    about: ClassVar[About]

    def weights(self, x: Tensor, /) -> Tensor: ...
    def reset(self) -> None: ...
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


@runtime_checkable
class DirectionBalancer(Protocol):
    """A method that chooses per parameter and has no weights: it needs the K cluster gradients, ``needs == "rows"``.

    :meth:`direction` maps a list of ``[k, *shape]`` to the list of ``[*shape]`` that is the update, as it is.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]  # "rows"
    about: ClassVar[About]

    def direction(self, rows: Sequence[Tensor | None], /) -> list[Tensor | None]: ...
    def reset(self) -> None: ...
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


class GramBalancer:
    """Base of the methods that need the Gram matrix: a subclass defines ``name``, ``about`` and :meth:`solve`.

    Args:
        update_every: solve on every ``update_every``-th call of :meth:`weights`, return the last solution in between.
            Where :attr:`due` is False the Gram matrix, and with it the K gradients, need not be computed.
        nonfinite: see :func:`antdiff.ops.pcgrad_weights`; ``"poison"`` under a ``GradScaler``.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs] = "gram"
    about: ClassVar[About]

    def __init__(self, *, update_every: int = 1, nonfinite: Literal["raise", "poison"] = "raise") -> None:
        self.update_every = as_count("update_every", update_every)
        self.nonfinite: Literal["raise", "poison"] = nonfinite
        self._calls = 0
        self._last: Tensor | None = None  # [..., k]

    def solve(self, gram: Tensor) -> Tensor:
        """Weights [..., k] of a Gram matrix [..., k, k], without memory of earlier calls."""
        raise NotImplementedError

    @property
    def due(self) -> bool:
        """Whether the next call of :meth:`weights` solves, and so needs a Gram matrix."""
        return self._last is None or self._calls % self.update_every == 0

    def weights(self, gram: Tensor | None = None, /) -> Tensor:
        """Weights float64 [..., k] of this step's update, from the Gram matrix float64 [..., k, k] of unscaled
        gradients.

        Raises:
            ValueError: ``gram`` is None although a solution is :attr:`due`; what the op raises.
        """
        if not self.due:
            assert self._last is not None
            self._calls += 1
            return self._last
        if gram is None:
            raise ValueError(f"gram must be given on this call: weights are due every {self.update_every} calls.")
        weights = self.solve(gram)
        self._calls += 1
        if self.update_every > 1:
            self._last = self._worth_keeping(weights)
        return weights

    def _worth_keeping(self, weights: Tensor) -> Tensor:
        """``weights``, or the last ones where these are poisoned: one bad step must not spoil the next ones."""
        if self._last is None or self._last.shape != weights.shape:
            return weights
        return torch.where(weights.isfinite().all(dim=-1, keepdim=True), weights, self._last)

    def reset(self) -> None:
        """Forgets the last solution; the next call solves."""
        self._calls = 0
        self._last = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if never interrupted."""
        return {"calls": self._calls, "last": None if self._last is None else self._last.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._calls = int(state["calls"])
        self._last = None if state["last"] is None else state["last"].clone()


class LossBalancer:
    """Base of the methods that need the losses alone: a subclass defines ``name``, ``about`` and
    :meth:`weights`; :meth:`observe` where it has a state.

    A loss of exactly zero is an empty cluster's: it has weight 0 and takes no part in the weights of the others.

    Args:
        k: the number of clusters.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs] = "losses"
    about: ClassVar[About]

    def __init__(self, k: int) -> None:
        self.k = as_count("k", k)

    def weights(self, losses: Tensor, /) -> Tensor:
        """Weights ``[K]`` of ``losses [K]``, detached, in their dtype and on their device. Takes no step."""
        raise NotImplementedError

    def observe(self, losses: Tensor, /) -> None:
        """Takes the losses of a step into the state. :meth:`loss` does it; call it where you use weights alone."""

    def loss(self, losses: Tensor, counts: Tensor | None = None) -> Tensor:
        """The scalar to back-propagate from ``losses [K]``: :meth:`observe`, then ``sum_i weights_i losses_i``."""
        self._check(losses)
        self.observe(losses.detach())
        return (self.weights(losses) * losses).sum()

    def reset(self) -> None:
        """Forgets all steps."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if never interrupted."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""

    def _check(self, losses: Tensor) -> None:
        check_losses(losses, self.k)


def check_losses(losses: Tensor, k: int | None) -> None:
    """Raise unless ``losses`` has shape ``[k]``; any ``[K]`` where ``k`` is None."""
    if losses.dim() != 1 or (k is not None and len(losses) != k):
        rule = "[K]" if k is None else f"[K] with K={k}"
        raise ValueError(f"losses must have shape {rule}; got {list(losses.shape)}.")


class RunningMean:
    """Mean loss of each cluster over the steps in which it had samples and all went well."""

    def __init__(self, k: int) -> None:
        self.steps = 0
        self.sums, self.counts = (torch.zeros(k, dtype=torch.float64) for _ in range(2))  # [K]

    def add(self, losses: Tensor) -> None:
        losses = losses.detach().double()
        present = (losses > 0) & losses.isfinite()
        self.sums = self.sums.to(losses.device) + torch.where(present, losses, 0.0)
        self.counts = self.counts.to(losses.device) + present
        self.steps += 1

    def value(self, *, otherwise: Tensor) -> Tensor:
        """Float64 ``[K]`` on the device of ``otherwise [K]``, whose entries stand for clusters that were never seen."""
        sums, counts = self.sums.to(otherwise.device), self.counts.to(otherwise.device)
        return torch.where(counts > 0, sums / counts, otherwise)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "sums": self.sums.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.sums, self.counts = state["sums"].clone(), state["counts"].clone()


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the entries of ``mask``, 0 elsewhere; 0 everywhere for an empty mask. NaN stays NaN."""
    return torch.where(mask, logits.masked_fill(~mask, -torch.inf).softmax(-1), 0.0)
