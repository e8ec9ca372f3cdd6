"""Route ``grouped`` under torch.compile: the same rules, run while the graph is traced.

Dynamo captures the loss function as a graph of torch functions. The parameters are inputs of the graph, and guards
check its assumptions. The backend of this file runs the graph under a :class:`TracedMode`, so that every rule sees the
same calls as in eager mode, and passes the result to the backend that the user asked for.

Only the destination of the gradients differs. A traced graph must not write to J as a side effect. Each parameter
therefore enters the graph as a *leaf* ``[k, *shape]``, which is the parameter expanded without a copy. A tap returns
the K gradients of the parameter as the gradient of this leaf.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from antdiff.gradients.batch import ClusteredBatch, GroupingError, PaddedBatch
from antdiff.gradients.grouped.mode import LEAK, SECOND_ORDER, GroupedMode, no_autocast, own_tensors, pull_back
from antdiff.gradients.grouped.recorder import Write
from antdiff.gradients.samples import Samples
from antdiff.gradients.sinks import FunctionalSink, Sink

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
LossFn = Callable[..., Tensor]


class CompiledLoss:
    """Compiles loss functions for the grouped route.

    Dynamo caches one graph per set of guards. Per graph, the first k tuples of cluster sizes get one program each, and
    stratified sampling with any batch size has no more than k tuples. Every further tuple uses a program that pads all
    clusters with zeros to the same room, a number of samples. One such program is compiled per room that is needed. The
    padding makes its weight gradients more expensive.

    Args:
        backend: the backend of torch.compile that compiles the traced graphs.
        fullgraph: the option of torch.compile. Graph breaks are safe: if an eager part applies a parameter, the
            parameter receives a gradient past the rules, which raises.

    Attributes:
        programs: the number of programs that have been compiled.
    """

    def __init__(self, model: nn.Module, backend: Backend, fullgraph: bool, separable: Iterable[Any] = ()) -> None:
        self.model, self.separable = model, tuple(separable)
        self.programs = 0
        self._inner, self._fullgraph = backend, fullgraph
        self._last: tuple[LossFn, LossFn] | None = None
        self._now: tuple[ClusteredBatch, dict[int, Tensor], set[int]] | None = None

    def __call__(
        self, loss_fn: LossFn, batch: Sequence[Any], clustered: ClusteredBatch, sinks: list[Sink]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the per-sample losses ``[B]`` and, per sink, the leaf ``[k, *shape]`` that receives its gradients."""
        if self._last is None or self._last[0] is not loss_fn:
            loss = getattr(loss_fn, "_torchdynamo_orig_callable", loss_fn)
            self._last = loss_fn, torch.compile(loss, backend=self._capture, fullgraph=self._fullgraph, dynamic=False)
        leaves = [s.tensor.detach().expand(clustered.k, *s.tensor.shape).requires_grad_() for s in sinks]
        samples = set(map(id, Samples.of(batch, clustered.B).tensors()))
        self._now = clustered, {id(s.tensor): leaf for s, leaf in zip(sinks, leaves, strict=True)}, samples
        try:
            return self._last[1](*batch), leaves
        finally:
            self._now = None

    def _capture(self, graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph of Dynamo, which calls this backend once per graph."""
        programs: dict[tuple[Any, ...], Callable[..., Any]] = {}

        def run(*inputs: Any) -> Any:
            if self._now is None:
                raise GroupingError(
                    "a graph compiled for cluster gradients can only run inside ClusterGradients, and it was called "
                    "outside. Compile the loss function again for other uses."
                )
            clustered, leaves, samples = self._now
            values = [*(leaves.get(id(x), x) for x in inputs), clustered.cluster]
            trained = tuple(id(x) in leaves for x in inputs)
            key: tuple[Any, ...] = (tuple(clustered.sizes), trained, torch.is_grad_enabled())
            if key not in programs and len(programs) >= clustered.k:
                # Rooms are multiples of a quarter of the mean cluster size, so that there are few rooms and few zeros.
                step = -(-clustered.B // (4 * clustered.k))
                room = -(-max(clustered.sizes) // step) * step
                key = (room, *key[1:])
                values += PaddedBatch.fill(clustered, room)
            if key not in programs:
                self.programs += 1
                own = {id(x): "" for x in own_tensors(self.model)}
                own.update((id(x), name) for name, x in self.model.named_parameters())
                names = {i: own[id(x)] for i, x in enumerate(inputs) if id(x) in own}
                if any(id(x) in samples for x in inputs):  # else the graph starts in the middle of the forward
                    constant = (i for i, x in enumerate(inputs) if isinstance(x, Tensor) and not x.requires_grad)
                    names |= {i: "" for i in constant if i not in names and id(inputs[i]) not in samples}
                traced = partial(_traced, graph, len(inputs), clustered.sizes, names, trained, self.separable)
                n_outputs = len(graph.graph.output_node().args[0])  # type: ignore[arg-type]
                programs[key] = self._inner(_single_call(traced, len(values), n_outputs), values)
            return programs[key](*values)

        return run


def compiler_of(
    model: nn.Module, options: Mapping[str, Any] | None, separable: Iterable[Any] = ()
) -> CompiledLoss | None:
    """Return a compiler with these options of torch.compile, or, if None, with the options of the compiled model.

    Returns:
        None if ``options`` is None and neither the model nor one of its modules is compiled.
    """
    whole: Any = next((m for m in model.modules() if hasattr(m, "_orig_mod")), None) if options is None else None
    if whole is None:
        if options is None and all(m._compiled_call_impl is None for m in model.modules()):
            return None
        whole = torch.compile(nn.Identity(), **(options or {}))
    # The backend that torch.compile built from its backend, mode and options. No public API returns it.
    backend = whole.dynamo_ctx.callback
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return CompiledLoss(model, backend, bool((options or {}).get("fullgraph")), separable)


def _traced(
    graph: fx.GraphModule,
    n_inputs: int,
    sizes: list[int],
    names: dict[int, str],
    trained: tuple[bool, ...],
    separable: tuple[Any, ...],
    *values: Any,
) -> Any:
    """Run the graph with taps. AOTAutograd calls this function with fake tensors.

    Args:
        names: the names of the inputs that are the model's own tensors, by position; empty for constants of the loss.
        trained: whether each input is a trainable parameter, given as its leaf.
        values: the inputs, then the cluster of each sample, then, if clusters are padded, the arguments ``index`` and
            ``there`` of :class:`PaddedBatch`.
    """
    inputs, (cluster, *padding) = list(values[:n_inputs]), values[n_inputs:]
    clustered = PaddedBatch(cluster, len(sizes), *padding) if padding else ClusteredBatch(cluster, sizes, None)
    leaves = {i: inputs[i] for i in names if trained[i]}
    for i, leaf in leaves.items():
        inputs[i] = _Parameter.apply(leaf, names[i])  # type: ignore[no-untyped-call]
    shared = {i: inputs[i] for i in names}
    with TracedMode(graph, clustered, names, shared, leaves, separable):
        return graph(*inputs)


def _single_call(f: Callable[..., Any], n_inputs: int, n_outputs: int) -> fx.GraphModule:
    """Return a graph whose only node calls ``f``. Backends expect a graph, and ``f`` has to be run, not rewritten."""

    def traced(*values: Any) -> Any:
        return f(*values)

    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(n_inputs)]
    out = graph.call_function(traced, tuple(inputs))
    graph.output(tuple(graph.call_function(operator.getitem, (out, i)) for i in range(n_outputs)))
    return fx.GraphModule(nn.Module(), graph)


class TracedMode(GroupedMode):
    """A :class:`GroupedMode` without side effects: the K gradients of a parameter are returned as those of its leaf.

    Args:
        graph: its own tensors are shared.
        names: the names of ``shared``.
        shared: the inputs of the graph that are parameters or buffers, by position. They are shared too.
        leaves: the leaf ``[k, *shape]`` of each trainable parameter, by position.
    """

    def __init__(
        self,
        graph: nn.Module,
        clustered: ClusteredBatch,
        names: dict[int, str],
        shared: dict[int, Tensor],
        leaves: dict[int, Tensor],
        separable: Iterable[Any],
    ) -> None:
        super().__init__(graph, clustered, [Sink(names[i], shared[i], clustered.k) for i in leaves], separable)
        self._shared.update((id(x), x) for x in shared.values())
        self._leaves = {id(shared[i]): leaf for i, leaf in leaves.items()}

    def tap(self, out: Tensor, write: Write, users: Sequence[Tensor | None], *saved: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return out
        leaves = [self._leaf_of(x) for x in users]
        return _Tap.apply(out, partial(self._collect, write, users), len(leaves), *leaves, *(x.detach() for x in saved))  # type: ignore

    def leaf(self, x: Tensor, write: Write, user: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return x.detach()
        return _Leaf.apply(x.detach(), partial(self._collect, write, (user,)), self._leaf_of(user))  # type: ignore

    def _leaf_of(self, x: Tensor | None) -> Tensor | None:
        """Return the leaf of a shared tensor, None if it needs no gradient.

        The leaf of a tensor computed from parameters is its expansion, whose gradient is pulled back to their leaves.
        """
        if x is None or not self.trains(x):
            return None
        if id(x) not in self._leaves:
            roots = [s.tensor for s in self._roots]
            values = x.detach().expand(self.clustered.k, *x.shape)
            leaves = [self._leaves[id(r)] for r in roots]
            self._leaves[id(x)] = _Derived.apply(  # type: ignore[no-untyped-call]
                values, lambda grads: pull_back([x], [grads], roots), *leaves
            )
        return self._leaves[id(x)]

    def _collect(
        self, write: Write, users: Sequence[Tensor | None], grad: Tensor, *saved: Tensor
    ) -> list[Tensor | None]:
        """Return the gradient ``[k, *shape]`` of each user's leaf."""
        if torch.is_grad_enabled():
            raise GroupingError(SECOND_ORDER)
        sinks = [None if x is None or not self.trains(x) else FunctionalSink("", x, self.clustered.k) for x in users]
        with torch._C.DisableTorchFunction(), no_autocast(grad.device.type):
            write(self.clustered, sinks, grad, *saved)
        return [None if s is None else s.total for s in sinks]


class _Parameter(torch.autograd.Function):
    """Return a parameter, given its leaf. Only taps may send gradients to the leaf, so this backward raises."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, name: str) -> Tensor:
        ctx.name = name
        return leaf[0].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise GroupingError(f"{ctx.name} {LEAK}")


class _Derived(torch.autograd.Function):
    """Return a leaf for a tensor computed from parameters. Its K gradients are pulled back to their leaves."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, pull_back: Callable[[Tensor], Any], *_leaves: Tensor) -> Tensor:
        ctx.pull_back = pull_back
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.pull_back(grads)


class _Tap(torch.autograd.Function):
    """Pass ``out`` and its gradient on unchanged, and return what ``collect`` makes of the gradient to the n leaves."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, collect: Callable[..., Any], n: int, *tensors: Any) -> Tensor:
        ctx.save_for_backward(*tensors[n:])
        ctx.collect = collect
        return torch.ops.aten._unsafe_view(out, out.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return grad, None, None, *ctx.collect(grad, *saved), *(None for _ in saved)


class _Leaf(torch.autograd.Function):
    """Pass the detached ``x`` on, and return what ``collect`` makes of its gradient to the leaf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, collect: Callable[..., Any], _leaf: Tensor) -> Tensor:
        ctx.collect = collect
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.collect(grad)
