"""The interface between the rules and the mode that records a forward, and the two functions that every rule uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from antdiff.gradients.batch import ClusteredBatch

Op = Callable[..., Any]

# Called as ``write(clustered, sinks, grad, *saved)``: adds the K weight gradients of one op to its sinks.
Write = Callable[..., None]


class Recorder(Protocol):
    """What a rule may ask of the mode that calls it.

    A tensor is *shared* if it is a parameter, a buffer, or computed from such tensors alone. Any other tensor *varies*,
    and its first dimension is the batch.

    Attributes:
        clustered: the clusters of the batch.
        probe: the sample whose values are NaN, or None in an ordinary forward.
    """

    clustered: ClusteredBatch
    probe: int | None

    def __enter__(self) -> Any:
        """Record the ops that a rule calls in turn."""

    def __exit__(self, *exception: Any) -> Any: ...

    def varies(self, x: Any) -> bool:
        """Return whether ``x`` is a tensor that is not shared."""
        ...

    def trains(self, x: Any) -> bool:
        """Return whether ``x`` is a shared tensor that needs a gradient."""
        ...

    def expanded_from(self, x: Tensor) -> Tensor | None:
        """Return the tensor that the shared tensor ``x`` was expanded from along its first dimension alone, if any."""
        ...

    def check(self, x: Tensor, *users: Tensor | None) -> Tensor:
        """Return the varying tensor ``x`` if it has one or more rows per sample.

        With a probe, also check that only the rows of that sample are NaN.

        Args:
            users: the shared tensors that meet ``x``, for the message.

        Raises:
            GroupingError: the first dimension of ``x`` is no multiple of the batch size, or samples have been mixed.
        """
        ...

    def tap(self, out: Tensor, write: Write, users: Sequence[Tensor | None], *saved: Tensor) -> Tensor:
        """Return ``out``, and call ``write(clustered, sinks, grad, *saved)`` when its gradient arrives.

        Args:
            users: the shared tensors behind ``out``. ``sinks`` has one entry per user: None where it needs no gradient.
        """
        ...

    def leaf(self, x: Tensor, write: Write, user: Tensor) -> Tensor:
        """Return the values of ``x`` without its graph, and call ``write(clustered, [sink of user], grad)`` when their
        gradient arrives."""
        ...


def detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def autocast_operand(x: Tensor) -> Tensor:
    """Cast ``x`` as autocast casts the operands of a matrix product.

    Rules cast before the product, so that the tensor saved for the weight gradient is the one that the product used.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
