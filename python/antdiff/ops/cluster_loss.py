"""Per-cluster losses in one pass over the data.

For K clusters of timesteps, ``losses[i]`` is the mean, over the samples of cluster i, of the sample's weight times its
mean error. These are the per-task losses of ANT (Go et al., NeurIPS 2023, section 4). All functions are deterministic
and can be differentiated once.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from antdiff._checks import MOST_TIMESTEPS, as_choice, as_count, as_number, describe
from antdiff.ops._extension import _C, checked, define, dense, differentiate, traced

Kind = Literal["mse", "huber", "l1"]
_KINDS: tuple[str, ...] = get_args(Kind)


def cluster_loss(
    pred: Tensor,
    target: Tensor,
    cluster: Tensor,
    k: int,
    weight: Tensor | None = None,
    *,
    kind: Kind = "mse",
    delta: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute the mean error over the samples of each cluster.

    ``losses[i] = sum_{b in i} weight[b] * mean_n error(pred[b, n] - target[b, n]) / counts[i]``

    Args:
        pred: ``[B, ...]``, float32, float64, float16 or bfloat16. Differentiable. Contiguous and channels_last tensors
            are read in place; other strides cost one copy.
        target: Same shape, dtype and device as ``pred``. Not differentiable.
        cluster: int64 ``[B]``, ids in ``[0, k)``, in any order.
        k: Number of clusters, at least 1.
        weight: ``[B]`` in the dtype of the losses. Differentiable. Default None: ones.
        kind: With d = pred - target, ``"mse"`` (d^2, default), ``"huber"`` (torch's ``huber_loss``) or ``"l1"`` (|d|).
        delta: The |d| beyond which the Huber loss is linear; positive. Default 1.

    Returns:
        ``losses [k]``, float32 (float64 for float64 input), and ``counts [k]``, int64. An empty cluster has loss 0 and
        count 0, and contributes no gradient.

    Raises:
        TypeError, ValueError: a dtype, shape, device or layout is wrong; on the CPU also if an id is out of range. On
            CUDA an id out of range makes all losses of the call NaN and is reported by
            :func:`antdiff.ops.check_errors`.
    """
    k = as_count("k", k, most=MOST_TIMESTEPS)
    if traced(pred, target, cluster, weight):
        _check_kind(kind, delta)
        losses, counts, _ = torch.ops.antdiff.cluster_loss(pred, target, cluster, weight, k, kind, float(delta))
        return losses, counts
    if torch.is_grad_enabled() and _wants_grad(pred, target, weight):
        losses, counts = _ClusterLoss.apply(pred, target, cluster, weight, k, kind, delta)  # type: ignore[no-untyped-call]
        return losses, counts
    losses, counts, _ = _forward(pred, target, cluster, weight, k, kind, delta)
    return losses, counts


