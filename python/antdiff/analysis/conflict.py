"""Conflict between clusters: how often their gradients point against each other, in batches and in expectation.

A batch's gradients are noisy, and noise makes cosines small, not negative on average: a share of conflicts near one
half in batches can come from no conflict at all. So both are measured: what a balancing method sees in each batch, and
the cosine of the expected gradients, from products of gradients of different batches, whose noise is independent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from antdiff import ops
from antdiff._checks import as_count
from antdiff.analysis.affinity import Loss, epsilon_loss, levels_of
from antdiff.analysis.confidence import Interval, student_interval
from antdiff.analysis.estimate import normalised
from antdiff.clustering import StratifiedTimesteps, TimestepClusters
from antdiff.gradients import ClusterGradients


@dataclass
class Conflict:
    """Conflict of K clusters over S independent repetitions. float64 on the CPU.

    Attributes:
        cosine: ``[S, K, K]``: cosines of the expected gradients, noise-corrected: with C_ij the mean of <g_i, h_j> over
            pairs of different batches g, h, ``C_ij / sqrt(C_ii C_jj)``; NaN where C_ii or C_jj is not positive.
        batch_cosine: ``[S, K, K]``: mean cosine of the gradients of one batch.
        rate: ``[S, K, K]``: share of batches in which the inner product is negative; the diagonal is 0.
    """

    cosine: Tensor
    batch_cosine: Tensor
    rate: Tensor

    def share(self) -> Interval:
        """Share of the pairs of clusters that conflict in a batch, over repetitions."""
        k = self.rate.shape[-1]
        return student_interval(self.rate.sum((1, 2)) / max(1, k * (k - 1)))

    def expected(self) -> Interval:
        """``[K, K]``: :attr:`cosine` over repetitions."""
        return student_interval(self.cosine)

    def conflicting_pairs(self) -> int:
        """Pairs of clusters whose expected gradients conflict: the whole interval of their cosine is below zero."""
        return int((self.expected().high < 0).triu(1).sum())


def cluster_conflict(
    model: nn.Module,
    data: Tensor,
    clusters: TimestepClusters,
    *,
    log_snr: str | Tensor = "cosine",
    loss: Loss | None = None,
    batch_size: int = 64,
    batches: int = 32,
    repeats: int = 5,
    generator: torch.Generator | None = None,
) -> Conflict:
    """Measures conflict between ``clusters`` for the model as it is, in eval mode, which is restored.

    Images are drawn with replacement, timesteps in equal shares for each cluster, so that all have the same noise.
    Holds 2 K gradients. Costs ``repeats * batches`` training steps.

    Args:
        model: the network, with independent samples.
        data: clean images to draw from, float ``[N, ...]``.
        clusters: K of them, at most ``batch_size``.
        log_snr, loss: as for :func:`antdiff.analysis.task_affinity`.
        batch_size: images a batch: the smaller, the more conflict is noise.
        batches: a repetition, at least 2.
        repeats: S, independent ones; their spread gives the intervals.
        generator: of everything, on the CPU; default torch's global one.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    levels = levels_of(log_snr)
    k, B = clusters.k, as_count("batch_size", batch_size, clusters.k)
    if len(levels) != clusters.T:
        raise ValueError(f"clusters must cover the T={len(levels)} timesteps of log_snr; got T={clusters.T}.")
    if not data.is_floating_point() or data.dim() < 2 or not len(data):
        raise TypeError(f"data must be float [N, ...], scaled as in training; got {data.dtype} {list(data.shape)}.")
    as_count("batches", batches, 2), as_count("repeats", repeats)
    per_sample, device = loss or epsilon_loss(levels), next(model.parameters()).device
    gradients = ClusterGradients(model, k, route="split", group="local")
    sampler = StratifiedTimesteps(clusters, group="local")

    def losses(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return per_sample(model, x0, noise, t)

    def grams() -> tuple[Tensor, Tensor]:
        """Of every batch of a repetition, [batches, K, K], and of the sum of their gradients, [K, K]."""
        total: list[Tensor | None] | None = None
        each = []
        for _ in range(batches):
            counts = sampler.shares(B)
            t, cluster, _ = sampler.sample(B, generator=generator)
            x0 = data[torch.randint(len(data), (B,), generator=generator).to(data.device)].to(device)
            noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(device)
            jacobian = gradients(losses, (x0, noise, t.to(device)), cluster.to(device), counts=counts)
            each.append(jacobian.gram().cpu())
            J = jacobian.rows
            if total is None:
                total = [None if x is None else x.clone() for x in J]
            else:
                for a, x in zip(total, J, strict=True):
                    if a is not None and x is not None:
                        a.add_(x)
        assert total is not None
        return torch.stack(each), ops.gram(total).cpu()

    training = model.training
    try:
        model.eval()
        found = [conflict_of(*grams()) for _ in range(repeats)]
    finally:
        model.train(training)
    return Conflict(*(torch.stack(column) for column in zip(*found, strict=True)))


def conflict_of(each: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:class:`Conflict`'s three matrices of one repetition, from the Gram matrices of its R batches and of their sum.

    ``sum_{r != s} <g_i^r, g_j^s> = <sum_r g_i^r, sum_s g_j^s> - sum_r <g_i^r, g_j^r>``: two Gram matrices are enough.
    """
    R = len(each)
    C = (total - each.sum(0)) / (R * (R - 1))  # [K, K]
    rate = (each < 0).double().mean(0)
    return normalised(C), normalised(each).nanmean(0), rate
