"""Methods that need only losses: the K losses of the whole batch, and one ordinary reduction of the gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from antdiff._checks import as_choice, as_flag, as_tensor, describe
from antdiff.distributed.ranks import Group, Ranks, refuse_nonfinite, wait


def global_losses(
    losses: Tensor,
    counts: Tensor,
    *,
    group: Group = None,
    averaged: bool = False,
    nonfinite: Literal["raise", "poison"] = "raise",
) -> tuple[Tensor, Tensor]:
    """Return the mean losses of the clusters over all ranks, to be back-propagated through any function of them.

    Their values are the same on every rank. Their gradient is that of this rank's samples, so the sum of the gradients
    over the ranks is the gradient of the whole batch::

        losses, counts = ops.cluster_loss(model(xt, t), noise, cluster, K, weight)
        losses, counts = distributed.global_losses(losses, counts)
        balancer.loss(losses, counts).backward()
        distributed.reduce_gradients(model)

    It sends one all-reduce of 2 K + R numbers. In one process it returns its arguments.

    Args:
        losses: ``[K]``, means over this rank's samples (0 for an empty cluster), with their graph.
        counts: ``[K]``, this rank's samples per cluster.
        group: the ranks: a process group, None for the default group, or ``"local"``.
        averaged: whether gradients will be averaged over ranks, by DistributedDataParallel or FSDP, and not summed.
            They are then multiplied by the number of ranks.
        nonfinite: ``"poison"`` returns a loss that is not finite, so that a ``GradScaler`` skips the step.

    Returns:
        Losses ``[K]`` and counts ``[K]`` of all ranks, in the dtypes of the arguments.

    Raises:
        NonFiniteError: a loss is not finite; it names the ranks. Raised on the CPU only, where the check does not wait.
        LostRankError: another rank has died or hangs.
    """
    ranks = Ranks(group)
    as_choice("nonfinite", nonfinite, ("raise", "poison"))
    as_flag("averaged", averaged)
    as_tensor("losses", losses, dims=1, shape="[K]")
    as_tensor("counts", counts, kind="real")
    if counts.shape != losses.shape or counts.device != losses.device:
        raise ValueError(
            f"counts must have the shape and device of losses, {list(losses.shape)} on {losses.device}; got "
            f"{list(counts.shape)} on {counts.device}."
        )
    if ranks.size == 1:
        return losses, counts
    sums = losses * counts  # [K]
    values = sums.detach().double()
    total, sound = ranks.total(torch.cat([values, counts.double()]), values.isfinite().all())
    k = len(losses)
    if nonfinite == "raise" and total.device.type == "cpu":
        refuse_nonfinite(sound, total)
    n = total[k:].clamp(min=1)
    own = (sums - sums.detach()) * (ranks.size if averaged else 1)  # zeros with a gradient
    return (total[:k] / n).to(losses.dtype) + own / n.to(losses.dtype), total[k:].to(counts.dtype)


def reduce_gradients(
    params: nn.Module | Iterable[nn.Parameter],
    *,
    group: Group = None,
    skip_unused: bool = False,
) -> None:
    """Sum ``p.grad`` over the ranks in place, in one message per dtype.

    Do not call it for gradients that DistributedDataParallel or FSDP has reduced. A ``p.grad`` of None counts as zero,
    and stays None if it is None on every rank. A rank that lacks a gradient waits for the device to learn whether
    another rank has one. Sparse gradients become dense.

    Args:
        params: the parameters, or the module that has them. They are the same on every rank.
        group: the ranks: a process group, None for the default group, or ``"local"``.
        skip_unused: leave every ``p.grad`` of None out of the message, so that no rank waits. Each of them must then be
            None on every rank.

    Raises:
        LostRankError: another rank has died or hangs.
    """
    ranks = Ranks(group)
    as_flag("skip_unused", skip_unused)
    if isinstance(params, nn.Module):
        params = params.parameters()
    elif isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(f"params must be a module or its parameters; got {describe(params)}.")
    params = list(params)
    if not all(isinstance(p, Tensor) for p in params):
        raise TypeError("params must be a module or its parameters; got an entry that is no tensor.")
    if ranks.size == 1:
        return
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for p in params:
        if p.requires_grad and not (skip_unused and p.grad is None):
            by_dtype.setdefault(p.dtype, []).append(p)
    for same_dtype in by_dtype.values():
        used = [p.grad is not None for p in same_dtype]
        # One number per parameter follows the gradients: how many ranks have one.
        first = same_dtype[0]
        ones = first.new_ones(len(used)) if all(used) else torch.tensor(used).to(first)
        pieces = [torch.zeros_like(p).flatten() if p.grad is None else _flat(p.grad) for p in same_dtype]
        bucket = torch.cat([*pieces, ones])
        wait(ranks.all_reduce(bucket), "all_reduce")
        *pieces, users = bucket.split([*(p.numel() for p in same_dtype), len(used)])
        # Only a rank that lacks a gradient reads the sums, which waits for the device.
        anywhere = used if all(used) else (users != 0).tolist()
        for p, piece, exists in zip(same_dtype, pieces, anywhere, strict=True):
            p.grad = piece.view(p.shape) if exists else None


def _flat(grad: Tensor) -> Tensor:
    return (grad if grad.layout is torch.strided else grad.to_dense()).flatten()
