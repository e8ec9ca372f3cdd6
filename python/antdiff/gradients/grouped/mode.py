"""Route ``grouped``: one forward and one backward that yield K weight gradients.

The backward of an op that applies a parameter to the batch costs two products of the same size: the gradient of the
input and the gradient of the weight. Autograd computes the first one as usual. The second one is a sum over samples,
which is computed here cluster by cluster: the FLOPs are the same, and K x P numbers are written instead of P.

:class:`GroupedMode` sees every torch function that a network calls, so the network needs no change. The mode
distinguishes two kinds of tensors:

- A *shared* tensor is a parameter, a buffer, a constant that the loss function holds, or computed from such tensors
  alone. It does not depend on the batch.
- Any other tensor is *varying*. Its first dimension is the batch, unless a probe of this batch has shown another
  layout.

If an op applies a shared tensor that needs a gradient to a varying one, the op runs on the detached shared tensor. A
*tap* on the output writes the K gradients of the shared tensor when the gradient of the output arrives.

A shared tensor may be computed from parameters (weight normalisation, casts, tables). Such a tensor gets K rows of its
own. At the end of the backward they are pulled back to the parameters through the small graph between the two.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode, resolve_name

from antdiff.gradients.batch import ClusteredBatch, GroupingError, RowsError
from antdiff.gradients.grouped.broadcast import own_rows
from antdiff.gradients.grouped.layout import Layout, Survey
from antdiff.gradients.grouped.recorder import Write, detached_all
from antdiff.gradients.grouped.rules import CROSS_SAMPLE, RULES
from antdiff.gradients.grouped.slices import by_slices
from antdiff.gradients.grouped.tracking import DRAWING, MOVES_ROWS, loses_track, structure_of, writes_in_place
from antdiff.gradients.sinks import Sink, Sinks

# An extra input of every tap, so that the output gets a graph even if no other input has one. It receives no gradient.
_ANCHOR = torch.zeros((), requires_grad=True)
# One number per mode, so that what an earlier call has noted on a tensor that lives longer means nothing.
_MARKS = itertools.count()


class GroupedMode(TorchFunctionMode):
    """Record one forward of ``model``. :meth:`backward` then fills the sinks.

    It implements :class:`antdiff.gradients.grouped.recorder.Recorder`.

    Args:
        sinks: one per trainable parameter.
        separable: torch functions without a rule that treat samples independently and draw no random numbers. The
            samples are the first dimension of every varying tensor argument and of the result.
        probe: bool ``[B]``, the samples whose values are NaN. Each op with a rule then checks that only the rows of
            these samples are NaN.
        batch: the tensors of samples. Without them, tensors count as rows of samples once they need a
            gradient.
        survey: what is seen in a probe that asks where the rows of the samples are.
        layouts: where they are, by place; None if the first dimension is the batch everywhere. Ops may then place rows
            by integers and masks of the batch, whose values are part of the structure.

    Attributes:
        structure: a hash of everything that decides where rows are, except values: rows per sample wherever the batch
            meets a parameter, and shapes and options of ops that move rows. Equal structures need one probe.
    """

    def __init__(
        self,
        model: nn.Module,
        clustered: ClusteredBatch,
        sinks: list[Sink],
        separable: Iterable[Any] = (),
        probe: Tensor | None = None,
        batch: Iterable[Tensor] = (),
        survey: Survey | None = None,
        layouts: Mapping[int, Layout] | None = None,
    ) -> None:
        super().__init__()
        self._model = model
        self.clustered = clustered
        self.probe = probe if survey is None else survey.poisoned
        self.rows: ClusteredBatch | None = clustered
        self._survey, self._layouts = survey, layouts
        self._locates = survey is not None or layouts is not None
        self._checked = False  # whether the op that is being applied has set self.rows
        self._seen: dict[Any, ClusteredBatch | None] = {}  # rows by shape and parameters; None if they are not unique
        self.recorded = 0  # the structure at the end of the forward
        self._in_backward = False
        self._roots = sinks
        self._sinks = {id(s.tensor): s for s in sinks}
        self._separable = set(separable)
        self._derived: list[Sink] = []
        # The tensors are kept alive, so that no id is reused while the mode is active.
        self._shared: dict[int, Tensor] = {id(x): x for x in own_tensors(model)}
        self._expanded: dict[int, Tensor] = {}
        # Tensors whose rows belong to unknown samples, and the op that lost track. Storages, of those written in place.
        self._untracked: dict[int, tuple[Tensor, str]] = {}
        self._untracked_storages: dict[int, str] = {}
        self._samples = set(map(id, batch))
        self._mark = next(_MARKS)
        self.structure = hash((clustered.B,))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        shared, samples = self._shared, self._samples
        tensors = tensors_in(args, kwargs)
        varies, trainable = False, []
        for x in tensors:
            if id(x) in shared:
                if x.requires_grad:
                    trainable.append(x)
            elif not varies:
                varies = self._may_have_rows(x)
        if not varies:
            drawn = samples and (func in DRAWING or any(map(self._differs, tensors)))
            out = self.share(func(*args, **kwargs), func, args)
            if drawn:
                for x in tensors_in((out,), {}):
                    x._antdiff_drawn = self._mark  # type: ignore[attr-defined]
            return out
        check = CROSS_SAMPLE.get(func)
        if check is not None:
            check(*args, **kwargs)
        moves = func in MOVES_ROWS
        if moves:
            moved = structure_of(func, args, kwargs)
            if moved is not None:
                self.structure = hash((self.structure, moved))
        if trainable and (torch.is_grad_enabled() or (self.probe is not None and not self._locates)):
            out = self._apply(func, args, kwargs, tensors, trainable)
        else:
            out = func(*args, **kwargs)
            if type(out) in _NO_TENSORS:  # x.shape, x.dim(), x.device, ...: nothing to follow
                return out
            if self.probe is not None:
                self._poison_conversion(out, func, args, kwargs)
        if moves or self._untracked:
            self._follow(out, func, args, kwargs)
        if samples and not (isinstance(out, Tensor) and out.requires_grad) and any(map(self._has_rows, tensors)):
            # On the tensor itself, so that nothing is kept alive. A result with a graph needs no mark.
            for x in tensors_in((out,), {}):
                x._antdiff_rows = self._mark  # type: ignore[attr-defined]
        # Only a shared tensor that was written into matters, and that is the result of every such op but x[i] = y.
        written = id(out) in shared or not isinstance(out, Tensor) or func is Tensor.__setitem__
        if written and (writes_in_place(func) or "out" in kwargs):
            for x in tensors_in((out,), {}) if func is not Tensor.__setitem__ else args[:1]:
                if id(x) in shared and (x.requires_grad or all(x is not y for y in own_tensors(self._model))):
                    self._unshare(x)
        return out

    def _apply(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        trainable: list[Tensor],
    ) -> Any:
        for x in tensors:
            if (x.dim() == 0 or x.shape[0]) and self.varies(x):
                break
        else:
            out = func(*detached_all(args), **detached_all(kwargs))  # no rows, so no gradient (an empty history)
            if not isinstance(out, Tensor):
                return out
            if not out.numel():  # unlike cat([parameter, history])
                return self.tap(out, lambda *_: None, ())
        rule = RULES.get(func)
        outer = self.rows, self._checked  # a rule may be composed of ops with rules
        self.rows, self._checked = self.clustered, False
        try:
            out = NotImplemented if rule is None else rule(self, func, *args, **kwargs)
            if out is NotImplemented and (
                func in self._separable or getattr(func, "_overloadpacket", None) in self._separable
            ):
                out = by_slices(self, func, *args, **kwargs)
        finally:
            self.rows, self._checked = outer
        if out is NotImplemented:
            names = sorted({self.sink(x).name for x in trainable})
            raise GroupingError(
                f"{resolve_name(func) or func} applies {', '.join(names)} to the batch in a way that has no grouped "
                "rule. If it treats samples independently, pass separable=[that function]; otherwise use "
                "route='split'."
            )
        return out

    # ---- the interface of the rules: see Recorder --------------------------------------------------------------------

    @property
    def lead(self) -> int:
        return 1 if self.rows is None else self.rows.lead

    def varies(self, x: Any) -> bool:
        return isinstance(x, Tensor) and id(x) not in self._shared and self._may_have_rows(x)

    def trains(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.requires_grad and id(x) in self._shared

    def sink(self, x: Tensor) -> Sink:
        sink = self._sinks.get(id(x))
        if sink is None:
            sink = Sink(f"a tensor {list(x.shape)} computed from parameters", x, self.clustered.k)
            self._sinks[id(x)] = sink
            self._derived.append(sink)
        return sink

    def sink_of(self, x: Tensor | None) -> Sink | None:
        return self.sink(x) if x is not None and self.trains(x) else None

    def expanded_from(self, x: Tensor) -> Tensor | None:
        return self._expanded.get(id(x))

    def check(self, x: Tensor, *users: Tensor | None) -> Tensor:
        lost = self._lost_by(x) if self._untracked else None
        if lost is not None:
            names = ", ".join(sorted({self.sink(p).name for p in users if p is not None and self.trains(p)}))
            raise RowsError(
                f"{lost} places rows by the values of the batch, so the rows that meet {names} "
                "belong to unknown samples. Use route='split', which needs no more than independent samples."
            )
        if self._locates:
            return self._locate(x, *users)
        m = self.clustered.repeats(x)
        self.structure = hash((self.structure, m))
        if self.probe is not None and (x.is_floating_point() or x.is_complex()):
            self._probe(x, m, ", ".join(self.sink(p).name for p in users if p is not None and self.trains(p)))
        return x

    def _locate(self, x: Tensor, *users: Tensor | None) -> Tensor:
        """Look where the rows of ``x`` are, or set ``rows`` to what the probe of this batch has shown."""
        use = (x.shape, *map(id, users))
        if self._in_backward:  # a checkpoint recomputes an op of the forward
            self.rows = self._seen.get(use)
            return x
        self.structure = place = hash((self.structure, tuple(x.shape)))
        if self._survey is not None and (x.is_floating_point() or x.is_complex()):
            names = ", ".join(self.sink(p).name for p in users if p is not None and self.trains(p))
            self._survey.see(place, x, names)
            return x
        layout = None if self._layouts is None else self._layouts.get(place)
        if layout is None:
            self.clustered.repeats(x)
            rows = self.clustered
        else:
            rows = layout.rows(self.clustered)
        if self._checked and rows is not self.rows:
            raise RowsError(
                f"{', '.join(self.sink(p).name for p in users if p is not None and self.trains(p))} meets two tensors "
                "whose rows belong to the samples in different orders. Use route='split'."
            )
        self.rows, self._checked = rows, True
        self._seen[use] = rows if self._seen.get(use, rows) is rows else None
        return x

    def tap(self, out: Tensor, write: Write, users: Sequence[Tensor | None], *saved: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return out
        sinks = tuple(self.sink_of(x) for x in users)
        write = self._writer(write, sinks)
        return _Tap.apply(out, _ANCHOR, write, *(x.detach() for x in saved))  # type: ignore

    def leaf(self, x: Tensor, write: Write, user: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return x.detach()
        return _Leaf.apply(x.detach(), _ANCHOR, self._writer(write, (self.sink(user),)))  # type: ignore

    # ---- backward ------------------------------------------------------------------------------------------------

    def backward(self, per_sample: Tensor, factors: Tensor) -> None:
        """Add the gradient of ``(factors * per_sample)``, summed over cluster i, to row i of every sink.

        Args:
            per_sample: the losses ``[B]``.
            factors: ``[B]``.

        Raises:
            GroupingError: a parameter received a gradient that no rule has split, so its K gradients are unknown.
        """
        if id(per_sample) in self._shared:  # the losses do not depend on the batch
            per_sample = self.leaf(per_sample, own_rows, per_sample)
        edge = get_gradient_edge(per_sample)
        self.recorded = self.structure
        for sink in self._roots:
            sink.tensor.grad = None
        # Given a gradient edge instead of a tensor, autograd leaves this mode on while it runs. The mode has to stay
        # on, so that the ops that a checkpoint recomputes are recorded too.
        self._in_backward = True
        try:
            with self:
                torch.autograd.backward((edge,), (factors,))
        finally:
            self._in_backward = False
        leaks = [s.name for s in self._roots if s.tensor.grad is not None]
        if leaks:
            raise GroupingError(f"{', '.join(leaks)} {LEAK}")
        self._pull_back()
        self._finish()

    def _finish(self) -> None:
        for sink in self._roots:
            sink.finish()

    def _pull_back(self) -> None:
        """Pull the rows of tensors computed from parameters back to rows of the parameters."""
        written = [s for s in self._derived if not s.fresh]
        if not written:
            return
        with self:
            pulled = pull_back([s.tensor for s in written], [s.rows for s in written], [s.tensor for s in self._roots])
        for sink, grads in zip(self._roots, pulled, strict=True):
            if grads is not None:
                sink.add_all(grads)

    def _writer(self, write: Write, sinks: Sinks) -> Callable[..., None]:
        if self.rows is None or (self._locates and self._in_backward):
            return (
                _refuse_recomputed  # runs in a re-entrant checkpoint only: the others discard the graph they recompute
            )
        return partial(self._write, write, self.rows, sinks)

    def _write(self, write: Write, rows: ClusteredBatch, sinks: Sinks, grad: Tensor, *saved: Tensor) -> None:
        if not self._in_backward:
            raise GroupingError(SECOND_ORDER)
        if torch.is_grad_enabled() or torch.is_autocast_enabled(grad.device.type):
            with torch._C.DisableTorchFunction(), torch.no_grad(), no_autocast(grad.device.type):
                self._fill(write, rows, sinks, grad, saved)
        else:  # as in most backwards; every context costs some 0.5 us per op with parameters
            with torch._C.DisableTorchFunction():
                self._fill(write, rows, sinks, grad, saved)

    # GramMode overrides this method.
    def _fill(self, write: Write, rows: ClusteredBatch, sinks: Sinks, grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        write(rows, sinks, grad, *saved)

    # ---- bookkeeping ---------------------------------------------------------------------------------------------

    def share(self, out: Any, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if isinstance(out, Tensor):
            self._shared[id(out)] = out
            if out.requires_grad and func in _EXPANDS and out.dim() and out.shape[0] != 1 and out.stride(0) == 0:
                source = args[0]
                if out.shape[1:] == (source.shape if source.dim() < out.dim() else source.shape[1:]):
                    self._expanded[id(out)] = source
        elif out is not None and not isinstance(out, (bool, int, float, torch.Size, torch.dtype, torch.device)):
            for x in tensors_in((out,), {}):
                self._shared[id(x)] = x
        return out

    def _unshare(self, x: Tensor) -> None:
        """Treat ``x`` and all its views as varying, because varying values were written into it in place."""
        storage = x.untyped_storage()._cdata
        roots = {id(s.tensor) for s in self._roots}
        for key, y in list(self._shared.items()):
            if key not in roots and y.untyped_storage()._cdata == storage:
                del self._shared[key]

    def _may_have_rows(self, x: Tensor) -> bool:
        """Return whether ``x`` may depend on the batch: all tensors may if the samples are not known.

        Otherwise a tensor that was computed neither from the batch nor with a graph is a constant. Taking a constant
        for rows of samples would be wrong; taking rows for a constant only holds K gradients of them.
        """
        return not self._samples or x.requires_grad or self._is_marked(x)

    def _has_rows(self, x: Any) -> bool:
        """Return whether ``x`` was computed from the batch."""
        return isinstance(x, Tensor) and (
            (x.requires_grad and id(x) not in self._shared and not isinstance(x, nn.Parameter)) or self._is_marked(x)
        )

    def _is_marked(self, x: Tensor) -> bool:
        return id(x) in self._samples or getattr(x, "_antdiff_rows", None) == self._mark

    def _differs(self, x: Any) -> bool:
        """Return whether the values of ``x`` may differ from batch to batch, as random numbers do."""
        return isinstance(x, Tensor) and (id(x) not in self._shared or getattr(x, "_antdiff_drawn", None) == self._mark)

    def _follow(self, out: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Mark the result of an op that loses track of the samples, or that is computed from such a result."""
        cause = None
        if loses_track(func, args, kwargs, self._differs, self._has_rows) and not self._noted(out, args, kwargs):
            cause = resolve_name(func) or str(func)
        if cause is None and self._untracked:
            cause = next(filter(None, map(self._lost_by, tensors_in(args, kwargs))), None)
        if cause is None:
            return
        for x in tensors_in((out,), {}):
            self._untracked[id(x)] = (x, cause)
        if args and isinstance(args[0], Tensor) and (func is Tensor.__setitem__ or out is args[0]):
            self._untracked[id(args[0])] = (args[0], cause)
            self._untracked_storages[args[0].untyped_storage()._cdata] = cause

    def _noted(self, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Add the integers and masks that place rows to the structure of this batch, if its rows are located."""
        if not self._locates:
            return False
        places = [x for x in tensors_in((*args, out), kwargs) if not (x.is_floating_point() or x.is_complex())]
        with torch._C.DisableTorchFunction():
            contents = [x.detach().cpu().contiguous().numpy().tobytes() for x in places]
        self.structure = hash((self.structure, *contents))
        return bool(places)

    def _lost_by(self, x: Tensor) -> str | None:
        """Return the op that lost track of the samples of ``x``, None if they are known."""
        if id(x) in self._untracked:
            return self._untracked[id(x)][1]
        return self._untracked_storages.get(x.untyped_storage()._cdata) if self._untracked_storages else None

    def _poison_conversion(
        self, out: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Under the probe, make the floats NaN that are computed from the integers of a poisoned sample.

        Integers (labels, timesteps) cannot be NaN themselves.
        """
        assert self.probe is not None
        if not isinstance(out, Tensor) or not out.is_floating_point() or out.dim() == 0:
            return
        if out.shape[0] != self.clustered.B or getattr(func, "__name__", "").endswith("_like"):
            return
        varying = [x for x in tensors_in(args, kwargs) if self.varies(x)]
        if varying and not any(x.is_floating_point() or x.is_complex() for x in varying):
            out[self.probe] = torch.nan

    def _probe(self, x: Tensor, m: int, name: str) -> None:
        """Raise if a row of a sample that is not probed is NaN in ``x``, which has m rows per sample."""
        assert self.probe is not None
        bad = torch.isnan(x).reshape(x.shape[0], -1).any(1)
        others = int((bad & ~self.probe.repeat_interleave(m)).sum())
        if others:
            raise RowsError(
                f"where {name} meets the batch, the values of some samples have reached {others} rows of other "
                "samples: an op before it mixes samples (BatchNorm, attention over the batch), or the batch is not the "
                "first dimension. Use route='loop' for a network that mixes samples, and route='split' for another "
                "layout."
            )


class _Tap(torch.autograd.Function):
    """Pass ``out`` and its gradient on unchanged, and call ``write`` with the gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, _anchor: Tensor, write: Write, *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)  # not in a closure: checkpointing and offloading replace only saved tensors
        ctx.write = write
        # The output has the memory of `out` and a history of its own. To autograd it is not a view, so the network may
        # modify it in place.
        return torch.ops.aten._unsafe_view(out, out.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # may rerun a checkpointed forward, which the active mode records
        ctx.write(grad_out, *saved)
        return grad_out, None, None, *(None for _ in saved)


class _Leaf(torch.autograd.Function):
    """Pass the detached ``x`` on, and call ``write`` with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, write: Write) -> Tensor:
        ctx.write = write
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.write(grad)
        return None, None, None


