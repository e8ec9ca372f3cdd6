"""Tests of conflict, negative transfer gaps and their intervals, on problems with known answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import UNIT_ROUNDOFF
from torch import Tensor, nn

from antdiff import TimestepClusters
from antdiff.analysis import Conflict, TransferGap, cluster_conflict, student_interval
from antdiff.analysis.conflict import conflict_of
from antdiff.analysis.estimate import normalised

T, P = 1000, 400
CLUSTERS = TimestepClusters(T, [0, 300, 700])

# Cosines of expected gradients: 0 and 1 conflict, 0 and 2 agree, 1 and 2 are orthogonal.
MEANS = torch.zeros(3, P, dtype=torch.float64)
MEANS[0, :2] = torch.tensor([0.8, -0.6], dtype=torch.float64)
MEANS[1, 1] = 2
MEANS[2, 0] = 0.5
COSINES = torch.tensor([[1, -0.6, 0.8], [-0.6, 1, 0], [0.8, 0, 1]], dtype=torch.float64)


class Linear(nn.Module):
    """A model with the loss <w, mean of the cluster + noise>: a sample's gradient is its cluster's mean plus noise."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(P, dtype=torch.float64))


def linear_loss(size: float) -> Any:
    def loss(model: Linear, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return (MEANS[CLUSTERS.cluster_of(t)] + size * noise) @ model.w

    return loss


def measured(size: float, **options: Any) -> Conflict:
    generator = torch.Generator().manual_seed(0)
    return cluster_conflict(
        Linear(), torch.zeros(8, P, dtype=torch.float64), CLUSTERS, loss=linear_loss(size), generator=generator,
        **{"batch_size": 12, "batches": 40, "repeats": 8, **options},
    )  # fmt: skip


def test_without_noise_everything_is_the_cosine_of_the_means() -> None:
    found = measured(0.0)
    for matrix in (*found.cosine, *found.batch_cosine):
        torch.testing.assert_close(matrix, COSINES, rtol=0, atol=1000 * UNIT_ROUNDOFF[torch.float64])
    assert found.share().mean == pytest.approx(1 / 3)
    assert found.conflicting_pairs() == 1


def test_noise_hides_conflict_in_batches_and_not_in_expectation() -> None:
    """With noise of 0.6 sqrt(400 / 4) = 6 times the length of a gradient's mean, batch cosines are nearly zero.

    The corrected cosines are right within four standard errors of their mean.
    """
    found = measured(0.6)
    off = ~torch.eye(3, dtype=torch.bool)
    assert float(found.batch_cosine.mean(0)[off].abs().max()) < 0.1
    assert 0.2 < float(found.share().mean) < 0.6
    mean, low, high = found.expected()
    error = (high - low) / 2 / 2.365  # Student's t with 7 degrees of freedom
    assert bool(((mean - COSINES).abs() <= 4 * error + 0.02)[off].all())  # 0.02 for second-order terms
    assert float(error[off].max()) < 0.15
    assert found.conflicting_pairs() == 1


def test_products_of_different_batches_are_those_of_all_pairs() -> None:
    g = torch.randn(5, 3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # [R, K, P]
    each, total = g @ g.mT, g.sum(0) @ g.sum(0).T
    C = sum(g[r] @ g[s].T for r in range(5) for s in range(5) if r != s) / 20
    cosine, batch, rate = conflict_of(each, total)
    torch.testing.assert_close(cosine, normalised(C), rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(batch, torch.stack([normalised(G) for G in each]).mean(0), rtol=1e-12, atol=0)
    assert rate[0, 1] == float((each[:, 0, 1] < 0).sum()) / 5
    assert rate[0, 0] == 0


def test_a_student_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Of 4,000 intervals, 0.95 cover the truth, within four standard errors: 4 sqrt(0.95 0.05 / 4000) = 0.014."""
    values = 3 + torch.randn(4, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, low, high = student_interval(values)
    assert float(((low < 3) & (high > 3)).double().mean()) == pytest.approx(0.95, abs=0.014)
    holed = torch.cat([values, torch.full((1, 4000), torch.nan).double()])
    assert torch.equal(student_interval(holed).low, low)
    one = student_interval(values[:1])
    assert bool(one.low.isnan().all())
    assert not bool(one.beyond_zero.any())


def test_a_gap_is_paired_by_seed_and_its_sign_is_told() -> None:
    """The joint losses differ between seeds by far more than the gap."""
    joint = torch.tensor([[1.0, 5.0, 9.0], [2.0, 6.0, 3.0], [9.0, 1.0, 1.0]], dtype=torch.float64)
    change = torch.tensor([[-0.11, 0.3, 0.1], [-0.10, 0.31, -0.1], [-0.09, 0.29, 0.02]], dtype=torch.float64)
    gap = TransferGap(joint, joint + change, "samples")
    torch.testing.assert_close(gap.gap.mean, change.mean(0))
    assert gap.gap.beyond_zero.tolist() == [True, True, False]
    assert gap.verdicts() == [
        "the specialist is better: negative transfer",
        "the joint model is better: positive transfer, or a specialist of too few steps",
        "no gap beyond the noise of the seeds",
    ]
    same = TransferGap(joint, joint + change, "iterations").verdicts()
    assert same[0].endswith("negative transfer, or more practice on its interval")
    assert same[1].endswith("positive transfer")
    assert set(TransferGap(joint[:1], joint[:1] + 1, "samples").verdicts()) == {"one seed: no statement possible"}
    torch.testing.assert_close(gap.relative.mean, (change / joint).mean(0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: measured(0.0, batches=1), ValueError, "batches must be at least 2; got 1"),
        (lambda: measured(0.0, batches=10**12), ValueError, "batches must be .*got 1000000000000"),
        (lambda: measured(0.0, repeats=10**12), ValueError, "repeats must be .*got 1000000000000"),
        (lambda: measured(0.0, batch_size=2), ValueError, "batch_size must be at least 3; got 2"),
        (lambda: measured(0.0, repeats=0), ValueError, "repeats must be at least 1; got 0"),
        (
            lambda: cluster_conflict(Linear(), torch.zeros(8, P), TimestepClusters.uniform(10, 2)),
            ValueError,
            "clusters must cover the T=1000 timesteps of log_snr; got T=10",
        ),
        (
            lambda: cluster_conflict(Linear(), torch.zeros(8, P, dtype=torch.uint8), CLUSTERS),
            TypeError,
            "data must be float",
        ),
        (lambda: TransferGap(torch.zeros(3, 2), torch.zeros(2, 2), "samples"), ValueError, "must both be"),
        (lambda: TransferGap(torch.zeros(3, 2), torch.zeros(3, 2), "epochs"), ValueError, "budget must be"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
