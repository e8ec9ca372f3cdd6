"""The interface between balancing methods and training loops: protocols, base classes and shared helpers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from antdiff._checks import MOST_TIMESTEPS, as_choice, as_count, as_state, as_tensor, state_tensor
from antdiff.ops._problems import as_gram
from antdiff.ops.pcgrad import Reduction

Needs = Literal["gram", "losses", "rows"]


class About(NamedTuple):
    """The entry of a method in the table of the documentation (``docs/balancing.md``)."""

    title: str
    paper: str
    solves: str
    when: str  # in which situations the method is worth trying
    invariant: bool = False  # the direction does not change when a single loss is rescaled
    conflict_free: bool = False  # no cluster's loss rises to first order: <d, g_i> >= 0 for all i
    published: str = ""  # how the authors' code and their runs differ from the defaults here, and why
    torchjd: str = ""  # how TorchJD 0.18 differs from the defaults here; empty if it does not have the method
    options: tuple[tuple[str, Any], ...] = ()  # the options that reproduce the published runs


@runtime_checkable
class Balancer(Protocol):
    """A method that computes K weights, either from K losses or from the K x K Gram matrix of the cluster gradients.

    ``needs`` says which of the two :meth:`weights` takes. The weights are ready to use: the update is the sum of
    weights times cluster gradients. Methods that are published as a sum over K clusters divide by K themselves.
    Without conflict the update is then close to the gradient of the mean loss, so a learning rate keeps its meaning.
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
    """A method that chooses per parameter, and therefore has no weights. It needs the K cluster gradients themselves.

    :meth:`direction` takes a list of tensors ``[k, *shape]``, one per parameter (None where a parameter is frozen),
    and returns the update as a list of tensors ``[*shape]``. The update is ready to use.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]  # "rows"
    about: ClassVar[About]

    def direction(self, rows: Sequence[Tensor | None], /) -> list[Tensor | None]: ...
    def reset(self) -> None: ...
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


class GramBalancer:
    """Base class of the methods that need the Gram matrix. A subclass defines ``name``, ``about`` and :meth:`solve`.

    Args:
        update_every: Solve on every ``update_every``-th call of :meth:`weights`, and return the last solution on the
            calls in between. While :attr:`due` is False, neither the Gram matrix nor the K gradients are needed.
            Default 1: solve on every call.
        nonfinite: ``"raise"`` (default) or ``"poison"``, see :func:`antdiff.ops.pcgrad_weights`. Use ``"poison"``
            together with a ``GradScaler``.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs] = "gram"
    about: ClassVar[About]

    def __init__(self, *, update_every: int = 1, nonfinite: Literal["raise", "poison"] = "raise") -> None:
        self.update_every = as_count("update_every", update_every)
        as_choice("nonfinite", nonfinite, ("raise", "poison"))
        self.nonfinite: Literal["raise", "poison"] = nonfinite
        self._calls = 0
        self._last: Tensor | None = None  # [..., k]

    def solve(self, gram: Tensor) -> Tensor:
        """Return the weights [..., k] of a Gram matrix [..., k, k], independently of earlier solutions."""
        raise NotImplementedError

    @property
    def due(self) -> bool:
        """Whether the next call of :meth:`weights` solves, and therefore needs a Gram matrix."""
        return self._last is None or self._calls % self.update_every == 0

    def weights(self, gram: Tensor | None = None, /) -> Tensor:
        """Return the weights of this step.

        Args:
            gram: float64 ``[..., k, k]``, the Gram matrix of gradients that carry no loss scale. It may be None
                while :attr:`due` is False.

        Returns:
            float64 ``[..., k]``, on the device of ``gram``.

        Raises:
            TypeError, ValueError: ``gram`` is not a valid Gram matrix, as the op says.
            ValueError: ``gram`` is None although a solution is :attr:`due`.
        """
        if gram is not None:
            as_gram(gram)  # only a check: a copy would not carry the precision of J
        if not self.due:
            assert self._last is not None
            self._calls += 1
            return self._last
        if gram is None:
            raise ValueError(
                f"gram must be given when weights are due, every {self.update_every} calls; got None. "
                "Pass the Gram matrix whenever .due is True."
            )
        try:
            weights = self.solve(gram)
        except ValueError as error:
            _name_clusters(gram, error)
            raise
        self._calls += 1
        if self.update_every > 1:
            self._last = self._replace_poisoned(weights)
        return weights

    def _replace_poisoned(self, weights: Tensor) -> Tensor:
        """Replace poisoned weights by the last good ones, so that one bad step does not spoil the following steps."""
        if self._last is None or self._last.shape != weights.shape:
            return weights
        return torch.where(weights.isfinite().all(dim=-1, keepdim=True), weights, self._last)

    def reset(self) -> None:
        """Discard the last solution, so that the next call solves."""
        self._calls = 0
        self._last = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs to continue exactly like an uninterrupted one."""
        return {"calls": self._calls, "last": None if self._last is None else self._last.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that :meth:`state_dict` returned."""
        calls, last = as_state(state, "calls", "last")["calls"], state["last"]
        calls = as_count("state['calls']", calls, 0)
        self._last = None if last is None else state_tensor("last", last, kind="float").clone()
        self._calls = calls


