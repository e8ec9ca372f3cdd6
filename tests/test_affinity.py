"""Tests of task affinity: against brute-force autograd, its estimators, its memory, and resuming an interrupted run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import UNIT_ROUNDOFF
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from antdiff import TimestepClusters
from antdiff.analysis import TaskAffinity, epsilon_loss, module_groups, plan, task_affinity
from antdiff.analysis import affinity as module
from antdiff.analysis.estimate import corrected_cosine, gap_correlation, interpolate
from antdiff.diffusion import log_snr

T = 1000
LEVELS = log_snr("cosine", T)

# Cosines of float64 gradients of some hundred parameters and tens of samples. Sums in another order change each entry
# by less than a thousand roundings. The corrected cosine divides by split-half products, here down to 0.1 |a| |b|.
AUTOGRAD = 1e4 * UNIT_ROUNDOFF[torch.float64]


class Net(nn.Module):
    """Two layers and a time embedding, in float64."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter = nn.Linear(6, width)
        self.time = nn.Linear(2, width)
        self.leave = nn.Linear(width, 6)
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.double()

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        level = t.to(x)[:, None] / T
        z = self.enter(x) + self.time(torch.cat([level, level.square()], 1))
        out: Tensor = self.leave(z.tanh()) * self.frozen
        return out if shift is None else out + shift


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


