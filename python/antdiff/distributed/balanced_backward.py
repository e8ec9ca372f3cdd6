"""The whole backward of a balanced step on several ranks: the last thing before ``optimizer.step()``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import antdiff.gradients
from antdiff import ops
from antdiff.distributed.cluster_gradients import ClusterGradients
from antdiff.distributed.exchange import Counts
from antdiff.distributed.losses import global_losses, reduce_gradients
from antdiff.distributed.ranks import refuse_nonfinite, wait
from antdiff.distributed.schemes import Scheme
from antdiff.gradients.batch import ClusteredBatch, check_losses, cut
from antdiff.gradients.cluster_gradients import Scaler, loss_scale
from antdiff.gradients.routes import LossFn, Route


class BalancedBackward(antdiff.gradients.BalancedBackward):
    """:class:`antdiff.BalancedBackward` on several ranks, in place of ``loss.backward()``.

    Example, the two lines in a loop with DistributedDataParallel or ``fully_shard``::

        backward = antdiff.distributed.BalancedBackward(model, balancing.PCGrad(), k=5)

        losses = backward(loss_fn, batch, cluster)         # was: loss_fn(*batch).mean().backward()
        optimizer.step()

    Every rank gets the same weights, from the Gram matrix of the whole batch, and ends with the same ``p.grad``.
    Nothing is broadcast for it: balancers start alike and see the same numbers, those that draw have generators with
    the same seed. On calls that need no gradients of clusters (loss weightings, and steps between two solutions of a
    method with ``update_every``), p.grad is summed once, as in a plain step.

    Args:
        model, route, scheme, group, dtype, separable: see :class:`antdiff.distributed.ClusterGradients`.
        balancer, k, scaler, micro_batch: see :class:`antdiff.BalancedBackward`. The balancer is made with the same
            settings on every rank. Under FSDP2 with ``micro_batch`` every rank needs as many samples.

    Attributes:
        gradients: the :class:`antdiff.distributed.ClusterGradients`.
        weights, gram: as there.
    """

    gradients: ClusterGradients  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        balancer: Any,
        k: int,
        *,
        route: Route = "split",
        scheme: Scheme = "auto",
        group: dist.ProcessGroup | None = None,
        dtype: torch.dtype | None = None,
        separable: Iterable[Callable[..., Any]] = (),
        scaler: Scaler | None = None,
        micro_batch: int | None = None,
    ) -> None:
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        if scheme == "cluster" and micro_batch is not None:
            raise ValueError(
                "scheme 'cluster' needs the counts of all ranks, which micro-batches do not have; got "
                f"micro_batch={micro_batch}. Leave one of the two out."
            )
        super().__init__(inner, balancer, k, scaler=scaler, micro_batch=micro_batch)
        self.gradients = ClusterGradients(
            model, k, route, scheme=scheme, group=group, dtype=dtype, separable=separable,
            nonfinite="raise" if scaler is None else "poison",
        )  # fmt: skip
        self.group = group

    def __call__(
        self, loss_fn: LossFn, batch: Sequence[Any], cluster: Tensor, *, counts: Sequence[int] | Counts | None = None
    ) -> Tensor:
        """Overwrites ``p.grad`` of every trainable parameter with the direction for the batch of all ranks.

        Args:
            loss_fn, batch, cluster, counts: see :meth:`antdiff.distributed.ClusterGradients.compute`.

        Returns:
            The mean per-sample loss of each cluster over all ranks ``[k]``, detached (0 where a cluster is empty).

        Raises:
            TypeError, ValueError, GroupingError: as :meth:`antdiff.BalancedBackward.__call__`.
            NonFiniteError: naming the ranks whose losses are not finite; not beside a scaler, nor at once on CUDA.
            LostRankError: another rank has died or hangs.
        """
        cg = self.gradients
        here = cg.counts_here(counts)
        if self.balancer.needs == "losses":
            return self._from_losses(loss_fn, batch, cluster, here)
        if not getattr(self.balancer, "due", True):
            return self._between(loss_fn, batch, cluster, here)
        if self.micro_batch is None:
            J = cg.compute(loss_fn, batch, cluster, counts=counts, scaler=self.scaler)
        else:
            rows, batch = ClusteredBatch.of(cluster, self.k, here).sort(batch)
            for start, stop, sizes in self._pieces(rows) or [(0, 0, rows.sizes)]:
                piece = cut(batch, rows.B, start, stop)
                cg.accumulate(loss_fn, piece, rows.cluster[start:stop], counts=sizes, scaler=self.scaler)
            J = cg.mean()
        self.gram = cg.gram(J) / (cg.scale * cg.scale)
        self.weights = self.balancer.weights(self.gram)
        cg.combine(self.weights, J)
        return cg.losses

    def _between(self, loss_fn: LossFn, batch: Sequence[Any], cluster: Tensor, counts: Sequence[int] | None) -> Tensor:
        cg, ranks = self.gradients, self.gradients.ranks
        rows, batch = ClusteredBatch.of(cluster, self.k, counts).sort(batch)
        self.weights = self.balancer.weights()
        self._clear()
        total = rows.counts.double()
        if ranks.size > 1:
            wait(ranks.all_reduce(total), "the sum of counts")
        scale = loss_scale(self.scaler, cluster.device) * (ranks.size if cg.is_sharded else 1)
        factors = (self.weights * scale / total.clamp(min=1))[rows.cluster]  # [B]
        sums, dtype = torch.zeros(self.k, dtype=torch.float64, device=cluster.device), torch.float32
        with cg.unsynchronised():
            for start, stop, _ in self._pieces(rows):
                per_sample = loss_fn(*cut(batch, rows.B, start, stop))
                check_losses(per_sample, stop - start)
                torch.autograd.backward((per_sample,), (factors[start:stop].to(per_sample.dtype),))
                dtype = torch.promote_types(per_sample.dtype, torch.float32)
                values = per_sample.detach().double()
                sums += torch.where(rows.one_hot(torch.bool)[:, start:stop], values, 0).sum(1)
        self._reduce()
        sums, sound = ranks.total(sums, sums.isfinite().all())
        if self.scaler is None and sums.device.type == "cpu":
            refuse_nonfinite(sound, sums)
        return (sums / total.clamp(min=1)).to(dtype)

    def _from_losses(
        self, loss_fn: LossFn, batch: Sequence[Any], cluster: Tensor, counts: Sequence[int] | None
    ) -> Tensor:
        rows = ClusteredBatch.of(cluster, self.k, counts)
        self._clear()
        with self.gradients.unsynchronised():
            per_sample = loss_fn(*batch)
            check_losses(per_sample, rows.B)
            losses, counts_ = ops.cluster_mean(per_sample, cluster, self.k)
            losses, counts_ = global_losses(
                losses, counts_, group=self.group, averaged=self.gradients.is_sharded,
                nonfinite="raise" if self.scaler is None else "poison",
            )  # fmt: skip
            (self.balancer.loss(losses, counts_) * loss_scale(self.scaler, cluster.device)).backward()
        self._reduce()
        return losses.detach()

    def _clear(self) -> None:
        for p in self.gradients.params:
            p.grad = None

    def _reduce(self) -> None:
        if not self.gradients.is_sharded:  # FSDP has done it
            reduce_gradients(self.gradients.model, group=self.group)
