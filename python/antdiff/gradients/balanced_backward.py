"""The whole backward of a balanced training step: cluster gradients, a balancing method, ``p.grad``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from antdiff import ops
from antdiff._checks import as_choice, as_count, as_flag, as_function
from antdiff.distributed.chunks import Counts
from antdiff.distributed.losses import global_losses, reduce_gradients
from antdiff.distributed.ranks import Group, refuse_nonfinite, wait
from antdiff.distributed.schemes import Scheme
from antdiff.gradients.batch import ClusteredBatch, check_losses, cut
from antdiff.gradients.cluster_gradients import ClusterGradients
from antdiff.gradients.jacobian import ClusterJacobian
from antdiff.gradients.parameters import dense_grads, finish_grads, limit_norm, without_hooks
from antdiff.gradients.ranked import rank_counts
from antdiff.gradients.routes import LossFn, Route, Scaler, loss_scale
from antdiff.gradients.samples import Samples, with_dims
from antdiff.gradients.walk import InDims


@dataclass(frozen=True)
class BackwardResult:
    """The losses, weights and Gram matrix of a step of :class:`BalancedBackward`.

    Attributes:
        losses: ``[k]`` detached, the mean per-sample loss of each cluster over all ranks (0 where a cluster is empty).
        counts: ``[k]``, the samples of each cluster over all ranks.
        weights: ``[k]``, the factors of the clusters' gradients in ``p.grad``; None for a method that chooses per
            parameter (GradDrop).
        gram: float64 ``[k, k]``, the Gram matrix of the cluster gradients; None if the step needed none.
    """

    losses: Tensor
    counts: Tensor
    weights: Tensor | None
    gram: Tensor | None


class BalancedBackward:
    """A replacement for ``loss.backward()`` that leaves the direction of a balancing method in every ``p.grad``.

    Example::

        backward = antdiff.BalancedBackward(model, balancing.PCGrad(), k=5)
        result = backward(lambda x, noise, t: per_sample_loss(model, x, noise, t), (x, noise, t), cluster)
        optimizer.step()

    If the method needs gradients, a call computes the K cluster gradients, their Gram matrix, its weights, and their
    combination. On the calls between two solutions of a method with ``update_every=M`` the weights are known
    beforehand. Such a call is one plain backward of the weighted losses, without a Jacobian, at exactly the cost of a
    plain step. A method with ``max_norm`` limits the length of ``p.grad`` in it too. If the method needs only losses
    (uncertainty weighting), every call is one plain backward.

    On several ranks (plain, DistributedDataParallel, FSDP2) every rank computes the same weights from the Gram matrix
    of the whole batch, and ends with the same ``p.grad``. No broadcast is needed: balancers start in the same state and
    see the same numbers, and methods that draw random numbers have generators with the same seed. Calls that need no
    cluster gradients sum ``p.grad`` once, as a plain step does.

    In float16, with ``scaler = torch.amp.GradScaler()``, ``p.grad`` contains the loss scale, so the scaler is used as
    usual: ``scaler.step(optimizer)`` unscales, and skips the step if a gradient overflowed; then ``scaler.update()``.

    Args:
        model, k, route, hold, scheme, group, dtype, separable, compile, audit: see :class:`antdiff.ClusterGradients`.
        balancer: an object of ``antdiff.balancing``. Its ``update_every`` is respected. With ``scaler`` it must be made
            with ``nonfinite="poison"``. On several ranks it must be made with the same settings on every rank.
        scaler: the gradient scaler of mixed precision in float16.
        micro_batch: the largest number of samples in the network at a time; the gradients are those of the whole batch.
            Under FSDP2 every rank needs the same number of samples.
        skip_unused: for steps without cluster gradients on several ranks. If True, the parameters without a gradient
            must be the same on every rank. The ranks then need not agree on them, for which a rank that lacks a
            gradient waits for the device.
        nonfinite: ``"raise"`` raises on the CPU if a loss is not finite, ValueError in one process and NonFiniteError
            on several ranks. ``"poison"``, which ``scaler`` implies, passes it on. In one process
            ``nonfinite="poison"`` of the balancer does the same.

    Attributes:
        gradients: the :class:`antdiff.ClusterGradients`. ``gradients.explain()`` returns its route.
    """

    def __init__(
        self,
        model: nn.Module,
        balancer: Any,
        k: int,
        route: Route | None = None,
        *,
        hold: Literal["jacobian", "gram"] = "jacobian",
        scheme: Scheme = "auto",
        group: Group = None,
        dtype: torch.dtype | None = None,
        separable: Iterable[Callable[..., Any]] = (),
        compile: Mapping[str, Any] | None = None,
        scaler: Scaler | None = None,
        micro_batch: int | None = None,
        skip_unused: bool = False,
        nonfinite: Literal["raise", "poison"] = "raise",
        audit: int | None = 1000,
    ) -> None:
        needs = getattr(balancer, "needs", None)
        method_of = {"gram": "weights", "losses": "weights", "rows": "direction"}
        if (
            isinstance(balancer, type)
            or not isinstance(needs, str)
            or needs not in method_of
            or not hasattr(balancer, method_of[needs])
        ):
            raise TypeError(
                f"balancer must be a method of antdiff.balancing, such as balancing.PCGrad(); got {balancer!r}."
            )
        if scaler is not None and getattr(balancer, "nonfinite", "poison") == "raise":
            raise ValueError(
                "balancer must be made with nonfinite='poison' if there is a scaler, which skips such steps; got "
                "nonfinite='raise'. Make it with nonfinite='poison'."
            )
        if micro_batch is not None:
            micro_batch = as_count("micro_batch", micro_batch)
        as_flag("skip_unused", skip_unused)
        as_choice("nonfinite", nonfinite, ("raise", "poison"))
        as_choice("hold", hold, ("jacobian", "gram"))
        as_choice("scheme", scheme, get_args(Scheme))
        if micro_batch is not None and needs == "losses":
            raise ValueError(
                "micro_batch must be None for a method that needs the losses of the whole batch first; got "
                f"{micro_batch}. Leave it out."
            )
        if micro_batch is not None and hold == "gram":
            raise ValueError(
                "micro_batch must be None with hold='gram', since the Gram matrix of a sum needs its rows; got "
                f"{micro_batch}. Leave one of the two out."
            )
        if micro_batch is not None and scheme == "cluster":
            raise ValueError(
                "scheme 'cluster' needs the counts of all ranks, which micro-batches do not have; got "
                f"micro_batch={micro_batch}. Leave one of the two out."
            )
        if needs == "rows" and hold == "gram":
            raise ValueError(
                "hold must be 'jacobian' for a method that chooses per parameter, which needs the rows; got 'gram'. "
                "Leave hold out."
            )
        if needs == "rows" and scheme == "auto":
            scheme = "all_reduce"  # a choice per parameter needs whole rows on every rank
        self.nonfinite: Literal["raise", "poison"] = nonfinite if scaler is None else "poison"
        self.gradients = ClusterGradients(
            model, k, route, hold=hold, scheme=scheme, group=group, dtype=dtype, separable=separable, compile=compile,
            nonfinite=self.nonfinite, audit=audit,
        )  # fmt: skip
        self.balancer, self.k, self.scaler, self.micro_batch = balancer, k, scaler, micro_batch
        self.skip_unused = skip_unused

    def __call__(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        *,
        counts: Sequence[int] | Counts | None = None,
        in_dims: InDims = None,
    ) -> BackwardResult:
        """Overwrite ``p.grad`` of every parameter of the model, and of a learned balancer such as ``uw``.

        Gradient hooks see the combined gradient once. ``p.grad`` is None for frozen parameters and for those that no
        sample has reached, as after :meth:`antdiff.gradients.ClusterJacobian.combine`.

        Args:
            loss_fn, batch, cluster, counts, in_dims: see :meth:`antdiff.ClusterGradients.__call__`.

        Returns:
            The losses, counts, weights and Gram matrix of this step.

        Raises:
            TypeError, ValueError, GroupingError, NonFiniteError, LostRankError: as
                :meth:`antdiff.ClusterGradients.__call__`, and as the balancer raises.
            ValueError: the loss of a cluster is not finite; see ``nonfinite``.
        """
        balancer = self.balancer
        as_function("loss_fn", loss_fn)
        batch = with_dims(batch, in_dims)
        if balancer.needs == "losses":
            return self._from_losses(loss_fn, batch, cluster, counts)
        if not getattr(balancer, "due", True):
            return self._between(loss_fn, batch, cluster, counts)
        jacobian = self._jacobian(loss_fn, batch, cluster, counts)
        gram = jacobian.gram()
        self._refuse_nonfinite(jacobian.losses)
        weights = None
        if balancer.needs == "rows":
            jacobian.write(balancer.direction(jacobian.rows))
        else:
            weights = balancer.weights(gram)
            jacobian.combine(weights)
        return BackwardResult(jacobian.losses, jacobian.counts, weights, gram)

    def _jacobian(
        self, loss_fn: LossFn, batch: Sequence[Any], cluster: Tensor, counts: Sequence[int] | Counts | None
    ) -> ClusterJacobian:
        if self.micro_batch is None:
            return self.gradients(loss_fn, batch, cluster, counts=counts, scaler=self.scaler)
        clustered, batch = ClusteredBatch.of(cluster, self.k, rank_counts(counts, self.gradients.ranks, self.k)).sort(
            batch
        )
        with self.gradients.accumulate() as total:
            for start, stop, sizes in self._pieces(clustered) or [(0, 0, clustered.sizes)]:
                piece = cut(batch, clustered.B, start, stop)
                total.add(loss_fn, piece, clustered.cluster[start:stop], counts=sizes, scaler=self.scaler)
        return total.jacobian

    def _between(
        self, loss_fn: LossFn, batch: Sequence[Any], cluster: Tensor, counts: Sequence[int] | Counts | None
    ) -> BackwardResult:
        """Compute the gradient of ``sum_i weights_i losses_i`` by one plain backward, with the last weights."""
        gradients = self.gradients
        gradients.ranks.require_all()
        clustered = ClusteredBatch.of(cluster, self.k, rank_counts(counts, gradients.ranks, self.k))
        samples = Samples.of(batch, clustered.B).detached()  # not sorted: micro-batches may mix clusters
        if gradients.is_sharded and clustered.B == 0:
            raise ValueError(
                "batch must hold a sample on every rank under FSDP2, whose ranks run in lockstep; got none."
            )
        weights = self.balancer.weights()
        self._clear()
        total = clustered.counts.double()  # [k], on the device
        if gradients.ranks.size > 1:
            wait(gradients.ranks.all_reduce(total), "the sum of counts")
        scale = loss_scale(self.scaler, cluster.device) * (gradients.ranks.size if gradients.is_sharded else 1)
        # Never index with an id that is out of range, which CUDA does not check: clamp it, and poison the result.
        inside = (clustered.cluster >= 0) & (clustered.cluster < self.k)
        factors = (weights * scale / total.clamp(min=1))[clustered.cluster.clamp(0, self.k - 1)]  # [B]
        factors = torch.where(inside, factors, torch.nan)
        sums = torch.zeros(self.k, dtype=torch.float64, device=clustered.cluster.device)
        dtype = torch.float32
        with gradients.unsynchronised(), without_hooks(gradients.params):
            for start, stop, _ in self._pieces(clustered):
                per_sample = loss_fn(*samples.cut(start, stop))
                check_losses(per_sample, stop - start)
                torch.autograd.backward((per_sample,), (factors[start:stop].to(per_sample.dtype),))
                dtype = torch.promote_types(per_sample.dtype, torch.float32)
                values = per_sample.detach().double()
                sums += torch.where(clustered.one_hot(torch.bool)[:, start:stop], values, 0).sum(1)
        self._reduce()
        if gradients.several:
            sums, finite = gradients.ranks.total(sums, sums.isfinite().all())
            if self.nonfinite == "raise" and sums.device.type == "cpu":
                refuse_nonfinite(finite, sums)
        losses = (sums / total.clamp(min=1)).to(dtype)
        try:
            self._refuse_nonfinite(losses)
        except ValueError:
            self._clear()
            raise
        max_norm = getattr(self.balancer, "max_norm", None)
        if max_norm is not None:  # the balancer could limit the length only with the Gram matrix of this step
            factor = limit_norm(gradients.params, max_norm * loss_scale(self.scaler, cluster.device))
            weights = weights * factor.to(weights)
        self._finish()
        return BackwardResult(losses, total.to(torch.int64), weights, None)

    def _from_losses(
        self, loss_fn: LossFn, batch: Sequence[Any], cluster: Tensor, counts: Sequence[int] | Counts | None
    ) -> BackwardResult:
        gradients = self.gradients
        gradients.ranks.require_all()
        clustered = ClusteredBatch.of(cluster, self.k, rank_counts(counts, gradients.ranks, self.k))
        self._clear()
        with gradients.unsynchronised(), without_hooks(gradients.params):
            per_sample = loss_fn(*Samples.of(batch, clustered.B).detached())
            check_losses(per_sample, clustered.B)
            losses, n = ops.cluster_mean(per_sample, cluster, self.k)
            losses, n = global_losses(
                losses, n, group=gradients.group, averaged=gradients.is_sharded, nonfinite=self.nonfinite
            )
            self._refuse_nonfinite(losses)
            # A method that weighs before it observes has the weights of the next step after loss().
            late = getattr(self.balancer, "observes_first", True)
            weights = None if late else self.balancer.weights(losses.detach())
            (self.balancer.loss(losses, n) * loss_scale(self.scaler, cluster.device)).backward()
        self._reduce()
        self._finish()
        losses = losses.detach()
        return BackwardResult(losses, n, self.balancer.weights(losses) if weights is None else weights, None)

    def _refuse_nonfinite(self, losses: Tensor) -> None:
        """Raise in one process on the CPU if a loss is not finite; several ranks have looked already."""
        if (
            self.gradients.ranks.size > 1
            or losses.device.type != "cpu"
            or self.nonfinite == "poison"
            or getattr(self.balancer, "nonfinite", "raise") == "poison"
        ):
            return
        losses = losses.detach()
        bad = torch.nonzero(~losses.isfinite()).flatten().tolist()
        if bad:
            raise ValueError(
                f"losses must be finite; got {float(losses[bad[0]])} for cluster {bad[0]}"
                + (f", and others for clusters {bad[1:]}" if bad[1:] else "")
                + ". Look at the samples of that cluster and at the weights, or skip the step."
            )

    def _clear(self) -> None:
        """Discard the gradients of the last step: of the model, frozen parameters included, and of the balancer."""
        own = self.balancer.parameters() if isinstance(self.balancer, nn.Module) else ()
        for p in (*self.gradients.model.parameters(), *self.gradients.params, *own):
            p.grad = None

    def _finish(self) -> None:
        params = self.gradients.params
        if all(p.grad is None for p in params):  # there was no sample
            for p in params:
                p.grad = torch.zeros_like(p)
        finish_grads(self.gradients.model.parameters(), params=params)

    def _reduce(self) -> None:
        gradients = self.gradients
        dense_grads(gradients.params)
        if not gradients.is_sharded:  # FSDP2 has reduced them
            reduce_gradients(gradients.model, group=gradients.group, skip_unused=self.skip_unused)

    def _pieces(self, clustered: ClusteredBatch) -> list[tuple[int, int, list[int]]]:
        """Cut a sorted batch into micro-batches: ``[start, stop)`` and the samples of each cluster in it."""
        n = self.micro_batch or max(clustered.B, 1)
        slices = clustered.slices()
        return [
            (a, b, [max(0, min(b, stop) - max(a, start)) for start, stop in slices])
            for a, b in ((a, min(a + n, clustered.B)) for a in range(0, clustered.B, n))
        ]
