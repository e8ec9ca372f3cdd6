"""The samplers of timesteps: the range of t, the shares of the clusters, and the importance weights."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from devices import HAS_CUDA

from antdiff import StratifiedTimesteps, TimestepClusters, UniformTimesteps, ops

CLUSTERS = TimestepClusters(1000, [0, 1, 3, 100, 613])  # sizes 1, 2, 97, 513, 387


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("B", [1, 2, 4, 5, 7, 64, 256])
def test_rows_lie_in_their_cluster_and_are_grouped(B: int) -> None:
    sampler = StratifiedTimesteps(CLUSTERS)
    generator = seeded()
    for _ in range(20):
        shares = sampler.shares(B)
        t, cluster, weight = sampler.sample(B, generator=generator)
        assert (t.shape, cluster.shape, weight.shape) == ((B,), (B,), (B,))
        assert (t.dtype, cluster.dtype, weight.dtype) == (torch.int64, torch.int64, torch.float32)
        assert torch.equal(CLUSTERS.cluster_of(t), cluster)
        assert (cluster.diff() >= 0).all()
        assert torch.bincount(cluster, minlength=5).tolist() == shares
        assert sum(shares) == B
        assert max(shares) - min(shares) <= 1
        assert (weight == 1).all()


@pytest.mark.parametrize("B", [1, 3, 4, 7, 13])
def test_shares_are_equal_over_k_steps(B: int) -> None:
    sampler = StratifiedTimesteps(CLUSTERS)
    counts = sum(torch.bincount(sampler.sample(B).cluster, minlength=5) for _ in range(5))
    assert counts.tolist() == [B] * 5


def test_shares_differ_by_one_at_most_whatever_the_sizes_of_batches() -> None:
    sampler = StratifiedTimesteps(CLUSTERS)
    counts = torch.zeros(5, dtype=torch.int64)
    for B in (1, 7, 3, 12, 2, 2, 9, 5, 1, 31):
        counts += torch.bincount(sampler.sample(B).cluster, minlength=5)
        assert counts.max() - counts.min() <= 1


def test_t_is_uniform_inside_each_cluster() -> None:
    """The count of every t in a cluster of 97 is within five standard deviations of its expectation."""
    t, cluster, _ = StratifiedTimesteps(CLUSTERS).sample(100_000, generator=seeded())
    n = 20_000
    counts = torch.bincount(t[cluster == 2] - 3, minlength=97).double()
    assert counts.shape == (97,)
    assert (counts - n / 97).abs().max() < 5 * (n / 97) ** 0.5
    assert (t[cluster == 0] == 0).all()


@pytest.mark.parametrize("B", [50, 53])
def test_importance_weights_give_the_mean_over_uniform_t(B: int) -> None:
    """(1/k) sum_c loss_c is unbiased for any shares.

    The first check replaces the loss of every sample by the mean over its interval, so there is no sampling noise. The
    second check has sampling noise.
    """
    L = torch.linspace(0, 3, 1000, dtype=torch.float64).exp()  # any loss of t
    sampler = StratifiedTimesteps(CLUSTERS, importance=True)
    t, cluster, weight = sampler.sample(B)
    means = torch.stack([L[a:b].mean() for a, b in pairwise(CLUSTERS.bounds)])  # [k]
    losses, counts = ops.cluster_loss(
        means[cluster][:, None].sqrt(), torch.zeros(B, 1, dtype=torch.float64), cluster, 5, weight.double()
    )
    assert counts.min() >= B // 5
    assert losses.mean().item() == pytest.approx(L.mean().item(), rel=4 * 2.0**-24)  # float32 weights
    assert torch.stack([weight[cluster == c][0] for c in range(5)]).mean().item() == pytest.approx(1, rel=4 * 2.0**-24)

    t, cluster, weight = sampler.sample(200_000, generator=seeded())
    losses, _ = ops.cluster_mean(L[t], cluster, 5, weight.double())
    # Standard error of the estimate, from the deviations within clusters and shares of 40 000 samples.
    deviations = torch.stack([L[a:b].std(correction=0) for a, b in pairwise(CLUSTERS.bounds)])
    error = (CLUSTERS.sizes / 1000 * deviations).norm().item() / 40_000**0.5
    assert abs(losses.mean() - L.mean()) < 5 * error
    unweighted, _ = ops.cluster_mean(L[t], cluster, 5)
    assert abs(unweighted.mean() - L.mean()) > 100 * error  # without weights it is the mean over another density


def test_fewer_rows_than_clusters_are_unbiased_over_the_rotation() -> None:
    means = torch.arange(1.0, 6.0, dtype=torch.float64)  # mean of L in each cluster
    sampler = StratifiedTimesteps(CLUSTERS, importance=True)
    estimates = []
    for _ in range(5):
        _, cluster, weight = sampler.sample(2)
        losses, counts = ops.cluster_mean(means[cluster], cluster, 5, weight.double())
        assert counts.sum() == 2
        estimates.append(losses.sum().item() / 2)  # sum / B
    assert sum(estimates) / 5 == pytest.approx((means * CLUSTERS.sizes / 1000).sum().item(), rel=4 * 2.0**-24)


def test_a_seed_repeats_and_state_continues() -> None:
    one, two = StratifiedTimesteps(CLUSTERS), StratifiedTimesteps(CLUSTERS)
    generator = seeded(3)
    batches = [one.sample(7, generator=generator) for _ in range(6)]
    again = seeded(3)
    for batch in batches[:3]:
        for a, b in zip(batch, two.sample(7, generator=again), strict=True):
            assert torch.equal(a, b)
    resumed = StratifiedTimesteps(CLUSTERS)
    resumed.load_state_dict(two.state_dict())
    for batch in batches[3:]:
        for a, b in zip(batch, resumed.sample(7, generator=again), strict=True):
            assert torch.equal(a, b)


def test_results_belong_to_the_caller() -> None:
    sampler = StratifiedTimesteps(CLUSTERS)
    _, cluster, weight = sampler.sample(10)
    cluster.zero_()
    weight.zero_()
    assert sampler.sample(10).cluster.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert (sampler.sample(10).weight == 1).all()


def test_the_memory_of_layouts_is_bounded() -> None:
    sampler = StratifiedTimesteps(CLUSTERS)
    for B in range(1, 400):
        sampler.sample(B)
    assert len(sampler._layouts) < 100


def test_uniform_timesteps() -> None:
    sampler = UniformTimesteps(CLUSTERS)
    t, cluster, weight = sampler.sample(50_000, generator=seeded())
    assert torch.equal(CLUSTERS.cluster_of(t), cluster)
    assert (weight == 1).all()
    assert (weight.dtype, t.dtype) == (torch.float32, torch.int64)
    counts = torch.bincount(cluster, minlength=5).double()
    assert ((counts - 50 * CLUSTERS.sizes).abs() < 5 * (50 * CLUSTERS.sizes) ** 0.5).all()
    assert torch.equal(t, sampler.sample(50_000, generator=seeded()).t)
    sampler.load_state_dict(sampler.state_dict())


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
def test_on_a_gpu_nothing_waits() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    for sampler in (StratifiedTimesteps(CLUSTERS, importance=True), UniformTimesteps(CLUSTERS)):
        for _ in range(5):  # once per rotation
            sampler.sample(13, device="cuda", generator=generator)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                t, cluster, _ = sampler.sample(13, device="cuda", generator=generator)
                CLUSTERS.cluster_of(t)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(CLUSTERS.cluster_of(t.cpu()), cluster.cpu())
    outside = CLUSTERS.cluster_of(torch.tensor([-1, 0, 1000], device="cuda"))
    assert outside.tolist() == [-1, 0, 5]  # ids out of range, which cluster_loss refuses


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: StratifiedTimesteps([0, 5]), TypeError, "clusters must be a TimestepClusters"),
        (lambda: UniformTimesteps(None), TypeError, "clusters must be a TimestepClusters"),
        (lambda: StratifiedTimesteps(CLUSTERS).sample(0), ValueError, "B must be at least 1"),
        (lambda: StratifiedTimesteps(CLUSTERS).sample(2.5), TypeError, "B must be an int"),
        (lambda: UniformTimesteps(CLUSTERS).sample(-1), ValueError, "B must be at least 1"),
        (
            lambda: StratifiedTimesteps(CLUSTERS).sample(4, generator=7),
            TypeError,
            "generator must be a torch.Generator",
        ),
        (
            lambda: StratifiedTimesteps(CLUSTERS).sample(4, device="meta", generator=seeded()),
            ValueError,
            "generator must",
        ),
        (lambda: StratifiedTimesteps(CLUSTERS).load_state_dict({"k": 4, "offset": 0}), ValueError, "k=5 clusters"),
        (lambda: StratifiedTimesteps(CLUSTERS).load_state_dict({"k": 5, "offset": 5}), ValueError, "k=5 clusters"),
        (lambda: StratifiedTimesteps(CLUSTERS).load_state_dict({}), ValueError, "k=5 clusters"),
        (lambda: UniformTimesteps(CLUSTERS).load_state_dict({"offset": 1}), ValueError, "empty"),
    ],
)
def test_misuse(call: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()  # type: ignore[operator]
