"""Cluster gradients of a batch that is spread over ranks: the rows are those of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from antdiff import ops
from antdiff.distributed.chunks import Counts
from antdiff.distributed.exchange import Exchange
from antdiff.distributed.ranks import Ranks, Work, refuse_nonfinite, wait
from antdiff.distributed.schemes import Scheme, choose
from antdiff.distributed.shards import Shards
from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.jacobian import Latest, current, divide_rows, unscaled
from antdiff.gradients.local import Accumulation, LocalGradients, added, finished, require_open
from antdiff.gradients.routes import LossFn, Scaler, loss_scale, refuse_batch_norm
from antdiff.gradients.stream import stream


class RankedGradients:
    """The engine behind :class:`antdiff.ClusterGradients` on several ranks, or under FSDP2.

    Args:
        local: computes the rows of this rank's batch.
        ranks: the ranks, whose batches make up the whole batch.
        shards: the parameters under FSDP2, else None.
        wrapper: the DistributedDataParallel wrapper, whose own reduction is switched off, or None.
        scheme, dtype, nonfinite: see :class:`antdiff.ClusterGradients`.
    """

    def __init__(
        self,
        local: LocalGradients,
        ranks: Ranks,
        shards: list[nn.Parameter] | None,
        wrapper: nn.parallel.DistributedDataParallel | None,
        scheme: Scheme,
        dtype: torch.dtype | None,
        nonfinite: Literal["raise", "poison"],
    ) -> None:
        self.local, self.ranks, self.shards, self.wrapper = local, ranks, shards, wrapper
        self.k, self.route, self.scheme, self.dtype, self.nonfinite = local.k, local.route, scheme, dtype, nonfinite
        self.latest = Latest()
        self._exchanges: dict[type[Exchange], Exchange] = {}
        self._chosen: tuple[type[Exchange], str] | None = None
        self._sound: Tensor | None = None  # bool [R] on the device, False for a rank that had a non-finite loss

    # ---- rows ----------------------------------------------------------------------------------------------------

    def jacobian(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        counts: Sequence[int] | Counts | None,
        scaler: Scaler | None,
    ) -> RankedJacobian:
        here = counts_here(counts, self.ranks)
        everywhere: Any = None if here is counts else counts
        rows, batch = ClusteredBatch.of(cluster, self.k, here).sort(batch)
        scale = loss_scale(scaler, cluster.device)
        self.latest.revoke()
        total, work = self._count(rows.counts, everywhere)
        exchange = self._exchange(everywhere)
        exchange.begin(everywhere)
        if self.route == "split":
            refuse_batch_norm("split", self.local.network.model)
            first = next((i for i, n in enumerate(rows.sizes) if n), 0)

            def factor(i: int) -> Tensor:
                if i == first:  # wait as late as possible: the first forward has run in the meantime
                    wait(work, "the sum of counts")
                return scale / total[i].clamp(min=1)

            sums = stream(loss_fn, batch, rows, factor, exchange, self.unsynchronised)
            if rows.B == 0:
                wait(work, "the sum of counts")
        else:
            with self.unsynchronised():
                mine = self.local.jacobian(loss_fn, batch, rows.cluster, rows.sizes, scaler)
            wait(work, "the sum of counts")
            self._send(exchange, mine.rows, rows.counts / total.clamp(min=1))
            sums = mine.losses.double() * rows.counts
        return self._finish(exchange, sums, total, scale)

    def accumulation(self) -> Accumulation | ShardedAccumulation:
        return ShardedAccumulation(self) if self.shards is not None else RankedAccumulation(self)

    def _finish(self, exchange: Exchange, sums: Tensor, total: Tensor, scale: Tensor | float) -> RankedJacobian:
        """Wait for the rows, and sum the Gram matrix and the losses over the ranks in one all-reduce."""
        k, J = self.k, exchange.finish()
        disjoint = exchange.sharded
        G = ops.gram(J)
        part = (G / exchange.replicas).flatten() if disjoint else G.new_zeros(0)
        summed, sound = self.ranks.total(torch.cat([part, sums.to(G.device)]), sums.isfinite().all())
        G = summed[: k * k].view(k, k) if disjoint else G
        counts = total.to(G.device, torch.int64)
        losses = (summed[-k:] / counts.clamp(min=1)).to(torch.promote_types(self.row_dtype(), torch.float32))
        self._sound = sound if self._sound is None else self._sound & sound
        if self.nonfinite == "raise" and G.device.type == "cpu":
            self.check(G)
        return self.latest.set(RankedJacobian(self, exchange, unscaled(G, scale), losses, counts, scale))

    def _send(self, exchange: Exchange, J: Sequence[Tensor | None], shares: Tensor) -> None:
        """Send the local means; ``shares [k]`` is this rank's share of each cluster's samples."""
        mine = [x for x in J if x is not None]
        for i in range(self.k):
            exchange.write(i, [x[i] for x in mine], shares[i])

    # ---- what else a step needs ----------------------------------------------------------------------------------

    def unsynchronised(self) -> AbstractContextManager[Any]:
        """Return a context in which DistributedDataParallel reduces no gradients and broadcasts no buffers."""
        if self.wrapper is None:
            return nullcontext()
        self.wrapper.require_forward_param_sync = False  # a rank without samples of a cluster would miss the broadcast
        return self.wrapper.no_sync()

    @property
    def params(self) -> list[nn.Parameter]:
        """The trainable parameters; under FSDP2 the shards, also while the model shows gathered ones."""
        return self.shards or [p for p in self.local.network.model.parameters() if p.requires_grad]

    def check(self, result: Tensor | None = None) -> None:
        sound, self._sound = self._sound, None
        if sound is not None:
            refuse_nonfinite(sound, sound.double() if result is None else result)

    def explain(self) -> str:
        if self._chosen is None:
            return f"scheme {self.scheme!r}, which is settled at the first call"
        size = f"rows and buffers hold {self.current_exchange().nbytes() / 2**20:.1f} MiB on this rank"
        return f"{self._chosen[1]}; {size}; route {self.route!r}"

    def row_dtype(self) -> torch.dtype:
        return self.dtype or reduce(torch.promote_types, {p.dtype for p in self.params})

    def current_exchange(self) -> Exchange:
        assert self._chosen is not None
        return self._exchanges[self._chosen[0]]

    # ---- the parts -----------------------------------------------------------------------------------------------

    def _count(self, mine: Tensor, everywhere: Counts | None) -> tuple[Tensor, Work]:
        """Return the samples of each cluster over all ranks, float64 ``[k]``, valid once the work is done."""
        if everywhere is not None:
            return torch.tensor(everywhere, dtype=torch.float64).sum(0).to(mine.device), None
        total = mine.double().clone()
        return total, self.ranks.all_reduce(total) if self.ranks.size > 1 else None

    def _exchange(self, counts: Counts | None) -> Exchange:
        params, dtype = self.params, self.row_dtype()
        if self.shards is not None:
            self._chosen = Shards, "the rows are FSDP2's own shards; K x K numbers are summed over the ranks"
        else:
            self._chosen = choose(self.scheme, self.ranks, self.k, sum(p.numel() for p in params), dtype, counts)
        kind = self._chosen[0]
        known = self._exchanges.get(kind)
        if (
            known is None
            or known.dtype != dtype
            or len(known.params) != len(params)
            or any(a is not b for a, b in zip(known.params, params, strict=True))
        ):
            self._exchanges[kind] = kind(self.ranks, params, self.k, dtype)
        return self._exchanges[kind]


class RankedJacobian:
    """Rows that are spread over ranks; see :class:`antdiff.gradients.ClusterJacobian`.

    The Gram matrix, the losses and the counts are those of all ranks and are there already, so :meth:`gram` sends
    nothing. :meth:`combine` gathers the direction, so every rank has to call it.
    """

    def __init__(
        self,
        engine: RankedGradients,
        exchange: Exchange,
        gram: Tensor,
        losses: Tensor,
        counts: Tensor,
        loss_scale: Tensor | float,
    ) -> None:
        self.losses, self.counts, self.loss_scale = losses, counts, loss_scale
        self._engine, self._gram = engine, gram
        self._buffers: Exchange | None = exchange

    @property
    def rows(self) -> list[Tensor | None]:
        exchange = current(self._buffers)
        if not exchange.per_parameter:
            raise ValueError(
                "rows are spread over the ranks with this scheme. Use scheme='all_reduce' to hold them whole."
            )
        each = iter(exchange.J)
        return [next(each) if p.requires_grad else None for p in self._engine.local.network.model.parameters()]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in current(self._buffers).J)

    def gram(self) -> Tensor:
        current(self._buffers)
        return self._gram

    def combine(self, weights: Tensor) -> None:
        current(self._buffers).combine(weights)

    def write(self, direction: Sequence[Tensor | None]) -> None:
        exchange = current(self._buffers)
        rows = self.rows
        if len(rows) != len(direction) or any((r is None) != (d is None) for r, d in zip(rows, direction, strict=True)):
            raise ValueError(
                "direction must have a tensor where jacobian.rows has one and None where it has None. "
                "Pass what the method returned for jacobian.rows."
            )
        exchange.set_grads([d for d in direction if d is not None])

    def revoke(self) -> None:
        self._buffers = None


class RankedAccumulation(Accumulation):
    """Micro-batches on several ranks: rows are exchanged once, at the end. Ranks may add different numbers of them."""

    def __init__(self, engine: RankedGradients) -> None:
        super().__init__(engine.local)
        self._ranked = engine

    def add(self, *args: Any, **kwargs: Any) -> None:
        with self._ranked.unsynchronised():
            super().add(*args, **kwargs)

    def finish(self) -> Any:
        engine = self._ranked
        engine.latest.revoke()
        local = super().finish()
        mine = local.counts.double()
        total, work = engine._count(mine, None)
        exchange = engine._exchange(None)
        exchange.begin(None)
        wait(work, "the sum of counts")
        engine._send(exchange, local.rows, mine / total.clamp(min=1))
        self._jacobian = engine._finish(exchange, local.losses.double() * mine, total, local.loss_scale)  # type: ignore[assignment]
        return self._jacobian


class ShardedAccumulation:
    """Micro-batches under FSDP2, whose ranks run in step: each of them has to add as many."""

    def __init__(self, engine: RankedGradients) -> None:
        self._engine = engine
        self._sums: tuple[Tensor, Tensor] | None = None  # losses and counts, float64 [k] each
        self._scale: Tensor | float = 1.0
        self._failed = False
        self._jacobian: RankedJacobian | None = None

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
        rows, batch = ClusteredBatch.of(cluster, engine.k, counts).sort(batch)
        first = self._sums is None
        exchange = engine._exchange(None)
        assert isinstance(exchange, Shards)
        if first:
            self._scale = loss_scale(scaler, cluster.device)
            engine.latest.revoke()
            engine.latest.set(self)
        exchange.fresh = first
        try:
            sums = stream(loss_fn, batch, rows, lambda _: self._scale, exchange, engine.unsynchronised)
        except BaseException:
            self.revoke()
            raise
        finally:
            exchange.fresh = True
        n = rows.counts.double()
        self._sums = (sums, n) if self._sums is None else (self._sums[0] + sums, self._sums[1] + n)

    def revoke(self) -> None:
        self._failed = True

    def finish(self) -> RankedJacobian:
        engine = self._engine
        require_open(self._failed or self._jacobian is not None)
        sums, mine = added(self._sums)
        total, work = engine._count(mine, None)
        wait(work, "the sum of counts")
        exchange = engine._exchange(None)
        divide_rows(exchange.J, total.to(exchange.J[0].dtype))
        self._jacobian = engine._finish(exchange, sums, total, self._scale)
        return self._jacobian

    @property
    def jacobian(self) -> RankedJacobian:
        return finished(self._jacobian)


def counts_here(counts: Sequence[int] | Counts | None, ranks: Ranks) -> Sequence[int] | None:
    """Return this rank's k counts, of k ints for this rank or R lists of k ints."""
    if counts is None or not len(counts) or not isinstance(counts[0], Sequence):
        return counts  # type: ignore[return-value]
    if len(counts) != ranks.size:
        raise ValueError(
            f"counts must be k ints for this rank, or a list of k ints for each of the {ranks.size} ranks; "
            f"got {len(counts)} lists. Pass the counts of StratifiedTimesteps.counts(B)."
        )
    return counts[ranks.rank]  # type: ignore[return-value]
