"""Curriculum: clusters, pacing, ranges, and composition with samplers and Uncertainty Weighting."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from antdiff import StratifiedTimesteps, TimestepClusters, UniformTimesteps, ops
from antdiff.balancing import UncertaintyWeighting
from antdiff.companions import Curriculum, SigmaCurriculum
from antdiff.diffusion.schedules import log_snr

GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_clusters.json").read_text())
T = 1000

# Published noise levels of EDM between N = 20 clusters of equal probability, for P_mean = -1.2 and P_std = 1.2.
EDM_SIGMAS = [0.0418, 0.0647, 0.0868, 0.1097, 0.1341, 0.1605, 0.1897, 0.2222, 0.2590, 0.3012, 0.3502, 0.4082, 0.4783,
              0.5651, 0.6766, 0.8269, 1.045, 1.402, 2.168]  # fmt: skip


def at_stage(curriculum: Any, stage: int) -> Any:
    curriculum.load_state_dict({**curriculum.state_dict(), "stage": stage})
    return curriculum


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- clusters and ranges -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine", "ldm", "sd"])
def test_log_snr_clusters_are_the_golden_ones(schedule: str) -> None:
    curriculum = Curriculum.from_log_snr(log_snr(schedule))
    assert curriculum.edges.tolist() == [*GOLDEN[schedule]["median"]["20"]["starts"], T]


def test_ranges_grow_from_the_most_noise_and_keep_what_they_have() -> None:
    curriculum = Curriculum.uniform(T)
    lows = []
    for n in range(1, 21):
        low, high = at_stage(curriculum, n).range
        assert int(high) == T
        lows.append(int(low))
    assert lows == [950 - 50 * i for i in range(20)]
    anti = Curriculum.uniform(T, order="hard-first")
    assert [tuple(map(int, at_stage(anti, n).range)) for n in (1, 2, 20)] == [(0, 50), (0, 100), (0, T)]


@pytest.mark.parametrize("stage", [1, 7, 20])
def test_samples_are_uniform_over_the_range(stage: int) -> None:
    curriculum = at_stage(Curriculum.from_log_snr(log_snr("cosine")), stage)
    low, high = map(int, curriculum.range)
    t = curriculum.sample(200_000, generator=generator())
    assert t.dtype == torch.int64
    assert low <= int(t.min())
    assert int(t.max()) < high
    share = torch.bincount(t - low, minlength=high - low).double() / len(t) * (high - low)  # expected: 1
    # A binomial count of mean n/m has a relative standard deviation of sqrt(m/n). The bound is 5.5 of them, for at most
    # 1000 cells.
    assert float((share - 1).abs().max()) < 5.5 * math.sqrt((high - low) / len(t))


def test_edm_clusters_are_the_published_noise_levels() -> None:
    curriculum = Curriculum.edm()
    got = curriculum.sigma_bounds
    # The published values have four significant digits; the tolerance is half a unit of the last digit.
    torch.testing.assert_close(got, torch.tensor(EDM_SIGMAS, dtype=torch.float64), rtol=2.5e-3, atol=5e-5)
    assert [f"{s:.4f}" for s in got.tolist()[:16]] == [f"{s:.4f}" for s in EDM_SIGMAS[:16]]
    assert [f"{s:.3f}" for s in got.tolist()[16:]] == [f"{s:.3f}" for s in EDM_SIGMAS[16:]]


def test_edm_samples_keep_to_the_quantiles_of_the_stage() -> None:
    curriculum = at_stage(SigmaCurriculum(), 5)
    sigma = curriculum.sample(100_000, generator=generator())
    assert sigma.dtype == torch.float32
    assert float(sigma.min()) >= 0.6766 - 5e-5  # the 15th of the 19 edges
    u = torch.special.ndtr((sigma.double().log() + 1.2) / 1.2)  # uniform over [0.75, 1)
    # The mean of n uniforms of width w has a standard deviation of w / sqrt(12 n). The bound is five of them.
    assert abs(float(u.mean()) - 0.875) < 5 * 0.25 / math.sqrt(12 * len(u))
    whole = at_stage(curriculum, 20).sample(100_000, generator=generator()).double().log()
    assert abs(float(whole.mean()) + 1.2) < 5 * 1.2 / math.sqrt(len(whole))


@pytest.mark.parametrize("options", [{"p_mean": -200.0}, {"p_mean": 200.0}, {"p_std": 30.0}, {"p_std": 1e300}])
def test_noise_levels_outside_float32_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="p_mean and p_std must give noise levels in the range of float32"):
        SigmaCurriculum(**options)


# ---- pacing ----------------------------------------------------------------------------------------------------------


def stages(curriculum: Any, losses: list[float]) -> list[int]:
    seen = []
    for loss in losses:
        curriculum.update(torch.tensor(loss))
        seen.append(int(curriculum.stage))
    return seen


@pytest.mark.parametrize("patience", [0, 1, 7])
def test_constant_loss_ends_each_stage_after_patience_plus_two_updates(patience: int) -> None:
    """One update sets the lowest loss, and patience + 1 updates fail to improve it."""
    curriculum = Curriculum.uniform(T, n=4, patience=patience)
    seen = stages(curriculum, [0.5] * 40)
    length = patience + 2
    assert seen == [min(4, 1 + (i + 1) // length) for i in range(40)]
    assert bool(curriculum.done)


def test_falling_loss_never_ends_a_stage_and_nan_counts_as_no_improvement() -> None:
    curriculum = Curriculum.uniform(T, n=4, patience=3)
    assert set(stages(curriculum, [1.0 - 1e-4 * i for i in range(500)])) == {1}
    assert stages(curriculum, [math.nan] * 4)[-1] == 2


def test_the_best_loss_is_forgotten_between_stages() -> None:
    """Lower noise has a higher loss, so the lowest loss of an easy stage must not count in the next stage."""
    curriculum = Curriculum.uniform(T, n=3, patience=2)
    stages(curriculum, [0.1] * 4)
    assert int(curriculum.stage) == 2
    assert set(stages(curriculum, [5.0 - 0.1 * i for i in range(30)])) == {2}


def test_noise_takes_the_expected_number_of_updates() -> None:
    """With i.i.d. losses and patience 200, a stage takes 356 updates on average, according to a simulation.

    The standard deviation is about 130. Over 76 stages, five standard deviations of the mean are 75.
    """
    curriculum = Curriculum.uniform(T, n=20)
    counts = []
    noise = torch.rand(20 * 19 * 500, generator=generator(), dtype=torch.float64)
    at = 0
    for _ in range(4):
        at_stage(curriculum, 1)
        start = at
        while not bool(curriculum.done):
            curriculum.update(noise[at])
            at += 1
        counts.append((at - start) / 19)
        curriculum.load_state_dict(Curriculum.uniform(T).state_dict())
    assert abs(sum(counts) / 4 - 356) < 5 * 130 / math.sqrt(4 * 19)


def test_fixed_pacing_takes_the_same_number_of_updates_whatever_the_loss() -> None:
    curriculum = Curriculum.uniform(T, n=3, steps_per_stage=5)
    assert stages(curriculum, [1.0 / (i + 1) for i in range(12)]) == [1] * 4 + [2] * 5 + [3] * 3


def test_smoothing_restarts_with_each_stage() -> None:
    curriculum = Curriculum.uniform(T, n=3, patience=0, smoothing=0.9)
    curriculum.update(1.0)
    curriculum.update(2.0)  # the average rises, so stage 2 begins
    assert int(curriculum.stage) == 2
    assert math.isnan(float(curriculum.state_dict()["smoothed"]))
    curriculum.update(10.0)
    curriculum.update(9.0)
    assert float(curriculum.state_dict()["smoothed"]) == pytest.approx(9.9)
    assert int(curriculum.stage) == 2


def test_host_stage_lags_one_update() -> None:
    curriculum = Curriculum.uniform(T, n=5, steps_per_stage=1)
    before = []
    for _ in range(4):
        curriculum.update(1.0)
        before.append((curriculum.host_stage, int(curriculum.stage)))
    assert before == [(1, 2), (2, 3), (3, 4), (4, 5)]


def test_a_resumed_curriculum_goes_on_as_the_uninterrupted_one() -> None:
    losses = torch.rand(300, generator=generator()).tolist()
    one = Curriculum.uniform(T, n=6, patience=10, smoothing=0.5)
    whole = stages(one, losses)
    first = Curriculum.uniform(T, n=6, patience=10, smoothing=0.5)
    half = stages(first, losses[:137])
    second = Curriculum.uniform(T, n=6, patience=10, smoothing=0.5)
    second.load_state_dict(first.state_dict())
    assert second.host_stage == half[-1]
    assert half + stages(second, losses[137:]) == whole
    assert len(set(whole)) > 2


class HostReads(TorchDispatchMode):
    """Record the operations that copy a number from a tensor to Python. On a GPU, each would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back_to_the_host() -> None:
    curriculum = Curriculum.uniform(T)
    sigma = Curriculum.edm()
    timesteps = curriculum.restrict(StratifiedTimesteps(TimestepClusters.uniform(T, 5), importance=True))
    timesteps.sample(8)  # the stratified sampler computes the layout of a batch size once
    loss = torch.tensor(1.0)
    with HostReads() as reads:
        assert curriculum.update(loss) is None
        sigma.update(loss)
        curriculum.sample(8)
        sigma.sample(8)
        timesteps.sample(8)
    assert reads.seen == []
    with HostReads() as reads:
        int(curriculum.stage)
    assert len(reads.seen) == 1  # the recorder does see a read