def pull_back(outs: Sequence[Tensor], rows: Sequence[Tensor], ins: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the K gradients of the parameters ``ins``, given the K gradients of tensors computed from them.

    Args:
        rows: ``[k, *shape]`` per tensor of ``outs``.

    Returns:
        ``[k, *shape]`` per tensor of ``ins``, None if no tensor of ``outs`` depends on it.
    """
    out_edges, in_edges = ([get_gradient_edge(x) for x in tensors] for tensors in (outs, ins))
    grad = partial(torch.autograd.grad, out_edges, in_edges, retain_graph=True, allow_unused=True)
    try:
        return list(grad(rows, is_grads_batched=True))
    except RuntimeError:  # an op between the two has no batched backward, for example a custom Function
        per_cluster = [grad([r[i] for r in rows]) for i in range(len(rows[0]))]
        return [_stack(p, grads) for p, grads in zip(ins, zip(*per_cluster, strict=True), strict=True)]


def _stack(p: Tensor, grads: Sequence[Tensor | None]) -> Tensor | None:
    if all(g is None for g in grads):
        return None
    return torch.stack([torch.zeros_like(p) if g is None else g for g in grads])


def no_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


LEAK = (
    "received a gradient that is not split by cluster: it is used in a custom autograd Function, a compiled region, or "
    "another op that a torch function mode does not see. Use route='split'."
)


def _refuse_recomputed(*_: Any) -> None:
    raise GroupingError(
        "a checkpoint recomputes an op whose rows are not in the order of the samples, and their samples are unknown "
        "there. Use use_reentrant=False, or route='split'."
    )


SECOND_ORDER = (
    "the forward computes a gradient (a gradient penalty, for example), and the grouped route supports first "
    "derivatives only. Use route='split'."
)

_EXPANDS = {Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to}


# What a torch function returns that neither is a tensor nor holds one. None is not here: x[i] = y returns it.
_NO_TENSORS = frozenset((bool, int, float, torch.Size, torch.dtype, torch.device, torch.layout))


def tensors_in(args: Iterable[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments of a call, also those in tuples, lists and dicts."""
    found: list[Tensor] = []
    _collect(args, found)
    if kwargs:
        _collect(kwargs.values(), found)
    return found


def _collect(values: Iterable[Any], found: list[Tensor]) -> None:
    # A loop and not a generator: it runs for every torch function that the network calls.
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (tuple, list)):
            _collect(x, found)
        elif isinstance(x, dict):
            _collect(x.values(), found)


def own_tensors(model: nn.Module) -> list[Tensor]:
    """Return parameters, buffers, and tensors that are plain attributes of modules, in dicts, lists and tuples too."""
    values: list[Any] = []
    for module in model.modules():
        for x in vars(module).values():  # about 20 per module, at every call: no function is called here
            kind = type(x)
            if kind is OrderedDict or kind is dict:
                if x and x is not module._modules:  # most of them hold hooks, and are empty
                    values.extend(x.values())
            elif kind not in _PLAIN:
                values.append(x)
    return tensors_in(values, {})


_PLAIN = frozenset((bool, int, float, str, type(None), set))
