"""Gradients of the weight and bias of normalisations, cluster by cluster."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from antdiff.gradients.batch import ClusteredBatch, GroupingError
from antdiff.gradients.grouped.recorder import Op, Recorder, detached
from antdiff.gradients.sinks import Sinks


def group_norm(
    recorder: Recorder,
    func: Op,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    if not recorder.varies(input) or recorder.varies(weight) or recorder.varies(bias):
        return NotImplemented
    x = _norm_input(recorder.check(input, weight, bias))  # [R, C, ...]
    if recorder.lead > 1:
        return NotImplemented
    if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
        x = x.contiguous()
    R, C, *space = x.shape
    n = torch.Size(space).numel()
    out, mean, rstd = torch.native_group_norm(x, detached(weight), detached(bias), R, C, n, num_groups, eps)
    return recorder.tap(out, _group_norm_grads, (weight, bias), x, mean, rstd)


def _group_norm_grads(
    clustered: ClusteredBatch, sinks: Sinks, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor
) -> None:
    """Sum grad, and grad times the normalised x, per channel of each sample, and then over the samples of each cluster.

    The fused backward kernel sums each channel over all samples. Here it gets the channels of all R samples as the
    channels of a single sample, so that it returns sums per sample.
    """
    R, C = x.shape[:2]
    # The kernel reads its arguments as contiguous, and the gradient of a slice of a concatenation is not.
    g, x = (_float(y).reshape(1, R * C, -1).contiguous() for y in (grad, x))
    mean, rstd = (_float(y).view(1, -1) for y in (mean, rstd))  # [1, R groups]
    shape = (1, R * C, x.shape[2], mean.shape[1])
    _, weight_sums, bias_sums = torch.ops.aten.native_group_norm_backward.default(
        g, x, mean, rstd, x.new_ones(R * C), *shape, [False, True, True]
    )
    for sink, sums in zip(sinks, (weight_sums, bias_sums), strict=True):
        if sink is not None:
            sink.add_sums(clustered, sums.view(R, C))


def layer_norm(
    recorder: Recorder,
    func: Op,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    if not recorder.varies(input) or recorder.varies(weight) or recorder.varies(bias):
        return NotImplemented
    x = _norm_input(recorder.check(input, weight, bias))  # [R, ..., *normalized_shape]
    out, mean, rstd = torch.native_layer_norm(x, normalized_shape, detached(weight), detached(bias), eps)
    saved = (x, mean, rstd) if recorder.trains(weight) else ()
    return recorder.tap(out, _layer_norm_grads, (weight, bias), *saved)


def _layer_norm_grads(
    clustered: ClusteredBatch, sinks: Sinks, grad: Tensor, x: Any = None, mean: Any = None, rstd: Any = None
) -> None:
    weight, bias = sinks
    size = (weight or bias).tensor.numel()  # type: ignore[union-attr]
    if bias is not None:
        bias.add_sums(clustered, grad.reshape(-1, size))
    if weight is not None:
        weight.add_sums(clustered, (_float(x) - mean).mul_(rstd).mul_(grad).reshape(-1, size))


def rms_norm(
    recorder: Recorder, func: Op, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: Any = None
) -> Any:
    if not recorder.varies(input) or weight is None or recorder.varies(weight):
        return NotImplemented
    x = recorder.check(input, weight)
    out = func(x, normalized_shape, detached(weight), eps)
    normalized = partial(func, normalized_shape=normalized_shape, eps=eps)
    return recorder.tap(out, partial(_affine_grads, normalized, False), (weight, None), x)


def batch_norm(
    recorder: Recorder,
    func: Op,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    """Apply batch norm with frozen statistics. :func:`no_batch_statistics` has already refused batch statistics."""
    if not recorder.varies(input) or recorder.varies(weight) or recorder.varies(bias):
        return NotImplemented
    x = recorder.check(input, weight, bias)
    if recorder.lead > 1:
        return NotImplemented
    out = F.batch_norm(x, running_mean, running_var, detached(weight), detached(bias), False, momentum, eps)
    normalized = partial(F.batch_norm, running_mean=running_mean, running_var=running_var, eps=eps)
    return recorder.tap(out, partial(_affine_grads, normalized, True), (weight, bias), x)


def instance_norm(
    recorder: Recorder,
    func: Op,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    if not recorder.varies(input) or recorder.varies(weight) or recorder.varies(bias):
        return NotImplemented
    x = recorder.check(input, weight, bias)
    if recorder.lead > 1:
        return NotImplemented
    stats = (None, None) if use_input_stats else (running_mean, running_var)
    out = F.instance_norm(
        x, running_mean, running_var, detached(weight), detached(bias), use_input_stats, momentum, eps
    )
    normalized = partial(
        F.instance_norm, running_mean=stats[0], running_var=stats[1], use_input_stats=use_input_stats, eps=eps
    )
    return recorder.tap(out, partial(_affine_grads, normalized, True), (weight, bias), x)


def _affine_grads(
    normalized: Op, channels: bool, clustered: ClusteredBatch, sinks: Sinks, grad: Tensor, x: Tensor
) -> None:
    """Write the gradients of ``out = normalized(x) * weight + bias``.

    Args:
        channels: weight and bias belong to dimension 1 of x; if False, to its last dimensions.
    """
    weight, bias = sinks
    for sink, factor in ((weight, normalized), (bias, None)):
        if sink is not None:
            terms = _float(grad) if factor is None else _float(grad) * factor(x)
            if channels and terms.dim() > 2:
                terms = terms.flatten(2).sum(2)
            sink.add_sums(clustered, terms.reshape(-1, sink.tensor.numel()))


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm_input(x: Tensor) -> Tensor:
    """Cast ``x`` as autocast does: normalisations run in float32 on CUDA, and in the dtype of the input on the CPU."""
    return x.float() if x.device.type == "cuda" and torch.is_autocast_enabled("cuda") else x


def no_batch_statistics(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    *_: Any,
    **__: Any,
) -> None:
    if training:
        raise GroupingError(
            "BatchNorm in training mode mixes the samples of all clusters, so the gradient of a cluster is not a sum "
            "over its own samples. Use GroupNorm, freeze the statistics with .eval(), or use route='loop'."
        )
