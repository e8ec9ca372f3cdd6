"""Tests of the sketch over many seeds: it is unbiased, and its variance is within the bound proved in its docstring."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from antdiff.analysis.estimate import corrected_cosine, sketch_sd
from antdiff.analysis.projection import Projection, module_groups

SEEDS = 400


class Bag(nn.Module):
    """A module with parameters of given shapes."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes])


SHAPES = ((40, 30), (500,), (7, 11, 3), (64,))


def sketches(J: list[Tensor], dim: int, group_of: object = None) -> Tensor:
    """Return the rows of every seed, [SEEDS, k, D]."""
    model, out = Bag(*(x.shape[1:] for x in J)), []
    for seed in range(SEEDS):
        projection = Projection(model, group_of or (lambda name: "all"), dim, torch.Generator().manual_seed(seed))
        row = torch.empty(len(J[0]), projection.columns, dtype=torch.float64)
        projection.write(J, row)
        out.append(row)
    return torch.stack(out)


def gradients(kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    J = [torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    for x in J:
        if kind == "parallel":
            x[1] = 2 * x[0] + 0.1 * x[1]
        elif (
            kind == "heavy"
        ):  # most of the norm in a few entries at one place of each piece: the worst case without rotations
            x *= 0.01
            x.flatten(1)[:, ::97] = 1 + x.flatten(1)[:, ::97]
    return J


@pytest.mark.parametrize("kind", ["dense", "parallel", "heavy"])
@pytest.mark.parametrize("apart", [False, True])
def test_inner_products_are_unbiased_and_within_the_bound(kind: str, apart: bool) -> None:
    """Over 400 seeds, the mean is within 4 standard errors and the mean square error is below 1.3 times the bound.

    The factor allows for the fluctuation of the mean square error: sqrt(2 / 400) = 7 % for a Gaussian, and a few times
    that if few entries dominate.
    """
    dim = 97
    J = gradients(kind)
    whole = torch.cat([x.flatten(1) for x in J], 1)
    G = whole @ whole.T  # [3, 3]
    group_of = (lambda name: name) if apart else None
    rows = sketches(J, dim, group_of)
    errors = rows @ rows.transpose(1, 2) - G  # [SEEDS, 3, 3]
    bound = (G.diagonal()[:, None] * G.diagonal() + G.square()) / dim  # [3, 3]
    assert bool((errors.mean(0).abs() <= 4 * (bound / SEEDS).sqrt()).all())
    assert bool((errors.square().mean(0) <= 1.3 * bound).all())
    if kind == "dense" and not apart:  # the sketch does have an error, so that the test is not void
        assert bool((errors.square().mean(0) > 0.6 * bound).all())


def test_small_groups_are_kept_whole() -> None:
    J = gradients("dense")
    model = Bag(*SHAPES)
    projection = Projection(model, lambda name: name, 300, torch.Generator().manual_seed(0))
    assert [group.stop - group.start for group in projection.groups] == [300, 300, 231, 64]
    row = torch.empty(3, projection.columns, dtype=torch.float64)
    projection.write(J, row)
    assert torch.equal(row[:, 600:831], J[2].flatten(1))
    assert torch.equal(row[:, 831:], J[3])
    exact = Projection(model, lambda name: "all", None, torch.Generator())
    row = torch.empty(2, exact.columns, dtype=torch.float64)
    exact.write(J, row)  # the first two rows of J
    assert torch.equal(row, torch.cat([x[:2].flatten(1) for x in J], 1))


def test_the_same_generator_gives_the_same_sketch_and_another_a_different_one() -> None:
    digests = [Projection(Bag(*SHAPES), str, 64, torch.Generator().manual_seed(s)).digest() for s in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_affinities_are_within_their_bound(noise: float) -> None:
    """sketch_sd is a first-order bound, so d is large enough for errors of a few percent. 1.3 is as above."""
    generator = torch.Generator().manual_seed(1)
    P, n, dim = 6000, 4, 2500
    common = torch.randn(1, P, generator=generator, dtype=torch.float64)
    signal = common + torch.linspace(0, 1.5, n)[:, None] * torch.randn(n, P, generator=generator, dtype=torch.float64)
    rows = torch.cat([signal + noise * torch.randn(n, P, generator=generator, dtype=torch.float64) for _ in range(2)])
    G = rows @ rows.T
    folded = sketches([rows], dim)
    found = torch.stack([corrected_cosine(row @ row.T) for row in folded])  # [SEEDS, n, n]
    bound = sketch_sd(G, dim)
    error = (found - corrected_cosine(G)).square().mean(0).sqrt()
    assert bool((error <= 1.3**0.5 * bound + 1e-12).all())
    off = ~torch.eye(n, dtype=torch.bool)
    assert bool((error[off] > 0.3 * bound[off]).all())
    if noise == 0:
        c = corrected_cosine(G)
        torch.testing.assert_close(bound, (1 - c.square()) / dim**0.5, rtol=1e-6, atol=1e-7)


def test_modules_at_the_top_are_the_groups() -> None:
    inner = nn.Module()
    inner.enter = nn.Linear(2, 3)
    inner.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))])
    inner.leave = nn.Linear(3, 2)
    outer = nn.Module()
    outer.net = inner
    group_of = module_groups(outer)
    names = list(dict.fromkeys(group_of(name) for name, _ in outer.named_parameters()))
    assert names == ["enter", "blocks.0", "blocks.1", "leave"]
    assert list(dict.fromkeys(map(module_groups(inner), dict(inner.named_parameters())))) == names
    assert module_groups(nn.Linear(2, 2))("weight") == "weight"
