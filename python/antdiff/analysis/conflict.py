"""Conflict between clusters: how often their gradients oppose each other, in batches and in expectation.

The gradients of a batch are noisy, and noise makes cosines small, but not negative on average. A share of conflicts
near one half in batches may therefore come from noise alone. This module measures both the conflicts in each batch, as
seen by a balancing method, and the cosine of the expected gradients. The latter uses products of gradients of different
batches, whose noise is independent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from antdiff import ops
from antdiff._checks import as_count, as_function, as_module, as_tensor, check_draws, describe
from antdiff.analysis.affinity import Loss, epsilon_loss, levels_of
from antdiff.analysis.confidence import Interval, student_interval
from antdiff.analysis.estimate import normalised
from antdiff.clustering import StratifiedTimesteps, TimestepClusters
from antdiff.gradients import ClusterGradients


@dataclass
class Conflict:
    """Conflict of K clusters over S independent repetitions. All tensors are float64 on the CPU.

    Attributes:
        cosine: ``[S, K, K]``, noise-corrected cosines of the expected gradients, ``C_ij / sqrt(C_ii C_jj)``. C_ij is
            the mean of <g_i, h_j> over pairs of different batches g, h. NaN where C_ii or C_jj is not positive.
        batch_cosine: ``[S, K, K]``, mean cosine of the gradients of one batch.
        rate: ``[S, K, K]``, share of batches in which the inner product is negative. The diagonal is 0.
    """

    cosine: Tensor
    batch_cosine: Tensor
    rate: Tensor

    def __post_init__(self) -> None:
        for name in ("cosine", "batch_cosine", "rate"):
            as_tensor(name, getattr(self, name), dims=3, shape="[S, K, K]", kind="float")
        if not self.cosine.shape == self.batch_cosine.shape == self.rate.shape or (
            self.cosine.shape[1] != self.cosine.shape[2]
        ):
            raise ValueError(
                "cosine, batch_cosine and rate must have the same shape [S, K, K]; got "
                f"{list(self.cosine.shape)}, {list(self.batch_cosine.shape)} and {list(self.rate.shape)}."
            )

    def share(self) -> Interval:
        """Return the share of pairs of clusters that conflict in a batch, with its interval over repetitions."""
        k = self.rate.shape[-1]
        return student_interval(self.rate.sum((1, 2)) / max(1, k * (k - 1)))

    def expected(self) -> Interval:
        """Return the mean of :attr:`cosine` and its interval over repetitions, each ``[K, K]``."""
        return student_interval(self.cosine)

    def conflicting_pairs(self) -> int:
        """Count the pairs whose expected gradients conflict: the interval of their cosine is entirely below zero."""
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
    """Measure the conflict between ``clusters`` with the current weights of the model.

    Images are drawn with replacement, and timesteps in equal shares per cluster, so that all clusters have the same
    noise. The model is in eval mode during the measurement, and its mode is restored. The memory is 2 K gradients, and
    the cost is ``repeats * batches`` training steps.

    Args:
        model: network whose samples do not interact.
        data: clean images to draw from, float ``[N, ...]``.
        clusters: K clusters, where K is at most ``batch_size``.
        log_snr, loss: as for :func:`antdiff.analysis.task_affinity`.
        batch_size: images per batch. In smaller batches, more of the conflict is noise.
        batches: batches per repetition, from 2 to 2^24 / K^2, since their Gram matrices are kept.
        repeats: S, the number of independent repetitions, at most 2^24 / K^2. Their spread gives the intervals.
        generator: all random numbers, on the CPU; default torch's global generator.

    Raises:
        TypeError, ValueError: an invalid argument.
    """
    as_module("model", model)
    as_tensor("data", data, shape="[N, ...]")
    if not isinstance(clusters, TimestepClusters):
        raise TypeError(f"clusters must be TimestepClusters; got {describe(clusters)}.")
    if loss is not None:
        as_function("loss", loss)
    check_draws(generator, torch.device("cpu"))
    levels = levels_of(log_snr)
    k, B = clusters.k, as_count("batch_size", batch_size, clusters.k, 2**24)
    if len(levels) != clusters.T:
        raise ValueError(
            f"clusters must cover the T={len(levels)} timesteps of log_snr; got T={clusters.T}. "
            "Pass the log_snr that the clusters were made for."
        )
    if not data.is_floating_point() or data.dim() < 2 or not len(data):
        raise TypeError(f"data must be float [N, ...], scaled as in training; got {data.dtype} {list(data.shape)}.")
    as_count("batches", batches, 2, _most_matrices(k)), as_count("repeats", repeats, most=_most_matrices(k))
    per_sample = epsilon_loss(levels) if loss is None else loss
    gradients = ClusterGradients(model, k, route="split", group="local")
    device = next(model.parameters()).device
    sampler = StratifiedTimesteps(clusters, group="local")

    def losses(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return per_sample(model, x0, noise, t)

    def grams() -> tuple[Tensor, Tensor]:
        """Return the Gram matrices of the batches of a repetition, [batches, K, K], and of their summed gradients."""
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


def _most_matrices(k: int) -> int:
    """Return how many matrices [K, K] the measurement may keep: 2^24 numbers, 128 MiB."""
    return max(2, 2**24 // k**2)


def conflict_of(each: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three matrices of :class:`Conflict` for one repetition of R batches.

    Two Gram matrices suffice, since
    ``sum_{r != s} <g_i^r, g_j^s> = <sum_r g_i^r, sum_s g_j^s> - sum_r <g_i^r, g_j^r>``.

    Args:
        each: ``[R, K, K]``, the Gram matrices of the batches.
        total: ``[K, K]``, the Gram matrix of the sum of their gradients.
    """
    R = len(each)
    C = (total - each.sum(0)) / (R * (R - 1))  # [K, K]
    rate = (each < 0).double().mean(0)
    return normalised(C), normalised(each).nanmean(0), rate
