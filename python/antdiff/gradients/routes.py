"""One call for the three routes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from antdiff._checks import describe
from antdiff.gradients.batch import ClusteredBatch, GroupingError, check_losses
from antdiff.gradients.grouped.compiled import CompiledLoss
from antdiff.gradients.grouped.mode import LEAK, GroupedMode
from antdiff.gradients.loop import loop
from antdiff.gradients.parameters import isolated
from antdiff.gradients.sinks import Sink
from antdiff.gradients.split import split

Route = Literal["auto", "grouped", "split", "loop"]
Chosen = Literal["grouped", "split", "loop"]
LossFn = Callable[..., Tensor]


class Scaler(Protocol):
    """``torch.amp.GradScaler``, or any object whose ``scale`` multiplies a tensor by the loss scale."""

    def scale(self, outputs: Any) -> Any: ...


def loss_scale(scaler: Scaler | None, device: torch.device) -> Tensor | float:
    """Return the loss scale, as a tensor because ``scaler.get_scale()`` would wait for the device."""
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None; got {describe(scaler)}.")
    return 1.0 if scaler is None else scaler.scale(torch.ones((), device=device))  # type: ignore[no-any-return]


@dataclass
class Network:
    """A network and how its routes run it.

    Attributes:
        separable: see :class:`antdiff.ClusterGradients`.
        compiled: compiles loss functions for ``grouped``; None in eager mode.
    """

    model: nn.Module
    separable: tuple[Callable[..., Any], ...] = ()
    compiled: CompiledLoss | None = None


def run(
    route: Chosen,
    net: Network,
    loss_fn: LossFn,
    batch: Sequence[Any],
    clustered: ClusteredBatch,
    sinks: list[Sink],
    *,
    mean: bool = True,
    scale: Tensor | float = 1.0,
    mode: GroupedMode | None = None,
) -> Tensor:
    """Write or add ``scale`` times the gradient of the mean, or the sum, of cluster i's losses to row i of the sinks.

    Args:
        batch: sorted by cluster.
        mode: for ``grouped``, used instead of the mode that fills J.

    Returns:
        The sum of each cluster's losses ``[k]``, detached, in at least float32.
    """
    refuse_batch_norm(route, net.model)
    with isolated([s.tensor for s in sinks]):
        if route == "split":
            losses = split(loss_fn, batch, clustered, _factors(clustered, scale, mean), sinks)
            example = next((x for x in losses if x is not None), clustered.cluster.new_zeros(0, dtype=torch.float32))
            zero = example.new_zeros((), dtype=torch.promote_types(example.dtype, torch.float32))
            return torch.stack([zero if x is None else x.sum(dtype=zero.dtype) for x in losses])
        if route == "grouped" and net.compiled is not None and mode is None:
            return _compiled(net.compiled, loss_fn, batch, clustered, sinks, mean, scale)
        if route == "grouped" and mode is None:
            mode = GroupedMode(net.model, clustered, sinks, net.separable)
        if mode is None:
            per_sample = loss_fn(*batch)
        else:
            with mode:
                per_sample = loss_fn(*batch)
        return backward(per_sample, clustered, sinks, mode, mean=mean, scale=scale)


def backward(
    per_sample: Tensor,
    clustered: ClusteredBatch,
    sinks: list[Sink],
    mode: GroupedMode | None,
    *,
    mean: bool = True,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """Run the backward of ``grouped`` (with its mode) or of ``loop`` (without one); otherwise as :func:`run`."""
    check_losses(per_sample, clustered.B)
    values = per_sample.detach()
    if mode is None:
        loop(per_sample, clustered, _factors(clustered, scale, mean), sinks)
    else:
        mode.backward(per_sample, _each_factor(per_sample, clustered, scale, mean))
    return _sums(values, clustered)


def _compiled(
    compiled: CompiledLoss,
    loss_fn: LossFn,
    batch: Sequence[Any],
    clustered: ClusteredBatch,
    sinks: list[Sink],
    mean: bool,
    scale: Tensor | float,
) -> Tensor:
    for sink in sinks:
        sink.tensor.grad = None
    per_sample, leaves = compiled(loss_fn, batch, clustered, sinks)
    check_losses(per_sample, clustered.B)
    torch.autograd.backward((per_sample,), (_each_factor(per_sample, clustered, scale, mean),))
    leaks = [s.name for s in sinks if s.tensor.grad is not None]
    if leaks:
        raise GroupingError(
            f"{', '.join(leaks)} {LEAK} Alternatively, Dynamo has stopped compiling loss_fn after too many different "
            "batches; see torch._dynamo.config.recompile_limit."
        )
    for sink, leaf in zip(sinks, leaves, strict=True):
        grad, leaf.grad = leaf.grad, None
        sink.take(grad)
    return _sums(per_sample.detach(), clustered)


def _sums(values: Tensor, clustered: ClusteredBatch) -> Tensor:
    """Return the sums ``[k]`` of the losses ``[B]``, in at least float32. A NaN stays in its cluster."""
    return clustered.sums(values).view(clustered.k)


def _each_factor(per_sample: Tensor, clustered: ClusteredBatch, scale: Tensor | float, mean: bool) -> Tensor:
    """Return the factor of each sample's loss ``[B]``, computed on the device so that nothing is copied there."""
    dtype = torch.promote_types(per_sample.dtype, torch.float32)
    if mean:
        factors = clustered.counts.clamp(min=1).to(dtype).reciprocal()[clustered.cluster]
    else:
        factors = per_sample.new_ones(clustered.B, dtype=dtype)
    return (factors if type(scale) is float and scale == 1.0 else factors * scale).to(per_sample.dtype)


def _factors(clustered: ClusteredBatch, scale: Tensor | float, mean: bool) -> list[Tensor | float]:
    return [scale / max(size, 1) if mean else scale for size in clustered.sizes]


def refuse_batch_norm(route: Chosen, model: nn.Module) -> None:
    """Raise for BatchNorm unless the route is ``loop``.

    ``split`` would normalise by the statistics of each slice, and ``grouped`` would ignore the dependence of samples on
    each other.
    """
    if route == "loop":
        return
    for m in model.modules():
        if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None):
            name = next(n for n, other in model.named_modules() if other is m)
            raise GroupingError(
                f"{name} ({type(m).__name__}) takes the statistics of the batch, so it mixes the samples of all "
                "clusters. Use GroupNorm, freeze its statistics with .eval(), or use route='loop'."
            )
