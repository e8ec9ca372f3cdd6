"""The questions that TorchJD's tests ask of its aggregators, asked of the methods here, in float64.

The questions are: Is the direction finite? Does no loss rise? Does the order of the rows not matter? Is the method
linear in the lengths of the rows? Does it vanish only at stationary points? They are asked of matrices of any rank, of
stationary ones, and of scales from 0 to 1e15. The last section explains the values in which TorchJD differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grams import STATIONARITY, condition, gram, unit_rows, with_rank
from tolerances import equal_cosines, minimiser, projected, regularised, unconditioned
from torch import Tensor

from antdiff import balancing, ops

SIZES = {  # rows, columns, rank
    "any": [(1, 1, 1), (4, 3, 1), (4, 3, 2), (4, 3, 3), (9, 11, 5), (9, 11, 9)],
    "strong": [(12, 8, 1), (12, 8, 5), (12, 8, 8), (12, 60, 1), (12, 60, 11)],
}
SIZES["weak"] = SIZES["none"] = SIZES["strong"]
MATRICES = {f"{kind} {m}x{n} rank {r}": with_rank(kind, m, n, r) for kind in STATIONARITY for m, n, r in SIZES[kind]}
ZEROS = {f"zero {m}x{n}": with_rank("any", m, n, 0) for m, n in ((1, 1), (4, 3), (9, 11))}
SCALES = [0.0, 1e-10, 1e3, 1e5, 1e10, 1e15]


def of(kind: str) -> list[str]:
    return [name for name in MATRICES if name.startswith(kind)]


# How each method is made. The names before the dash are those of the registry.
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {} for name in balancing.names() if balancing.get(name).needs in ("gram", "rows")},
    "cagrad-1": {"c": 1.0},
    "cagrad-2": {"c": 2.0},
    "fairgrad-0.1": {"alpha": 0.1},
    "linear": {},
    "rlw": {},
}


def make(name: str) -> Any:
    return balancing.get(name.partition("-")[0])


def weights_of(name: str, J: Tensor) -> Tensor:
    method = make(name)
    if method.needs == "losses":
        return method(len(J), **OPTIONS[name]).weights(torch.ones(len(J), dtype=torch.float64))
    return method(**OPTIONS[name]).weights(gram(J))


def direction(name: str, J: Tensor) -> Tensor:
    """Return the direction [P] of a method for J [k, P]."""
    if make(name).needs == "rows":
        return make(name)(**OPTIONS[name]).direction(J)
    return weights_of(name, J) @ J


def longest_term(name: str, J: Tensor) -> Tensor:
    """Return the largest w_i |g_i|. The terms of the mean count too, because most methods start from the mean."""
    return (weights_of(name, J).abs().clamp(min=1 / len(J)) * J.norm(dim=1)).max()


# ---- the properties --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_directions_are_finite_and_of_the_right_shape(name: str) -> None:
    scaled = {f"{scale:g} of {key}": scale * MATRICES[key] for scale in SCALES for key in of("any")}
    for key, J in (MATRICES | ZEROS | scaled).items():
        d = direction(name, J.clone().requires_grad_())
        assert d.shape == J.shape[1:], key
        assert d.isfinite().all(), key
        if not J.any():
            assert not d.any(), key
        if make(name).needs == "gram":
            assert not make(name)(**OPTIONS[name]).weights(gram(J).requires_grad_()).requires_grad


@pytest.mark.parametrize("key", MATRICES)
@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda", "cagrad-1", "cagrad-2"])
def test_no_loss_rises(name: str, key: str) -> None:
    J = MATRICES[key]
    slack = unconditioned(len(J)) * longest_term(name, J)
    assert (J @ direction(name, J) >= -slack * J.norm(dim=1)).all()


@pytest.mark.parametrize("key", of("none"))
@pytest.mark.parametrize("name", ["nash", "fairgrad", "fairgrad-0.1"])
def test_every_loss_falls_in_a_bargaining_solution(name: str, key: str) -> None:
    """These methods have no solution if a combination of the rows vanishes."""
    assert (MATRICES[key] @ direction(name, MATRICES[key]) > 0).all()


@pytest.mark.parametrize("key", MATRICES)
@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda", "cagrad", "cagrad-1", "cagrad-2", "linear"])
def test_the_order_of_the_rows_does_not_matter(name: str, key: str) -> None:
    """test_gram_weights.py asks this of the other methods, whose tolerance depends on the condition."""
    J = MATRICES[key]
    want, slack = direction(name, J), 2 * unconditioned(len(J)) * longest_term(name, J)
    for seed in range(5):
        p = torch.randperm(len(J), generator=torch.Generator().manual_seed(seed))
        assert (direction(name, J[p]) - want).norm() <= slack


@pytest.mark.parametrize("key", MATRICES)
@pytest.mark.parametrize("name", ["upgrad", "config", "linear"])
def test_directions_are_linear_in_the_lengths_of_the_rows(name: str, key: str) -> None:
    """A(diag(a x + b y) J) = a A(diag(x) J) + b A(diag(y) J) for positive a, b, x and y."""
    J = MATRICES[key]
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        x, y = torch.rand(2, len(J), 1, generator=g, dtype=torch.float64) + 0.01
        a, b = torch.rand(2, generator=g, dtype=torch.float64)
        terms = [(a * x + b * y) * J, a * x * J, b * y * J]
        whole, one, other = (direction(name, term) for term in terms)
        error = unconditioned(len(J))
        if name == "config":  # normalises the rows, so their directions are the same in all terms
            error = equal_cosines(len(J), condition(unit_rows(J)), dependent=True)
        assert (whole - one - other).norm() <= error * sum(longest_term(name, term) for term in terms)


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "linear", "rlw"])
def test_directions_vanish_only_where_a_positive_combination_does(name: str) -> None:
    for key in (*of("weak"), *of("none")):
        J = MATRICES[key]
        assert direction(name, J).norm() > unconditioned(len(J)) * longest_term(name, J), key


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda", "cagrad-1", "cagrad-2"])
def test_directions_vanish_at_strongly_stationary_points(name: str) -> None:
    for key in of("strong"):
        J = MATRICES[key]
        assert direction(name, J).norm() <= unconditioned(len(J)) * longest_term(name, J), key


@pytest.mark.parametrize("c", [1.0, 2.0, 50.0])
@pytest.mark.parametrize("device", ["cpu", "twin"])
def test_cagrad_is_the_projection_of_the_mean_at_stationary_points(device: str, c: float) -> None:
    """No direction then has a least <d, g_i> above zero, and the projection of the mean attains zero.

    A search for the sum of the weights would go on without an end, because multiples of the vanishing combination
    change nothing but rounding errors.
    """
    module = ops if device == "cpu" else ops.reference
    for m in (4, 6, 9) if device == "twin" else (4, 6, 9, 20):
        for kind in ("weak", "strong"):
            for seed in range(10):
                J = with_rank(kind, m, 2 * m, m - 1, seed)
                w, want = module.gram_weights(gram(J), "cagrad", parameter=c), ops.gram_weights(gram(J), "dualproj")
                error = minimiser(m, 16.0) if kind == "strong" else unconditioned(m)
                assert ((w - want) @ J).norm() <= error * longest_term("dualproj", J)
                assert (w * J.norm(dim=1)).max() <= 2 * longest_term("dualproj", J), "nothing is amplified"


@pytest.mark.parametrize("k", [2, 5, 9, 32, 50])
def test_minima_satisfy_their_optimality_conditions(k: int) -> None:
    for seed in range(3):
        J = torch.randn(k, 3 * k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        G, norms = gram(J), J.norm(dim=1)
        slack = minimiser(k, condition(unit_rows(J))) * norms
        a = ops.gram_weights(G, "mgda")
        products = G @ a
        assert (a >= 0).all()
        torch.testing.assert_close(a.sum(), torch.ones((), dtype=torch.float64), rtol=minimiser(k, 1), atol=0)
        assert (products - a @ products >= -slack * (a * norms).sum()).all()
        w = ops.gram_weights(G, "dualproj")
        added, products = w - 1 / k, G @ w
        assert (added >= 0).all()
        assert (products >= -slack * (w * norms).sum()).all()
        assert (products[added > 0].abs() <= (slack * (w * norms).sum())[added > 0]).all()


@pytest.mark.parametrize("P", [5, 7, 15, 102, 1200, 11100])
def test_two_gradients_are_projected_alike_by_pcgrad_and_upgrad(P: int) -> None:
    for seed in range(5):
        J = torch.randn(2, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        pcgrad = ops.pcgrad_weights(ops.gram(J), reduction="mean")
        upgrad = ops.gram_weights(ops.gram(J), "upgrad")
        error = projected(2) + minimiser(2, condition(unit_rows(J)))
        assert ((pcgrad - upgrad) @ J).norm() <= error * J.norm(dim=1).sum()


# ---- where TorchJD differs -------------------------------------------------------------------------------------------


def torchjd(name: str, **options: Any) -> Callable[[Tensor], Tensor]:
    aggregation = pytest.importorskip("torchjd.aggregation")
    try:
        return getattr(aggregation, name)(**options)  # type: ignore[no-any-return]
    except ImportError as error:
        pytest.skip(str(error))


RIDGE = 1e-4  # TorchJD's reg_eps


@pytest.mark.parametrize("key", MATRICES)
@pytest.mark.parametrize(("method", "peer"), [("upgrad", "UPGradWeighting"), ("dualproj", "DualProjWeighting")])
def test_torchjd_projects_with_a_ridge(method: Any, peer: str, key: str) -> None:
    """Its projections are the exact ones of G / trace(G) + 1e-4 I, so the ridge is all that they differ in."""
    G, k = gram(MATRICES[key]), len(MATRICES[key])
    H = G / G.trace() + RIDGE * torch.eye(k, dtype=torch.float64)
    got, want = ops.gram_weights(H, method), torchjd(peer)(G)
    off = got - want
    assert (off @ H @ off).clamp(min=0).sqrt() <= regularised(k, RIDGE) * (got * H.diagonal().sqrt()).max()


def test_torchjd_takes_the_zero_direction_of_cagrad_at_stationary_points() -> None:
    """Both attain the greatest least <d, g_i>, zero. The projection of the mean is not zero at weakly stationary ones.

    TorchJD tests the length of the dual solution against 1e-4 |J|, and returns zero below.
    """
    J = MATRICES["weak 12x60 rank 11"]
    assert not torchjd("CAGrad", c=1.0)(J).any()
    assert direction("cagrad-1", J).norm() > 0.1 * J.mean(0).norm()
