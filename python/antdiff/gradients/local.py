"""Cluster gradients of the batch of this process: the routes, the choice of ``auto``, and the buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _pop_mode_temporarily

from antdiff.gradients import routes
from antdiff.gradients import verify as checks
from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.checked import CheckedRoutes, Layouts
from antdiff.gradients.grouped.deferred import GramMode
from antdiff.gradients.grouped.mode import GroupedMode
from antdiff.gradients.jacobian import DeferredJacobian, HeldJacobian, Latest, mean_losses
from antdiff.gradients.parameters import without_hooks
from antdiff.gradients.routes import Chosen, LossFn, Network, Route, Scaler, loss_scale
from antdiff.gradients.samples import Samples
from antdiff.gradients.sinks import GradientStore, Sink


class LocalGradients:
    """The engine of :class:`antdiff.ClusterGradients` in one process. Several ranks use it for their own batches.

    Args:
        network: the model and how its routes run it.
        k, route, dtype: see :class:`antdiff.ClusterGradients`.
        held: whether rows are held in memory (``hold="jacobian"``).
        why: the reason for ``route``, for :meth:`explain`.
    """

    def __init__(
        self,
        network: Network,
        k: int,
        route: Route,
        dtype: torch.dtype | None,
        *,
        held: bool,
        why: str,
        audit: int | None,
    ) -> None:
        self.network, self.k, self.held = network, k, held
        self.store = GradientStore(network.model, k, dtype)
        self.latest = Latest()
        self.checked = CheckedRoutes(network, None if route == "auto" else (route, why), audit)

    def jacobian(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        counts: Sequence[int] | None,
        scaler: Scaler | None,
    ) -> HeldJacobian:
        clustered = ClusteredBatch.of(cluster, self.k, counts)
        scale = loss_scale(scaler, cluster.device)
        self.latest.revoke()
        sums = self.run(loss_fn, batch, clustered, scale, mean=True, fresh=True)
        return self.latest.set(HeldJacobian(self.store, *mean_losses(sums, clustered.counts), scale))

    def deferred(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        counts: Sequence[int] | None,
        scaler: Scaler | None,
    ) -> DeferredJacobian:
        clustered, batch = ClusteredBatch.of(cluster, self.k, counts).sort(batch)
        scale = loss_scale(scaler, cluster.device)
        self.latest.revoke()
        route = "grouped" if clustered.B == 0 else self.checked.settle_deferred(loss_fn, batch, clustered)
        if route != "grouped" or self.network.compiled is not None:
            raise ValueError(
                f"hold='gram' needs the grouped route in eager mode; use hold='jacobian'. {self.explain()}"
            )
        named = self.network.model.named_parameters()
        trained = [(name, p) for name, p in named if p.requires_grad]
        samples = list(Samples.of(batch, clustered.B).tensors())

        def make_mode(layouts: Layouts) -> GramMode:
            sinks = [Sink(name, p, self.k, dtype=self.store.dtype) for name, p in trained]
            return GramMode(self.network.model, clustered, sinks, self.network.separable, None, samples, None, layouts)

        if clustered.B:
            mode, sums = self.checked.run_deferred(make_mode, loss_fn, batch, clustered, scale)
        else:
            mode, sums = make_mode(None), clustered.cluster.new_zeros(self.k, dtype=torch.float32)
        return self.latest.set(DeferredJacobian(mode, *mean_losses(sums, clustered.counts), scale))

    def run(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        clustered: ClusteredBatch,
        scale: Tensor | float,
        *,
        mean: bool,
        fresh: bool,
    ) -> Tensor:
        """Write the gradients of the clusters' mean or summed losses times ``scale`` into the store, or add them to it.

        Returns:
            The sums of the losses ``[k]``.
        """
        if clustered.B == 0:
            sinks = self.store.sinks(fresh=fresh)
            for sink in sinks:
                sink.finish()
            self.store.keep(sinks)
            return clustered.cluster.new_zeros(self.k, dtype=torch.float32)
        clustered, batch = clustered.sort(batch)
        return self.checked.run(self.store, loss_fn, batch, clustered, scale, mean=mean, fresh=fresh)

    def verify(self, loss_fn: LossFn, batch: Sequence[Any], cluster: Tensor, counts: Sequence[int] | None) -> float:
        clustered, batch = ClusteredBatch.of(cluster, self.k, counts).sort(batch)
        if clustered.B == 0:
            raise ValueError("batch must hold a sample for verify(); got none. Pass a batch of the training data.")
        route, locates = self.checked.settle(loss_fn, batch, clustered), self.checked.locates
        return checks.verify(route, self.network, loss_fn, batch, clustered, locates=locates)

    @contextmanager
    def record(self, cluster: Tensor, counts: Sequence[int] | None, scaler: Scaler | None) -> Iterator[Recording]:
        choice = self.checked.choice
        name: Chosen = choice[0] if choice else "grouped"
        if name == "split":
            raise ValueError(
                "record() needs a route that runs the forward once, and 'split' runs it slice by slice. "
                f"Call cluster_gradients(loss_fn, batch, cluster). {self.explain()}"
            )
        if name == "grouped" and self.network.compiled is not None:
            raise ValueError(
                "record() cannot record a compiled forward. Call cluster_gradients(loss_fn, batch, cluster), which "
                "traces loss_fn together with the rules of the grouped route."
            )
        clustered = ClusteredBatch.of(cluster, self.k, counts)
        scale = loss_scale(scaler, cluster.device)
        routes.refuse_batch_norm(name, self.network.model)
        self.latest.revoke()
        sinks = self.store.sinks(fresh=True)
        mode = GroupedMode(self.network.model, clustered, sinks, self.network.separable) if name == "grouped" else None
        before = [s.tensor.grad for s in sinks]
        recording = self.latest.set(Recording(self, clustered, sinks, mode, scale))
        try:
            if mode is None:
                yield recording
            else:
                with mode:
                    yield recording
            if recording.jacobian is None:
                raise ValueError(
                    "record() must be followed by one recording.backward(losses) inside its with block; got none. "
                    "Call it there, or leave record() out."
                )
        finally:
            recording.revoke()
            for sink, grad in zip(sinks, before, strict=True):
                sink.tensor.grad = grad

    def explain(self) -> str:
        size = f"the rows hold {self.store.nbytes() / 2**20:.1f} MiB" if self.held else "the rows are not held"
        return f"{self.explain_route()}; {size}"

    def explain_route(self) -> str:
        if self.checked.choice is None:
            return "route 'auto', which chooses at the first call"
        name, why = self.checked.choice
        return f"route {name!r}: {why}"

    def nbytes(self) -> int:
        """Return the memory of the rows in bytes."""
        return self.store.nbytes() if self.held else 0


class Recording:
    """A forward inside the with block of :meth:`antdiff.ClusterGradients.record`.

    Attributes:
        jacobian: the result of :meth:`backward`, or None before it.
    """

    def __init__(
        self,
        engine: LocalGradients,
        clustered: ClusteredBatch,
        sinks: list[Sink],
        mode: GroupedMode | None,
        scale: Tensor | float,
    ) -> None:
        self.jacobian: HeldJacobian | None = None
        self._closed = False
        self._engine, self._clustered, self._sinks, self._mode, self._scale = engine, clustered, sinks, mode, scale

    def backward(self, per_sample: Tensor) -> HeldJacobian:
        """Compute the cluster gradients of the losses ``[B]``, given in the order of ``cluster``. Frees the graph.

        Raises:
            ValueError: the losses have another shape, this is not the first call inside the with block, or another
                call of the same ClusterGradients has reused the buffers.
            GroupingError: as for :meth:`antdiff.ClusterGradients.__call__`.
        """
        if self._closed:
            raise ValueError(
                "recording.backward(losses) must be called once, inside the with block of record() and before another "
                "call of the same ClusterGradients. Open a new recording."
            )
        self._closed = True
        engine, clustered = self._engine, self._clustered
        # The mode has to be off for this arithmetic, and on for what a checkpoint recomputes in the backward. There the
        # mode enters itself. Disabling torch functions altogether would keep it off there too.
        mode_off = nullcontext() if self._mode is None else _pop_mode_temporarily()
        with mode_off, without_hooks([s.tensor for s in self._sinks]):
            sums = routes.backward(per_sample, clustered, self._sinks, self._mode, scale=self._scale)
        self.jacobian = engine.latest.set(HeldJacobian(engine.store, *mean_losses(sums, clustered.counts), self._scale))
        return self.jacobian

    def revoke(self) -> None:
        """Refuse a backward: the with block is over, or another call is about to reuse the buffers."""
        self._closed = True
