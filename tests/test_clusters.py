"""TimestepClusters: construction, look-up, files, the figure, and misuse."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

from antdiff import TimestepClusters, diffusion, ops
from antdiff.plotting import plot_clusters

GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_clusters.json").read_text())
CLUSTERS = TimestepClusters(10, [0, 3, 4])
LEVELS = TimestepClusters(10, [0, 3, 4], edges=[0.5, 2.0])


# ---- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "cosine", "ldm", "sd"])
@pytest.mark.parametrize("k", [2, 3, 5, 8, 20])
def test_golden_log_snr(name: str, k: int) -> None:
    clusters = TimestepClusters.from_log_snr(diffusion.log_snr(name), k)
    assert clusters.starts.tolist() == GOLDEN[name]["median"][str(k)]["starts"]
    assert clusters.T == 1000
    assert clusters.k == k
    assert clusters.sizes.sum() == 1000


def test_uniform_is_optimal_for_the_timestep_cost() -> None:
    """The cost is the sum of distances to the centre. Many partitions tie, so the test compares total costs."""
    for T, k in ((1000, 5), (1000, 8), (1000, 7), (23, 6), (5, 5), (9, 1)):
        clusters = TimestepClusters.uniform(T, k)
        assert clusters.sizes.max() - clusters.sizes.min() <= 1
        _, best = ops.interval_partition_values(torch.arange(T, dtype=torch.float64), k)
        assert sum(n * n // 4 for n in clusters.sizes.tolist()) == best
    assert TimestepClusters.uniform(1000, 5).starts.tolist() == [0, 200, 400, 600, 800]


def test_float32_and_arrays_are_widened() -> None:
    x = diffusion.log_snr("linear", 200).float()
    want = TimestepClusters.from_log_snr(x.double(), 5)
    assert TimestepClusters.from_log_snr(x, 5) == want
    assert TimestepClusters.from_log_snr(x.numpy(), 5) == want
    assert TimestepClusters.from_log_snr(x.requires_grad_(), 5) == want


def test_options_reach_the_solver() -> None:
    x = diffusion.log_snr("linear", 300)
    weight = torch.linspace(1, 9, 300, dtype=torch.float64)
    for options in ({"p": 2}, {"weight": weight}, {"p": 2, "weight": weight}, {"min_size": 55, "max_size": 70}):
        starts, _ = ops.interval_partition_values(x, 5, **options)
        clusters = TimestepClusters.from_log_snr(x, 5, **options)
        assert clusters.starts.tolist() == starts.tolist()
        assert clusters != TimestepClusters.from_log_snr(x, 5)


def test_from_affinity_and_from_cost() -> None:
    block = torch.bucketize(torch.arange(40), torch.tensor([9, 21]), right=True)
    affinity = (block[:, None] == block).float()
    assert TimestepClusters.from_affinity(affinity, 3).bounds == (0, 9, 21, 40)
    cost = (block[:, None] != block).double()
    assert TimestepClusters.from_cost(cost, 3).bounds == (0, 9, 21, 40)


def test_zero_terminal_snr_is_explained() -> None:
    betas = diffusion.betas("linear", 50)
    betas[-1] = 1
    x = diffusion.log_snr_from_betas(betas)
    assert x[-1] == -math.inf
    with pytest.raises(ValueError, match=r"got -inf at t=49.*log_snr\[-1\] = log_snr\[-2\]"):
        TimestepClusters.from_log_snr(x, 4)
    x[-1] = x[-2]
    assert TimestepClusters.from_log_snr(x, 4).T == 50


def test_sigmas() -> None:
    sigmas = torch.logspace(-2, 2, 101, dtype=torch.float64)  # even in log, so the clusters have equal sizes
    clusters = TimestepClusters.from_sigmas(sigmas, 4)
    assert clusters.edges is not None
    assert (clusters.sizes - 101 / 4).abs().max() < 2
    assert clusters.cluster_of(sigmas).tolist() == clusters.cluster_of(torch.arange(101)).tolist()
    same = TimestepClusters.from_log_snr(diffusion.log_snr_from_sigmas(sigmas), 4)
    assert clusters.bounds == same.bounds


def test_edm_quantiles() -> None:
    edges = TimestepClusters.from_quantiles(20).edges
    printed = ".0418 .0647 .0868 .1097 .1341 .1605 .1897 .2222 .2590 .3012 "
    printed += ".3502 .4082 .4783 .5651 .6766 .8269 1.045 1.402 2.168"
    assert edges == pytest.approx([float(e) for e in printed.split()], rel=2e-3)  # three to four digits
    log_sigma = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 1.2 - 1.2
    counts = torch.bincount(TimestepClusters.from_quantiles(20).cluster_of(log_sigma.exp()), minlength=20)
    assert (counts - 1000).abs().max() < 5 * math.sqrt(1000)  # five standard deviations of a binomial


def test_flow_matching_quantiles() -> None:
    uniform = TimestepClusters.from_quantiles(4, distribution="uniform", T=8)
    assert uniform.edges == (0.25, 0.5, 0.75)
    logit = TimestepClusters.from_quantiles(4, distribution="logit-normal", mean=0.0, std=1.0)
    assert logit.edges is not None
    z = NormalDist().inv_cdf(0.25)
    assert logit.edges == pytest.approx((1 / (1 + math.exp(-z)), 0.5, 1 / (1 + math.exp(z))))
    # If k does not divide T, timesteps (bins of equal probability) and noise levels still agree.
    odd = TimestepClusters.from_quantiles(3, distribution="uniform", T=10)
    tau = (torch.arange(10, dtype=torch.float64) + 0.5) / 10
    assert odd.cluster_of(tau).tolist() == odd.cluster_of(torch.arange(10)).tolist()


# ---- look-up ---------------------------------------------------------------------------------------------------------

EXPECTED = [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_cluster_of_tensors(dtype: torch.dtype) -> None:
    t = torch.arange(10, dtype=dtype)
    ids = CLUSTERS.cluster_of(t)
    assert ids.dtype == torch.int64
    assert ids.tolist() == EXPECTED
    assert CLUSTERS.cluster_of(t.view(2, 5).T).tolist() == torch.tensor(EXPECTED).view(2, 5).T.tolist()
    assert CLUSTERS.cluster_of(t[:0]).shape == (0,)
    assert CLUSTERS.cluster_of(t[4]).item() == 2


def test_cluster_of_arrays_and_numbers() -> None:
    ids = CLUSTERS.cluster_of(np.arange(10, dtype=np.int32).reshape(5, 2))
    assert ids.dtype == np.int64
    assert ids.ravel().tolist() == EXPECTED
    assert [CLUSTERS.cluster_of(t) for t in range(10)] == EXPECTED
    assert CLUSTERS.cluster_of(np.int64(3)) == 1
    assert type(CLUSTERS.cluster_of(3)) is int


def test_cluster_of_noise_levels() -> None:
    sigma = [0.0, 0.49, 0.5, 1.9, 2.0, 1e30]
    expected = [0, 0, 1, 1, 2, 2]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        usable = torch.tensor(sigma[:-1] if dtype == torch.float16 else sigma, dtype=dtype)
        assert LEVELS.cluster_of(usable).tolist() == expected[: len(usable)]
    assert LEVELS.cluster_of(np.array(sigma)).tolist() == expected
    assert [LEVELS.cluster_of(s) for s in sigma] == expected
    assert LEVELS.cluster_of(torch.arange(10)).tolist() == EXPECTED  # integers stay timesteps


@pytest.mark.parametrize("t", [-1, 10, 2**40])
def test_timesteps_out_of_range(t: int) -> None:
    for form in (t, torch.tensor([0, t]), np.array([0, t])):
        with pytest.raises(ValueError, match=r"t must lie in \[0, T\) with T=10; got"):
            CLUSTERS.cluster_of(form)


@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf])
def test_noise_levels_out_of_range(sigma: float) -> None:
    for form in (sigma, torch.tensor([1.0, sigma]), np.array([1.0, sigma])):
        with pytest.raises(ValueError, match="finite and >= 0; got"):
            LEVELS.cluster_of(form)


@pytest.mark.parametrize("t", [1.5, torch.tensor([1.0]), np.array([1.0])])
def test_noise_levels_need_edges(t: object) -> None:
    with pytest.raises(TypeError, match=r"have no edges.*from_sigmas"):
        CLUSTERS.cluster_of(t)


@pytest.mark.parametrize("t", [True, "3", None, [1, 2], torch.tensor([True]), np.array([True]), torch.tensor([1j])])
def test_cluster_of_the_wrong_kind(t: object) -> None:
    with pytest.raises(TypeError, match="t must be"):
        CLUSTERS.cluster_of(t)


# ---- equality, text, files -------------------------------------------------------------------------------------------


def test_equality_text_and_pickles() -> None:
    assert TimestepClusters(10, torch.tensor([0, 3, 4])) == CLUSTERS
    assert CLUSTERS != LEVELS
    assert TimestepClusters(11, [0, 3, 4]) != CLUSTERS
    assert CLUSTERS != "clusters"
    assert len({CLUSTERS, TimestepClusters(10, [0, 3, 4]), LEVELS}) == 2
    assert repr(CLUSTERS) == "TimestepClusters(T=10, k=3: [0, 3) [3, 4) [4, 10))"
    assert repr(LEVELS).endswith("; edges 0.5 2)")
    LEVELS.cluster_of(torch.tensor([1.0]))  # fills the cache of boundaries
    assert pickle.loads(pickle.dumps(LEVELS)) == LEVELS


def test_they_cannot_be_changed_through_what_they_return() -> None:
    CLUSTERS.starts[1] = 7
    CLUSTERS.sizes[1] = 7
    assert CLUSTERS.bounds == (0, 3, 4, 10)
    with pytest.raises(AttributeError):
        CLUSTERS.T = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        CLUSTERS.other = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "clusters", [CLUSTERS, LEVELS, TimestepClusters.from_quantiles(7), TimestepClusters.uniform(1, 1)]
)
def test_files_round_trip(clusters: TimestepClusters, tmp_path: Path) -> None:
    path = tmp_path / "clusters.json"
    path.write_text("old")
    clusters.save(path)
    assert TimestepClusters.load(path) == clusters
    assert [p.name for p in tmp_path.iterdir()] == ["clusters.json"]  # nothing temporary stays


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clusters.json"
    CLUSTERS.save(path)

    def full_disk(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        LEVELS.save(path)
    assert TimestepClusters.load(path) == CLUSTERS
    assert [p.name for p in tmp_path.iterdir()] == ["clusters.json"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "must be JSON"),
        ("[1, 2]", "must hold timestep clusters"),
        ('{"T": 3}', "must hold timestep clusters"),
        ({"version": 2}, "must be of version 1; got 2"),
        ({"version": None}, "must be of version 1"),
        ({"T": None}, "damaged: T must be an int"),
        ({"starts": [0, 5, 5]}, "damaged: starts must ascend strictly"),
        ({"starts": [1, 5]}, "damaged: starts must ascend strictly from 0"),
        ({"starts": [0, 10]}, "damaged: starts must ascend strictly"),
        ({"starts": "034"}, "damaged: starts must be a list"),
        ({"starts": [0.0, 3.0]}, "damaged: starts must be an int"),
        ({"edges": [1.0]}, "damaged: edges must have k-1=2 entries"),
        ({"edges": [2.0, 1.0]}, "damaged: edges must ascend"),
        ({"edges": [1.0, "x"]}, "damaged"),
    ],
)
def test_a_damaged_file(content: str | dict[str, object], text: str, tmp_path: Path) -> None:
    path = tmp_path / "clusters.json"
    CLUSTERS.save(path)
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_text(content)
    with pytest.raises(ValueError, match=text):
        TimestepClusters.load(path)


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TimestepClusters.load(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be JSON"):
        TimestepClusters.load(tmp_path / "bytes.json")
    document = {"format": "antdiff.TimestepClusters", "version": 1, "T": 3}
    (tmp_path / "short.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="'starts' is missing"):
        TimestepClusters.load(tmp_path / "short.json")


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    clusters = TimestepClusters.from_log_snr(diffusion.log_snr("linear", 100), 4)
    ax = plot_clusters(clusters, diffusion.log_snr("linear", 100))
    assert len(ax.patches) == 4
    spans = sorted((p.get_x(), p.get_x() + p.get_width()) for p in ax.patches)
    assert [a + 0.5 for a, _ in spans] == clusters.starts.tolist()
    assert spans[-1][1] == 99.5
    assert ax.lines[0].get_ydata().shape == (100,)
    ax.figure.savefig(tmp_path / "clusters.png")
    assert (tmp_path / "clusters.png").stat().st_size > 1000
    assert plot_clusters(clusters, ax=ax) is ax
    with pytest.raises(ValueError, match=r"log_snr must have shape \[T\] with T=100; got \[7\]"):
        plot_clusters(clusters, torch.ones(7))


# ---- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: TimestepClusters(0, [0]), ValueError, "T must be at least 1"),
        (lambda: TimestepClusters(5, []), ValueError, "starts must ascend"),
        (lambda: TimestepClusters(5, [0, 5]), ValueError, "stay below T=5"),
        (lambda: TimestepClusters(5, [0, 2.5]), TypeError, "starts must be an int"),
        (lambda: TimestepClusters(5, [0, 2], edges=[0.0]), ValueError, "positive"),
        (lambda: TimestepClusters(5, [0, 2], edges=[math.nan]), ValueError, "positive"),
        (lambda: TimestepClusters.uniform(5, 6), ValueError, "k must be at most T.*k=6 with T=5"),
        (lambda: TimestepClusters.uniform(5, 0), ValueError, "k must be at least 1"),
        (lambda: TimestepClusters.from_log_snr([1.0, 2.0], 1), TypeError, "log_snr must be a float tensor"),
        (lambda: TimestepClusters.from_log_snr(torch.arange(5), 1), TypeError, "got torch.int64"),
        (lambda: TimestepClusters.from_log_snr(torch.ones(2, 2), 1), ValueError, r"log_snr must have shape \[T\]"),
        (lambda: TimestepClusters.from_log_snr(torch.ones(0), 1), ValueError, "T >= 1"),
        (lambda: TimestepClusters.from_log_snr(torch.tensor([1.0, math.nan]), 1), ValueError, "got nan at t=1"),
        (lambda: TimestepClusters.from_log_snr(torch.ones(3), 4), ValueError, "k must be at most T"),
        (lambda: TimestepClusters.from_log_snr(torch.ones(9), 3, min_size=4), ValueError, "sizes must satisfy"),
        (lambda: TimestepClusters.from_affinity(torch.ones(3, 4), 2), ValueError, r"shape \[T, T\]"),
        (lambda: TimestepClusters.from_affinity(torch.ones(3), 2), ValueError, r"tas must have shape \[T, T\]"),
        (lambda: TimestepClusters.from_affinity(torch.full((3, 3), math.nan), 2), ValueError, "must be finite"),
        (lambda: TimestepClusters.from_cost(torch.ones(3, 3), 2), TypeError, "cost must be float64"),
        (lambda: TimestepClusters.from_sigmas(torch.tensor([2.0, 1.0]), 1), ValueError, "flip"),
        (lambda: TimestepClusters.from_sigmas(torch.tensor([0.0, 1.0]), 1), ValueError, "leave out the final 0"),
        (lambda: TimestepClusters.from_quantiles(4, distribution="normal"), ValueError, "distribution must be"),
        (lambda: TimestepClusters.from_quantiles(4, std=0.0), ValueError, "std finite and positive"),
    ],
)
def test_misuse(make: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()  # type: ignore[operator]
