"""The destinations of weight gradients: K rows per tensor, written in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from antdiff.gradients.batch import ClusteredBatch


class Sink:
    """The gradients of one tensor for K clusters.

    Attributes:
        name: the name of the parameter, for messages.
        rows: ``[k, *shape]``, allocated at the first write unless given.
        fresh: nothing has been written yet. The first write then overwrites the rows, so that they need not be zeroed.
        reached: a gradient has arrived. False if the rows were only set to zero.

    Args:
        dtype: of the rows; default that of ``tensor``.
    """

    def __init__(
        self,
        name: str,
        tensor: Tensor,
        k: int,
        rows: Tensor | None = None,
        *,
        fresh: bool = True,
        reached: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.name, self.tensor, self.fresh, self.reached = name, tensor, fresh, reached
        self._k, self._rows, self._dtype = k, rows, dtype or tensor.dtype

    @property
    def rows(self) -> Tensor:
        if self._rows is None:
            x = self.tensor
            self._rows = torch.empty((self._k, *x.shape), dtype=self._dtype, device=x.device)
        return self._rows

    def add_products(self, factors: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Add ``left_i [m, n] @ right_i`` to row i, without a temporary if all dtypes are equal."""
        for row, (left, right) in zip(self.rows.unbind(), factors, strict=True):
            if not (left.dtype == right.dtype == row.dtype):
                product = left @ right
                row.copy_(product) if self.fresh else row.add_(product)
            elif not self.fresh:
                row.addmm_(left, right)
            else:
                torch.mm(left, right, out=row)  # writes zeros if the cluster is empty
        self.fresh, self.reached = False, True

    def add_rows(self, grads: Iterable[Tensor | None]) -> None:
        """Add ``grads_i`` to row i. It is None for a cluster without samples."""
        written, sources, empty = [], [], []
        for row, grad in zip(self.rows.unbind(), grads, strict=True):
            if grad is None:
                empty.append(row)
            else:
                written.append(row)
                sources.append(grad.view(row.shape))
        if written:
            (torch._foreach_copy_ if self.fresh else torch._foreach_add_)(written, sources)
        if empty and self.fresh:
            torch._foreach_zero_(empty)
        self.fresh, self.reached = False, True

    def add_all(self, grads: Tensor) -> None:
        """Add ``grads [k, ...]`` to all rows. It may have another shape with the same number of elements."""
        rows = self.rows
        if self.fresh:
            rows.copy_(grads.view(rows.shape))
        else:
            rows.add_(grads.view(rows.shape))
        self.fresh, self.reached = False, True

    def add_sums(self, clustered: ClusteredBatch, x: Tensor) -> None:
        """Add the sum of each cluster's rows of ``x [R, ...]`` to its row."""
        rows = self.rows if self.fresh and x.is_cpu else None
        sums = clustered.sums(x, rows)
        if rows is not None and sums.data_ptr() == rows.data_ptr() and sums.numel():
            self.fresh, self.reached = False, True
        else:
            self.add_all(sums)

    def take(self, grads: Tensor | None) -> None:
        """Add ``grads [k, *shape]`` to all rows and take ownership of it. It becomes the rows if none are allocated."""
        if grads is None:
            self.finish()
        elif self.fresh and self._rows is None and grads.is_contiguous() and grads.dtype == self._dtype:
            self._rows, self.fresh, self.reached = grads, False, True
        else:
            self.add_all(grads)

    def drop(self) -> None:
        """Free the rows."""
        self._rows = None

    def finish(self) -> None:
        """Set the rows to zero if no gradient has been written."""
        if self.fresh:
            self.rows.zero_()
            self.fresh = False