def cluster_loss_and_grad(
    pred: Tensor,
    target: Tensor,
    cluster: Tensor,
    k: int,
    weight: Tensor | None = None,
    *,
    cluster_weight: Tensor | None = None,
    kind: Kind = "mse",
    delta: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the losses and ``d(sum_i cluster_weight[i] losses[i]) / d pred`` in one pass over the data.

    Pass the gradient on with ``pred.backward(grad)``. Autograd records nothing in this call.

    Args:
        cluster_weight: ``[k]`` in the dtype of the losses. Default None: ones.
        pred, target, cluster, k, weight, kind, delta: As in :func:`cluster_loss`.

    Returns:
        ``losses [k]``, ``counts [k]`` int64, and ``grad`` with the shape and dtype of ``pred``. None of them requires
        grad.

    Raises:
        TypeError, ValueError: as :func:`cluster_loss`.
    """
    k = as_count("k", k, most=MOST_TIMESTEPS)
    if traced(pred, target, cluster, weight, cluster_weight):
        _check_kind(kind, delta)
        return torch.ops.antdiff.cluster_loss_and_grad(  # type: ignore[no-any-return]
            pred, target, cluster, weight, k, cluster_weight, kind, float(delta)
        )
    return _loss_and_grad(pred, target, cluster, weight, k, cluster_weight, kind, delta)


def cluster_mean(per_sample: Tensor, cluster: Tensor, k: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the mean over the samples of each cluster, for losses that are already per-sample.

    Use it, for example, for the per-sample terms of a learned variance.

    Args:
        per_sample: ``[B]``, floating point. Differentiable. Half precision is accumulated and returned in float32.
        cluster, k, weight: As in :func:`cluster_loss`.

    Returns:
        ``losses [k]`` and ``counts [k]`` int64.

    Raises:
        TypeError, ValueError: as :func:`cluster_loss`.
    """
    k = as_count("k", k, most=MOST_TIMESTEPS)
    if isinstance(per_sample, Tensor) and per_sample.dtype in (torch.float16, torch.bfloat16):
        per_sample = dense("per_sample", per_sample).float()
    if traced(per_sample, cluster, weight):
        return torch.ops.antdiff.cluster_mean(per_sample, cluster, weight, k)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and _wants_grad(per_sample, None, weight):
        losses, counts = _ClusterMean.apply(per_sample, cluster, weight, k)  # type: ignore[no-untyped-call]
        return losses, counts
    return _mean(per_sample, cluster, weight, k)


# ---- plain calls -----------------------------------------------------------------------------------------------------


def _wants_grad(pred: object, target: object, weight: object) -> bool:
    if isinstance(target, Tensor) and target.requires_grad:
        raise ValueError("target must not require grad, because the op has no gradient for it. Pass target.detach().")
    return getattr(pred, "requires_grad", False) or getattr(weight, "requires_grad", False)


def _read_order(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return pred and target as contiguous ``[B, ...]`` in the order in which the kernel reads them.

    A pair in channels_last is viewed as [B, H, W, C] without a copy, since the mean over the elements of a sample does
    not depend on their order. Any other non-contiguous tensor is copied once.
    """
    if _channels_last(pred) and _channels_last(target) and not _negated(pred, target):
        return pred.permute(0, 2, 3, 1), target.permute(0, 2, 3, 1)
    pred, target = dense("pred", pred), dense("target", target)
    if pred.dim() == 0:
        raise ValueError("pred must have a batch dimension, [B, ...]; got a 0-d tensor. Add one with pred[None].")
    return pred, target


def _negated(*tensors: Tensor) -> bool:
    """Whether a tensor is a negated view, which has to be copied before a kernel can read it."""
    return not torch.compiler.is_compiling() and any(x.is_neg() for x in tensors)


def _channels_last(x: Tensor) -> bool:
    """Whether x is in channels_last order but not contiguous. A tensor with one channel is both."""
    if getattr(x, "layout", None) is not torch.strided or x.dim() != 4 or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def _optional(name: str, x: Tensor | None) -> Tensor | None:
    return None if x is None else dense(name, x)


def _outputs(pred: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Allocate losses [k], counts [k], per_sample [B], and on CUDA the scratch memory of the partial sums."""
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    device = pred.device
    scratch = None
    if device.type == "cuda":
        tiles = _C.cluster_loss_tiles(pred.shape[0], pred.shape[1:].numel())
        scratch = torch.empty(tiles, dtype=torch.float64, device=device)
    return (
        torch.empty(k, dtype=dtype, device=device),
        torch.empty(k, dtype=torch.int64, device=device),
        torch.empty(pred.shape[0], dtype=dtype, device=device),
        scratch,
    )


def _forward(
    pred: Tensor, target: Tensor, cluster: Tensor, weight: Tensor | None, k: int, kind: str, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_kind(kind, delta)
    pred, target = _read_order(pred, target)
    losses, counts, per_sample, scratch = _outputs(pred, k)
    _C.cluster_loss_forward(
        pred,
        target,
        dense("cluster", cluster),
        _optional("weight", weight),
        k,
        kind,
        delta,
        losses,
        counts,
        per_sample,
        scratch,
    )
    return checked(losses), counts, per_sample


def _backward(
    grad_losses: Tensor,
    pred: Tensor,
    target: Tensor,
    cluster: Tensor,
    weight: Tensor | None,
    counts: Tensor,
    kind: str,
    delta: float,
) -> Tensor:
    rows, target_rows = _read_order(pred, target)
    grad = torch.empty_like(rows)
    _C.cluster_loss_backward(
        grad_losses.contiguous(),
        rows,
        target_rows,
        dense("cluster", cluster),
        _optional("weight", weight),
        counts,
        kind,
        delta,
        grad,
    )
    return _restore_layout(grad, rows, pred)


def _loss_and_grad(
    pred: Tensor,
    target: Tensor,
    cluster: Tensor,
    weight: Tensor | None,
    k: int,
    cluster_weight: Tensor | None,
    kind: str,
    delta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_kind(kind, delta)
    rows, target_rows = _read_order(pred, target)
    losses, counts, per_sample, scratch = _outputs(rows, k)
    if cluster_weight is None:
        cluster_weight = torch.ones_like(losses)
    grad = torch.empty_like(rows)
    _C.cluster_loss_and_grad(
        rows,
        target_rows,
        dense("cluster", cluster),
        _optional("weight", weight),
        k,
        _optional("cluster_weight", cluster_weight),
        kind,
        delta,
        losses,
        counts,
        per_sample,
        scratch,
        grad,
    )
    return checked(losses), counts, _restore_layout(grad, rows, pred)


def _mean(per_sample: Tensor, cluster: Tensor, weight: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    if not isinstance(per_sample, Tensor) or per_sample.dim() != 1 or not per_sample.is_floating_point():
        raise TypeError(
            f"per_sample must be a floating-point tensor [B]; got {describe(per_sample)}. "
            "Average over its other dimensions."
        )
    per_sample = dense("per_sample", per_sample)
    losses, counts, _, _ = _outputs(per_sample, k)
    _C.cluster_mean_forward(
        dense("per_sample", per_sample), dense("cluster", cluster), _optional("weight", weight), k, losses, counts
    )
    return checked(losses), counts


def _restore_layout(grad: Tensor, rows: Tensor, pred: Tensor) -> Tensor:
    """View ``grad``, which has the layout that the kernel read (``rows``), in the shape of pred."""
    viewed = rows is not pred and pred.numel() > 0 and rows.data_ptr() == pred.data_ptr()
    return grad.permute(0, 3, 1, 2) if viewed else grad


def _per_sample_scale(grad_losses: Tensor, cluster: Tensor, counts: Tensor) -> Tensor:
    """Return d losses[cluster[b]] / d (weight[b] * error[b]), times the incoming gradient, [B]."""
    k = counts.shape[0]
    scale = (grad_losses / counts.clamp(min=1))[cluster.clamp(0, k - 1)]
    # On CUDA an id out of range has not raised. It is clamped above, so that it never indexes memory, and its result is
    # poisoned here.
    return torch.where((cluster >= 0) & (cluster < k), scale, torch.nan)


def _check_kind(kind: str, delta: float) -> None:
    as_choice("kind", kind, _KINDS)
    if type(delta) is not float or not 0 < delta < math.inf:
        as_number("delta", delta, above=0 if kind == "huber" else -math.inf, remedy="Use kind='l1' for the limit 0.")


# ---- eager autograd --------------------------------------------------------------------------------------------------


def refuse_double_backward(op: str) -> None:
    """Raise if a ``backward`` is being differentiated. This is cheaper than ``once_differentiable``, and clearer."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"antdiff.ops.{op} can be differentiated only once; got create_graph=True. Use antdiff.ops.reference.{op}."
        )


class _ClusterLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, target: Tensor, cluster: Tensor, weight: Tensor | None, k: int, kind: str, delta: float
    ) -> tuple[Tensor, Tensor]:
        losses, counts, per_sample = _forward(pred, target, cluster, weight, k, kind, delta)
        ctx.save_for_backward(pred, target, cluster, weight, counts, per_sample)
        ctx.kind, ctx.delta = kind, delta
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return losses, counts

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor | None, _grad_counts: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("cluster_loss")
        if grad_losses is None:
            return (None,) * 7
        pred, target, cluster, weight, counts, per_sample = ctx.saved_tensors
        grad_pred = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_pred = _backward(grad_losses, pred, target, cluster, weight, counts, ctx.kind, ctx.delta)
        if ctx.needs_input_grad[3]:
            grad_weight = _per_sample_scale(grad_losses, cluster, counts) * per_sample
        return grad_pred, None, None, grad_weight, None, None, None


class _ClusterMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, per_sample: Tensor, cluster: Tensor, weight: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        losses, counts = _mean(per_sample, cluster, weight, k)
        ctx.save_for_backward(per_sample, cluster, weight, counts)
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return losses, counts

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor | None, _grad_counts: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("cluster_mean")
        if grad_losses is None:
            return (None,) * 4
        return _mean_backward(grad_losses, *ctx.saved_tensors, *ctx.needs_input_grad[:3:2])


def _mean_backward(
    grad_losses: Tensor,
    per_sample: Tensor,
    cluster: Tensor,
    weight: Tensor | None,
    counts: Tensor,
    want_sample: bool,
    want_weight: bool,
) -> tuple[Tensor | None, None, Tensor | None, None]:
    scale = _per_sample_scale(grad_losses, cluster, counts)
    grad_sample = (scale if weight is None else scale * weight) if want_sample else None
    return grad_sample, None, scale * per_sample if want_weight else None, None


# ---- torch.library: torch.compile, export, fake tensors --------------------------------------------------------------


def _fake_outputs(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(k, dtype=dtype), x.new_empty(k, dtype=torch.int64), x.new_empty(x.shape[0], dtype=dtype)


def _fake_forward(pred: Tensor, _target: Any, _cluster: Any, _weight: Any, k: int, *_rest: Any) -> tuple[Tensor, ...]:
    return _fake_outputs(pred, k)


def _fake_grad(pred: Tensor, target: Tensor) -> Tensor:
    nhwc = _channels_last(pred) and _channels_last(target)
    return torch.empty_like(pred, memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def _fake_backward(_grad_losses: Any, pred: Tensor, target: Tensor, *_rest: Any) -> Tensor:
    return _fake_grad(pred, target)


def _fake_both(pred: Tensor, target: Tensor, _cluster: Any, _weight: Any, k: int, *_rest: Any) -> tuple[Tensor, ...]:
    return *_fake_outputs(pred, k)[:2], _fake_grad(pred, target)


def _fake_mean(per_sample: Tensor, _cluster: Any, _weight: Any, k: int) -> tuple[Tensor, ...]:
    return _fake_outputs(per_sample, k)[:2]


def _setup_loss(ctx: Any, inputs: Any, output: Any) -> None:
    pred, target, cluster, weight, _, ctx.kind, ctx.delta = inputs
    ctx.save_for_backward(pred, target, cluster, weight, output[1], output[2])


def _loss_autograd(ctx: Any, grad_losses: Tensor, _counts: Any, _per_sample: Any) -> tuple[Tensor | None, ...]:
    pred, target, cluster, weight, counts, per_sample = ctx.saved_tensors
    grad_pred = torch.ops.antdiff.cluster_loss_backward(
        grad_losses, pred, target, cluster, weight, counts, ctx.kind, ctx.delta
    )
    grad_weight = None
    if ctx.needs_input_grad[3]:
        grad_weight = _per_sample_scale(grad_losses, cluster, counts) * per_sample
    return grad_pred, None, None, grad_weight, None, None, None


def _setup_mean(ctx: Any, inputs: Any, output: Any) -> None:
    per_sample, cluster, weight, _ = inputs
    ctx.save_for_backward(per_sample, cluster, weight, output[1])


def _mean_autograd(ctx: Any, grad_losses: Tensor, _counts: Any) -> tuple[Tensor | None, ...]:
    return _mean_backward(grad_losses, *ctx.saved_tensors, *ctx.needs_input_grad[:3:2])


define(
    "cluster_loss(Tensor pred, Tensor target, Tensor cluster, Tensor? weight, SymInt k, str kind, float delta)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define(
    "cluster_loss_backward(Tensor grad_losses, Tensor pred, Tensor target, Tensor cluster, Tensor? weight,"
    " Tensor counts, str kind, float delta) -> Tensor",
    _backward,
    _fake_backward,
)
define(
    "cluster_loss_and_grad(Tensor pred, Tensor target, Tensor cluster, Tensor? weight, SymInt k,"
    " Tensor? cluster_weight, str kind, float delta) -> (Tensor, Tensor, Tensor)",
    _loss_and_grad,
    _fake_both,
)
define(
    "cluster_mean(Tensor per_sample, Tensor cluster, Tensor? weight, SymInt k) -> (Tensor, Tensor)", _mean, _fake_mean
)
differentiate("cluster_loss", _loss_autograd, _setup_loss)
differentiate("cluster_mean", _mean_autograd, _setup_mean)
