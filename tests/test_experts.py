"""Interval experts: timesteps, the bank, and architectures."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from einops import reduce, repeat
from torch import Tensor, nn

from antdiff import TimestepClusters
from antdiff.companions import (
    ExpertBank,
    InceptionMixer2d,
    SoftIntervalSampler,
    add_inception,
    high_ratio_schedule,
)

T = 1000

# Published mass of each expert's density on the four intervals, for p = (0.8, 0.4, 0.2, 0.1).
MASS = [[0.85, 0.05, 0.05, 0.05], [0.15, 0.55, 0.15, 0.15], [0.2, 0.2, 0.4, 0.2], [0.225, 0.225, 0.225, 0.325]]


# ---- timesteps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", range(4))
def test_densities_have_the_published_masses_and_samples_follow_them(expert: int) -> None:
    sampler = SoftIntervalSampler()
    q = sampler.density(expert)
    # float64 sums of 1000 terms of at most 4e-3
    torch.testing.assert_close(q.sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(
        q.view(4, 250).sum(1), torch.tensor(MASS[expert], dtype=torch.float64), rtol=1e-12, atol=0.0
    )
    n = 100_000
    t = sampler.sample(expert, n, generator=torch.Generator().manual_seed(expert))
    assert t.dtype == torch.int64
    got = torch.bincount(t // 250, minlength=4).double() / n
    # The bound is five standard deviations of a binomial share.
    assert bool(((got - q.view(4, 250).sum(1)).abs() < 5 * 0.5 / n**0.5).all())


def test_limits_hard_experts_and_plain_models() -> None:
    hard = SoftIntervalSampler(3, (1, 1, 1), T)
    assert hard.bounds == [0, 333, 666, 1000]
    t = hard.sample(2, 5000)
    assert int(t.min()) >= 666
    assert bool((hard.density(1)[333:666] == 1 / 333).all())
    assert float(hard.density(1)[:333].sum()) == 0
    plain = SoftIntervalSampler(3, (0, 0, 0), T)
    assert bool((plain.density(1) == 1 / T).all())


def test_clusters_give_other_intervals() -> None:
    clusters = TimestepClusters(T, [0, 100, 400, 800])
    sampler = SoftIntervalSampler(clusters=clusters, p=(1, 1, 1, 1))
    t = sampler.sample(1, 2000)
    assert int(t.min()) >= 100
    assert int(t.max()) < 400


# ---- the bank --------------------------------------------------------------------------------------------------------


class Expert(nn.Module):
    """Add the expert's number and a function of t, so that a wrong expert or a wrong row changes the output."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.tensor(number))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor | int, scale: Tensor | float = 1.0) -> Tensor:
        self.calls += 1
        t = torch.as_tensor(t).reshape(-1, 1)
        return x + self.number + 1e-3 * t * torch.as_tensor(scale).reshape(-1, 1)


def bank(n: int = 4, **options: Any) -> ExpertBank:
    return ExpertBank([Expert(10.0 * i) for i in range(n)], T, **options)


