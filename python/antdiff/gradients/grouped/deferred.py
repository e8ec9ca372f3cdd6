"""The Gram matrix without J, for a J of K x P numbers that does not fit in memory.

The K gradients of a parameter are computed as in route ``grouped``, multiplied with each other, and discarded. The
input of the op and the gradient of its output are kept. Once the weights are known, one product of these two gives the
combined gradient, ``sum_k w_k grad_k``. Weight gradients are therefore computed twice, which makes 4/3 of the FLOPs of
a plain step. Where the K gradients are smaller than these two tensors (biases, layers that see many tokens), the K
gradients are kept instead, at no cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from antdiff.gradients.batch import ClusteredBatch, GroupingError
from antdiff.gradients.grouped.mode import GroupedMode, no_autocast
from antdiff.gradients.grouped.recorder import Write
from antdiff.gradients.parameters import finish_grads
from antdiff.gradients.sinks import Sink, Sinks, unreached
from antdiff.ops import _mixed as mixed


class DeferredGradient(NamedTuple):
    """The arguments for computing the weight gradients of one op again.

    Attributes:
        sinks: the sinks of the gradients, None where a sink keeps its K rows and needs no second computation.
    """

    write: Write
    rows: ClusteredBatch
    sinks: Sinks
    grad: Tensor
    saved: tuple[Tensor, ...]

    def nbytes(self) -> int:
        """Return the memory that is held until :meth:`GramMode.combine`."""
        return sum(x.nbytes for x in (self.grad, *self.saved))


class GramMode(GroupedMode):
    """Record one forward. :meth:`backward` then computes the Gram matrix, and :meth:`combine` the combined gradient.

    Attributes:
        gram: float64 ``[k, k]``. If the losses carry a loss scale, it carries the square of the scale.
    """

    def __init__(self, model: nn.Module, *args: Any) -> None:
        super().__init__(model, *args)
        self.model = model
        k = self.clustered.k
        self.gram = torch.zeros(k, k, dtype=torch.float64, device=self.clustered.cluster.device)
        self._deferred: list[DeferredGradient] = []
        self._uses: dict[Sink, int] = {}  # uses of the forward that the backward has not reached yet
        self._keeps: dict[Sink, bool] = {}  # whether a sink keeps its K rows until combine()
        self._folded: set[Sink] = set()  # sinks whose rows were added to the Gram matrix and discarded
        self._combined = False

    def tap(self, out: Tensor, write: Write, users: Sequence[Tensor | None], *saved: Tensor) -> Tensor:
        self._count(users)
        return super().tap(out, write, users, *saved)

    def leaf(self, x: Tensor, write: Write, user: Tensor) -> Tensor:
        self._count([user])
        return super().leaf(x, write, user)

    def _count(self, users: Sequence[Tensor | None]) -> None:
        """Count the uses of shared tensors in the forward.

        Ops that a checkpoint reruns in the backward are not counted: either they were counted in the forward, or they
        are the only use.
        """
        if not self._in_backward and torch.is_grad_enabled():
            for sink in filter(None, map(self.sink_of, users)):
                self._uses[sink] = self._uses.get(sink, 0) + 1

    def sink(self, x: Tensor) -> Sink:
        known = id(x) in self._sinks
        sink = super().sink(x)
        if not known:  # x is computed from parameters, which get their K rows at the end of the backward
            roots = {id(s.tensor): s for s in self._roots}
            parameters = [roots[id(p)] for p in _parameters_of(x) if id(p) in roots]
            self._refuse_folded(parameters)  # possible if x is first used in the backward of a re-entrant checkpoint
            self._keeps.update((s, True) for s in parameters)
            self._keeps[sink] = True
        return sink

    def _fill(self, write: Write, rows: ClusteredBatch, sinks: Sinks, grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        written = [s for s in sinks if s is not None]
        self._refuse_folded(written)
        write(rows, sinks, grad, *saved)
        deferred = DeferredGradient(write, rows, sinks, grad, saved)
        nbytes = deferred.nbytes()
        for sink in written:
            self._uses[sink] = self._uses.get(sink, 0) - 1
        for sink in dict.fromkeys(written):
            if not self._keeps.setdefault(sink, sink.rows.nbytes <= nbytes) and self._uses[sink] <= 0:
                mixed.add_gram(self.gram, [sink.rows])
                self._folded.add(sink)
                sink.drop()
        open_sinks = [None if s is None or self._keeps[s] else s for s in sinks]
        if any(s is not None for s in open_sinks):
            self._deferred.append(deferred._replace(sinks=open_sinks))

    def _refuse_folded(self, sinks: Iterable[Sink]) -> None:
        names = [s.name for s in sinks if s in self._folded]
        if names:
            raise GroupingError(
                f"{', '.join(names)} is used inside a checkpoint and again elsewhere, so its Gram matrix was computed "
                "too early. Use use_reentrant=False for the checkpoint, or hold='jacobian'."
            )

    def _finish(self) -> None:
        remaining = [s.rows for s in self._roots if not s.fresh and s not in self._folded]
        if remaining:
            mixed.add_gram(self.gram, remaining)

    def combine(self, weights: Tensor) -> None:
        """Write ``sum_k weights_k J_k`` to the ``.grad`` of every parameter, and free all tensors kept for it.

        Args:
            weights: ``[k]``.

        Raises:
            RuntimeError: a second call.
        """
        if self._combined:
            raise RuntimeError(
                "combine() works once, since it frees the tensors that it uses, and it was called a second time. "
                "Compute the cluster gradients again."
            )
        kept: list[tuple[Tensor, Tensor]] = []
        totals: dict[Sink, Sink] = {}
        missed = unreached(self._roots)
        for s in self._roots:
            grad = s.tensor.grad = torch.empty_like(s.tensor, memory_format=torch.contiguous_format)
            if self._keeps.get(s, False) and s.reached:
                kept.append((s.rows, grad))
            else:
                totals[s] = Sink(s.name, s.tensor, 1, grad[None])
        with torch.no_grad(), no_autocast(self.clustered.cluster.device.type):
            if kept:
                mixed.combine(weights, [rows for rows, _ in kept], [grad for _, grad in kept])
            for write, rows, sinks, grad, saved in self._deferred:
                weighted = grad * rows.spread(weights.to(grad.dtype), grad)
                write(
                    rows.derived("one", _one_cluster),
                    [None if s is None else totals[s] for s in sinks],
                    weighted,
                    *saved,
                )
            for total in totals.values():
                total.finish()
        self._deferred.clear()
        for s in self._roots:
            s.drop()
        self._combined = True
        finish_grads(self.model.parameters(), missed)


def _one_cluster(rows: ClusteredBatch) -> ClusteredBatch:
    return ClusteredBatch(torch.zeros_like(rows.cluster), [rows.B], None, rows.lead)


def _parameters_of(x: Tensor) -> Iterator[Tensor]:
    """Yield the leaf tensors that ``x`` was computed from."""
    seen, stack = set(), [x.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                yield node.variable
            stack.extend(f for f, _ in node.next_functions)
