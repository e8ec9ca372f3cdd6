"""K cluster gradients of a batch that is spread over ranks: the rows are those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from antdiff import gradients, ops
from antdiff.distributed.exchange import Counts, Exchange
from antdiff.distributed.ranks import Ranks, Work, refuse_nonfinite, wait
from antdiff.distributed.schemes import Scheme, choose
from antdiff.distributed.shards import Shards, sharded_parameters
from antdiff.distributed.stream import stream
from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.cluster_gradients import Scaler, loss_scale
from antdiff.gradients.routes import LossFn, Route, refuse_batch_norm


class ClusterGradients:
    """:class:`antdiff.ClusterGradients` for a model trained on several ranks, plain, in DistributedDataParallel or
    under FSDP2's ``fully_shard``.

    Example::

        cg = antdiff.distributed.ClusterGradients(model, k=5)
        J = cg.compute(loss_fn, batch, cluster)            # this rank's part of K rows, of the batch of all ranks
        weights = ops.pcgrad_weights(cg.gram(J))           # [k], the same on every rank
        cg.combine(weights, J)                             # p.grad, ready for optimizer.step()

    Row i is the gradient of the mean over the samples of cluster i on all ranks, whatever their numbers, zero included:
    ``p.grad`` is what one process would compute from the whole batch, up to rounding, and needs no further reduction.
    Unlike there, :meth:`gram` and :meth:`combine` take J: its parts on the other ranks belong to both.

    How the rows are summed (``antdiff.distributed.exchange`` describes the schemes):

    - ``"reduce_scatter"``: for any batch. With route ``split`` a row travels while the next one is computed, and a rank
      holds K P / R numbers of J.
    - ``"cluster"``: where each rank holds few clusters, and every rank knows which: ``counts`` must be given for all.
    - ``"all_reduce"``: every rank holds all of J, a list as :class:`antdiff.ClusterGradients` gives it; GradDrop needs
      it.
    - ``"auto"``: the one that :func:`antdiff.distributed.cost_model` expects to be the fastest; :meth:`explain` says
      why.

    Under FSDP2 the rows arrive summed and sharded from FSDP itself, and there is nothing to choose. A process without
    torch.distributed is a group of one.

    Args:
        model: the network, with the same weights on every rank. DistributedDataParallel's own reduction is switched off
            while gradients are computed; ``loss_fn`` may call the wrapped network or the one inside.
        k, separable: see :class:`antdiff.ClusterGradients`.
        route: as there, but ``split`` by default, which needs least memory and overlaps. FSDP2 needs it.
        scheme: see above.
        group: the ranks; default all.
        dtype: of the rows; default the parameters' own (the widest). What is summed over ranks is rounded to it.
        nonfinite: ``"raise"`` a :class:`NonFiniteError` on every rank where a loss or G is not finite; on CUDA, where
            looking would wait for the device, :meth:`check` raises it later. ``"poison"``: never, beside a
            ``GradScaler``.

    Attributes:
        J: as :meth:`compute` returns it.
        losses: ``[k]`` detached: mean per-sample loss of each cluster over all ranks (0 where empty); set by
            :meth:`gram`.
        counts: int64 ``[k]``: samples of each cluster on all ranks; set by :meth:`gram`.
        scale: see :class:`antdiff.ClusterGradients`.

    Raises:
        TypeError, ValueError: as :class:`antdiff.ClusterGradients`; an unknown scheme, or FSDP with another route.
    """

    def __init__(
        self,
        model: nn.Module,
        k: int,
        route: Route = "split",
        *,
        scheme: Scheme = "auto",
        group: dist.ProcessGroup | None = None,
        dtype: torch.dtype | None = None,
        separable: Iterable[Callable[..., Any]] = (),
        nonfinite: Literal["raise", "poison"] = "raise",
    ) -> None:
        if scheme not in get_args(Scheme):
            raise ValueError(f"scheme must be one of {', '.join(map(repr, get_args(Scheme)))}; got {scheme!r}.")
        self._wrapped = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
        self.model: nn.Module = model if self._wrapped is None else self._wrapped.module
        self.ranks = Ranks(group)
        self._shards = sharded_parameters(self.model, self.ranks, route)
        self.local = gradients.ClusterGradients(self.model, k, route, dtype=dtype, separable=separable)
        self.k, self.route, self.scheme, self.dtype, self.nonfinite = k, route, scheme, dtype, nonfinite
        self.J: list[Tensor | None] | list[Tensor] = []
        self.losses: Tensor
        self.counts: Tensor
        self.scale: Tensor | float = 1.0
        self._exchanges: dict[type[Exchange], Exchange] = {}
        self._chosen: tuple[type[Exchange], str] | None = None
        self._sums: Tensor | None = None  # float64 [k], of this rank's losses
        self._total: Tensor | None = None  # float64 [k], samples on all ranks
        self._sound: Tensor | None = None  # bool [R], on the device: nothing unsound was met on these ranks so far
        self._partial: Tensor | None = None  # float64 [k], this rank's counts since the first accumulate

    # ---- rows ----------------------------------------------------------------------------------------------------

    def compute(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        *,
        counts: Sequence[int] | Counts | None = None,
        scaler: Scaler | None = None,
    ) -> list[Any]:
        """J of the batch of all ranks; every rank calls it, each with its own samples.

        Args:
            loss_fn, batch, cluster, scaler: see :meth:`antdiff.ClusterGradients.compute`. A rank may lack clusters, or
                have no sample at all (but for FSDP2, which needs one).
            counts: samples of each cluster on this rank, as there; or on every rank, R lists of k ints, the same on all
                (:meth:`antdiff.distributed.StratifiedTimesteps.counts`): then nothing has to be asked, and the rows of
                empty clusters are not sent.

        Returns:
            This rank's part of the K rows, for :meth:`gram` and :meth:`combine`; which part depends on the scheme.
            Under FSDP2 and ``all_reduce`` a list of ``[k, *shape]``, of the shard or whole; else one matrix ``[k, S]``.

        Raises:
            TypeError, ValueError, GroupingError: as there.
            LostRankError: another rank has died or hangs.
        """
        self.ranks.require_all()
        if self.ranks.size == 1 and not self.is_sharded:
            mine = self.counts_here(counts)
            self.J = self.local.compute(loss_fn, batch, cluster, counts=mine, scaler=scaler)
            self.scale = self.local.scale
            return self.J
        rows, everywhere = self._rows(cluster, counts)
        rows, batch = rows.sort(batch)
        self.scale = loss_scale(scaler, cluster.device)
        total, work = self._count(rows.counts, everywhere)
        exchange = self._exchange(everywhere)
        exchange.begin(everywhere)
        if self.route == "split":

            def factor(i: int) -> Tensor:
                if i == first:  # the first backward needs it, and the first forward has gone by meanwhile
                    wait(work, "the sum of counts")
                return self.scale / total[i].clamp(min=1)

            first = next((i for i, n in enumerate(rows.sizes) if n), 0)
            refuse_batch_norm("split", self.model)
            self._sums = stream(loss_fn, batch, rows, factor, exchange, self.unsynchronised)
            if rows.B == 0:
                wait(work, "the sum of counts")
        else:
            with self.unsynchronised():  # means over this rank's samples, which counts make parts of the global ones
                J = self.local.compute(loss_fn, batch, rows.cluster, counts=rows.sizes, scaler=scaler)
            self.scale = self.local.scale
            wait(work, "the sum of counts")
            self._send(exchange, J, rows.counts / total.clamp(min=1))
            self._sums = self.local.losses.double() * rows.counts
        self._total = total
        return self._finish(exchange)

    def accumulate(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        *,
        counts: Sequence[int] | None = None,
        scaler: Scaler | None = None,
    ) -> None:
        """Adds a micro-batch of this rank; :meth:`mean` ends it, and only there rows are exchanged. Arguments as for
        :meth:`compute`. Ranks may add different numbers of them, but not under FSDP2."""
        self.ranks.require_all()
        if not self.is_sharded:
            with self.unsynchronised():
                self.local.accumulate(loss_fn, batch, cluster, counts=counts, scaler=scaler)
            return
        rows, batch = ClusteredBatch.of(cluster, self.k, counts).sort(batch)
        first = self._partial is None
        exchange = self._exchange(None)
        assert isinstance(exchange, Shards)
        exchange.fresh = first
        if first:
            self.scale = loss_scale(scaler, cluster.device)
        try:
            sums = stream(loss_fn, batch, rows, lambda _: self.scale, exchange, self.unsynchronised)
        except BaseException:
            self._partial = None
            raise
        finally:
            exchange.fresh = True
        self._sums = sums if first or self._sums is None else self._sums + sums
        self._partial = rows.counts.double() if self._partial is None else self._partial + rows.counts

    def mean(self) -> list[Any]:
        """J of all micro-batches of all ranks since the last call, as :meth:`compute` returns it.

        Raises:
            RuntimeError: nothing was accumulated.
        """
        if not self.is_sharded:
            J = self.local.mean()
            self.scale = self.local.scale
            if self.ranks.size == 1:
                self.J = J
                return self.J
            mine = self.local.counts.double()
            self._sums = self.local.losses.double() * mine
            self._total, work = self._count(mine, None)
            exchange = self._exchange(None)
            exchange.begin(None)
            wait(work, "the sum of counts")
            self._send(exchange, J, mine / self._total.clamp(min=1))
            return self._finish(exchange)
        if self._partial is None:
            raise RuntimeError("mean() ends accumulate(); call accumulate(loss_fn, batch, cluster) first.")
        self._total, work = self._count(self._partial, None)
        self._partial = None
        wait(work, "the sum of counts")
        exchange = self._exchange(None)
        for rows in exchange.J:
            rows.div_(self._total.clamp(min=1).to(rows.dtype).view(self.k, *[1] * (rows.dim() - 1)))
        return self._finish(exchange)

    # ---- what is done with them ----------------------------------------------------------------------------------

    @torch.no_grad()
    def gram(self, J: Sequence[Any]) -> Tensor:
        """G float64 ``[k, k]`` of the global rows, the same bits on every rank; sets :attr:`losses`.

        One all-reduce of K x K + K + R numbers, which also says who holds a NaN.

        Raises:
            NonFiniteError: naming the ranks whose losses are not finite; see ``nonfinite``.
            LostRankError: another rank has died or hangs.
        """
        self._own(J)
        if self.ranks.size == 1 and not self.is_sharded:
            self.losses, self.counts = self.local.losses, self.local.counts
            return ops.gram(list(J))
        assert self._sums is not None
        assert self._total is not None
        k, exchange = self.k, self._current()
        split = exchange.sharded
        G = ops.gram(list(J))
        part = (G / exchange.replicas).flatten() if split else G.new_zeros(0)
        total, sound = self.ranks.total(torch.cat([part, self._sums.to(G.device)]), self._sums.isfinite().all())
        G = total[: k * k].view(k, k) if split else G
        self.counts = self._total.to(G.device, torch.int64)
        losses = total[-k:] / self.counts.clamp(min=1)
        self.losses = losses.to(torch.promote_types(self._dtype(), torch.float32))
        self._sound = sound if self._sound is None else self._sound & sound
        if self.nonfinite == "raise" and G.device.type == "cpu":
            self.check(G)
        return G

    def combine(self, weights: Tensor, J: Sequence[Any]) -> None:
        """``p.grad = weights^T J`` of every parameter, for float ``weights [k]``, the same on every rank.

        The gradients of a step may be views of one buffer, which the next step overwrites.
        """
        self._own(J)
        if self.ranks.size == 1 and not self.is_sharded:
            ops.combine(weights, list(J), out=self.local.grads())
        else:
            self._current().combine(weights)

    def check(self, result: Tensor | None = None) -> None:
        """Raises what :meth:`gram` met since the last call, and forgets it; on CUDA it waits for the device.

        Raises:
            NonFiniteError: naming the ranks.
        """
        sound, self._sound = self._sound, None
        if sound is not None:
            refuse_nonfinite(sound, sound.double() if result is None else result)

    def explain(self) -> str:
        """The scheme, why it was chosen, what it sends, and the memory of rows and buffers on this rank."""
        if self.ranks.size == 1 and not self.is_sharded:
            return f"one process; {self.local.explain()}"
        if self._chosen is None:
            return f"scheme {self.scheme!r}, which is settled at the first compute()"
        size = f"rows and buffers hold {self.nbytes() / 2**20:.1f} MiB on this rank"
        return f"{self._chosen[1]}; {size}; route {self.route!r}"

    def nbytes(self) -> int:
        """Memory of J, what is in flight, and p.grad on this rank, after a compute()."""
        return self._current().nbytes()

    # ---- the parts -----------------------------------------------------------------------------------------------

    def unsynchronised(self) -> AbstractContextManager[Any]:
        """While open, DistributedDataParallel reduces no gradients and broadcasts no buffers."""
        if self._wrapped is None:
            return nullcontext()
        self._wrapped.require_forward_param_sync = False  # a rank that lacks a cluster would miss the broadcast
        return self._wrapped.no_sync()

    def _send(self, exchange: Exchange, J: list[Tensor | None], shares: Tensor) -> None:
        """The local means as parts of the global ones; shares [k]: this rank's of each cluster's samples."""
        mine = [x for x in J if x is not None]
        for i in range(self.k):
            exchange.write(i, [x[i] for x in mine], shares[i])

    @property
    def is_sharded(self) -> bool:
        """Whether the parameters are FSDP2's shards."""
        return self._shards is not None

    @property
    def params(self) -> list[nn.Parameter]:
        """The trainable parameters; under FSDP2 the shards, also while the model shows gathered ones."""
        return self._shards or [p for p in self.model.parameters() if p.requires_grad]

    def _rows(self, cluster: Tensor, counts: Sequence[int] | Counts | None) -> tuple[ClusteredBatch, Counts | None]:
        """This rank's rows, and the counts of all ranks where they are known."""
        here = self.counts_here(counts)
        everywhere: Any = None if here is counts else counts
        return ClusteredBatch.of(cluster, self.k, here), everywhere

    def counts_here(self, counts: Sequence[int] | Counts | None) -> Sequence[int] | None:
        """This rank's k counts of those that were given."""
        if counts is None or not len(counts) or not isinstance(counts[0], Sequence):
            return counts  # type: ignore[return-value]
        if len(counts) != self.ranks.size:
            raise ValueError(
                f"counts must be k ints for this rank, or a list of k ints for each of the {self.ranks.size} ranks; "
                f"got {len(counts)} lists."
            )
        return counts[self.ranks.rank]  # type: ignore[return-value]

    def _count(self, mine: Tensor, everywhere: Counts | None) -> tuple[Tensor, Work]:
        """Samples of each cluster on all ranks, float64 [k], once the work is done."""
        if everywhere is not None:
            return torch.tensor(everywhere, dtype=torch.float64).sum(0).to(mine.device), None
        total = mine.double().clone()
        return total, self.ranks.all_reduce(total) if self.ranks.size > 1 else None

    def _exchange(self, counts: Counts | None) -> Exchange:
        params, dtype = self.params, self._dtype()
        if self.is_sharded:
            self._chosen = Shards, "rows are FSDP's own shards; K x K numbers are summed"
        else:
            self._chosen = choose(self.scheme, self.ranks, self.k, sum(p.numel() for p in params), dtype, counts)
        kind = self._chosen[0]
        known = self._exchanges.get(kind)
        stale = (
            known is None
            or known.dtype != dtype
            or len(known.params) != len(params)
            or any(a is not b for a, b in zip(known.params, params, strict=True))
        )
        if stale:
            self._exchanges[kind] = kind(self.ranks, params, self.k, dtype)
        return self._exchanges[kind]

    def _current(self) -> Exchange:
        assert self._chosen is not None
        return self._exchanges[self._chosen[0]]

    def _finish(self, exchange: Exchange) -> list[Any]:
        """J, complete: with None where a parameter is frozen, if it has an entry for each."""
        rows = exchange.finish()
        each = iter(rows)
        self.J = (
            [next(each) if p.requires_grad else None for p in self.model.parameters()]
            if exchange.per_parameter
            else rows
        )
        return self.J

    def _dtype(self) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        return reduce(torch.promote_types, {p.dtype for p in self.params})

    def _own(self, J: Sequence[Any]) -> None:
        if J is not self.J:
            raise ValueError(
                "J must be what compute() or mean() returned last; other gradients are not summed over ranks."
            )
