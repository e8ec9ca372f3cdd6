"""Methods that look at losses alone: K losses of the whole batch, and one ordinary reduction of the gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from antdiff.distributed.ranks import Group, Ranks, refuse_nonfinite, wait


def global_losses(
    losses: Tensor,
    counts: Tensor,
    *,
    group: Group = None,
    averaged: bool = False,
    nonfinite: Literal["raise", "poison"] = "raise",
) -> tuple[Tensor, Tensor]:
    """The mean losses of the clusters over all ranks, for any function of them to be back-propagated.

    Their values are the same on every rank; their gradient is that of this rank's samples, so that the gradients of the
    ranks add up to that of the whole batch::

        losses, counts = ops.cluster_loss(model(xt, t), noise, cluster, K, weight)
        losses, counts = distributed.global_losses(losses, counts)
        balancer.loss(losses, counts).backward()
        distributed.reduce_gradients(model)

    One all-reduce of 2 K + R numbers. A process without torch.distributed gets back what it gave.

    Args:
        losses: ``[K]``, means over this rank's samples (0 where empty), with their graph.
        counts: ``[K]``, this rank's samples.
        group: the ranks; default all.
        averaged: the gradients will be averaged over ranks, by DistributedDataParallel or FSDP, and not summed: they
            are multiplied by the number of ranks.
        nonfinite: ``"poison"``: a loss that is not finite is passed on, for a ``GradScaler`` to skip the step.

    Returns:
        Losses ``[K]`` and counts ``[K]`` of all ranks, in the dtypes given.

    Raises:
        NonFiniteError: a loss is not finite, naming the ranks; on the CPU alone, where looking costs nothing.
        LostRankError: another rank has died or hangs.
    """
    ranks = Ranks(group)
    if ranks.size == 1:
        return losses, counts
    sums = losses * counts  # [K]
    values = sums.detach().double()
    total, sound = ranks.total(torch.cat([values, counts.double()]), values.isfinite().all())
    k = len(losses)
    if nonfinite == "raise" and total.device.type == "cpu":
        refuse_nonfinite(sound, total)
    n = total[k:].clamp(min=1)
    mine = (sums - sums.detach()) * (ranks.size if averaged else 1)  # 0, with a gradient
    return (total[:k] / n).to(losses.dtype) + mine / n.to(losses.dtype), total[k:].to(counts.dtype)


def reduce_gradients(
    params: nn.Module | Iterable[nn.Parameter],
    *,
    group: Group = None,
    skip_unused: bool = False,
) -> None:
    """Sums ``p.grad`` over the ranks, in one message a dtype. Not for gradients that DistributedDataParallel or FSDP
    has reduced.

    Args:
        params: the parameters, or the module that has them, the same on every rank.
        group: the ranks; default all.
        skip_unused: a ``p.grad`` of None stays None, and must be so on every rank; else it counts as zero.

    Raises:
        LostRankError: another rank has died or hangs.
    """
    ranks = Ranks(group)
    if ranks.size == 1:
        return
    params = params.parameters() if isinstance(params, nn.Module) else params
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for p in params:
        if p.requires_grad and not (skip_unused and p.grad is None):
            by_dtype.setdefault(p.dtype, []).append(p)
    for group_ in by_dtype.values():
        bucket = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in group_])
        wait(ranks.all_reduce(bucket), "all_reduce")
        for p, piece in zip(group_, bucket.split([p.numel() for p in group_]), strict=True):
            p.grad = piece.view(p.shape)
