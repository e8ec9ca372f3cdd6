"""Where weight gradients go: K rows a tensor, written in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class Sink:
    """The gradients of one tensor for K clusters.

    Attributes:
        name: of the parameter, for messages.
        rows: ``[k, *shape]``; allocated at the first write unless given.
        fresh: nothing has been written yet, so the first writer overwrites and nobody has to clear K x P numbers.
    """

    def __init__(self, name: str, tensor: Tensor, k: int, rows: Tensor | None = None, *, fresh: bool = True) -> None:
        self.name, self.tensor, self.fresh = name, tensor, fresh
        self._k, self._rows = k, rows

    @property
    def rows(self) -> Tensor:
        if self._rows is None:
            x = self.tensor
            self._rows = torch.empty((self._k, *x.shape), dtype=x.dtype, device=x.device)
        return self._rows

    def add_products(self, factors: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Row i += ``left_i [m, n] @ right_i``, written straight into it where the dtypes agree."""
        for row, (left, right) in zip(self.rows.unbind(), factors, strict=True):
            if not (left.dtype == right.dtype == row.dtype):
                product = left @ right
                row.copy_(product) if self.fresh else row.add_(product)
            elif not self.fresh:
                row.addmm_(left, right)
            else:
                torch.mm(left, right, out=row)  # zero where the cluster is empty
        self.fresh = False

    def add_rows(self, grads: Iterable[Tensor | None]) -> None:
        """Row i += ``grads_i``, None for a cluster without samples."""
        to, given, missed = [], [], []
        for row, grad in zip(self.rows.unbind(), grads, strict=True):
            if grad is None:
                missed.append(row)
            else:
                to.append(row)
                given.append(grad.view(row.shape))
        if to:
            (torch._foreach_copy_ if self.fresh else torch._foreach_add_)(to, given)
        if missed and self.fresh:
            torch._foreach_zero_(missed)
        self.fresh = False

    def add_all(self, grads: Tensor) -> None:
        """All rows += grads ``[k, ...]``, of as many numbers."""
        rows = self.rows
        if self.fresh:
            rows.copy_(grads.view(rows.shape))
        else:
            rows.add_(grads.view(rows.shape))
        self.fresh = False

    def take(self, grads: Tensor | None) -> None:
        """All rows += grads ``[k, *shape]``, which the caller gives away: they become the rows where there are none."""
        if grads is None:
            self.finish()
        elif self.fresh and self._rows is None and grads.is_contiguous():
            self._rows, self.fresh = grads, False
        else:
            self.add_all(grads)

    def drop(self) -> None:
        self._rows = None

    def finish(self) -> None:
        """A parameter that nothing reached has zero gradients."""
        if self.fresh:
            self.rows.zero_()
            self.fresh = False


class FunctionalSink(Sink):
    """As a sink, without writing in place.

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

    def add_all(self, grads: Tensor) -> None:
        grads = grads.reshape(self._k, *self.tensor.shape).to(self.tensor.dtype)
        self.total = grads if self.total is None else self.total + grads


Sinks = Sequence[Sink | None]


class GradientStore:
    """The buffers of J: one ``[k, *shape]`` a trainable parameter, made once.

    Attributes:
        tensors: in the order of ``model.parameters()``, None where frozen.
        reuse: False where gradients arrive in buffers of their own (torch.compile), which are then taken over.
    """

    def __init__(self, model: nn.Module, k: int, dtype: torch.dtype | None, *, reuse: bool = True) -> None:
        self.model, self.k, self.dtype, self.reuse = model, k, dtype, reuse
        self.named = list(model.named_parameters())
        self.tensors: list[Tensor | None] = []

    def sinks(self, *, fresh: bool) -> list[Sink]:
        """One a trainable parameter. Buffers are made again only if parameters were frozen, moved, converted or
        replaced by others."""
        named = list(self.model.named_parameters())  # those of now: a head may have been replaced, an adapter added
        replaced = len(named) != len(self.named) or any(
            a is not b for (_, a), (_, b) in zip(named, self.named, strict=True)
        )
        if replaced and not fresh:
            raise ValueError("model's parameters were replaced between two micro-batches.")
        self.named = named
        if fresh and not self.reuse:
            self.tensors[:] = []
            return [
                Sink(name, p, self.k, None if self._type(p) == p.dtype else self._empty(p))
                for name, p in self.named
                if p.requires_grad
            ]
        stale = len(self.tensors) != len(self.named) or any(
            (J is None) == p.requires_grad
            or (J is not None and (J.shape[1:] != p.shape or J.device != p.device or J.dtype != self._type(p)))
            for J, (_, p) in zip(self.tensors, self.named, strict=True)
        )
        if stale:
            if not fresh:
                raise ValueError("model's parameters were frozen, moved or converted between two micro-batches.")
            self.tensors[:] = [self._empty(p) if p.requires_grad else None for _, p in self.named]
        return [
            Sink(name, p, self.k, J, fresh=fresh)
            for J, (name, p) in zip(self.tensors, self.named, strict=True)
            if J is not None
        ]

    def keep(self, sinks: list[Sink]) -> None:
        """J is what these sinks hold."""
        rows = iter(sinks)
        self.tensors[:] = [next(rows).rows if p.requires_grad else None for _, p in self.named]

    def _empty(self, p: Tensor) -> Tensor:
        return torch.empty((self.k, *p.shape), dtype=self._type(p), device=p.device)

    def nbytes(self) -> int:
        return sum(self.k * p.numel() * self._type(p).itemsize for _, p in self.named if p.requires_grad)

    def _type(self, p: Tensor) -> torch.dtype:
        return p.dtype if self.dtype is None else self.dtype
