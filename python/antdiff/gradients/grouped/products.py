"""Weight gradients of matrix products and convolutions, cluster by cluster."""

from __future__ import annotations

import string
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.grouped.recorder import Op, Recorder, autocast_operand, detached
from antdiff.gradients.grouped.slices import by_slices
from antdiff.gradients.sinks import Sinks

# Device types on which torch's grouped_mm computes the K products of a linear layer's weight gradient in one launch
# (bfloat16, sizes that are a multiple of 8). On a CPU it computes the same K products and copies them, at 0.6 to 1.04
# times the speed of mm with `out=`; the speeds get closer as the number of rows grows. It has not been measured on a
# GPU. The result is the same.
GROUPED_MM: frozenset[str] = frozenset()


def linear(recorder: Recorder, func: Op, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not recorder.varies(input) or recorder.varies(weight) or recorder.varies(bias) or input.dim() < 2:
        return NotImplemented
    x = _flat(recorder.check(input, weight, bias))  # [R, in]
    out = func(x, detached(weight), detached(bias))  # [R, out]
    out = recorder.tap(out, partial(_linear_grads, False), (weight, bias), *((x,) if recorder.trains(weight) else ()))
    return out.view(*input.shape[:-1], out.shape[-1])


def matmul(recorder: Recorder, func: Op, input: Tensor, other: Tensor) -> Any:
    if recorder.varies(input) and recorder.varies(other):
        return NotImplemented
    if recorder.varies(input) and other.dim() == 2 and input.dim() >= 2:
        x = _flat(recorder.check(input, other))  # [R, in]
        out = func(x, detached(other))  # [R, out]
        out = recorder.tap(out, partial(_linear_grads, True), (other, None), x)
        return out.view(*input.shape[:-1], out.shape[-1])
    if recorder.varies(other) and input.dim() == 2 and other.dim() >= 3:
        letters = string.ascii_lowercase[: other.dim()]
        result = "".join([*letters[:-2], "z", letters[-1]])
        if recorder.check(other, input) is not None and recorder.lead > 1:
            return NotImplemented
        out = func(detached(input), autocast_operand(other))
        return _contract(recorder, out, "z" + letters[-2], letters, result, input, other)
    varying, shared = (input, other) if recorder.varies(input) else (other, input)
    if varying.dim() < max(2, shared.dim()) or (varying.dim() == shared.dim() and shared.shape[0] != 1):
        return NotImplemented
    return by_slices(recorder, func, input, other)


def bmm(recorder: Recorder, func: Op, input: Tensor, mat2: Tensor) -> Any:
    """Rule of bmm with a weight that was expanded over the batch."""
    source = recorder.expanded_from(mat2) if recorder.trains(mat2) else None
    if source is None or source.dim() < 2:
        return NotImplemented
    return matmul(recorder, torch.matmul, input, source)


def addmm(
    recorder: Recorder, func: Op, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Any:
    if recorder.varies(input) or recorder.varies(mat2):
        return NotImplemented
    if input.dim() > 1 or input.numel() == 1 or (alpha, beta) != (1, 1):
        return NotImplemented
    x = autocast_operand(recorder.check(mat1, mat2, input))  # [R, in]
    out = func(detached(input), x, detached(mat2))  # [R, out]
    return recorder.tap(out, partial(_linear_grads, True), (mat2, input), *((x,) if recorder.trains(mat2) else ()))


def _flat(x: Tensor) -> Tensor:
    """Flatten ``x`` to one matrix, as torch does for a weight that needs a gradient.

    For a detached weight and an input that is not contiguous, torch would instead compute a batched product of copies.
    """
    return autocast_operand(x).flatten(0, -2)


def _linear_grads(
    transposed: bool, clustered: ClusteredBatch, sinks: Sinks, grad: Tensor, x: Tensor | None = None
) -> None:
    """Write the gradients of the weight and the bias, given ``grad [R, out]`` and ``x [R, in]``."""
    weight, bias = sinks
    if weight is not None:
        assert x is not None
        x = x.conj()  # no-op for a real tensor
        if x.device.type in GROUPED_MM and clustered.order is None:
            left, right = (x, grad) if transposed else (grad, x)
            stops = torch.tensor([stop for _, stop in clustered.slices()], device=x.device) * clustered.repeats(x)
            weight.add_all(F.grouped_mm(left.t(), right, offs=stops.to(torch.int32)))
        else:
            pieces = clustered.pieces(grad, x)
            weight.add_products((v.t(), g) if transposed else (g.t(), v) for g, v in pieces)
    if bias is not None:
        bias.add_sums(clustered, grad)


def einsum(recorder: Recorder, func: Op, equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if (
        not isinstance(equation, str)
        or len(operands) != 2
        or recorder.varies(operands[0]) == recorder.varies(operands[1])
    ):
        return NotImplemented
    first = recorder.varies(operands[0])
    x, p = operands if first else operands[::-1]
    equation = equation.replace(" ", "")
    inputs, arrow, result = equation.partition("->")
    names = inputs.split(",")
    x_name, p_name = names if first else names[::-1]
    if not arrow or "..." in p_name or ("..." in x_name) != ("..." in result):
        return NotImplemented
    free = [c for c in string.ascii_letters if c not in equation]
    dots = "".join(free[: x.dim() - len(x_name.replace("...", ""))])
    x_name, result = x_name.replace("...", dots), result.replace("...", dots)
    known = set(x_name) | set(result)
    if x_name[:1] != result[:1] or x_name[0] in p_name or not set(p_name) <= known or len(set(p_name)) < len(p_name):
        return NotImplemented
    recorder.check(x, p)
    if recorder.lead > 1:
        return NotImplemented
    x = autocast_operand(x)
    out = func(equation, *((x, detached(p)) if first else (detached(p), x)))
    return _contract(recorder, out, p_name, x_name, result, p, x)


def _contract(recorder: Recorder, out: Tensor, p_name: str, x_name: str, result: str, p: Tensor, x: Tensor) -> Tensor:
    """Tap ``out = einsum(p, x)``, whose weight gradient is ``einsum(grad of out, x)``."""
    x = autocast_operand(recorder.check(x, p))
    return recorder.tap(out, partial(_einsum_grads, f"{result},{x_name}->{p_name}"), (p,), x)


def _einsum_grads(equation: str, clustered: ClusteredBatch, sinks: Sinks, grad: Tensor, x: Tensor) -> None:
    for sink in sinks:
        if sink is not None:
            sink.add_rows(torch.einsum(equation, g, v) if len(g) else None for g, v in clustered.pieces(grad, x.conj()))


# ---- convolutions ----------------------------------------------------------------------------------------------------


def convolution(
    recorder: Recorder,
    func: Op,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if isinstance(padding, str):
        spans = [(n - 1) * d for n, d in zip(weight.shape[2:], _per_dimension(weight, dilation), strict=True)]
        if padding == "same" and any(span % 2 for span in spans):  # torch pads unevenly
            return by_slices(recorder, func, input, weight, bias, stride, padding, dilation, groups)
        padding = [span // 2 for span in spans] if padding == "same" else 0
    call = partial(func, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return _convolve(recorder, call, input, weight, bias, (stride, padding, dilation, False, 0, groups))


def convolution_transpose(
    recorder: Recorder,
    func: Op,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    call = partial(
        func, stride=stride, padding=padding, output_padding=output_padding, groups=groups, dilation=dilation
    )
    return _convolve(recorder, call, input, weight, bias, (stride, padding, dilation, True, output_padding, groups))


def _convolve(
    recorder: Recorder, call: Op, input: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
) -> Any:
    if not recorder.varies(input) or recorder.varies(weight) or recorder.varies(bias) or input.dim() != weight.dim():
        return NotImplemented
    x = autocast_operand(recorder.check(input, weight, bias))  # [R, in, ...]
    if recorder.lead > 1:
        return NotImplemented
    stride, padding, dilation, transposed, output_padding, groups = options
    options = (
        *(_per_dimension(weight, v) for v in (stride, padding, dilation)),
        transposed,
        _per_dimension(weight, output_padding),
        groups,
    )
    write = partial(_convolution_grads, options)
    return recorder.tap(
        call(x, detached(weight), detached(bias)),
        write,
        (weight, bias),
        *((x, detached(weight)) if recorder.trains(weight) else ()),
    )


def _convolution_grads(
    options: tuple[Any, ...], clustered: ClusteredBatch, sinks: Sinks, grad: Tensor, x: Any = None, w: Any = None
) -> None:
    weight, bias = sinks
    if weight is not None:
        of_weight = partial(torch.ops.aten.convolution_backward.default, output_mask=[False, True, False])
        w = w.to(x.dtype)
        weight.add_rows(of_weight(g, v, w, None, *options)[1] if len(g) else None for g, v in clustered.pieces(grad, x))
    if bias is not None:
        bias.add_sums(clustered, grad.flatten(2).sum(2, dtype=torch.promote_types(grad.dtype, torch.float32)))


def _per_dimension(weight: Tensor, value: Any) -> list[int]:
    """Return an option of a convolution as a list with one value per spatial dimension."""
    n = weight.dim() - 2
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * n if len(values) == 1 else values