@pytest.mark.parametrize("n", [1, 3, 4, 7])
def test_every_timestep_has_one_expert_that_of_the_bounds(n: int) -> None:
    """3 and 7 do not divide T; t n // T would be a different assignment for them."""
    b = bank(n)
    owners = [b.expert_for(t) for t in range(T)]
    assert owners == sorted(owners)
    bounds = [i * T // n for i in range(n + 1)]
    assert [owners.count(i) for i in range(n)] == [hi - lo for lo, hi in itertools.pairwise(bounds)]
    if n == 4:
        assert (owners[249], owners[250]) == (0, 1)
    if n == 7:
        assert any(owners[t] != t * n // T for t in range(T))


def test_mixed_timesteps_equal_one_call_a_sample() -> None:
    b = bank()
    x, t = torch.randn(9, 2), torch.tensor([0, 999, 250, 249, 500, 750, 1, 749, 998])
    scale = torch.arange(9.0)
    want = torch.cat([b(x[i : i + 1], int(t[i]), scale=scale[i : i + 1]) for i in range(9)])
    for expert in b.experts:
        expert.calls = 0
    y = b(x, t, scale=scale)
    assert torch.equal(y, want)
    assert [expert.calls for expert in b.experts] == [1, 1, 1, 1]
    y.sum().backward()
    counts = torch.bincount(t // 250)
    assert [float(expert.number.grad) for expert in b.experts] == [2.0 * float(c) for c in counts]


@pytest.mark.parametrize("t", [600, torch.tensor(600), torch.tensor([600]), torch.full((5,), 600)])
def test_one_timestep_for_all_calls_one_expert(t: Any) -> None:
    b = bank()
    y = b(torch.zeros(5, 2), t)
    assert [expert.calls for expert in b.experts] == [0, 0, 1, 0]
    torch.testing.assert_close(y, torch.full((5, 2), 20.6), rtol=1e-6, atol=0.0)  # float32


def test_the_bank_follows_clusters() -> None:
    b = bank(clusters=TimestepClusters(T, [0, 100, 400, 800]))
    assert [b.expert_for(t) for t in (99, 100, 399, 400, 799, 800)] == [0, 1, 1, 2, 2, 3]


def test_offloading_keeps_one_expert_on_the_device() -> None:
    moves: list[tuple[int, str]] = []

    class Moving(Expert):
        def to(self, device: Any) -> Any:  # type: ignore[override]
            moves.append((int(self.number) // 10, str(device)))
            return self

    b = ExpertBank([Moving(10.0 * i) for i in range(4)], T).offload("cuda", home="cpu")
    x = torch.zeros(3, 2)
    for t in (999, 800, 700, 400, 300):
        assert torch.equal(b(x, t), bank()(x, t))
    assert moves == [(3, "cuda"), (3, "cpu"), (2, "cuda"), (2, "cpu"), (1, "cuda")]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
def test_a_multistep_solver_keeps_its_history_across_experts() -> None:
    """The solver's history consists of predictions. The bank gives the same samples as exchanging networks by hand."""
    from diffusers import DPMSolverMultistepScheduler

    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Tanh()) for _ in range(4)]
    noise = torch.randn(2, 1, 8, 8)

    class Ignoring(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

    b = ExpertBank([Ignoring(net) for net in experts], T)

    def solve(predict: Any) -> Tensor:
        solver = DPMSolverMultistepScheduler(num_train_timesteps=T, solver_order=2)
        solver.set_timesteps(10)
        x = noise
        for t in solver.timesteps:
            x = solver.step(predict(x, int(t)), t, x).prev_sample
        return x

    with torch.no_grad():
        assert torch.equal(solve(b), solve(lambda x, t: experts[t // 250](x)))


# ---- architectures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1), (9, 2)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_mixer_keeps_any_shape(size: tuple[int, int], ratio: float) -> None:
    mixer = InceptionMixer2d(32, ratio, head_dim=4)
    x = torch.randn(2, 32, *size, requires_grad=True)
    y = mixer(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in mixer.parameters())
    assert x.grad is not None
    assert bool((x.grad.abs().sum((0, 2, 3)) > 0).all())  # every channel has an effect


def test_mixer_branches_by_hand() -> None:
    """The split is 12 | 20 (5 heads of 4). The halves double, so 24 + 20 channels mix. Attention sees 2x2 means."""
    mixer = InceptionMixer2d(32, 12 / 32, head_dim=4).double()
    assert (mixer.high, mixer.low, mixer.heads) == (12, 20, 5)
    assert mixer.out.in_channels == 44
    x = torch.randn(2, 32, 6, 6, dtype=torch.float64)
    z1, z2, z3 = x[:, :6], x[:, 6:12], x[:, 12:]
    y1 = nn.functional.gelu(mixer.pooled(nn.functional.max_pool2d(z1, 3, 1, 1)))
    y2 = nn.functional.gelu(mixer.convolved[1](mixer.convolved[0](z2)))
    tokens = reduce(z3, "b c (h 2) (w 2) -> b (h w) c", "mean")  # [B, 9, 20]
    attention = nn.MultiheadAttention(20, 5, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        attention.in_proj_weight.copy_(mixer.qkv.weight.flatten(1))
        attention.in_proj_bias.copy_(mixer.qkv.bias)
        attention.out_proj.weight.copy_(mixer.attended.weight.flatten(1))
        attention.out_proj.bias.copy_(mixer.attended.bias)
    low = attention(tokens, tokens, tokens, need_weights=False)[0]
    y = torch.cat([y1, y2, repeat(low, "b (h w) c -> b c (h 2) (w 2)", h=3)], 1)
    # float64 sums of a few dozen terms of order one, in different orders
    torch.testing.assert_close(mixer(x), mixer.out(y + mixer.mix(y)), rtol=1e-11, atol=1e-12)


def test_high_ratio_has_the_published_points_and_falls_with_noise_and_depth() -> None:
    """Published d_h : d_l in the second and fourth stage: 5:8 and 1:3 (first expert), 1:4 and 1:15 (last expert)."""
    for expert, stage, high, low in ((0, 1, 5, 8), (0, 3, 1, 3), (3, 1, 1, 4), (3, 3, 1, 15)):
        assert high_ratio_schedule(expert, stage) == pytest.approx(high / (high + low), rel=1e-12)
    for n, stages in ((4, 4), (6, 3), (2, 2)):
        table = [[high_ratio_schedule(e, s, n, stages) for s in range(stages)] for e in range(n)]
        assert all(0 < r < 1 for row in table for r in row)
        assert all(a > b for row in table for a, b in itertools.pairwise(row))
        assert all(a > b for column in zip(*table, strict=True) for a, b in itertools.pairwise(column))
    falls = [high_ratio_schedule(e, 3) / high_ratio_schedule(e, 1) for e in range(4)]
    assert falls == sorted(falls, reverse=True)  # the share falls faster with depth for noisier experts
    assert 0 < high_ratio_schedule(0, 0, 1, 1) < 1


def unet() -> Any:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=8,
        add_attention=False,
    )  # fmt: skip


def test_inception_in_a_unet_starts_as_the_unet_and_has_more_attention_at_more_noise() -> None:
    plain = unet()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([10, 900])
    want = plain(x, t, return_dict=False)[0]
    lows = []
    for expert in range(4):
        net = add_inception(copy.deepcopy(plain), expert, 4)
        y = net(x, t, return_dict=False)[0]
        assert torch.equal(y, want)
        y.square().sum().backward()
        scales = [p for name, p in net.named_parameters() if name.endswith("scale")]
        assert len(scales) == 2
        assert all(p.grad is not None and bool((p.grad != 0).any()) for p in scales)
        lows.append([m.low / (m.low + m.high) for m in net.modules() if isinstance(m, InceptionMixer2d)])
    assert all(a[0] < a[1] for a in lows)
    # 32 and 64 channels have 8 heads each, too few for four different shares.
    assert all(a[s] <= b[s] for a, b in itertools.pairwise(lows) for s in range(2))
    assert all(lows[0][s] < lows[3][s] for s in range(2))


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SoftIntervalSampler(3), ValueError, "p must be n_experts=3 probabilities"),
        (lambda: SoftIntervalSampler(2, (0.5, 1.5)), ValueError, "p must be n_experts=2 probabilities"),
        (lambda: SoftIntervalSampler(0, ()), ValueError, "n_experts must be in"),
        (lambda: SoftIntervalSampler().sample(4, 8), ValueError, "expert must be one of 0 .. 3; got 4"),
        (lambda: SoftIntervalSampler().density("a"), TypeError, "expert must be an int"),
        (
            lambda: SoftIntervalSampler(clusters=TimestepClusters.uniform(T, 5)),
            ValueError,
            "clusters must have one interval per expert, k=4, and T=1000; got k=5",
        ),
        (lambda: bank(clusters=TimestepClusters.uniform(500, 4)), ValueError, "got k=4 and T=500"),
        (lambda: ExpertBank([]), ValueError, "experts must be at least one network"),
        (lambda: bank().expert(4), ValueError, "expert must be one of 0 .. 3; got 4"),
        (lambda: bank()(torch.zeros(2, 2), 1000), ValueError, "0 <= t < T=1000; got 1000"),
        (lambda: bank()(torch.zeros(2, 2), torch.tensor([3, -1])), ValueError, "got -1 at row 1"),
        (lambda: bank()(torch.zeros(2, 2), torch.tensor([3, 1, 2])), ValueError, r"int64 \[B=2\]; got shape \[3\]"),
        (lambda: InceptionMixer2d(32, 1.0), ValueError, r"high_ratio must be in \(0, 1\)"),
        (lambda: InceptionMixer2d(32, 0.5), ValueError, "dim >= head_dim"),
        (lambda: InceptionMixer2d(33, 0.5, 8), ValueError, "must be even"),
        (lambda: InceptionMixer2d(32, 0.5, 8, pool=0), ValueError, "pool must be at least 1"),
        (lambda: high_ratio_schedule(4, 0), ValueError, "expert must be one of 0 .. 3; got 4"),
        (lambda: high_ratio_schedule(0, 4), ValueError, "stage must be one of 0 .. 3; got 4"),
        (lambda: add_inception(nn.Linear(2, 2), 0, 4), ValueError, "must be diffusers' UNet2DModel"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
