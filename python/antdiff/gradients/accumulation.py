"""Micro-batches: sums of gradients, losses and counts, which become the jacobian of the whole batch at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from antdiff._checks import as_function
from antdiff.distributed.chunks import Counts
from antdiff.distributed.ranks import wait
from antdiff.distributed.shards import Shards
from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.jacobian import ClusterJacobian, HeldJacobian, divide_rows, mean_losses
from antdiff.gradients.ranked import RankedGradients, rank_counts
from antdiff.gradients.routes import LossFn, Scaler, loss_scale
from antdiff.gradients.samples import Samples, with_dims
from antdiff.gradients.stream import stream
from antdiff.gradients.walk import InDims


class Accumulation:
    """Sums over micro-batches in one process; see :meth:`antdiff.ClusterGradients.accumulate`."""

    def __init__(self, engine: RankedGradients) -> None:
        self.engine = engine
        self.scale: Tensor | float = 1.0
        self._sums: tuple[Tensor, Tensor] | None = None  # losses and counts, [k] each
        self._ended = False
        self._jacobian: ClusterJacobian | None = None

    @property
    def jacobian(self) -> ClusterJacobian:
        """The rows of all micro-batches, once the with block has ended."""
        if self._jacobian is None:
            raise RuntimeError(
                "jacobian exists once the with block of accumulate() has ended without an error. "
                "Read it after the block."
            )
        return self._jacobian

    def add(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        *,
        counts: Sequence[int] | Counts | None = None,
        scaler: Scaler | None = None,
        in_dims: InDims = None,
    ) -> None:
        """Add a micro-batch; arguments as for :meth:`antdiff.ClusterGradients.__call__`."""
        self._require_open()
        as_function("loss_fn", loss_fn)
        engine = self.engine
        clustered = ClusteredBatch.of(cluster, engine.k, rank_counts(counts, engine.ranks, engine.k))
        batch = Samples.of(with_dims(batch, in_dims), clustered.B)
        fresh = self._sums is None
        if fresh:
            self.scale = loss_scale(scaler, cluster.device)
            engine.latest.revoke()
            engine.latest.set(self)
        try:
            sums = self.add_rows(loss_fn, batch, clustered, fresh)
        except BaseException:
            self.revoke()  # the rows hold a part of this micro-batch
            raise
        n = clustered.counts
        self._sums = (sums, n) if self._sums is None else (self._sums[0] + sums, self._sums[1] + n)

    def finish(self) -> None:
        """Make the jacobian. No micro-batch can be added afterwards."""
        self._require_open()
        if self._sums is None:
            raise ValueError(
                "accumulate() must be given at least one micro-batch, which may be empty; got none. "
                "Call add(loss_fn, batch, cluster) inside the with block."
            )
        self._jacobian = self.total(*self._sums)
        self._ended = True

    def revoke(self) -> None:
        """Refuse further micro-batches."""
        self._ended = True

    def add_rows(self, loss_fn: LossFn, batch: Sequence[Any], clustered: ClusteredBatch, fresh: bool) -> Tensor:
        """Add the gradients of the summed losses to the rows, or overwrite the rows if ``fresh``.

        Returns:
            The sums of the losses ``[k]``.
        """
        engine = self.engine
        with engine.unsynchronised():
            return engine.local.run(loss_fn, batch, clustered, self.scale, mean=False, fresh=fresh)

    def total(self, sums: Tensor, counts: Tensor) -> ClusterJacobian:
        """Return the jacobian, given the sums of the losses and the counts of all micro-batches, ``[k]`` each."""
        local = self.engine.local
        divide_rows(local.store.tensors, counts)
        return local.latest.set(HeldJacobian(local.store, *mean_losses(sums, counts), self.scale))

    def _require_open(self) -> None:
        if self._ended:
            raise RuntimeError(
                "this accumulation has ended: its with block is over, a micro-batch raised an error, or another call "
                "has reused its buffers. Start a new one with accumulate()."
            )


class RankedAccumulation(Accumulation):
    """Micro-batches on several ranks: rows are exchanged once, at the end. Ranks may add different numbers of them."""

    def __init__(self, engine: RankedGradients) -> None:
        super().__init__(engine)
        if engine.scheme == "cluster":
            raise ValueError(
                "scheme must not be 'cluster' to accumulate, since that scheme needs the counts of all ranks before "
                "the rows. Use scheme='auto'."
            )

    def total(self, sums: Tensor, counts: Tensor) -> ClusterJacobian:
        engine = self.engine
        exchange = engine.exchange_for(None)
        exchange.begin(None)
        total, work = engine.count(counts, None)
        wait(work, "the sum of counts")
        engine.reached = engine.local.store.reached()
        engine.send(exchange, engine.local.store.tensors, 1 / total.clamp(min=1))
        return engine.finish(exchange, sums.double(), total, self.scale)


class ShardedAccumulation(Accumulation):
    """Micro-batches under FSDP2. Its ranks run in lockstep, so each of them has to add the same number."""

    def add_rows(self, loss_fn: LossFn, batch: Sequence[Any], clustered: ClusteredBatch, fresh: bool) -> Tensor:
        engine = self.engine
        exchange = engine.exchange_for(None)
        assert isinstance(exchange, Shards)
        clustered, batch = clustered.sort(batch)
        exchange.fresh = fresh
        if fresh:
            engine.reached = set()
        try:
            return stream(
                loss_fn, batch, clustered, lambda _: self.scale, exchange, engine.unsynchronised, engine.reached
            )
        finally:
            exchange.fresh = True

    def total(self, sums: Tensor, counts: Tensor) -> ClusterJacobian:
        engine = self.engine
        exchange = engine.exchange_for(None)
        total, work = engine.count(counts, None)
        wait(work, "the sum of counts")
        divide_rows(exchange.J, total.to(exchange.J[0].dtype))
        return engine.finish(exchange, sums, total, self.scale)
