"""The whole backward of a balanced training step: cluster gradients, a balancing method, ``p.grad``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from antdiff import ops
from antdiff.gradients.batch import ClusteredBatch, check_losses, cut
from antdiff.gradients.cluster_gradients import ClusterGradients, Scaler, loss_scale
from antdiff.gradients.routes import LossFn, Route


class Balancer(Protocol):
    """What is asked of a balancing method; those of ``antdiff.balancing`` have it."""

    needs: Literal["gram", "losses"] | Any


class BalancedBackward:
    """In place of ``loss.backward()``: leaves in every ``p.grad`` the direction of a balancing method.

    Example::

        backward = antdiff.BalancedBackward(model, balancing.PCGrad(), k=5)
        losses = backward(lambda x, noise, t: per_sample_loss(model, x, noise, t), (x, noise, t), cluster)
        optimizer.step()

    Where the method looks at gradients, a call computes the K cluster gradients, their Gram matrix, its weights, and
    their combination. On the calls between two solutions of a method with ``update_every=M``, the weights are known
    beforehand, and the call is one plain backward of the weighted losses: no J, exactly the cost of a plain step. Where
    the method looks at losses alone (uncertainty weighting), every call is one plain backward.

    In float16, with ``scaler = torch.amp.GradScaler()``, J and ``p.grad`` carry its factor, and the Gram matrix
    is freed of it, so the scaler is used as ever: ``scaler.step(optimizer)`` unscales, and skips the step where a
    gradient overflowed; ``scaler.update()`` after it.

    Args:
        model, k, route, dtype, separable, compile: see :class:`antdiff.ClusterGradients`.
        balancer: an object of ``antdiff.balancing``. Its ``update_every`` is obeyed. With ``scaler`` it must have been
            made with ``nonfinite="poison"``.
        scaler: of mixed precision in float16.
        micro_batch: at most so many samples in the network at a time; the gradients are those of the whole batch.
        keep: ``"gram"`` where the K x P numbers of the Jacobian do not fit: see :meth:`antdiff.ClusterGradients.gram`.

    Attributes:
        gradients: the :class:`antdiff.ClusterGradients`; ``gradients.explain()`` says which route it takes.
        weights: float64 ``[k]``, the factors of the clusters' gradients in the last ``p.grad``; None for a method that
            looks at losses alone.
        gram: float64 ``[k, k]`` of the last call that computed it, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        balancer: Any,
        k: int,
        *,
        route: Route = "auto",
        dtype: torch.dtype | None = None,
        separable: Iterable[Callable[..., Any]] = (),
        compile: Mapping[str, Any] | None = None,
        scaler: Scaler | None = None,
        micro_batch: int | None = None,
        keep: Literal["jacobian", "gram"] = "jacobian",
    ) -> None:
        if getattr(balancer, "needs", None) == "rows" and not isinstance(balancer, type):
            raise TypeError(
                f"balancer must have weights; {type(balancer).__name__} chooses for each parameter. Call its "
                "direction(J) on what ClusterGradients computes."
            )
        known = hasattr(balancer, "weights") and getattr(balancer, "needs", None) in ("gram", "losses")
        if not known or isinstance(balancer, type):
            raise TypeError(
                f"balancer must be a method of antdiff.balancing, such as balancing.PCGrad(); got {balancer!r}."
            )
        if scaler is not None and getattr(balancer, "nonfinite", "poison") == "raise":
            raise ValueError("balancer must be made with nonfinite='poison' beside a scaler, which skips such steps.")
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1; got {micro_batch}.")
        if micro_batch is not None and balancer.needs == "losses":
            raise ValueError("micro_batch must be None for a method that needs the losses of the whole batch first.")
        if keep not in ("jacobian", "gram"):
            raise ValueError(f"keep must be 'jacobian' or 'gram'; got {keep!r}.")
        if micro_batch is not None and keep == "gram":
            raise ValueError("micro_batch must be None with keep='gram': the Gram matrix of a sum needs the summed J.")
        self.gradients = ClusterGradients(model, k, route, dtype=dtype, separable=separable, compile=compile)
        self.balancer, self.k, self.scaler, self.micro_batch, self.keep = balancer, k, scaler, micro_batch, keep
        self.weights: Tensor | None = None
        self.gram: Tensor | None = None

    def __call__(
        self, loss_fn: LossFn, batch: Sequence[Any], cluster: Tensor, *, counts: Sequence[int] | None = None
    ) -> Tensor:
        """Overwrites ``p.grad`` of every trainable parameter of the model.

        Args:
            loss_fn, batch, cluster, counts: see :meth:`antdiff.ClusterGradients.compute`.

        Returns:
            The mean per-sample loss of each cluster ``[k]``, detached (0 where a cluster is empty).

        Raises:
            TypeError, ValueError, GroupingError: as :meth:`antdiff.ClusterGradients.compute`; what the balancer raises.
        """
        if self.balancer.needs == "losses":
            return self._from_losses(loss_fn, batch, cluster, counts)
        if not getattr(self.balancer, "due", True):
            return self._between(loss_fn, batch, cluster, counts)
        cg = self.gradients
        if self.keep == "gram":
            self.gram = cg.gram(loss_fn, batch, cluster, counts=counts, scaler=self.scaler)
            self.gram /= cg.scale * cg.scale
            self.weights = self.balancer.weights(self.gram)
            cg.combine(self.weights)
            return cg.losses
        if self.micro_batch is None:
            J = cg.compute(loss_fn, batch, cluster, counts=counts, scaler=self.scaler)
        else:
            rows, batch = ClusteredBatch.of(cluster, self.k, counts).sort(batch)
            for start, stop, sizes in self._pieces(rows) or [(0, 0, rows.sizes)]:
                piece = cut(batch, rows.B, start, stop)
                cg.accumulate(loss_fn, piece, rows.cluster[start:stop], counts=sizes, scaler=self.scaler)
            J = cg.mean()
        self.gram = ops.gram(J)
        self.gram /= cg.scale * cg.scale
        self.weights = self.balancer.weights(self.gram)
        ops.combine(self.weights, J, out=cg.grads())
        return cg.losses

    def _between(self, loss_fn: LossFn, batch: Sequence[Any], cluster: Tensor, counts: Sequence[int] | None) -> Tensor:
        """The weights are known: the gradient of ``sum_i weights_i losses_i`` by one plain backward."""
        rows, batch = ClusteredBatch.of(cluster, self.k, counts).sort(batch)
        self.weights = self.balancer.weights()
        self._clear()
        scale = loss_scale(self.scaler, cluster.device)
        sizes = rows.one_hot(torch.float64).sum(1).clamp(min=1)  # [k], on the device
        inside = (rows.cluster >= 0) & (rows.cluster < self.k)  # an id out of range is not to be an address on CUDA
        factors = (self.weights * scale / sizes)[rows.cluster.clamp(0, self.k - 1)]  # [B]
        factors = torch.where(inside, factors, torch.nan)
        sums = torch.zeros(self.k, device=rows.cluster.device)
        for start, stop, _ in self._pieces(rows):
            per_sample = loss_fn(*cut(batch, rows.B, start, stop))
            check_losses(per_sample, stop - start)
            torch.autograd.backward((per_sample,), (factors[start:stop].to(per_sample.dtype),))
            values = per_sample.detach().to(torch.promote_types(per_sample.dtype, torch.float32))
            sums = sums + torch.where(rows.one_hot(torch.bool)[:, start:stop], values, 0).sum(1)
        return sums / sizes.to(sums.dtype)

    def _from_losses(
        self, loss_fn: LossFn, batch: Sequence[Any], cluster: Tensor, counts: Sequence[int] | None
    ) -> Tensor:
        rows = ClusteredBatch.of(cluster, self.k, counts)
        per_sample = loss_fn(*batch)
        check_losses(per_sample, rows.B)
        losses, counts_ = ops.cluster_mean(per_sample, cluster, self.k)
        self._clear()
        (self.balancer.loss(losses, counts_) * loss_scale(self.scaler, cluster.device)).backward()
        return losses.detach()

    def _clear(self) -> None:
        for p in self.gradients.model.parameters():
            p.grad = None

    def _pieces(self, rows: ClusteredBatch) -> list[tuple[int, int, list[int]]]:
        """Micro-batches of a sorted batch: ``[start, stop)`` and the samples of each cluster in it."""
        n = self.micro_batch or max(rows.B, 1)
        slices = rows.slices()
        return [
            (a, b, [max(0, min(b, stop) - max(a, start)) for start, stop in slices])
            for a, b in ((a, min(a + n, rows.B)) for a in range(0, rows.B, n))
        ]