class SummedBalancer(GramBalancer):
    """Base class of the methods whose published direction is K times the one that is used here by default.

    Args:
        reduction: ``"mean"`` (default), or ``"sum"`` for the published length, K times as long.
        update_every, nonfinite: See :class:`GramBalancer`.
    """

    def __init__(
        self,
        *,
        reduction: Reduction = "mean",
        update_every: int = 1,
        nonfinite: Literal["raise", "poison"] = "raise",
    ) -> None:
        super().__init__(update_every=update_every, nonfinite=nonfinite)
        as_choice("reduction", reduction, ("sum", "mean"))
        self.reduction: Reduction = reduction


def _name_clusters(gram: Tensor, error: ValueError) -> None:
    """Raise an error that names the clusters whose squared norms, on the diagonal, are not finite.

    The op names the first entry that is not finite, which may be in the row of another cluster.
    """
    if not isinstance(gram, Tensor) or gram.dim() != 2 or len(gram) != gram.shape[1]:
        return
    bad = torch.nonzero(~gram.detach().diagonal().isfinite()).flatten().tolist()
    if bad:
        i = bad[0]
        raise ValueError(
            f"gram must be finite; got {float(gram[i, i])} at [{i}, {i}]: the gradients of clusters {bad} are not "
            "finite. Look at their samples, skip the step, or pass nonfinite='poison' to get NaN weights."
        ) from error


class LossBalancer:
    """Base class of the methods that need only the losses.

    A subclass defines ``name``, ``about`` and :meth:`weights`; a subclass with state also defines :meth:`observe`.
    A loss of exactly zero means that the cluster is empty. It gets weight 0 and does not influence the other weights.
    If ``positive`` is True, a negative loss raises ValueError on the CPU. On other devices, where reading
    the losses would wait for the device, all weights are NaN.

    Args:
        k: Number of clusters, at least 1.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs] = "losses"
    about: ClassVar[About]
    positive: ClassVar[bool] = False  # defined for positive losses only
    # Whether loss() calls observe() before weights(). If False, the state that weights() uses is from earlier steps.
    observes_first: ClassVar[bool] = False

    def __init__(self, k: int) -> None:
        self.k = as_count("k", k, most=MOST_TIMESTEPS)

    def weights(self, losses: Tensor, /) -> Tensor:
        """Return weights ``[K]`` for ``losses [K]``, detached, in their dtype and on their device.

        The call does not change the state.
        """
        raise NotImplementedError

    def observe(self, losses: Tensor, /) -> None:
        """Update the state with the losses ``[K]`` of a step.

        :meth:`loss` calls this method. Call it yourself in a loop that only uses :meth:`weights`, after each call of
        :meth:`weights` (before it if :attr:`observes_first`).
        """

    def loss(self, losses: Tensor, counts: Tensor | None = None) -> Tensor:
        """Return the scalar to back-propagate, ``sum_i weights_i losses_i``, and call :meth:`observe`.

        The weights are those from before :meth:`observe`, so that the last step of an epoch still has the weights of
        its epoch. RLW, which draws in :meth:`observe`, and FAMO, which measures the improvement of the previous step by
        the losses of this step, observe first. ``losses [K]`` are attached to the model's graph. ``counts`` is accepted
        for the common interface and unused.
        """
        self._check(losses)
        if self.observes_first:
            self.observe(losses.detach())
        weights = self.weights(losses)
        if not self.observes_first:
            self.observe(losses.detach())
        return (weights * losses).sum()

    def reset(self) -> None:
        """Reset the state to that of a new object."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs to continue exactly like an uninterrupted one."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that :meth:`state_dict` returned."""

    def _check(self, losses: Tensor) -> None:
        check_losses(losses, self.k)
        if self.positive and losses.device.type == "cpu" and not torch.compiler.is_compiling():
            losses = losses.detach()
            bad = torch.nonzero(losses < 0).flatten().tolist()
            if bad:
                raise ValueError(
                    f"losses must be positive for {self.name!r}; got {float(losses[bad[0]]):.3g} for cluster {bad[0]}. "
                    "Use a method that needs gradients, such as 'pcgrad', for losses that can be negative, or balance "
                    "the losses before a learned uncertainty is added."
                )


def check_losses(losses: Tensor, k: int | None) -> None:
    """Raise unless ``losses`` has shape ``[k]``, or any shape ``[K]`` if ``k`` is None."""
    as_tensor("losses", losses, shape="[K]")
    if losses.dim() != 1 or (k is not None and len(losses) != k) or len(losses) == 0:
        rule = "[K]" if k is None else f"[K] with K={k}"
        raise ValueError(f"losses must have shape {rule}; got {list(losses.shape)}.")


class RunningMean:
    """Mean loss of each cluster over the steps in which its loss was finite and positive (the cluster not empty)."""

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
        """Return the means, float64 ``[K]`` on the device of ``otherwise``.

        Clusters without any loss so far get their entry of ``otherwise [K]``.
        """
        sums, counts = self.sums.to(otherwise.device), self.counts.to(otherwise.device)
        return torch.where(counts > 0, sums / counts, otherwise)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "sums": self.sums.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        as_state(state, "steps", "sums", "counts")
        steps = as_count("state['steps']", state["steps"], 0)
        k = self.sums.shape
        sums, counts = (state_tensor(name, state[name], k, kind="float") for name in ("sums", "counts"))
        self.steps, self.sums, self.counts = steps, sums.clone(), counts.clone()


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Compute the softmax over the entries selected by ``mask``; other entries are 0.

    The result is 0 everywhere if the mask selects nothing. NaN stays NaN.
    """
    return torch.where(mask, logits.masked_fill(~mask, -torch.inf).softmax(-1), 0.0)