class FunctionalSink(Sink):
    """A sink that returns its gradients instead of writing in place, for traced graphs.

    Attributes:
        total: ``[k, *shape]``, or None before the first write.
    """

    def __init__(self, name: str, tensor: Tensor, k: int) -> None:
        super().__init__(name, tensor, k)
        self.total: Tensor | None = None

    def add_products(self, factors: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.add_all(torch.stack([left @ right for left, right in factors]))

    def add_rows(self, grads: Iterable[Tensor | None]) -> None:
        rows = list(grads)
        known = next((x for x in rows if x is not None), None)
        if known is not None:
            self.add_all(torch.stack([torch.zeros_like(known) if x is None else x for x in rows]))

    def add_sums(self, clustered: ClusteredBatch, x: Tensor) -> None:
        self.add_all(clustered.sums(x))

    def add_all(self, grads: Tensor) -> None:
        grads = grads.reshape(self._k, *self.tensor.shape).to(self.tensor.dtype)
        self.total = grads if self.total is None else self.total + grads


Sinks = Sequence[Sink | None]


def unreached(sinks: Sequence[Sink]) -> list[Tensor]:
    """Return the tensors that received no gradient; none of them if there was no sample, whose gradient is zero."""
    return [s.tensor for s in sinks if not s.reached] if any(s.reached for s in sinks) else []


class GradientStore:
    """The buffers of J: one tensor ``[k, *shape]`` per trainable parameter, allocated once.

    Attributes:
        tensors: in the order of ``model.parameters()``, None where a parameter is frozen.
        reuse: keep the buffers from call to call. False with torch.compile, whose backward returns new tensors; these
            become the buffers.
    """

    def __init__(self, model: nn.Module, k: int, dtype: torch.dtype | None, *, reuse: bool = True) -> None:
        self.model, self.k, self.dtype, self.reuse = model, k, dtype, reuse
        self.named = list(model.named_parameters())
        self.tensors: list[Tensor | None] = []
        self._sinks: list[Sink] = []

    def sinks(self, *, fresh: bool) -> list[Sink]:
        """Return one sink per trainable parameter.

        Reallocate the buffers only if a parameter was frozen, moved, cast or replaced.

        Args:
            fresh: overwrite the rows instead of adding to them.

        Raises:
            ValueError: the buffers would have to be reallocated, and ``fresh`` is False.
        """
        named = list(self.model.named_parameters())  # again: a head may have been replaced or an adapter added
        if not fresh and [id(p) for _, p in named] != [id(p) for _, p in self.named]:
            raise ValueError(
                "model must keep its parameters from the first to the last micro-batch; some were replaced between two "
                "micro-batches. Replace them between steps."
            )
        self.named = named
        reached = set() if fresh else self.reached()
        self._sinks = []  # they hold the rows
        if fresh and not self.reuse:
            self.tensors[:] = []
            self._sinks = [
                Sink(name, p, self.k, None if self._dtype(p) == p.dtype else self._empty(p))
                for name, p in self.named
                if p.requires_grad
            ]
            return self._sinks
        if not self._fit():
            if not fresh:
                raise ValueError(
                    "model must keep its parameters from the first to the last micro-batch; some were frozen, moved or "
                    "cast between two micro-batches. Change them between steps."
                )
            self.tensors[:] = [self._empty(p) if p.requires_grad else None for _, p in self.named]
        self._sinks = [
            Sink(name, p, self.k, J, fresh=fresh, reached=id(p) in reached)
            for J, (name, p) in zip(self.tensors, self.named, strict=True)
            if J is not None
        ]
        return self._sinks

    def reached(self) -> set[int]:
        """Return the ids of the parameters that a sample has reached since the rows were last overwritten."""
        return {id(s.tensor) for s in self._sinks if s.reached}

    def unreached(self) -> list[Tensor]:
        """Return the other trainable parameters; see :func:`unreached`."""
        return unreached(self._sinks)

    def keep(self, sinks: list[Sink]) -> None:
        """Make the rows of these sinks the buffers of J."""
        rows = iter(sinks)
        self.tensors[:] = [next(rows).rows if p.requires_grad else None for _, p in self.named]

    def grads(self) -> list[Tensor | None]:
        """Return ``p.grad`` of each parameter, None where frozen, as the ``out`` of ``ops.combine``.

        A gradient that is missing, or whose layout ``ops.combine`` cannot write (channels_last, sparse), is allocated.
        """
        out: list[Tensor | None] = []
        for _, p in self.named:
            usable = p.grad is not None and p.grad.layout is torch.strided and p.grad.is_contiguous()
            if p.requires_grad and not usable:
                p.grad = torch.empty_like(p, memory_format=torch.contiguous_format)
            out.append(p.grad if p.requires_grad else None)
        return out

    def _fit(self) -> bool:
        """Return whether the buffers have the shapes, devices and dtypes of the rows of the parameters."""
        if len(self.tensors) != len(self.named):
            return False
        for J, (_, p) in zip(self.tensors, self.named, strict=True):
            if J is None or not p.requires_grad:
                if J is not None or p.requires_grad:
                    return False
            elif J.shape[1:] != p.shape or J.device != p.device or J.dtype != (self.dtype or p.dtype):
                return False
        return True

    def _empty(self, p: Tensor) -> Tensor:
        return torch.empty((self.k, *p.shape), dtype=self._dtype(p), device=p.device)

    def nbytes(self) -> int:
        """Return the memory of J in bytes."""
        return sum(self.k * p.numel() * self._dtype(p).itemsize for _, p in self.named if p.requires_grad)

    def _dtype(self, p: Tensor) -> torch.dtype:
        return p.dtype if self.dtype is None else self.dtype
