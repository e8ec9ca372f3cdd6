"""Cluster gradients of this process's batch: the routes, the choice of ``auto``, and the buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from antdiff.gradients import routes
from antdiff.gradients import verify as checks
from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.grouped.compiled import compiler_of
from antdiff.gradients.grouped.deferred import GramMode
from antdiff.gradients.grouped.mode import GroupedMode
from antdiff.gradients.jacobian import DeferredJacobian, HeldJacobian, Latest, divide_rows, mean_losses
from antdiff.gradients.routes import Chosen, LossFn, Network, Route, Scaler, loss_scale
from antdiff.gradients.sinks import GradientStore, Sink


class LocalGradients:
    """The engine behind :class:`antdiff.ClusterGradients` in one process; several ranks use it for their own batches.

    Args:
        network: the model and how its routes run it.
        k, route, dtype: see :class:`antdiff.ClusterGradients`.
    """

    def __init__(self, network: Network, k: int, route: Route, dtype: torch.dtype | None) -> None:
        self.network, self.k, self.route = network, k, route
        self.store = GradientStore(network.model, k, dtype)
        self.latest = Latest()
        self.choice: tuple[Chosen, str] | None = None if route == "auto" else (route, "asked for")

    def jacobian(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        counts: Sequence[int] | None,
        scaler: Scaler | None,
    ) -> HeldJacobian:
        rows = ClusteredBatch.of(cluster, self.k, counts)
        scale = loss_scale(scaler, cluster.device)
        self.latest.revoke()
        sums = self.run(loss_fn, batch, rows, scale, mean=True, fresh=True)
        return self.latest.set(HeldJacobian(self.store, *mean_losses(sums, rows.counts), scale))

    def deferred(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        counts: Sequence[int] | None,
        scaler: Scaler | None,
    ) -> DeferredJacobian:
        rows, batch = ClusteredBatch.of(cluster, self.k, counts).sort(batch)
        scale = loss_scale(scaler, cluster.device)
        self.latest.revoke()
        route = "grouped" if rows.B == 0 else self.settled(loss_fn, batch, rows)
        if route != "grouped" or self.network.compiled is not None:
            raise ValueError(
                f"hold='gram' needs the grouped route in eager mode; use hold='jacobian'. {self.explain()}"
            )
        sinks = [Sink(name, p, self.k) for name, p in self.store.named if p.requires_grad]
        mode = GramMode(self.network.model, rows, sinks, self.network.separable)
        sums = rows.cluster.new_zeros(self.k, dtype=torch.float32)
        if rows.B:
            sums = routes.run(route, self.network, loss_fn, batch, rows, sinks, scale=scale, mode=mode)
        return self.latest.set(DeferredJacobian(mode, *mean_losses(sums, rows.counts), scale))

    def run(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        rows: ClusteredBatch,
        scale: Tensor | float,
        *,
        mean: bool,
        fresh: bool,
    ) -> Tensor:
        """Write the gradients of the clusters' mean or summed losses times ``scale`` into the store, or add them to it.

        Returns:
            The sums of the losses ``[k]``.
        """
        if rows.B == 0:
            sinks = self.store.sinks(fresh=fresh)
            for sink in sinks:
                sink.finish()
            self.store.keep(sinks)
            return rows.cluster.new_zeros(self.k, dtype=torch.float32)
        rows, batch = rows.sort(batch)
        route = self.settled(loss_fn, batch, rows)
        self.store.reuse = route != "grouped" or self.network.compiled is None
        sinks = self.store.sinks(fresh=fresh)
        sums = routes.run(route, self.network, loss_fn, batch, rows, sinks, mean=mean, scale=scale)
        self.store.keep(sinks)
        return sums

    def settled(self, loss_fn: LossFn, batch: Sequence[Any], rows: ClusteredBatch) -> Chosen:
        """Return the route; ``auto`` chooses it at the first call, from a batch sorted by cluster."""
        net = self.network
        if net.compiled is None and hasattr(loss_fn, "_torchdynamo_orig_callable"):
            net.compiled = compiler_of(net.model, {}, net.separable)
        if self.choice is None:
            self.choice = checks.choose(net, loss_fn, batch, rows)
        return self.choice[0]

    def verify(self, loss_fn: LossFn, batch: Sequence[Any], cluster: Tensor, counts: Sequence[int] | None) -> float:
        rows, batch = ClusteredBatch.of(cluster, self.k, counts).sort(batch)
        return checks.verify(self.settled(loss_fn, batch, rows), self.network, loss_fn, batch, rows)

    @contextmanager
    def record(self, cluster: Tensor, counts: Sequence[int] | None, scaler: Scaler | None) -> Iterator[Recording]:
        name: Chosen = self.choice[0] if self.choice else "grouped"
        if name == "split":
            raise ValueError(
                "record() needs a route that runs the forward once, and 'split' runs it slice by slice. "
                f"Call cluster_gradients(loss_fn, batch, cluster). {self.explain()}"
            )
        if name == "grouped" and self.network.compiled is not None:
            raise ValueError(
                "record() cannot see inside a compiled forward. Call cluster_gradients(loss_fn, batch, cluster), which "
                "traces loss_fn together with the rules of the grouped route."
            )
        rows = ClusteredBatch.of(cluster, self.k, counts)
        scale = loss_scale(scaler, cluster.device)
        routes.refuse_batch_norm(name, self.network.model)
        self.latest.revoke()
        sinks = self.store.sinks(fresh=True)
        mode = GroupedMode(self.network.model, rows, sinks, self.network.separable) if name == "grouped" else None
        before = [s.tensor.grad for s in sinks]
        recording = Recording(self, rows, sinks, mode, scale)
        try:
            if mode is None:
                yield recording
            else:
                with mode:
                    yield recording
            if recording.jacobian is None:
                raise ValueError(
                    "record() must be followed by one recording.backward(losses) inside its with block; none was "
                    "called. Call it there, or leave record() out."
                )
        finally:
            recording.closed = True
            for sink, grad in zip(sinks, before, strict=True):
                sink.tensor.grad = grad

    def explain(self) -> str:
        size = f"the rows hold {self.store.nbytes() / 2**20:.1f} MiB"
        if self.choice is None:
            return f"route 'auto', which chooses at the first call; {size}"
        name, why = self.choice
        return f"route {name!r}: {why}; {size}"


J = TypeVar("J")


class Recording:
    """A forward that :meth:`antdiff.ClusterGradients.record` watches.

    Attributes:
        jacobian: the result of :meth:`backward`, or None before it.
    """

    def __init__(
        self,
        engine: LocalGradients,
        rows: ClusteredBatch,
        sinks: list[Sink],
        mode: GroupedMode | None,
        scale: Tensor | float,
    ) -> None:
        self.jacobian: HeldJacobian | None = None
        self.closed = False
        self._engine, self._rows, self._sinks, self._mode, self._scale = engine, rows, sinks, mode, scale

    def backward(self, per_sample: Tensor) -> HeldJacobian:
        """Take the cluster gradients of the losses ``[B]``, in the order of ``cluster``. Frees the graph.

        Raises:
            ValueError: the losses have another shape, or this is not the first call inside the with block.
            GroupingError: as for :meth:`antdiff.ClusterGradients.__call__`.
        """
        if self.closed:
            raise ValueError(
                "recording.backward(losses) must be called once, inside the with block of record(). "
                "Open a new recording for another batch."
            )
        self.closed = True
        engine, rows = self._engine, self._rows
        with torch._C.DisableTorchFunction():
            sums = routes.backward(per_sample, rows, self._sinks, self._mode, scale=self._scale)
        self.jacobian = engine.latest.set(HeldJacobian(engine.store, *mean_losses(sums, rows.counts), self._scale))
        return self.jacobian


class Accumulation:
    """Sums of gradients, losses and counts over micro-batches; see :meth:`antdiff.ClusterGradients.accumulate`."""

    def __init__(self, engine: LocalGradients) -> None:
        self._engine = engine
        self._sums: tuple[Tensor, Tensor] | None = None  # losses and counts, [k] each
        self._scale: Tensor | float = 1.0
        self._failed = False
        self._jacobian: HeldJacobian | None = None

    def add(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        *,
        counts: Sequence[int] | None = None,
        scaler: Scaler | None = None,
    ) -> None:
        engine = self._engine
        require_open(self._failed or self._jacobian is not None)
        rows = ClusteredBatch.of(cluster, engine.k, counts)
        first = self._sums is None
        if first:
            self._scale = loss_scale(scaler, cluster.device)
            engine.latest.revoke()
            engine.latest.set(self)
        try:
            sums = engine.run(loss_fn, batch, rows, self._scale, mean=False, fresh=first)
        except BaseException:
            self.revoke()  # the rows hold a part of this micro-batch
            raise
        self._sums = (sums, rows.counts) if self._sums is None else (self._sums[0] + sums, self._sums[1] + rows.counts)

    def revoke(self) -> None:
        self._failed = True

    def finish(self) -> HeldJacobian:
        require_open(self._failed or self._jacobian is not None)
        sums, counts = added(self._sums)
        engine = self._engine
        divide_rows(engine.store.tensors, counts)
        self._jacobian = engine.latest.set(HeldJacobian(engine.store, *mean_losses(sums, counts), self._scale))
        return self._jacobian

    @property
    def jacobian(self) -> HeldJacobian:
        """The rows of all micro-batches, once the with block has ended."""
        return finished(self._jacobian)


def require_open(ended: bool) -> None:
    if ended:
        raise RuntimeError(
            "this accumulation has ended: its with block is over, a micro-batch raised an error, or another call has "
            "reused its buffers. Start a new one with accumulate()."
        )


def added(sums: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    if sums is None:
        raise ValueError(
            "accumulate() must be given at least one micro-batch, which may be empty; got none. "
            "Call add(loss_fn, batch, cluster) inside the with block."
        )
    return sums


def finished(jacobian: J | None) -> J:
    if jacobian is None:
        raise RuntimeError(
            "jacobian is there once the with block of accumulate() has ended without an error. Read it after the block."
        )
    return jacobian