def two_ranks(rank: int, port: int, losses: list[list[float]], results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        results.put((rank, stages(Curriculum.uniform(T, n=4, patience=2), losses[rank])))
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ranks_with_different_losses_change_stage_together() -> None:
    """Alone, the first rank (falling loss) would never advance, and the second (rising loss) every fourth update."""
    losses = [[1.0 - 0.01 * i for i in range(30)], [2.0 + 0.03 * i for i in range(30)]]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    ranks = [context.Process(target=two_ranks, args=(rank, port, losses, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    got = dict(results.get() for _ in ranks)
    for process in ranks:
        process.join()
    mean = [(a + b) / 2 for a, b in zip(*losses, strict=True)]
    assert got[0] == got[1] == stages(Curriculum.uniform(T, n=4, patience=2), mean)
    assert got[0][-1] > 1


# ---- composition -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [StratifiedTimesteps, UniformTimesteps])
@pytest.mark.parametrize("stage", [1, 6, 13, 20])
def test_restriction_keeps_the_density_inside_the_range(make: Any, stage: int) -> None:
    clusters = TimestepClusters.from_log_snr(log_snr("cosine"), 5)
    timesteps = at_stage(Curriculum.from_log_snr(log_snr("cosine")), stage).restrict(make(clusters))
    p = torch.full((T,), 1 / T, dtype=torch.float64)
    if make is StratifiedTimesteps:
        p = 1 / (clusters.k * clusters.sizes[clusters.cluster_of(torch.arange(T))].double())
    low, _high = map(int, timesteps.curriculum.range)
    p[:low] = 0
    p /= p.sum()
    n = 200_000
    t, cluster, weight = timesteps.sample(n, generator=generator())
    assert torch.equal(cluster, clusters.cluster_of(t))
    assert bool((weight == 1).all())
    counts = torch.bincount(t, minlength=T).double()
    assert bool((counts[:low] == 0).all())
    # The variance of a count is at most that of a Poisson distribution (less if stratified). The bound is 6 standard
    # deviations, for 1000 cells, plus 6 for nearly empty cells.
    assert bool(((counts - n * p).abs() <= 6 * (n * p).sqrt() + 6).all())


def test_once_done_the_sampler_is_itself() -> None:
    clusters = TimestepClusters.uniform(T, 5)
    timesteps = at_stage(Curriculum.uniform(T), 20).restrict(StratifiedTimesteps(clusters))
    t, cluster, weight = timesteps.sample(64, generator=generator(3))
    want = StratifiedTimesteps(clusters).sample(64, generator=generator(3))
    assert torch.equal(t, want.t)
    assert torch.equal(cluster, want.cluster)
    assert torch.equal(weight, want.weight)


@pytest.mark.parametrize("stage", [1, 6, 13, 20])
def test_importance_weights_give_the_mean_over_uniform_t_in_the_range(stage: int) -> None:
    clusters = TimestepClusters.from_log_snr(log_snr("cosine"), 5)
    curriculum = at_stage(Curriculum.from_log_snr(log_snr("cosine")), stage)
    timesteps = curriculum.restrict(StratifiedTimesteps(clusters, importance=True))
    low, high = map(int, curriculum.range)
    t, cluster, weight = timesteps.sample(200_000, generator=generator())
    value = torch.cos(t.double() / 150)
    losses, counts = ops.cluster_mean(value, cluster, clusters.k, weight.double())
    want = torch.cos(torch.arange(low, high).double() / 150).mean()
    # |value| <= 1, and the weights average to 1 and stay below 5, so the standard deviation is below 5 / sqrt(n). The
    # bound is four of them.
    assert abs(float(losses.sum() / clusters.k - want)) < 20 / math.sqrt(len(t))
    assert torch.equal(timesteps.cluster_weights[cluster], weight)
    assert bool(((counts == 0) == (clusters.starts + clusters.sizes <= low)).all())


def test_uncertainty_weighting_leaves_clusters_outside_the_range_alone() -> None:
    clusters = TimestepClusters.uniform(T, 5)
    curriculum = Curriculum.uniform(T, n=5, steps_per_stage=10)
    timesteps = curriculum.restrict(StratifiedTimesteps(clusters))
    uw = UncertaintyWeighting(clusters.k)
    optimizer = torch.optim.Adam(uw.param_groups())
    scale = torch.tensor([1.0, 0.5, 0.3, 0.2, 0.1])
    moved = []
    for step in range(30):
        _t, cluster, weight = timesteps.sample(10, generator=generator(step))
        losses, counts = ops.cluster_mean(scale[cluster], cluster, clusters.k, weight)
        optimizer.zero_grad()
        loss = uw.loss(losses, counts)
        assert bool(loss.isfinite())
        loss.backward()
        optimizer.step()
        curriculum.update(loss.detach())
        moved.append((uw.log_variance != 0).tolist())
    assert moved[9] == [False, False, False, False, True]
    assert moved[19] == [False, False, False, True, True]
    assert moved[29] == [False, False, True, True, True]


def test_restricted_timesteps_resume() -> None:
    clusters = TimestepClusters.uniform(T, 3)

    def make() -> Any:
        return Curriculum.uniform(T, n=4, steps_per_stage=3).restrict(StratifiedTimesteps(clusters))

    one, rng = make(), generator()
    for _ in range(5):
        one.sample(7, generator=rng)
        one.curriculum.update(1.0)
    two = make()
    two.load_state_dict(one.state_dict())
    rng_state = rng.get_state()
    first = one.sample(7, generator=rng)
    rng.set_state(rng_state)
    assert all(torch.equal(a, b) for a, b in zip(first, two.sample(7, generator=rng), strict=True))


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Curriculum.uniform(T, patience=-1), ValueError, "patience must be at least 0"),
        (lambda: Curriculum.uniform(T, steps_per_stage=0), ValueError, "steps_per_stage must be at least 1"),
        (lambda: Curriculum.uniform(T, order="up"), ValueError, "order must be"),
        (lambda: Curriculum.uniform(T, smoothing=1.0), ValueError, "smoothing must be in"),
        (lambda: Curriculum([0, 5]), TypeError, "clusters must be TimestepClusters"),
        (lambda: Curriculum.edm(p_std=0), ValueError, "p_std must be positive"),
        (lambda: Curriculum.edm(n=0), ValueError, "n must be at least 1"),
        (lambda: Curriculum.uniform(T).update(torch.zeros(2)), ValueError, "loss must be one number"),
        (lambda: Curriculum.uniform(T).update("low"), TypeError, "loss must be a tensor or a number"),
        (lambda: Curriculum.uniform(T).update(torch.zeros((), device="meta")), ValueError, "device='meta'"),
        (lambda: Curriculum.uniform(T).sample(4, device="meta"), ValueError, "device must be the curriculum's own"),
        (lambda: at_stage(Curriculum.uniform(T, n=3), 4), ValueError, "N=3 clusters; got stage 4"),
        (lambda: Curriculum.uniform(T).restrict(object()), TypeError, "sampler must be"),
        (
            lambda: Curriculum.uniform(T).restrict(UniformTimesteps(TimestepClusters.uniform(50, 2))),
            ValueError,
            "T=1000 timesteps; got T=50",
        ),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
