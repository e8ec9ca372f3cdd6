"""Cluster gradients of a batch that is spread over ranks. The rows are those of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from antdiff._checks import describe
from antdiff.distributed.chunks import Counts
from antdiff.distributed.exchange import Exchange
from antdiff.distributed.ranks import Ranks, Work, refuse_nonfinite, wait
from antdiff.distributed.schemes import Scheme, choose
from antdiff.distributed.shards import Shards
from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.jacobian import check_direction, current, unscaled
from antdiff.gradients.local import LocalGradients
from antdiff.gradients.parameters import finish_grads
from antdiff.gradients.routes import LossFn, Route, Scaler, loss_scale, refuse_batch_norm
from antdiff.gradients.stream import stream
from antdiff.ops import _mixed as mixed
from antdiff.ops import precision_of, with_precision


class RankedGradients:
    """The engine of :class:`antdiff.ClusterGradients` on several ranks, or under FSDP2.

    Args:
        local: computes the rows of this rank's batch.
        ranks: the ranks, whose batches are the parts of the whole batch.
        shards: the parameters under FSDP2, else None.
        wrapper: the DistributedDataParallel wrapper, whose own reduction is switched off, or None.
        route, scheme, dtype, nonfinite: see :class:`antdiff.ClusterGradients`.
    """

    def __init__(
        self,
        local: LocalGradients,
        ranks: Ranks,
        shards: list[nn.Parameter] | None,
        wrapper: nn.parallel.DistributedDataParallel | None,
        route: Route,
        scheme: Scheme,
        dtype: torch.dtype | None,
        nonfinite: Literal["raise", "poison"],
    ) -> None:
        self.local, self.ranks, self.shards, self.wrapper = local, ranks, shards, wrapper
        self.k, self.route, self.scheme, self.dtype, self.nonfinite = local.k, route, scheme, dtype, nonfinite
        self.latest = local.latest  # one for both engines: a call of either reuses the rows of this process
        self.reached: set[int] = set()  # ids of the parameters that a sample of this rank has reached in this step
        self._exchanges: dict[type[Exchange], Exchange] = {}
        self._chosen: tuple[type[Exchange], str] | None = None
        self._finite: Tensor | None = None  # bool [R] on the device, False for a rank that had a non-finite loss

    # ---- rows ----------------------------------------------------------------------------------------------------

    def jacobian(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        counts: Sequence[int] | Counts | None,
        scaler: Scaler | None,
    ) -> RankedJacobian:
        own_counts = rank_counts(counts, self.ranks, self.k)
        all_counts: Counts | None = None if own_counts is counts else counts  # type: ignore[assignment]
        clustered, batch = ClusteredBatch.of(cluster, self.k, own_counts).sort(batch)
        scale = loss_scale(scaler, cluster.device)
        exchange = self.exchange_for(all_counts)
        self.latest.revoke()
        total, work = self.count(clustered.counts, all_counts)
        exchange.begin(all_counts)
        if self.route == "split":
            refuse_batch_norm("split", self.local.network.model)
            first = next((i for i, n in enumerate(clustered.sizes) if n), 0)

            def factor(i: int) -> Tensor:
                if i == first:  # not earlier: the first forward runs while the counts are summed
                    wait(work, "the sum of counts")
                return scale / total[i].clamp(min=1)

            self.reached = set()
            sums = stream(loss_fn, batch, clustered, factor, exchange, self.unsynchronised, self.reached)
            if clustered.B == 0:
                wait(work, "the sum of counts")
        else:
            with self.unsynchronised():
                sums = self.local.run(loss_fn, batch, clustered, scale, mean=True, fresh=True)
            self.reached = self.local.store.reached()
            wait(work, "the sum of counts")
            self.send(exchange, self.local.store.tensors, clustered.counts / total.clamp(min=1))
        return self.finish(exchange, sums.double(), total, scale)

    def finish(self, exchange: Exchange, sums: Tensor, total: Tensor, scale: Tensor | float) -> RankedJacobian:
        """Wait for the rows, and sum the Gram matrix and the losses over the ranks in one all-reduce.

        Args:
            sums: the sums of this rank's losses, float64 ``[k]``.
            total: the samples of each cluster over all ranks, float64 ``[k]``.
            scale: the loss scale.
        """
        k, J = self.k, exchange.finish()
        disjoint = exchange.sharded
        G = mixed.gram(J)
        part = (G / exchange.replicas).flatten() if disjoint else G.new_zeros(0)
        reached = [float(id(p) in self.reached) for p in exchange.params]
        # A list of host numbers has to be copied to the device, so ones are made there.
        flags = G.new_ones(len(reached)) if all(reached) else torch.tensor(reached, dtype=G.dtype, device=G.device)
        message = torch.cat([part, sums.to(G.device), flags])
        summed, finite = self.ranks.total(message, sums.isfinite().all())
        summed, flags = summed.split([len(part) + k, len(reached)])
        if disjoint:
            G = with_precision(summed[: k * k].view(k, k), precision_of(G))
        counts = total.to(G.device, torch.int64)
        losses = (summed[-k:] / counts.clamp(min=1)).to(torch.promote_types(self.row_dtype(), torch.float32))
        self._finite = finite if self._finite is None else self._finite & finite
        if self.nonfinite == "raise" and G.device.type == "cpu":
            self.check(G)
        model = self.local.network.model
        missed = None if all(reached) else flags == 0
        return self.latest.set(RankedJacobian(model, exchange, unscaled(G, scale), losses, counts, scale, missed))

    def send(self, exchange: Exchange, rows: Sequence[Tensor | None], factors: Tensor) -> None:
        """Send the rows of this rank, row i times ``factors[i]``."""
        trainable = [x for x in rows if x is not None]
        for i in range(self.k):
            exchange.write(i, [x[i] for x in trainable], factors[i])

    # ---- parameters, checks and memory ---------------------------------------------------------------------------

    @contextmanager
    def unsynchronised(self) -> Iterator[None]:
        """Let DistributedDataParallel reduce no gradients and broadcast no buffers inside the with block."""
        wrapper = self.wrapper
        if wrapper is None:
            yield
            return
        before = wrapper.require_forward_param_sync
        wrapper.require_forward_param_sync = False  # a rank without samples of a cluster would miss the broadcast
        try:
            with wrapper.no_sync():
                yield
        finally:
            wrapper.require_forward_param_sync = before

    @property
    def params(self) -> list[nn.Parameter]:
        """The trainable parameters. Under FSDP2 these are the shards, also while the model has gathered parameters."""
        params = self.local.network.model.parameters() if self.shards is None else self.shards
        return [p for p in params if p.requires_grad]

    def check(self, result: Tensor | None = None) -> None:
        """Raise if a rank had a non-finite loss since the last check, or if ``result`` is not finite."""
        finite, self._finite = self._finite, None
        if finite is not None:
            refuse_nonfinite(finite, finite.double() if result is None else result)

    def explain(self) -> str:
        if self._chosen is None:
            return f"scheme {self.scheme!r}, which is chosen at the first call"
        size = f"rows and buffers hold {self.nbytes() / 2**20:.1f} MiB on this rank"
        return f"{self._chosen[1]}; {self.local.explain_route()}; {size}"

    def nbytes(self) -> int:
        """Return the memory of rows, buffers and ``p.grad`` on this rank in bytes, 0 before the first call."""
        if self._chosen is None:
            return 0
        local = sum(x.nbytes for x in self.local.store.tensors if x is not None)  # none with route split
        return self.current_exchange().nbytes() + local

    def row_dtype(self) -> torch.dtype:
        return self.dtype or reduce(torch.promote_types, {p.dtype for p in self.params})

    def current_exchange(self) -> Exchange:
        """Return the exchange of the last call."""
        assert self._chosen is not None
        return self._exchanges[self._chosen[0]]

    # ---- counts and exchanges ------------------------------------------------------------------------------------

    def count(self, counts: Tensor, all_counts: Counts | None) -> tuple[Tensor, Work]:
        """Return the samples of each cluster over all ranks, float64 ``[k]``, valid once the work is done."""
        if all_counts is not None:
            return torch.tensor(all_counts, dtype=torch.float64).sum(0).to(counts.device), None
        total = counts.double()
        return total, self.ranks.all_reduce(total) if self.ranks.size > 1 else None

    def exchange_for(self, counts: Counts | None) -> Exchange:
        """Return the exchange of the scheme, made again if a parameter was frozen, moved, cast or replaced."""
        params, dtype = self.params, self.row_dtype()
        if self.shards is not None:
            self._chosen = Shards, "the rows are FSDP2's own shards; K x K numbers are summed over the ranks"
        else:
            self._chosen = choose(self.scheme, self.ranks, self.k, sum(p.numel() for p in params), dtype, counts)
        kind = self._chosen[0]
        known = self._exchanges.get(kind)
        if (
            known is None
            or (known.dtype, known.device) != (dtype, params[0].device)
            or len(known.params) != len(params)
            or any(a is not b for a, b in zip(known.params, params, strict=True))
        ):
            self._exchanges[kind] = kind(self.ranks, params, self.k, dtype)
        return self._exchanges[kind]


class RankedJacobian:
    """Rows that are spread over ranks; see :class:`antdiff.gradients.ClusterJacobian`.

    The Gram matrix, the losses and the counts are those of all ranks. They are known already, so :meth:`gram` sends
    nothing. :meth:`combine` gathers the direction, so every rank has to call it.

    Args:
        missed: bool per parameter of the exchange, on the device: no sample of any rank has reached it. None if this
            rank's samples have reached all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        exchange: Exchange,
        gram: Tensor,
        losses: Tensor,
        counts: Tensor,
        loss_scale: Tensor | float,
        missed: Tensor | None,
    ) -> None:
        self.losses, self.counts, self.loss_scale = losses, counts, loss_scale
        self._model, self._gram, self._missed = model, gram, missed
        self._buffers: Exchange | None = exchange

    @property
    def rows(self) -> list[Tensor | None]:
        exchange = current(self._buffers)
        if not exchange.per_parameter:
            raise ValueError(
                "rows are spread over the ranks with this scheme. Use scheme='all_reduce' to hold whole rows."
            )
        each = iter(exchange.J)
        return [next(each) if p.requires_grad else None for p in self._model.parameters()]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in current(self._buffers).J)

    def gram(self) -> Tensor:
        current(self._buffers)
        return self._gram

    def combine(self, weights: Tensor) -> None:
        current(self._buffers).combine(weights)
        self._finish_grads()

    def write(self, direction: Sequence[Tensor | None]) -> None:
        check_direction(self.rows, direction)
        current(self._buffers).set_grads([d for d in direction if d is not None])
        self._finish_grads()

    def _finish_grads(self) -> None:
        params = current(self._buffers).params
        # This waits for the device, and only on a rank with a parameter that its own samples have not reached.
        missed = [] if self._missed is None else self._missed.tolist()
        unreached = [] if all(missed) else [p for p, x in zip(params, missed, strict=True) if x]
        finish_grads(self._model.parameters(), unreached, params)

    def revoke(self) -> None:
        self._buffers = None


def rank_counts(counts: Sequence[int] | Counts | None, ranks: Ranks, k: int) -> Sequence[int] | None:
    """Return this rank's k counts, given k ints for this rank or a list of k ints for each of R ranks."""
    is_row = isinstance(counts, (list, tuple)) or (isinstance(counts, Tensor) and counts.dim() == 1)
    if counts is not None and not is_row:
        raise TypeError(f"counts must be a list of k={k} ints; got {describe(counts)}.")
    if counts is None or not len(counts) or not isinstance(counts[0], Sequence):
        return counts  # type: ignore[return-value]
    if len(counts) != ranks.size:
        raise ValueError(
            f"counts must be k ints for this rank, or a list of k ints for each of the {ranks.size} ranks; "
            f"got {len(counts)} lists. Pass the counts of StratifiedTimesteps.counts(B)."
        )
    lengths = [len(row) for row in counts]  # type: ignore[arg-type]
    if any(n != k for n in lengths):
        raise ValueError(
            f"counts must have k={k} ints for each rank; got lists of {lengths}. "
            "Pass the counts of StratifiedTimesteps.counts(B)."
        )
    return counts[ranks.rank]  # type: ignore[return-value]
