"""The gradient of every cluster's loss, from one batch, for about the price of one backward.

Samples of different clusters share no arithmetic except the parameters, so the K gradients of a batch cost the FLOPs of
one forward and one backward, and K x P numbers. Three routes give the same rows: ``grouped``, ``split`` and ``loop``,
each described in its file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn

from antdiff.gradients import routes
from antdiff.gradients import verify as checks
from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.grouped.compiled import compiler_of
from antdiff.gradients.grouped.deferred import GramMode
from antdiff.gradients.grouped.mode import GroupedMode
from antdiff.gradients.routes import Chosen, LossFn, Network, Route
from antdiff.gradients.sinks import GradientStore, Sink


class Scaler(Protocol):
    """``torch.amp.GradScaler``, or anything whose ``scale`` multiplies a tensor by the loss scale."""

    def scale(self, outputs: Any) -> Any: ...


class ClusterGradients:
    """K cluster gradients of ``model``, written into one reusable set of buffers.

    Example::

        cg = antdiff.ClusterGradients(model, k=5)
        J = cg.compute(lambda x, noise, t: per_sample_loss(model, x, noise, t), (x, noise, t), cluster)
        weights = ops.pcgrad_weights(ops.gram(J))          # [k]
        ops.combine(weights, J, out=cg.grads())            # p.grad, ready for optimizer.step()

    or, with the forward in your own hands (routes ``grouped`` and ``loop``)::

        with cg.batch(cluster):
            cg.backward(per_sample_loss(model, x, noise, t))
        J = cg.J

    The routes:

    - ``"grouped"``: one forward and one backward; K weight gradients at every op that applies a parameter. Eager or
      compiled. The random numbers of dropout are those of a plain step. K x P numbers more memory than a plain step;
      where parameters are computed from parameters (weight normalisation), up to as much again.
    - ``"split"``: one forward and backward for each cluster's slice of the batch. Any network with independent samples,
      compiled ones too; less memory than a plain step. As fast as ``grouped`` where a slice fills the device.
    - ``"loop"``: one forward, K backwards, (1 + 2K)/3 of a plain step. For networks that mix samples (BatchNorm).
    - ``"auto"``: at the first :meth:`compute`, runs ``grouped`` on at most two samples a cluster and compares it with
      ``loop``, then settles: ``grouped`` if they agree, ``split`` if the network has an op without a rule or
      does not compile, ``loop`` if its samples depend on each other. :meth:`explain` says which and why.

    Args:
        model: the network, not wrapped in DistributedDataParallel or FSDP.
        k: the number of clusters, at least 1.
        route: see above.
        dtype: of J; default each parameter's own. ``torch.bfloat16`` halves the memory.
        separable: functions without a grouped rule, as called (``torch.ops.my.op``), that treat the samples, first
            dimension of their tensors, independently and use no random numbers. Costs one more forward of that op.
        compile: options of ``torch.compile`` with which ``grouped`` compiles loss functions (``{}`` for the defaults;
            ``dynamic`` is not among them). None: where ``model`` or the loss function is compiled, as ``model`` is;
            eager otherwise. A program is compiled for each tuple of cluster sizes, so keep the counts equal from step
            to step. J is then new tensors at each call.

    Attributes:
        J: a list of ``[k, *shape]``, one for each of ``model.parameters()`` (None where frozen).
        losses: ``[k]`` detached: the mean per-sample loss of each cluster (0 where empty).
        counts: int64 ``[k]``, on the losses' device: samples a cluster.
        scale: what J is multiplied by: 1.0, or the loss scale of the scaler that was given.

    Raises:
        TypeError, ValueError: a model without trainable parameters, a bad ``k`` or an unknown route.
    """

    def __init__(
        self,
        model: nn.Module,
        k: int,
        route: Route = "auto",
        *,
        dtype: torch.dtype | None = None,
        separable: Iterable[Callable[..., Any]] = (),
        compile: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise TypeError(
                "model must not be wrapped: its reducer would average each gradient alone. Pass model.module."
            )
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k must be an int; got {type(k).__name__}.")
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}.")
        if route not in get_args(Route):
            raise ValueError(f"route must be one of {', '.join(map(repr, get_args(Route)))}; got {route!r}.")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("model must have a parameter that requires grad; got none. Unfreeze one.")
        self.model, self.k, self.route = model, k, route
        self._network = Network(model, tuple(separable), compiler_of(model, compile, separable))
        self.losses: Tensor
        self.counts: Tensor
        self.scale: Tensor | float = 1.0
        self._jacobian = GradientStore(model, k, dtype)
        self._choice: tuple[Chosen, str] | None = None if route == "auto" else (route, "asked for")
        self._open: tuple[ClusteredBatch, list[Sink], GroupedMode | None, Tensor | float] | None = None
        self._sums: tuple[Tensor, Tensor] | None = None
        self._gram: GramMode | None = None

    @property
    def J(self) -> list[Tensor | None]:  # noqa: N802
        return self._jacobian.tensors

    # ---- from a loss function ------------------------------------------------------------------------------------

    def compute(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        *,
        counts: Sequence[int] | None = None,
        scaler: Scaler | None = None,
    ) -> list[Tensor | None]:
        """Row i of J is the gradient of the mean of ``loss_fn`` over the samples of cluster i.

        Args:
            loss_fn: ``loss_fn(*slice)`` gives the per-sample losses ``[b]`` of a slice of the batch, b >= 1;
                importance or timestep weights belong inside it.
            batch: what ``loss_fn`` takes. Tensors whose first dimension is B are sliced, in dicts, lists and tuples
                too; everything else is passed as it is. No gradient flows back into the batch.
            cluster: int64 ``[B]``, ids in ``[0, k)``, in any order.
            counts: the number of samples of each cluster as k Python ints, if the rows of the batch are already grouped
                by cluster in ascending order (as :class:`antdiff.StratifiedTimesteps` draws them). Without it the ids
                are sorted and counted, which on CUDA waits for the device.
            scaler: of mixed precision in float16. J then carries its scale (see ``scale``), ``losses`` do not.

        Returns:
            J. The buffers are reused: the next call overwrites them. The parameters' ``.grad`` are left as they were. A
            parameter that no sample of cluster i reaches has a zero row i, and so has every parameter where cluster i
            is empty.

        Raises:
            TypeError, ValueError: a batch, ids, counts or losses of the wrong kind or shape. J is then undefined.
            GroupingError: the route cannot tell the clusters' gradients apart in this network. J is then undefined.
        """
        rows = ClusteredBatch.of(cluster, self.k, counts)
        self._sums = self._gram = None
        self.scale = loss_scale(scaler, cluster.device)
        sums = self._run(loss_fn, batch, rows, mean=True, fresh=True)
        self._report(sums, rows.counts)
        return self.J

    def accumulate(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        *,
        counts: Sequence[int] | None = None,
        scaler: Scaler | None = None,
    ) -> None:
        """Adds a micro-batch: sums of gradients, losses, counts; :meth:`mean` ends it. Arguments as for compute.
        Wrong ids or counts change nothing; a later error forgets what was accumulated.

        The clusters of the micro-batches may differ in size and be empty; the result is that of the whole batch.
        """
        rows = ClusteredBatch.of(cluster, self.k, counts)
        first = self._sums is None
        if first:
            self.scale = loss_scale(scaler, cluster.device)
        try:
            sums = self._run(loss_fn, batch, rows, mean=False, fresh=first)
        except BaseException:
            self._sums = None  # J holds part of a micro-batch: nothing may be added to it
            raise
        if self._sums is None:
            self._sums = (sums, rows.counts)
        else:
            self._sums = (self._sums[0] + sums, self._sums[1] + rows.counts)

    def mean(self) -> list[Tensor | None]:
        """J of all micro-batches since the last call: row i is the gradient of the mean over all samples of cluster i.

        Raises:
            RuntimeError: nothing was accumulated.
        """
        if self._sums is None:
            raise RuntimeError("mean() ends accumulate(); call accumulate(loss_fn, batch, cluster) first.")
        sums, counts = self._sums
        self._sums = None
        self._report(sums, counts)
        for J in self.J:
            if J is not None:
                J.div_(counts.clamp(min=1).to(J.device).view(self.k, *[1] * (J.dim() - 1)))
        return self.J

    # ---- without J -----------------------------------------------------------------------------------------------

    def gram(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        *,
        counts: Sequence[int] | None = None,
        scaler: Scaler | None = None,
    ) -> Tensor:
        """The Gram matrix of the rows of J without holding J, where K x P numbers do not fit; arguments as for
        :meth:`compute`. Then call :meth:`combine` with the weights.

        Weight gradients are taken twice, in all 4/3 of a plain step. Beyond a plain step it holds the input and the
        gradient of the output of every op with a parameter, or its K weight gradients where they are smaller, and for a
        moment the K gradients of one parameter. Parameters that others are computed from (weight normalisation) hold
        all of theirs. A checkpoint saves nothing here: what it computes again is needed again.

        Returns:
            float64 ``[k, k]``. With a scaler it carries ``scale ** 2``.

        Raises:
            ValueError: the route is not ``grouped``, in eager mode.
            GroupingError: as for :meth:`compute`; and a parameter used inside a re-entrant checkpoint and elsewhere.
        """
        rows, batch = ClusteredBatch.of(cluster, self.k, counts).sort(batch)
        self._sums = self._gram = None
        self.scale = loss_scale(scaler, cluster.device)
        route = "grouped" if rows.B == 0 else self._settled(loss_fn, batch, rows)
        if route != "grouped" or self._network.compiled is not None:
            raise ValueError(
                f"gram() needs the grouped route in eager mode; use compute() and ops.gram(J). {self.explain()}"
            )
        sinks = [Sink(name, p, self.k) for name, p in self._jacobian.named if p.requires_grad]
        mode = GramMode(self.model, rows, sinks, self._network.separable)
        sums = rows.cluster.new_zeros(self.k, dtype=torch.float32)
        if rows.B:
            sums = routes.run(route, self._network, loss_fn, batch, rows, sinks, scale=self.scale, mode=mode)
        self._report(sums, rows.counts)
        self._gram = mode
        return mode.gram

    def combine(self, weights: Tensor) -> None:
        """After :meth:`gram`: ``p.grad = sum_i weights_i J_i`` for every trainable parameter, once.

        Args:
            weights: ``[k]``.
        """
        if self._gram is None:
            raise RuntimeError("combine() ends gram(); call gram(loss_fn, batch, cluster) first.")
        mode, self._gram = self._gram, None
        mode.combine(weights)

    # ---- from a forward of your own ------------------------------------------------------------------------------

    @contextmanager
    def batch(
        self, cluster: Tensor, *, counts: Sequence[int] | None = None, scaler: Scaler | None = None
    ) -> Iterator[ClusterGradients]:
        """Inside, run the forward on the whole batch and call :meth:`backward` once; arguments as for :meth:`compute`.

        Samples in any order; in ascending order of their clusters the grouped route copies nothing. ``auto`` takes
        ``grouped`` here unless :meth:`compute` has chosen otherwise; it cannot run the network by itself to check it.
        """
        name: Chosen = self._choice[0] if self._choice else "grouped"
        if name == "split":
            raise ValueError(f"route 'split' runs the forward itself, slice by slice: call compute(). {self.explain()}")
        if name == "grouped" and self._network.compiled is not None:
            raise ValueError("a compiled forward must be handed over to be traced with its rules: call compute().")
        rows = ClusteredBatch.of(cluster, self.k, counts)
        scale = loss_scale(scaler, cluster.device)
        routes.refuse_batch_norm(name, self.model)
        sinks = self._jacobian.sinks(fresh=True)
        mode = GroupedMode(self.model, rows, sinks, self._network.separable) if name == "grouped" else None
        before = [s.tensor.grad for s in sinks]
        self._open, self._sums = (rows, sinks, mode, scale), None
        try:
            if mode is None:
                yield self
            else:
                with mode:
                    yield self
            if self._open is not None:
                raise RuntimeError("backward() must be called once, inside `with cg.batch(cluster):`; J is undefined.")
        finally:
            self._open = None
            for sink, grad in zip(sinks, before, strict=True):
                sink.tensor.grad = grad

    def backward(self, per_sample: Tensor) -> list[Tensor | None]:
        """Fills J from the losses ``[B]`` of the batch, in the order of ``cluster``. Frees the graph."""
        if self._open is None:
            raise RuntimeError("backward() must be called once, inside `with cg.batch(cluster):`.")
        rows, sinks, mode, self.scale = self._open
        self._open = None
        with torch._C.DisableTorchFunction():
            sums = routes.backward(per_sample, rows, sinks, mode, scale=self.scale)
        self._report(sums, rows.counts)
        return self.J

    # ---- asking --------------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """The route, why it was chosen, and the memory of J."""
        size = f"J holds {self._jacobian.nbytes() / 2**20:.1f} MiB"
        if self._choice is None:
            return f"route 'auto', which chooses at the first compute(); {size}"
        name, why = self._choice
        return f"route {name!r}: {why}; {size}"

    def verify(
        self, loss_fn: LossFn, batch: Sequence[Any], cluster: Tensor, *, counts: Sequence[int] | None = None
    ) -> float:
        """Checks the route on a batch, once, before training; arguments as for :meth:`compute`.

        First a probe: with all values of one sample NaN, no other sample may become NaN wherever the batch meets a
        parameter, nor in the losses. It finds BatchNorm, attention over the batch, losses over the batch and layouts
        whose first dimension is not the batch, and names the place. Then a comparison of J with the ``loop`` route,
        from the same random numbers; skipped for ``split`` where the forward draws any, since the slices draw others.

        Costs 2 forwards, one call of the route and one of ``loop``, and twice the memory of J, given back at the end.
        Leaves J, gradients, buffers and torch's random state as they were.

        Returns:
            The largest relative difference of a parameter's gradient from ``loop``; NaN where it was skipped.

        Raises:
            GroupingError: samples are not independent, or a gradient differs.
        """
        rows, batch = ClusteredBatch.of(cluster, self.k, counts).sort(batch)
        route = self._settled(loss_fn, batch, rows)
        return checks.verify(route, self._network, loss_fn, batch, rows)

    def grads(self) -> list[Tensor | None]:
        """``p.grad`` of each parameter (None where frozen), the ``out`` of ``combine``: allocated where it is missing,
        or laid out as ``combine`` cannot write it (channels_last, sparse)."""
        out: list[Tensor | None] = []
        for _, p in self._jacobian.named:
            usable = p.grad is not None and p.grad.layout is torch.strided and p.grad.is_contiguous()
            if p.requires_grad and not usable:
                p.grad = torch.empty_like(p, memory_format=torch.contiguous_format)
            out.append(p.grad if p.requires_grad else None)
        return out

    def _run(self, loss_fn: LossFn, batch: Sequence[Any], rows: ClusteredBatch, *, mean: bool, fresh: bool) -> Tensor:
        """Sums of the losses ``[k]``; J (+)= the gradients of the means or the sums, times the scale."""
        if rows.B == 0:
            sinks = self._jacobian.sinks(fresh=fresh)
            for sink in sinks:
                sink.finish()
            self._jacobian.keep(sinks)
            return rows.cluster.new_zeros(self.k, dtype=torch.float32)
        rows, batch = rows.sort(batch)
        route = self._settled(loss_fn, batch, rows)
        self._jacobian.reuse = route != "grouped" or self._network.compiled is None
        sinks = self._jacobian.sinks(fresh=fresh)
        sums = routes.run(route, self._network, loss_fn, batch, rows, sinks, mean=mean, scale=self.scale)
        self._jacobian.keep(sinks)
        return sums

    def _settled(self, loss_fn: LossFn, batch: Sequence[Any], rows: ClusteredBatch) -> Chosen:
        net = self._network
        if net.compiled is None and hasattr(loss_fn, "_torchdynamo_orig_callable"):
            net.compiled = compiler_of(self.model, {}, net.separable)
        if self._choice is None:
            self._choice = checks.choose(net, loss_fn, batch, rows)
        return self._choice[0]

    def _report(self, sums: Tensor, counts: Tensor) -> None:
        self.counts = counts.to(sums.device)
        self.losses = sums / self.counts.clamp(min=1)


def loss_scale(scaler: Scaler | None, device: torch.device) -> Tensor | float:
    """The loss scale as a tensor: asking the scaler for a number would wait for the device."""
    return 1.0 if scaler is None else scaler.scale(torch.ones((), device=device))  # type: ignore[no-any-return]