def images(n: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 0.5 + 1


def halves_by_hand(x0: Tensor, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x0), generator=generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    return [(x0[rows], noise[rows]) for rows in order.chunk(2)]


def gradients(model: nn.Module, x0: Tensor, noise: Tensor, ts: list[int], only: str = "") -> Tensor:
    """Return the gradients [n, P] from autograd, one timestep at a time."""
    alpha = LEVELS.sigmoid()
    rows = []
    for t in ts:
        xt = alpha[t].sqrt() * x0 + (1 - alpha[t]).sqrt() * noise
        loss = (model(xt, torch.full((len(x0),), t)) - noise).square().mean()
        wanted = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith(only)]
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, wanted)]))
    return torch.stack(rows)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the corrected cosines from their definition, pair by pair."""
    n = len(a)
    out = torch.full((n, n), torch.nan, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            left, right = a[i] @ b[i], a[j] @ b[j]
            if left > 0 and right > 0:
                out[i, j] = (a[i] @ b[j] + b[i] @ a[j]) / 2 / (left * right).sqrt()
    return out


GRID = [0, 50, 200, 420, 650, 801, 999]


# ---- the values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [64, 5])
def test_affinity_is_that_of_brute_force_autograd(batch_size: int) -> None:
    model, x0 = net(), images()
    found = task_affinity(
        model, x0, GRID, batch_size=batch_size, groups=module_groups(model), generator=torch.Generator().manual_seed(3)
    )
    a, b = (gradients(model, *half, GRID) for half in halves_by_hand(x0, 3))
    torch.testing.assert_close(found.affinity, cosine(a, b), rtol=0, atol=AUTOGRAD, equal_nan=True)
    whole = (a + b) / 2
    torch.testing.assert_close(found.raw, cosine(whole, whole), rtol=0, atol=AUTOGRAD)
    torch.testing.assert_close(found.products[0], (a * b).sum(1), rtol=AUTOGRAD, atol=0)
    assert not found.affinity.isnan().all()
    assert found.layer_names == ("enter", "time", "leave")
    for name, layer in zip(found.layer_names, found.layers, strict=True):
        a, b = (gradients(model, *half, GRID, name) for half in halves_by_hand(x0, 3))
        torch.testing.assert_close(layer, cosine(a, b), rtol=0, atol=AUTOGRAD, equal_nan=True)


def test_a_timestep_whose_product_is_not_positive_has_no_affinity() -> None:
    """A network that is right on average has no signal: half of the products are negative."""
    torch.manual_seed(0)
    a, b = torch.randn(8, 40, dtype=torch.float64), torch.randn(8, 40, dtype=torch.float64)
    rows = torch.cat([a, b])
    found = corrected_cosine(rows @ rows.T)
    want = cosine(a, b)
    assert 0 < int(want.isnan().sum()) < 64
    torch.testing.assert_close(found, want, rtol=AUTOGRAD, atol=0, equal_nan=True)
    assert torch.equal(found.diagonal().isnan(), (a * b).sum(1) <= 0)


def test_the_correction_removes_what_noise_takes_from_a_cosine() -> None:
    """The true cosine is 0.8, and the noise is three times as long as the gradient.

    Over many draws the raw cosine stays near 0.08, and the corrected one is right on average, within 4 standard errors
    of its mean.
    """
    generator = torch.Generator().manual_seed(0)
    P, draws = 4000, 200
    truth = torch.zeros(2, P, dtype=torch.float64)
    truth[0, 0], truth[1, :2] = 1, torch.tensor([0.8, 0.6])
    raw, corrected = [], []
    for _ in range(draws):
        a, b = truth + 0.03 * torch.randn(2, 2, P, generator=generator, dtype=torch.float64)  # each [2, P]
        rows = torch.cat([a, b])
        corrected.append(corrected_cosine(rows @ rows.T)[0, 1])
        raw.append(cosine(a, a)[0, 1])
    values = torch.stack(corrected)
    assert abs(float(values.mean()) - 0.8) < 4 * float(values.std()) / draws**0.5 + 0.005  # 0.005: second order
    assert float(torch.stack(raw).mean()) < 0.25


def test_checkpoints_are_averaged_and_the_model_is_left_as_it_was() -> None:
    model, x0 = net(0), images()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    states = [net(1).state_dict(), net(2).state_dict()]
    found = task_affinity(model, x0, GRID, checkpoints=iter(states))
    each = [task_affinity(net(seed), x0, GRID) for seed in (1, 2)]
    assert torch.equal(found.checkpoints, torch.cat([one.checkpoints for one in each]))
    torch.testing.assert_close(found.affinity, found.checkpoints.nanmean(0), rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_conditions_follow_their_images_and_a_loss_of_ones_own_is_used() -> None:
    model, x0 = net(), images()
    shift = x0 * 3  # rows that reveal a wrong order
    seen = []

    def loss(net: nn.Module, x: Tensor, noise: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(bool((y == 3 * x).all()))
        return 2 * epsilon_loss(LEVELS)(net, x, noise, t, y)

    given = task_affinity(model, (x0, shift), GRID, loss=loss)
    default = task_affinity(model, (x0, shift), GRID)
    assert all(seen)
    torch.testing.assert_close(given.products, 4 * default.products, rtol=AUTOGRAD, atol=0)


# ---- resuming --------------------------------------------------------------------------------------------------------


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("sketch", [None, 32])
def test_an_interrupted_computation_goes_on_to_the_same_bits(
    sketch: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven timesteps in blocks of two, with two halves each: eight calls per checkpoint."""
    calls, limit = [0], [0]
    compute = module._Stream._gradients

    def counted(self: Any, ts: Tensor, samples: list[Tensor], out: Tensor) -> None:
        if calls[0] == limit[0]:
            raise Stop
        calls[0] += 1
        compute(self, ts, samples, out)

    def run(folder: Path | None, stop_after: int = -1, block: int = 2) -> TaskAffinity:
        calls[0], limit[0] = 0, stop_after
        monkeypatch.setattr(plan, "_LARGEST_BLOCK", block)
        states = (net(seed).state_dict() for seed in (1, 2))
        return task_affinity(net(), images(), GRID, checkpoints=states, sketch=sketch, folder=folder)

    monkeypatch.setattr(module._Stream, "_gradients", counted)
    whole = run(None, block=16)
    with pytest.raises(Stop):
        run(tmp_path, stop_after=5)  # in the first checkpoint, between the halves of a block
    with pytest.raises(Stop):
        run(tmp_path, stop_after=8)  # four calls to finish it, and four of the second checkpoint
    found = run(tmp_path)
    assert calls[0] == 4
    again = run(tmp_path)
    assert calls[0] == 0
    for name, value in vars(whole).items():
        if isinstance(value, Tensor):
            assert same(value, getattr(found, name)), name
            assert same(value, getattr(again, name)), name


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(-9), b.nan_to_num(-9))


