"""The gradient of every cluster's loss, from one batch.

Samples of different clusters share no arithmetic except the parameters, so the K gradients of a batch cost the FLOPs of
one forward and one backward: each sample is still visited once. The ``split`` route runs the network on the K slices of
the batch in turn. It works with any network and loss whose samples are independent, holds the activations of one slice
at a time, and keeps no graph; the price is K times the launches, and K x P numbers for the gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

Route = Literal["split"]
LossFn = Callable[..., Tensor]


class ClusterGradients:
    """K cluster gradients of ``model``, written into one reusable set of buffers.

    Example::

        cg = antdiff.ClusterGradients(model, k=5)
        J = cg.compute(lambda x, noise, t: per_sample_loss(model, x, noise, t), (x, noise, t), cluster)
        weights = ops.pcgrad_weights(ops.gram(J))          # [k]
        ops.combine(weights / 5, J, out=cg.grads())        # p.grad, ready for optimizer.step()

    Args:
        model: a network whose samples are independent of each other (no BatchNorm in training mode).
        k: the number of clusters, at least 1.
        route: ``"split"``: one forward and one backward for each cluster's slice of the batch.
        dtype: of J; default each parameter's own. ``torch.bfloat16`` halves the memory.

    Attributes:
        losses: ``[k]`` detached, after :meth:`compute`: the mean per-sample loss of each cluster (0 where empty).
        counts: int64 ``[k]``, on the losses' device: samples a cluster.

    Raises:
        TypeError, ValueError: a model without trainable parameters, a bad ``k`` or an unknown route.
    """

    def __init__(self, model: nn.Module, k: int, route: Route = "split", *, dtype: torch.dtype | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k must be an int; got {type(k).__name__}.")
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}.")
        if route != "split":
            raise ValueError(f"route must be 'split'; got {route!r}.")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("model must have a parameter that requires grad; got none. Unfreeze one.")
        self.model = model
        self.k = k
        self.route = route
        self.dtype = dtype
        self.losses: Tensor
        self.counts: Tensor
        self._parameters = list(model.parameters())
        self._J: list[Tensor | None] = []

    def compute(
        self, loss_fn: LossFn, batch: Sequence[Any], cluster: Tensor, *, counts: Sequence[int] | None = None
    ) -> list[Tensor | None]:
        """Row i of J is the gradient of the mean of ``loss_fn`` over the samples of cluster i.

        Args:
            loss_fn: ``loss_fn(*slice)`` gives the per-sample losses ``[b]`` of a slice of the batch, b >= 1;
                importance or timestep weights belong inside it.
            batch: what ``loss_fn`` takes. Tensors whose first dimension is B are sliced, in dicts, lists and tuples
                too; everything else is passed as it is. No gradient flows back into the batch.
            cluster: int64 ``[B]``, ids in ``[0, k)``, in any order.
            counts: the number of samples of each cluster as k Python ints, if the rows of the batch are already grouped
                by cluster in ascending order (as :class:`antdiff.StratifiedTimesteps` draws them). Without it the ids
                are sorted and counted, which on CUDA waits for the device.

        Returns:
            J, a list of ``[k, *shape]``, one for each of ``model.parameters()`` (None where frozen). The buffers are
            reused: the next call overwrites them. The parameters' ``.grad`` are left as they were. A parameter that no
            sample of cluster i reaches has a zero row i, and so has every parameter where cluster i is empty.

        Raises:
            TypeError, ValueError: a batch, ids, counts or losses of the wrong kind or shape. J is then undefined.
        """
        order, sizes = self._grouping(cluster, counts)
        B = sum(sizes)
        if order is not None:
            batch = _each(batch, B, lambda x: _leaf(x.index_select(0, order)))
        trainable = [p for p in self._parameters if p.requires_grad]
        rows = self._buffers(trainable)
        before = [p.grad for p in trainable]
        losses: list[Tensor | None] = []
        try:
            start = 0
            for i, size in enumerate(sizes):
                piece = _each(batch, B, partial(_rows, start=start, stop=start + size))
                losses.append(self._one_cluster(loss_fn, piece, size, trainable, [J[i] for J in rows]))
                start += size
        finally:
            for p, grad in zip(trainable, before, strict=True):
                p.grad = grad
        known = next((loss for loss in losses if loss is not None), None)
        zero = cluster.new_zeros((), dtype=torch.float32) if known is None else torch.zeros_like(known)
        self.losses = torch.stack([zero if loss is None else loss for loss in losses])
        self.counts = torch.tensor(sizes, dtype=torch.int64).to(zero.device, non_blocking=True)
        return self._J

    def grads(self) -> list[Tensor | None]:
        """``p.grad`` of each parameter (None where frozen), allocated where missing: the ``out`` of ``combine``."""
        out: list[Tensor | None] = []
        for p in self._parameters:
            if p.requires_grad and p.grad is None:
                p.grad = torch.empty_like(p, memory_format=torch.contiguous_format)
            out.append(p.grad if p.requires_grad else None)
        return out

    def _one_cluster(
        self, loss_fn: LossFn, piece: Sequence[Any], size: int, trainable: list[nn.Parameter], rows: list[Tensor]
    ) -> Tensor | None:
        if size == 0:
            torch._foreach_zero_(rows)
            return None
        # .backward into empty .grad, not autograd.grad: re-entrant checkpointing allows only the former, and autograd
        # hands over its own buffers, so nothing is added up.
        for p in trainable:
            p.grad = None
        per_sample = loss_fn(*piece)
        _check_losses(per_sample, size)
        loss = per_sample.mean()
        loss.backward()  # type: ignore[no-untyped-call]
        reached = [(row, p.grad) for row, p in zip(rows, trainable, strict=True) if p.grad is not None]
        missed = [row for row, p in zip(rows, trainable, strict=True) if p.grad is None]
        if reached:
            torch._foreach_copy_([row for row, _ in reached], [grad for _, grad in reached])
        if missed:
            torch._foreach_zero_(missed)
        return loss.detach().to(torch.promote_types(loss.dtype, torch.float32))

    def _grouping(self, cluster: Tensor, counts: Sequence[int] | None) -> tuple[Tensor | None, list[int]]:
        """The order that groups the batch by cluster (None if it is grouped), and the size of each group."""
        if not isinstance(cluster, Tensor) or cluster.dtype != torch.int64 or cluster.dim() != 1:
            came = f"{cluster.dtype} {list(cluster.shape)}" if isinstance(cluster, Tensor) else type(cluster).__name__
            raise TypeError(f"cluster must be an int64 tensor [B]; got {came}.")
        B = cluster.numel()
        if counts is not None:
            sizes = [int(n) for n in counts]
            if len(sizes) != self.k or min(sizes) < 0 or sum(sizes) != B:
                raise ValueError(f"counts must be k={self.k} sizes >= 0 that add up to B={B}; got {sizes}.")
            return None, sizes
        order = torch.argsort(cluster, stable=True)
        edges = torch.arange(self.k + 1, device=cluster.device)
        bounds = torch.searchsorted(cluster[order].contiguous(), edges).tolist()  # the one wait for the device
        if bounds[0] != 0 or bounds[-1] != B:
            row = int(torch.nonzero((cluster < 0) | (cluster >= self.k))[0])
            raise ValueError(
                f"cluster must be int64 [B] with 0 <= id < k; got id {int(cluster[row])} with k={self.k} at row {row}."
            )
        return order, [stop - start for start, stop in itertools.pairwise(bounds)]

    def _buffers(self, trainable: list[nn.Parameter]) -> list[Tensor]:
        """J's buffers, made once and again only if parameters were frozen, moved or converted since."""
        stale = len(self._J) != len(self._parameters) or any(
            (J is None) == p.requires_grad or (J is not None and (J.device != p.device or J.dtype != self._type(p)))
            for J, p in zip(self._J, self._parameters, strict=True)
        )
        if stale:
            self._J = [
                torch.empty((self.k, *p.shape), dtype=self._type(p), device=p.device) if p.requires_grad else None
                for p in self._parameters
            ]
        return [J for J in self._J if J is not None]

    def _type(self, p: nn.Parameter) -> torch.dtype:
        return p.dtype if self.dtype is None else self.dtype


def _each(value: Any, B: int, f: Callable[[Tensor], Tensor]) -> Any:
    """``f`` on every tensor of a batch whose first dimension is B."""
    if isinstance(value, Tensor):
        return f(value) if value.dim() > 0 and value.shape[0] == B else value
    if isinstance(value, dict):
        return {key: _each(x, B, f) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_each(x, B, f) for x in value)
    return value


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    return _leaf(x[start:stop])


def _leaf(x: Tensor) -> Tensor:
    """A slice that starts a graph of its own, so that one slice's backward cannot free another's."""
    return x.detach().requires_grad_() if x.requires_grad else x


def _check_losses(per_sample: object, size: int) -> None:
    if not isinstance(per_sample, Tensor) or per_sample.shape != (size,):
        came = list(per_sample.shape) if isinstance(per_sample, Tensor) else type(per_sample).__name__
        raise ValueError(
            f"loss_fn must return one loss for each sample, a tensor [{size}] for this slice; got {came}. "
            "Average over the other dimensions, not over the samples."
        )
    if not per_sample.requires_grad:
        raise ValueError("loss_fn must return losses that depend on model's parameters; got a tensor without a graph.")
