"""The result of one call of :class:`antdiff.ClusterGradients`: K cluster gradients and the operations on them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from antdiff._checks import as_tensor, describe
from antdiff.gradients.grouped.deferred import GramMode
from antdiff.gradients.parameters import finish_grads
from antdiff.gradients.sinks import GradientStore
from antdiff.ops import _mixed as mixed


class ClusterJacobian(Protocol):
    """K cluster gradients of one batch. Row i is the gradient of the mean loss of cluster i.

    Its buffers belong to the :class:`antdiff.ClusterGradients` that made it, whose next call, accumulation or recording
    reuses them, even if that fails. From then on every method raises RuntimeError; ``losses`` and ``counts`` stay
    valid.

    Attributes:
        losses: ``[k]`` detached, the mean per-sample loss of each cluster over all ranks (0 where a cluster is empty).
        counts: int64 ``[k]``, the samples of each cluster over all ranks, on the device of the losses.
        loss_scale: the factor of the ``scaler`` that was given, a tensor ``[]``, or 1.0 without one. ``rows`` contain
            it, and so does ``p.grad`` after :meth:`combine`; ``losses`` and :meth:`gram` do not.
        rows: a list of ``[k, *shape]``, one for each of ``model.parameters()`` and None if a parameter is frozen. Under
            FSDP2 these are the rows of this rank's shards. Raises ValueError if this process does not hold whole rows.
        nbytes: memory of the rows on this rank, in bytes.
    """

    losses: Tensor
    counts: Tensor
    loss_scale: Tensor | float

    @property
    def rows(self) -> list[Tensor | None]: ...
    @property
    def nbytes(self) -> int: ...
    def gram(self) -> Tensor:
        """Return the inner products of the rows, float64 ``[k, k]``, without the loss scale."""

    def combine(self, weights: Tensor) -> None:
        """Write ``sum_i weights_i row_i`` to the ``.grad`` of every trainable parameter, for float ``weights [k]``.

        ``p.grad`` becomes None for a frozen parameter, and for one that no sample of any rank has reached. If there was
        no sample at all it becomes zero. Gradient hooks of the parameters are called here, once, with the combined
        gradient. On several ranks on CUDA, a rank whose own samples have not reached some parameter waits for the
        device to learn whether those of another rank have.
        """

    def write(self, direction: Sequence[Tensor | None]) -> None:
        """Write ``direction``, a list like ``rows`` without its first dimension, to ``.grad``, as :meth:`combine`."""


class HeldJacobian:
    """Rows that are held in memory; see :class:`ClusterJacobian`."""

    def __init__(self, store: GradientStore, losses: Tensor, counts: Tensor, loss_scale: Tensor | float) -> None:
        self.losses, self.counts, self.loss_scale = losses, counts, loss_scale
        self._buffers: GradientStore | None = store

    @property
    def rows(self) -> list[Tensor | None]:
        return self._store.tensors

    @property
    def nbytes(self) -> int:
        return self._store.nbytes()

    def gram(self) -> Tensor:
        return unscaled(mixed.gram(self.rows), self.loss_scale)

    def combine(self, weights: Tensor) -> None:
        store = self._store
        mixed.combine(weights, self.rows, store.grads())
        finish_grads((p for _, p in store.named), store.unreached())

    def write(self, direction: Sequence[Tensor | None]) -> None:
        check_direction(self.rows, direction)
        store = self._store
        for (_, p), d in zip(store.named, direction, strict=True):
            if d is not None:
                p.grad = d.to(p.dtype)
        finish_grads((p for _, p in store.named), store.unreached())

    def revoke(self) -> None:
        self._buffers = None

    @property
    def _store(self) -> GradientStore:
        return current(self._buffers)


class DeferredJacobian:
    """Rows that are not held (``hold="gram"``): their Gram matrix, and the tensors from which they are combined.

    :meth:`combine` can be called once, since it frees these tensors.
    """

    def __init__(self, mode: GramMode, losses: Tensor, counts: Tensor, loss_scale: Tensor | float) -> None:
        self.losses, self.counts, self.loss_scale = losses, counts, loss_scale
        self._recorded: GramMode | None = mode
        self._gram = unscaled(mode.gram, loss_scale)

    @property
    def rows(self) -> list[Tensor | None]:
        raise ValueError("rows are not held with hold='gram'. Use hold='jacobian' to read them.")

    @property
    def nbytes(self) -> int:
        return 0

    def gram(self) -> Tensor:
        current(self._recorded)
        return self._gram

    def combine(self, weights: Tensor) -> None:
        current(self._recorded).combine(weights)

    def write(self, direction: Sequence[Tensor | None]) -> None:
        raise ValueError("direction needs the rows, which are not held with hold='gram'. Use hold='jacobian'.")

    def revoke(self) -> None:
        self._recorded = None


class Revocable(Protocol):
    def revoke(self) -> None:
        """Release the buffers, because a later call is about to reuse them."""


R = TypeVar("R", bound=Revocable)
T = TypeVar("T")


class Latest:
    """The jacobian, recording or accumulation that uses a set of buffers now. The next user revokes it."""

    def __init__(self) -> None:
        self._ref: weakref.ref[Any] | None = None

    def revoke(self) -> None:
        last = None if self._ref is None else self._ref()
        self._ref = None
        if last is not None:
            last.revoke()

    def set(self, jacobian: R) -> R:
        self._ref = weakref.ref(jacobian)
        return jacobian


def current(buffers: T | None) -> T:
    """Return the buffers of a jacobian, or raise if it was revoked."""
    if buffers is None:
        raise RuntimeError(
            "this ClusterJacobian is stale: a later call of the same ClusterGradients has reused its buffers. "
            "Use a jacobian before the next call, or clone its rows."
        )
    return buffers


def unscaled(gram: Tensor, loss_scale: Tensor | float) -> Tensor:
    """Divide a Gram matrix of scaled rows by ``loss_scale ** 2``, in place."""
    if isinstance(loss_scale, float) and loss_scale == 1.0:
        return gram
    return gram.div_(loss_scale * loss_scale)


def check_direction(rows: Sequence[Tensor | None], direction: Sequence[Tensor | None]) -> None:
    """Raise unless ``direction`` has one tensor ``[*shape]`` per ``[k, *shape]`` of ``rows``, and None for None."""
    if not isinstance(direction, (list, tuple)) or not all(d is None or isinstance(d, Tensor) for d in direction):
        raise TypeError(f"direction must be a list of tensors and None; got {describe(direction)}.")
    if len(direction) != len(rows):
        raise ValueError(
            f"direction must have one entry for each of the {len(rows)} parameters; got {len(direction)}. "
            "Pass what the method returned for jacobian.rows."
        )
    for row, d in zip(rows, direction, strict=True):
        if d is not None:
            as_tensor("direction", d)
        want, got = None if row is None else list(row.shape[1:]), None if d is None else list(d.shape)
        if want != got:
            raise ValueError(
                f"direction must have a tensor for each tensor of jacobian.rows, of shape {want} here, and None for a "
                f"frozen parameter; got {got}. Pass what the method returned for jacobian.rows."
            )


def mean_losses(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean losses ``[k]``, 0 for an empty cluster, and the counts int64 ``[k]`` on their device."""
    counts = counts.to(sums.device)
    return sums / counts.clamp(min=1), counts


def divide_rows(rows: Sequence[Tensor | None], counts: Tensor) -> None:
    """Divide row i of every ``[k, *shape]`` by ``counts[i]``, or by 1 if that is 0, in place."""
    for x in rows:
        if x is not None:
            x.div_(counts.clamp(min=1).to(x.device).view(len(counts), *[1] * (x.dim() - 1)))