def test_the_state_of_another_computation_is_refused(tmp_path: Path) -> None:
    task_affinity(net(0), images(), GRID, folder=tmp_path)
    for call in (
        lambda: task_affinity(net(0), images(seed=1), GRID, folder=tmp_path),
        lambda: task_affinity(net(0), images(), GRID[1:], folder=tmp_path),
        lambda: task_affinity(net(0), images(), GRID, sketch=32, folder=tmp_path),
        lambda: task_affinity(net(1), images(), GRID, folder=tmp_path),
    ):
        with pytest.raises(ValueError, match="holds the state of another computation"):
            call()


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    found = task_affinity(net(), images(), GRID, groups=module_groups(net()))
    found.save(tmp_path / "affinity.npz")
    loaded = TaskAffinity.load(tmp_path / "affinity.npz")
    for name, value in vars(found).items():
        other = getattr(loaded, name)
        assert same(value, other) if isinstance(value, Tensor) else value == other
    (tmp_path / "other.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"must be an npz written by TaskAffinity\.save"):
        TaskAffinity.load(tmp_path / "other.npz")


# ---- memory ----------------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Measures the peak memory in bytes of the tensors created inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.take(x.untyped_storage())
        return out

    def take(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.drop, key, size)  # storages keep their Python object for their whole lifetime

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Wide(nn.Module):
    """A network of 203,025 parameters in two groups, with activations of a few kilobytes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(450, 300), nn.Linear(300, 225)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.first(x).tanh() * (1 + t[:, None] / T)).repeat(1, 2)


@pytest.mark.parametrize(
    ("memory", "sketch", "on_disk"), [(30, "auto", False), (8, "auto", False), (8, None, True), (5, 4096, False)]
)
def test_memory_stays_within_what_was_asked_for(
    memory: int, sketch: Any, on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 rows of 203,025 float32 are 9.7 MB. The slack is 200 KB for the activations and the data."""
    model, x0 = Wide(), torch.randn(4, 450)
    peak = Peak()

    class Mapped(module.ResumableRows):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            if on_disk:  # pages of a file do not count, since the system can reclaim them
                peak.take(self.rows.untyped_storage())
                peak.now -= self.rows.nbytes
                peak.most = peak.now

    monkeypatch.setattr(module, "ResumableRows", Mapped)
    for p in model.parameters():
        peak.known.add(p.untyped_storage()._cdata)
    with peak:
        found = task_affinity(
            model, x0, [0, 200, 400, 600, 800, 999], memory=memory * 10**6, sketch=sketch,
            groups=module_groups(model), folder=tmp_path if on_disk else None,
        )  # fmt: skip
    P = found.stats["parameters"]
    assert P == 203_025
    assert (found.stats["sketch_dim"] is None) == (memory == 30 or on_disk)
    assert found.stats["memory_bytes"] <= memory * 10**6
    assert found.stats["block"] * P * 4 < peak.most <= memory * 10**6 + 200_000
    assert peak.most > 0.5 * found.stats["memory_bytes"]  # the plan is not far above the memory used


# ---- all timesteps ---------------------------------------------------------------------------------------------------


def test_interpolation_is_symmetric_with_a_unit_diagonal_and_keeps_the_grid() -> None:
    found = task_affinity(net(), images(400), GRID)
    full = found.full()
    assert full.shape == (T, T)
    assert torch.equal(full, full.T)
    assert bool((full.diagonal() == 1).all())
    torch.testing.assert_close(full[GRID][:, GRID], found.affinity, rtol=0, atol=AUTOGRAD)
    step = (full[1:] - full[:-1]).abs().max()
    assert step < 0.05  # continuous, also next to the diagonal: 2 / 50, the smallest gap of the grid


def test_interpolation_is_exact_for_gradients_that_are_linear_in_t_between_the_points() -> None:
    """The interpolated matrix is the cosine of unit gradients that are linear between the grid timesteps."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.nn.functional.normalize(torch.randn(4, 9, generator=generator, dtype=torch.float64), dim=1)
    grid = torch.tensor([3, 10, 30, 47])
    t = torch.arange(50, dtype=torch.float64)
    lines = []
    for s in t.clamp(3, 47):
        i = min(int((grid <= s).sum()) - 1, 2)
        w = (s - grid[i]) / (grid[i + 1] - grid[i])
        lines.append((1 - w) * ends[i] + w * ends[i + 1])
    unit = torch.nn.functional.normalize(torch.stack(lines), dim=1)
    torch.testing.assert_close(interpolate(ends @ ends.T, grid, 50), unit @ unit.T, rtol=0, atol=AUTOGRAD)


def test_timesteps_without_affinity_are_interpolated_over() -> None:
    A = torch.tensor([[1.0, torch.nan, 0.5], [torch.nan, torch.nan, torch.nan], [0.5, torch.nan, 1.0]]).double()
    grid = torch.tensor([0, 5, 9])
    assert torch.equal(interpolate(A, grid, 10), interpolate(A[::2, ::2], grid[::2], 10))
    with pytest.raises(ValueError, match="all are NaN"):
        interpolate(torch.full((2, 2), torch.nan).double(), grid[:2], 10)


def test_clusters_of_a_block_matrix_are_its_blocks() -> None:
    starts, n = [0, 130, 400, 720], 100
    clusters = TimestepClusters(T, starts)
    grid = torch.linspace(0, T - 1, n).round().long()
    inside = clusters.cluster_of(grid)
    A = torch.where(inside[:, None] == inside, 1.0, 0.1).double()
    A.diagonal().fill_(1)
    found = TaskAffinity(
        A, grid, LEVELS, A, A[None], torch.ones(1, n), torch.ones(1, n), A[None], ("all",), {}
    ).clusters(4)
    assert (found.starts - torch.tensor(starts)).abs().max() <= 10  # one step of the grid


def test_gap_correlation_is_minus_one_where_affinity_falls_with_the_gap() -> None:
    x = torch.arange(30.0).double()
    gap = (x[:, None] - x).abs()
    found = gap_correlation(1 / (1 + gap), x, resamples=50, generator=torch.Generator().manual_seed(0))
    assert found == (pytest.approx(-1), pytest.approx(-1), pytest.approx(-1))
    noise = torch.randn(30, 30, generator=torch.Generator().manual_seed(1)).double()
    found = gap_correlation((noise + noise.T) / 2, x, resamples=200, generator=torch.Generator().manual_seed(0))
    assert found.low < 0 < found.high
    assert found.low < found.value < found.high


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: task_affinity(net(), images(), 1), ValueError, "timesteps must be from 2 to T=1000; got 1"),
        (lambda: task_affinity(net(), images(), [5, 5]), ValueError, "timesteps must be at least two, ascending in 0"),
        (lambda: task_affinity(net(), images(), [5, 1000]), ValueError, "ascending in 0 .. T-1=999"),
        (lambda: task_affinity(net(), images(), [0.5, 2.0]), TypeError, "timesteps must be an int or a list of ints"),
        (lambda: task_affinity(net(), images(5)), ValueError, "data must have an even number N >= 2 .* got N=5"),
        (lambda: task_affinity(net(), images().long()), TypeError, "data must be float.* got torch.int64"),
        (lambda: task_affinity(net(), (images(4), images(6))), ValueError, r"same first dimension N; got \[4, 6\]"),
        (lambda: task_affinity(net(), images(), log_snr=3), TypeError, "log_snr must be the name of a schedule"),
        (lambda: task_affinity(net(), images(), memory=10**4), ValueError, "memory must be at least .* got 10000"),
        (lambda: task_affinity(net(), images(), memory=1.5), TypeError, "memory must be an int, in bytes; got float"),
        (lambda: task_affinity(net(), images(), sketch=0), ValueError, "sketch must be at least 1; got 0"),
        (lambda: task_affinity(net(), images(), sketch="yes"), TypeError, "sketch must be an int, 'auto' or None"),
        (lambda: task_affinity(net(), images(), GRID, checkpoints=[]), ValueError, "checkpoints must hold at least"),
        (
            lambda: task_affinity(net().requires_grad_(False), images(), GRID),
            ValueError,
            "model must have a parameter that requires grad",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
