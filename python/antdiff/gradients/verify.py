"""Checks of cluster gradients against the route ``loop``, and the choice of a route by ``auto``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from antdiff.gradients.batch import ClusteredBatch, GroupingError, check_losses, each_row
from antdiff.gradients.grouped.mode import GroupedMode
from antdiff.gradients.routes import Chosen, LossFn, Network, refuse_batch_norm, run
from antdiff.gradients.samples import Samples
from antdiff.gradients.sinks import GradientStore

# The gradient of a parameter is compared relative to its norm, or to this share of the norm of the whole row of J if
# its norm is smaller. A gradient that is zero up to rounding (the bias of a key in attention) has no scale of its own.
SMALL = 0.05
# Rounding errors are about 1e-13 in float64. Products in other dtypes may be in bfloat16 or TF32, where a sum in
# another order differs by a few 1e-3. Samples that are mixed, or rows of another cluster, differ by 0.1 or more.
TOLERANCE = {torch.float64: 1e-8}
TOLERANCE_LOW = 2e-2


def verify(route: Chosen, net: Network, loss_fn: LossFn, batch: Sequence[Any], clustered: ClusteredBatch) -> float:
    """Run both checks on a sorted batch; see :meth:`ClusterGradients.verify`."""
    refuse_batch_norm(route, net.model)
    with repeatable(net.model) as replay:
        with uncompiled(net):
            probe(route, net, loss_fn, batch, clustered, replay)
        error, where = distance(route, net, loss_fn, batch, clustered, replay)
    if error > tolerance(net.model):
        raise GroupingError(
            f"route {route!r} differs from 'loop' by {error:.1e} in the gradient of {where}, so the samples are "
            "not independent, or their rows are not in the order of the first dimension. Use route='loop'."
        )
    return error


def choose(net: Network, loss_fn: LossFn, batch: Sequence[Any], clustered: ClusteredBatch) -> tuple[Chosen, str]:
    """Return the route that ``auto`` takes, and the reason."""
    with uncompiled(net):  # the rules are the same, so no program is compiled for a few samples
        route, why = _on_few(Network(net.model, net.separable), loss_fn, batch, clustered)
    if net.compiled is None or route != "grouped":
        return route, why
    with repeatable(net.model):
        try:
            sinks = GradientStore(net.model, clustered.k, None, reuse=False).sinks(fresh=True)
            run(route, net, loss_fn, batch, clustered, sinks)
        except Exception as error:
            # The eager route has just succeeded, so this is a failure of the compiler.
            return "split", f"'grouped' does not compile: {type(error).__name__}: {error}"
    return route, f"{why}, and it compiled"


def uncompiled(net: Network) -> AbstractContextManager[Any]:
    """Return a context in which compiled functions run eagerly."""
    return nullcontext() if net.compiled is None else torch.compiler.set_stance("force_eager")


def _on_few(net: Network, loss_fn: LossFn, batch: Sequence[Any], clustered: ClusteredBatch) -> tuple[Chosen, str]:
    """Choose a route from at most two samples per cluster of a sorted batch; return it and the reason."""
    try:
        refuse_batch_norm("grouped", net.model)
    except GroupingError as reason:
        return "loop", str(reason)
    small, few = first_of_each(batch, clustered)
    if few.k > 1 and few.sizes.count(0) == few.k - 1 and few.B == 2:
        # With one cluster all routes agree, even if rows are out of order. Treat its two samples as two clusters.
        few = ClusteredBatch(torch.arange(2, device=few.cluster.device), [1, 1, *[0] * (few.k - 2)], None)
    with repeatable(net.model) as replay:
        once = loss_fn(*small)
        check_losses(once, few.B)
        replay.rewind()
        if not torch.equal(once.nan_to_num(), loss_fn(*small).nan_to_num()):
            return "split", (
                "loss_fn gives different losses for the same batch and random state, so 'grouped' cannot be checked; "
                "draw noise and timesteps before the call"
            )
        limit, reasons = tolerance(net.model), ""
        candidates: tuple[Chosen, ...] = ("grouped", "split")
        for route in candidates:
            try:
                error, where = distance(route, net, loss_fn, small, few, replay)
            except GroupingError as reason:
                reasons += f"not {route!r}: {reason} "
                continue
            if error <= limit:
                return route, f"{reasons}on {few.B} samples it differs from 'loop' by {error:.0e}"
            if error != error:
                return route, f"{reasons}not compared with 'loop', since slices draw other random numbers"
            reasons += f"not {route!r}: on {few.B} samples it differs from 'loop' by {error:.0e} in {where}. "
    return "loop", reasons.strip()


class Replay:
    """A snapshot of the model's buffers and of torch's global generators, to which :meth:`rewind` returns."""

    def __init__(self, model: nn.Module) -> None:
        devices = {x.device for x in (*model.parameters(), *model.buffers()) if x.device.type == "cuda"}
        self.devices = sorted(devices, key=str)
        self._buffers = [(b, b.clone()) for b in model.buffers()]
        self._states = self._random()

    def _random(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.devices)]

    def drew(self) -> bool:
        """Return whether random numbers were drawn since the snapshot."""
        return not all(torch.equal(a, b) for a, b in zip(self._states, self._random(), strict=True))

    @torch.no_grad()
    def rewind(self) -> None:
        torch.set_rng_state(self._states[0])
        for device, state in zip(self.devices, self._states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
        for buffer, value in self._buffers:
            buffer.copy_(value)


@contextmanager
def repeatable(model: nn.Module) -> Iterator[Replay]:
    """Restore buffers, gradients and torch's global generators at the end of the with block."""
    replay = Replay(model)
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        yield replay
    finally:
        replay.rewind()
        for p, grad in grads:
            p.grad = grad


