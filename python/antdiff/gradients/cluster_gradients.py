"""The gradients of K clusters' losses from one batch, for about the price of one backward.

Samples of different clusters share nothing but the parameters, so the K gradients of a batch cost the FLOPs of one
forward and one backward, and K x P numbers of memory. The routes ``grouped``, ``split`` and ``loop`` give the same
rows. Each route is described in its file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from antdiff._checks import as_choice, as_count, as_function, describe
from antdiff.distributed.chunks import Counts
from antdiff.distributed.ranks import Group, Ranks
from antdiff.distributed.schemes import Scheme
from antdiff.distributed.shards import mesh_group, sharded_parameters
from antdiff.gradients.accumulation import Accumulation, RankedAccumulation, ShardedAccumulation
from antdiff.gradients.grouped.compiled import compiler_of
from antdiff.gradients.jacobian import ClusterJacobian
from antdiff.gradients.local import LocalGradients, Recording
from antdiff.gradients.ranked import RankedGradients, rank_counts
from antdiff.gradients.routes import LossFn, Network, Route, Scaler
from antdiff.gradients.samples import with_dims
from antdiff.gradients.walk import InDims


class ClusterGradients:
    """K cluster gradients of ``model``: plain, in DistributedDataParallel, or under FSDP2's ``fully_shard``.

    Example::

        cluster_gradients = antdiff.ClusterGradients(model, k=5)
        jacobian = cluster_gradients(lambda x, noise, t: per_sample_loss(model, x, noise, t), (x, noise, t), cluster)
        weights = ops.pcgrad_weights(jacobian.gram())      # [k], ready to use
        jacobian.combine(weights)                          # writes p.grad, ready for optimizer.step()

    The routes:

    - ``"grouped"``: one forward and one backward, with K weight gradients at every op that applies a parameter. It
      runs eagerly or compiled. Dropout draws the same random numbers as in a plain step. It needs K x P numbers more
      memory than a plain step, and up to as much again if parameters are computed from parameters (weight
      normalisation).
    - ``"split"``: one forward and backward per cluster, on its slice of the batch. It serves any network with
      independent samples, compiled ones too, and needs less memory than a plain step. It is as fast as ``grouped`` if a
      slice fills the device. On several ranks a row is sent while the next one is computed.
    - ``"loop"``: one forward and K backwards, (1 + 2K)/3 of a plain step. It serves networks that mix samples
      (BatchNorm).
    - ``"auto"``: the first call takes the first of ``grouped``, ``split`` and ``loop`` that runs on this batch and
      passes two checks. A probe with NaN must show that no sample reaches the rows of another one, and the row of one
      cluster must agree with a plain backward. So the route is ``split`` if an op has no rule or does not compile, and
      ``loop`` if samples depend on each other. :meth:`explain` returns the route and the reason.

    On several ranks, row i is the gradient of the mean over the samples of cluster i on all ranks. The ranks may have
    any numbers of samples, zero included. ``p.grad`` is what one process would compute from the whole batch, up to
    rounding, and needs no further reduction. ``scheme`` is the way in which the rows are summed
    (``antdiff.distributed.exchange`` has the details):

    - ``"reduce_scatter"``: serves any batch. With route ``split`` a rank holds K P / R numbers.
    - ``"cluster"``: for batches in which each rank holds few clusters. ``counts`` must be given for all ranks.
    - ``"all_reduce"``: every rank holds all rows, as GradDrop requires.
    - ``"auto"``: the scheme that :func:`antdiff.distributed.cost_model` expects to be the fastest.

    Under FSDP2 the rows are summed and sharded by FSDP2 itself, and ``scheme`` is not used.

    Args:
        model: the network, with the same weights on every rank. The reduction of DistributedDataParallel is switched
            off while gradients are computed. ``loss_fn`` may call the wrapper or the network inside it.
        k: the number of clusters, at least 1.
        route: see above. None means ``"auto"`` in one process. On several ranks it means ``"split"``, which needs the
            least memory and overlaps communication. FSDP2 needs ``"split"``.
        hold: ``"jacobian"`` holds the K x P numbers of the rows. ``"gram"`` holds only the tensors from which their
            Gram matrix and, once the weights are known, their combination are computed. It computes the weight
            gradients twice, which makes 4/3 of a plain step. In addition to a plain step it holds the input and the
            gradient of the output of every op with a parameter, or its K weight gradients if they are smaller, and for
            a short time the K gradients of one parameter. Parameters that other tensors are computed from (weight
            normalisation) hold all their K gradients. Activation checkpointing saves no memory, since the recomputed
            tensors are held. ``"gram"`` needs the grouped route in eager mode, and one process.
        scheme: see above.
        group: the ranks: a process group; None for the group of the DistributedDataParallel or FSDP2 wrapper, else the
            default group if torch.distributed is initialised, else one process; ``"local"`` never communicates.
        dtype: the dtype of the rows. None: the dtype of each parameter, and on several ranks the widest of them, to
            which the sum over ranks is rounded. ``torch.bfloat16`` halves the memory.
        separable: functions without a grouped rule, given as they are called (``torch.ops.my.op``), that treat the
            samples, the first dimension of their tensors, independently and use no random numbers. Each costs one more
            forward of the op.
        compile: options of ``torch.compile`` with which ``grouped`` compiles loss functions. ``{}`` means the defaults,
            and ``dynamic`` is not allowed. None: the options of ``model`` if ``model`` or the loss function is
            compiled, and eager mode otherwise. A program is compiled for each tuple of cluster sizes, so keep the
            counts equal from step to step. The rows are then new tensors at each call.
        nonfinite: on several ranks, ``"raise"`` raises :class:`antdiff.distributed.NonFiniteError` on every rank if a
            loss or the Gram matrix is not finite. On CUDA this check would wait for the device, so :meth:`check`
            raises the error later. ``"poison"`` never raises, for use with a ``GradScaler``. In one process the
            balancing method checks the Gram matrix.
        audit: how often route ``grouped`` is checked while it runs. At call 1, 2, 4, 8, ... and then every ``audit``
            calls, the row of one cluster is compared with a plain backward, and the probe of :meth:`verify` is
            repeated. A batch of a new structure (size, rows per sample, shapes of joined or cut tensors) is probed
            before its rows are used. A difference raises GroupingError. These checks call ``loss_fn`` additional times
            with the same random numbers, and leave parameters, buffers, gradients and generators as they were
            (``docs/gradients.md`` lists what is restored). An audited call holds the parameters twice more. None checks
            nothing after ``auto`` has chosen.

    Attributes:
        model: the network, without its DistributedDataParallel wrapper.
        ranks: the ranks whose batches make up the whole batch; ``ranks.size`` is their number.
        several: whether there are several ranks, or FSDP2.

    Raises:
        TypeError, ValueError: a model without trainable parameters, a bad ``k``, an unknown route, scheme or hold, or
            a combination that is not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        k: int,
        route: Route | None = None,
        *,
        hold: Literal["jacobian", "gram"] = "jacobian",
        scheme: Scheme = "auto",
        group: Group = None,
        dtype: torch.dtype | None = None,
        separable: Iterable[Callable[..., Any]] = (),
        compile: Mapping[str, Any] | None = None,
        nonfinite: Literal["raise", "poison"] = "raise",
        audit: int | None = 1000,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
        k = as_count("k", k)
        if route is not None:
            as_choice("route", route, get_args(Route))
        as_choice("hold", hold, ("jacobian", "gram"))
        as_choice("scheme", scheme, get_args(Scheme))
        as_choice("nonfinite", nonfinite, ("raise", "poison"))
        if dtype is not None and (
            not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2
        ):
            raise ValueError(f"dtype must be float32, float64, float16, bfloat16 or None; got {str(dtype)[:40]}.")
        if not isinstance(separable, (list, tuple, set, frozenset)) or not all(map(callable, separable)):
            raise TypeError(
                f"separable must be a list of functions such as torch.ops.my.op; got {describe(separable)}."
            )
        if compile is not None and not (isinstance(compile, Mapping) and all(isinstance(key, str) for key in compile)):
            raise TypeError(f"compile must be a dict of options of torch.compile, or None; got {describe(compile)}.")
        if audit is not None:
            audit = as_count("audit", audit)
        wrapper = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
        inner: nn.Module = model if wrapper is None else wrapper.module
        nested = [name for name, m in inner.named_modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
        if nested:
            raise ValueError(
                "model must be a DistributedDataParallel wrapper or contain none; got one inside it, at "
                f"{nested[0]!r}. Wrap last: DistributedDataParallel(torch.compile(network))."
            )
        if not any(p.requires_grad for p in inner.parameters()):
            raise ValueError("model must have a parameter that requires grad; got none. Unfreeze one.")
        complex_names = [name for name, p in inner.named_parameters() if p.requires_grad and p.is_complex()]
        if complex_names:
            raise ValueError(
                f"model must have real parameters; got complex {', '.join(complex_names)}. Store real and imaginary "
                "parts in a real parameter, and apply torch.view_as_complex to it in forward."
            )
        if wrapper is not None and wrapper.static_graph:
            raise ValueError(
                "model must not be wrapped with static_graph=True, since its reduction of gradients, which is switched "
                "off here, relies on that. Wrap it with DistributedDataParallel(network) alone."
            )
        if group is None:
            group = mesh_group(inner) if wrapper is None else wrapper.process_group
        self.model, self.k, self.hold, self.group = inner, k, hold, group
        self.ranks = Ranks(group)
        shards = sharded_parameters(inner, self.ranks, route or "split")
        several = self.ranks.size > 1 or shards is not None
        if several and hold == "gram":
            raise ValueError("hold must be 'jacobian' on several ranks; got 'gram'. Leave hold out.")
        self.route: Route = route or ("split" if several else "auto")
        if hold == "gram" and dtype is not None:
            raise ValueError(f"dtype must be None with hold='gram', which holds no rows; got {dtype}. Leave it out.")
        network = Network(inner, tuple(separable), compiler_of(inner, compile, separable))
        why = "asked for" if route is not None else "the default on several ranks"
        self._local = LocalGradients(network, k, self.route, dtype, held=hold == "jacobian", why=why, audit=audit)
        # A wrapper of a single process still has a reducer, which must not see the gradients of clusters.
        self._ranked = RankedGradients(self._local, self.ranks, shards, wrapper, self.route, scheme, dtype, nonfinite)
        self.several = several

    # ---- from a loss function ------------------------------------------------------------------------------------

    def __call__(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        *,
        counts: Sequence[int] | Counts | None = None,
        scaler: Scaler | None = None,
        in_dims: InDims = None,
    ) -> ClusterJacobian:
        """Compute the K cluster gradients of a batch. On several ranks every rank calls it, with its own samples.

        Args:
            loss_fn: ``loss_fn(*slice)`` returns the per-sample losses ``[b]`` of a slice of the batch, b >= 1. Apply
                importance or timestep weights inside it.
            batch: the arguments of ``loss_fn``. Tensors and NumPy arrays ``[B, ...]`` hold the samples, and so do lists
                of B strings, numbers or images, also inside dicts, lists, tuples and dataclasses. They are sorted and
                sliced; everything else is passed unchanged. Mark an argument that has B rows by coincidence with
                :func:`antdiff.shared`. No gradient flows back into the samples. A rank may lack clusters, or have no
                sample at all (FSDP2 needs one).
            cluster: int64 ``[B]``, ids in ``[0, k)``, in any order.
            counts: the number of samples of each cluster as k Python ints, if the batch is already sorted by cluster
                (as :class:`antdiff.StratifiedTimesteps` draws it). Without it the ids are sorted and counted, which on
                CUDA waits for the device. It may also be a list of k ints per rank, the same on all ranks
                (:meth:`antdiff.StratifiedTimesteps.counts`). Counts are then not exchanged, and with scheme
                ``"cluster"`` the rows of empty clusters are not sent.
            scaler: the gradient scaler of mixed precision in float16. The rows and ``p.grad`` then contain its scale;
                the losses and the Gram matrix do not.
            in_dims: says which arguments hold samples, as in ``torch.func.vmap``: 0 for all of them, or a tuple with
                one entry per argument, 0 (one row or entry per sample) or None (shared by all samples). An entry may
                have the structure of its argument: ``(0, {"captions": 0, "table": None})``. Default: by the shapes.

        Returns:
            The rows, their losses and counts; see :class:`antdiff.gradients.ClusterJacobian`. ``p.grad`` is not
            changed, except that the schemes ``"reduce_scatter"`` and ``"cluster"`` reuse the memory of the ``p.grad``
            that the last jacobian wrote. A parameter that no sample of cluster i reaches has a zero row i, and so has
            every parameter if cluster i is empty.

        Raises:
            TypeError, ValueError: a batch, ids, counts or losses of the wrong kind or shape, or an argument whose
                samples cannot be identified.
            GroupingError: the route cannot separate the clusters' gradients in this network.
            NonFiniteError: see ``nonfinite``.
            LostRankError: another rank has died or hangs.
        """
        self.ranks.require_all()
        as_function("loss_fn", loss_fn)
        batch = with_dims(batch, in_dims)
        if self.several:
            return self._ranked.jacobian(loss_fn, batch, cluster, counts, scaler)
        compute = self._local.deferred if self.hold == "gram" else self._local.jacobian
        sizes = None if counts is None else rank_counts(counts, self.ranks, self.k)
        if self._ranked.wrapper is None:
            return compute(loss_fn, batch, cluster, sizes, scaler)
        with self.unsynchronised():
            return compute(loss_fn, batch, cluster, sizes, scaler)

    @contextmanager
    def accumulate(self) -> Iterator[Accumulation]:
        """Accumulate micro-batches; the clusters of each may differ in size and be empty.

        Example::

            with cluster_gradients.accumulate() as total:
                for batch, cluster in micro_batches:
                    total.add(loss_fn, batch, cluster)     # arguments as for a call
            total.jacobian.combine(weights)

        ``total.jacobian`` is that of the whole batch. On several ranks rows are exchanged once, when the block ends,
        and ranks may add different numbers of micro-batches. Under FSDP2 rows are exchanged at each micro-batch, and
        ranks must add the same number. Wrong ids or counts change nothing. Any other error, and another call of the
        same object, end the accumulation.

        Raises:
            ValueError: no micro-batch was added, ``hold="gram"``, since the Gram matrix of a sum needs the rows, or
                ``scheme="cluster"`` on several ranks, which needs the counts beforehand.
        """
        if self.hold == "gram":
            raise ValueError(
                "hold must be 'jacobian' to accumulate, since the Gram matrix of a sum needs the summed rows; got "
                "'gram'. Make the object with hold='jacobian'."
            )
        self.ranks.require_all()
        kind = ShardedAccumulation if self.is_sharded else RankedAccumulation if self.several else Accumulation
        total = kind(self._ranked)
        try:
            yield total
            total.finish()
        except BaseException:
            total.revoke()
            raise

    # ---- from a forward of your own ------------------------------------------------------------------------------

    @contextmanager
    def record(
        self, cluster: Tensor, *, counts: Sequence[int] | Counts | None = None, scaler: Scaler | None = None
    ) -> Iterator[Recording]:
        """Record a forward on the whole batch that you run yourself (routes ``grouped`` and ``loop``, one process).

        Example::

            with cluster_gradients.record(cluster) as recording:
                jacobian = recording.backward(per_sample_loss(model, x, noise, t))

        Samples may be in any order. If they are sorted by cluster, the grouped route copies nothing. ``auto`` takes
        ``grouped`` here unless an earlier call has chosen another route, since it cannot run the network to check it.
        For the same reason there is no probe and no audit, and samples that are sorted or packed by their values before
        they meet a parameter give wrong rows. Call :meth:`verify` before training.
        Another call of the same object inside the block ends the recording.
        """
        if self.several or self.hold == "gram":
            raise ValueError(
                f"record() needs one process and hold='jacobian'; got {self.ranks.size} ranks and hold={self.hold!r}. "
                "Call cluster_gradients(loss_fn, batch, cluster)."
            )
        self.ranks.require_all()
        own_counts = rank_counts(counts, self.ranks, self.k)
        with self.unsynchronised(), self._local.record(cluster, own_counts, scaler) as recording:
            yield recording

    # ---- inspection ----------------------------------------------------------------------------------------------

    @property
    def is_sharded(self) -> bool:
        """Whether the parameters are shards of FSDP2."""
        return self._ranked.shards is not None

    @property
    def params(self) -> list[nn.Parameter]:
        """The trainable parameters. Under FSDP2 these are the shards, also while the model has gathered parameters."""
        return self._ranked.params

    def unsynchronised(self) -> AbstractContextManager[Any]:
        """Return a context in which DistributedDataParallel reduces no gradients and broadcasts no buffers."""
        return self._ranked.unsynchronised()

    def nbytes(self) -> int:
        """Return the memory of the rows in bytes; on several ranks of rows, buffers and ``p.grad``, after a call."""
        return self._ranked.nbytes() if self.several else self._local.nbytes()

    def explain(self) -> str:
        """Return the route, on several ranks the scheme, the reasons for both, and the memory of the rows as text."""
        return self._ranked.explain() if self.several else self._local.explain()

    def verify(
        self,
        loss_fn: LossFn,
        batch: Sequence[Any],
        cluster: Tensor,
        *,
        counts: Sequence[int] | Counts | None = None,
        in_dims: InDims = None,
    ) -> float:
        """Check the route on a batch of this process, once, before training. Arguments are those of a call.

        The first check is a probe. All values of one sample are NaN, and no other sample may become NaN at any op that
        applies a parameter, or in the losses. The probe finds BatchNorm, attention over the batch and losses over the
        batch, and names the op. The second check compares the rows
        with those of the ``loop`` route, from the same random numbers. It is skipped for ``split`` if the forward draws
        random numbers, since the slices draw others.

        The cost is 2 forwards, one call of the route and one of ``loop``, and twice the memory of the rows, which is
        freed at the end. Rows, gradients, buffers and torch's random state are not changed.

        Returns:
            The largest relative difference of a parameter's gradient from ``loop``; NaN if the comparison was skipped.

        Raises:
            GroupingError: samples are not independent, or a gradient differs.
            ValueError: the parameters are shards of FSDP2, or the batch is empty.
        """
        if self.is_sharded:
            raise ValueError("model must have whole parameters for verify(). Call it before fully_shard(model).")
        as_function("loss_fn", loss_fn)
        with self.unsynchronised():
            return self._local.verify(
                loss_fn, with_dims(batch, in_dims), cluster, rank_counts(counts, self.ranks, self.k)
            )

    def check(self) -> None:
        """Raise if a rank had a non-finite loss since the last check. On CUDA this waits for the device.

        Raises:
            NonFiniteError: it names the ranks.
        """
        self._ranked.check()
