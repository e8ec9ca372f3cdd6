"""The interface that rules see of the mode that records a forward, and two functions that most rules use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from antdiff.gradients.batch import ClusteredBatch

Op = Callable[..., Any]

# Called as ``write(clustered, sinks, grad, *saved)``. Adds the K weight gradients of one op to their sinks.
Write = Callable[..., None]


class Recorder(Protocol):
    """The interface of :class:`antdiff.gradients.grouped.mode.GroupedMode` that rules may use.

    A tensor is *shared* if it is a parameter, a buffer, or computed from such tensors alone. Any other tensor *varies*,
    and its rows belong to samples: those of its first dimension, unless a probe has shown another layout.

    Attributes:
        clustered: the clusters of the batch.
        rows: the clusters of the rows of the tensors that :meth:`check` has seen in this op, and how many leading
            dimensions count rows. None if a checkpoint recomputes an op whose rows are unknown; a tap then raises.
        lead: ``rows.lead``, or 1 if the rows are unknown.
        probe: bool ``[B]``, the samples whose values are NaN, or None in an ordinary forward.
    """

    clustered: ClusteredBatch
    rows: ClusteredBatch | None
    probe: Tensor | None

    @property
    def lead(self) -> int: ...

    def __enter__(self) -> Any:
        """Record the ops in this context, for a rule that is composed of ops with rules."""

    def __exit__(self, *exception: Any) -> Any: ...

    def varies(self, x: Any) -> bool:
        """Return whether ``x`` is a tensor that is not shared."""
        ...

    def trains(self, x: Any) -> bool:
        """Return whether ``x`` is a shared tensor that needs a gradient."""
        ...

    def expanded_from(self, x: Tensor) -> Tensor | None:
        """Return the tensor from which the shared tensor ``x`` was expanded along its first dimension only, if any."""
        ...

    def share(self, out: Any, func: Op, args: tuple[Any, ...]) -> Any:
        """Return ``out = func(*args)`` after registering it as shared: it depends on shared values only."""
        ...

    def check(self, x: Tensor, *users: Tensor | None) -> Tensor:
        """Return the varying tensor ``x`` after a check that its rows are known to belong to samples.

        In a probe the rows are looked at instead.

        Args:
            users: the shared tensors that the op applies to ``x``. The message names them.

        Raises:
            GroupingError: the first dimension of ``x`` is no multiple of the batch size and no probe has shown where
                the rows of samples are, or an earlier op has placed rows by the values of the batch.
        """
        ...

    def tap(self, out: Tensor, write: Write, users: Sequence[Tensor | None], *saved: Tensor) -> Tensor:
        """Return ``out``, and call ``write(clustered, sinks, grad, *saved)`` when its gradient arrives.

        Args:
            users: the shared tensors that ``out`` was computed from. ``sinks`` has one entry per user, None if the user
                needs no gradient.
            saved: tensors that ``write`` needs. They are saved for the backward as autograd saves its own.
        """
        ...

    def leaf(self, x: Tensor, write: Write, user: Tensor) -> Tensor:
        """Return ``x`` without its graph, and call ``write(clustered, [sink], grad)`` when its gradient arrives.

        Args:
            user: the shared tensor whose sink ``write`` gets.
        """
        ...


def detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def detached_all(x: Any) -> Any:
    """Detach all tensors in nested tuples, lists and dicts."""
    if isinstance(x, dict):
        return {key: detached_all(v) for key, v in x.items()}
    return type(x)(map(detached_all, x)) if type(x) in (tuple, list) else detached(x)


def autocast_operand(x: Tensor) -> Tensor:
    """Cast ``x`` as autocast casts the operands of a matrix product.

    Rules cast before the product, so that the tensor saved for the weight gradient is the one that the product used.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