def distance(
    route: Chosen,
    net: Network,
    loss_fn: LossFn,
    batch: Sequence[Any],
    clustered: ClusteredBatch,
    replay: Replay,
) -> tuple[float, str]:
    """Return the distance of a route's J from that of ``loop``, and the parameter in which it is largest.

    The distance is NaN if the two routes draw different random numbers.
    """
    if route == "loop":
        return 0.0, ""
    k = clustered.k
    J = GradientStore(net.model, k, None, reuse=net.compiled is None)
    reference = GradientStore(net.model, k, None)
    replay.rewind()
    sinks = J.sinks(fresh=True)
    run(route, net, loss_fn, batch, clustered, sinks)
    J.keep(sinks)
    if route == "split" and replay.drew():
        return float("nan"), ""
    replay.rewind()
    run("loop", net, loss_fn, batch, clustered, reference.sinks(fresh=True))
    error, index = worst_error(J.tensors, reference.tensors)
    return error, J.named[index][0]


def _norms(rows: Tensor) -> Tensor:
    """Return the norm of each row, ``[k]``."""
    norms: Tensor = torch.linalg.vector_norm(rows.double().reshape(len(rows), -1), dim=1)
    return norms


def worst_error(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> tuple[float, int]:
    """Return the largest relative difference of a parameter's rows, and the index of that parameter."""
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(got, want, strict=True)) if a is not None and b is not None]
    norms = torch.stack([_norms(b) for _, _, b in pairs])  # [parameters, k]
    gaps = torch.stack([_norms(a - b) for _, a, b in pairs])
    scale = norms.maximum(SMALL * norms.square().sum(0).sqrt())
    error = torch.where(gaps == 0, gaps, gaps / scale).nan_to_num(nan=torch.inf)  # 0 / 0 is not an error, NaN is one
    return float(error.max()), pairs[int(error.amax(1).argmax())][0]


def tolerance(model: nn.Module) -> float:
    """Return the largest tolerance of the dtypes of the trainable parameters."""
    return max(TOLERANCE.get(p.dtype, TOLERANCE_LOW) for p in model.parameters() if p.requires_grad)


def probe(
    route: Chosen,
    net: Network,
    loss_fn: LossFn,
    batch: Sequence[Any],
    clustered: ClusteredBatch,
    replay: Replay,
) -> None:
    """Run a forward with the first sample all NaN and one with the last, and raise if NaN reaches another sample.

    Ops that remove NaN hide a dependence from this check, but not from the comparison with ``loop``.
    """
    if route == "loop":
        return
    for j in sorted({0, clustered.B - 1}):

        def poison(x: Tensor, j: int = j) -> Tensor:
            if not x.is_floating_point():
                return x
            x = x.detach().clone()
            x[j] = torch.nan
            return x

        poisoned = each_row(batch, clustered.B, poison)
        replay.rewind()
        if route == "grouped":
            with GroupedMode(
                net.model,
                clustered,
                GradientStore(net.model, clustered.k, None).sinks(fresh=True),
                net.separable,
                probe=j,
            ):
                losses = loss_fn(*poisoned)
        else:
            losses = loss_fn(*poisoned)
        check_losses(losses, clustered.B)
        others = torch.isnan(losses)
        others[j] = False
        if others.any():
            raise GroupingError(
                f"the values of sample {j} have reached the losses of {int(others.sum())} other samples, so the "
                "network or the loss mixes samples. Use route='loop', the only one that serves such a network."
            )


def first_of_each(
    batch: Sequence[Any], clustered: ClusteredBatch, each: int = 2
) -> tuple[Sequence[Any], ClusteredBatch]:
    """Return at most ``each`` samples of every cluster of a sorted batch."""
    picked = [i for start, stop in clustered.slices() for i in range(start, min(stop, start + each))]
    index = torch.tensor(picked, device=clustered.cluster.device)
    sizes = [min(size, each) for size in clustered.sizes]
    return Samples.of(batch, clustered.B).select(index), ClusteredBatch(clustered.cluster[index], sizes, None)
