"""gram_weights and gradvac_weights against their twins, cvxpy on the gradients, TorchJD, and optimality conditions."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from devices import DEVICES, HAS_CUDA
from grams import KINDS, STATIONARY, condition, dependent, examples, gram, rows, unit_rows, worst_condition
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tolerances import (
    CAGRAD_SEARCH,
    CONIC_SOLVER,
    FAIRGRAD_RESIDUAL,
    aligned,
    dependent_rows,
    equal_cosines,
    minimiser,
    nash,
    projected,
    vanishing,
)
from torch import Tensor

from antdiff import ops
from antdiff.ops import _mixed as mixed
from antdiff.ops import reference
from antdiff.ops.gram_weights import Method

METHODS = get_args(Method)
CONFLICT = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64)
# The published direction for J = CONFLICT, computed by hand or iterated to convergence.
FIXED = {
    "upgrad": [0.2924, 1.9006, 1.9006],
    "dualproj": [0.5556, 1.1111, 1.1111],
    "aligned_mtl": [0.2133, 0.9673, 0.9673],
    "mgda": [0.0, 1.0, 1.0],
    "cagrad": [0.1835, 1.2041, 1.2041],
    "imtl_g": [0.0767, 1.0, 1.0],
    "config": [0.1588, 2.0706, 2.0706],
}


def published(method: Method) -> str:
    """Return the reduction of the paper: ConFIG's direction is a sum."""
    return "sum" if method == "config" else "mean"


def direction(J: Tensor, weights: Tensor) -> Tensor:
    return (weights[:, None] * J).sum(0)


def tolerance(method: Method, J: Tensor, w: Tensor) -> float:
    """Return the tolerance of a direction with weights near ``w``, relative to its longest term.

    See :func:`assert_same_direction`.
    """
    k = len(J)
    if method == "aligned_mtl":  # its threshold for a zero eigenvalue is lower than that of condition(J)
        kept = spectrum(J)[0]
        return aligned(k, float(kept.max() / kept.min()) if J.any() else 1.0)
    if method in ("imtl_g", "config"):
        d = direction(J, w)
        # IMTL-G divides by the sum of the weights, ConFIG multiplies by the sum of projections. Both sums may cancel.
        cancelled = w if method == "imtl_g" else J @ d
        terms = float(cancelled.abs().sum() / cancelled.sum().abs()) if w.any() else 1.0
        return equal_cosines(k, condition(unit_rows(J)), dependent=dependent(J)) * terms
    search = {"cagrad": CAGRAD_SEARCH, "fairgrad": 2 * 2 * FAIRGRAD_RESIDUAL}.get(method, 0.0)  # alpha = 2, both sides
    return minimiser(k, worst_condition(J)) + search


def assert_same_direction(method: Method, J: Tensor, got: Tensor, want: Tensor) -> None:
    """Compare two directions, relative to the longest term of either.

    For methods that start from the mean, the terms of the mean count too. For Aligned-MTL, the length that its
    direction has if nothing in the mean cancels counts instead.
    """
    terms = (torch.stack([got, want]).abs() * J.norm(dim=1)).max()
    if method in ("upgrad", "dualproj", "cagrad", "aligned_mtl"):
        least = J.norm(dim=1).max() ** 2 if method != "aligned_mtl" else spectrum(J)[0].min()
        terms = torch.maximum(terms, least.sqrt() / len(J))
    assert got.isfinite().all()
    assert direction(J, got - want).norm() <= tolerance(method, J, want) * terms


def spectrum(J: Tensor) -> tuple[Tensor, Tensor]:
    """Return the non-zero eigenvalues of J J^T, and all eigenvalues divided by Aligned-MTL's threshold for zero."""
    values = torch.linalg.svdvals(J) ** 2
    threshold = torch.finfo(J.dtype).eps * max(1, int((J.norm(dim=1) > 0).sum())) * values.max()
    return values[values >= threshold], values / threshold if threshold > 0 else values


def assume_rank_is_clear(method: Method, J: Tensor) -> None:
    """Skip examples with an eigenvalue near Aligned-MTL's threshold, where the result is discontinuous."""
    ratios = spectrum(J)[1]
    assume(method != "aligned_mtl" or not ((ratios > 1 / 8) & (ratios < 8)).any())


@pytest.mark.sanitize
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", FIXED)
def test_fixed_values(device: str, method: Method) -> None:
    J = CONFLICT.to(device)
    for module in (ops, reference):
        got = module.gram_weights(J @ J.T, method, reduction=published(method)) @ J
        torch.testing.assert_close(got.cpu(), torch.tensor(FIXED[method], dtype=torch.float64), rtol=0, atol=5e-5)


SPECTRAL: tuple[Method, ...] = ("aligned_mtl", "imtl_g", "config")


def spectral_direction(method: Method, J: Tensor, rank: int) -> Tensor:
    """Return the direction of a spectral method for J [k, P] of this rank, from the SVD of J instead of from G."""
    if method == "aligned_mtl":
        U, s, V = torch.linalg.svd(J, full_matrices=False)
        return s[rank - 1] * U.sum(0)[:rank] @ V[:rank] / len(J)
    norms = J.norm(dim=1)
    U, s, V = torch.linalg.svd(J / norms[:, None], full_matrices=False)
    d = (U.sum(0)[:rank] / s[:rank]) @ V[:rank]  # the least-norm d with <d, g_i / |g_i|> = 1
    if method == "config":
        return d / d.norm() * (J @ d / d.norm()).mean()
    weights = U[:, :rank] / s[:rank] ** 2 @ U.sum(0)[:rank] / norms
    return d / weights.sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", SPECTRAL)
def test_dependent_rows_have_the_direction_of_exact_ones_in_every_precision(
    method: Method, dtype: torch.dtype, device: str
) -> None:
    """Rounding of J moves an eigenvalue of zero. Its inverse would shorten the direction to 1e-4 to 1e-8."""
    for k, P, seed in ((2, 40, 0), (4, 40, 1), (4, 3000, 2), (5, 40, 3), (8, 300, 4), (8, 300, 5)):
        for unit in (1.0, 1e-2) if dtype == torch.float16 else (1.0, 1e-10, 1e10):
            g = torch.Generator().manual_seed(seed)
            mix = torch.randn(k, max(1, k - 1), generator=g, dtype=torch.float64).abs()
            J = mix @ torch.randn(max(1, k - 1), P, generator=g, dtype=torch.float64)
            want = spectral_direction(method, J, max(1, k - 1))
            values = torch.linalg.svdvals(J if method == "aligned_mtl" else unit_rows(J))[: max(1, k - 1)] ** 2
            error = dependent_rows(dtype, k, float(values[0] / values[-1]))
            G = ops.gram((J * unit).to(dtype).to(device))
            assert ops.precision_of(G) == dtype
            for weights in (
                ops.gram_weights(G, method),
                ops.gram_weights(G.clone(), method, precision=dtype),
                reference.gram_weights(reference.gram((J * unit).to(dtype)), method).to(device),
            ):
                got = direction(J, weights.cpu())
                assert (got - want).norm() <= error * (weights.cpu().abs() * J.norm(dim=1)).sum()
                assert float(got.norm() / want.norm()) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("method", SPECTRAL)
def test_a_gram_matrix_of_unknown_precision_counts_as_float64(method: Method) -> None:
    J = torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    J[3] = J[0] + 1e-4 * J[3]  # an eigenvalue of about 1e-8: zero in float32, and not in float64
    G = gram(J)
    assert ops.precision_of(G) == torch.float64
    assert torch.equal(ops.gram_weights(G, method), ops.gram_weights(G, method, precision=torch.float64))
    coarse = ops.gram_weights(G, method, precision=torch.float32)
    torch.testing.assert_close(coarse, ops.gram_weights(ops.with_precision(G, torch.float32), method))
    torch.testing.assert_close(coarse, reference.gram_weights(G, method), rtol=1e-6, atol=0)
    assert not torch.allclose(coarse, ops.gram_weights(G.clone(), method), rtol=0.1)
    with pytest.raises(ValueError, match="precision must be one of"):
        ops.gram_weights(G, method, precision=torch.int64)


def test_the_precision_of_a_gram_matrix_is_that_of_its_least_precise_part() -> None:
    x = torch.ones(2, 3)
    G = torch.zeros(2, 2, dtype=torch.float64)
    for module in (ops, reference):
        assert ops.precision_of(module.gram(x.double())) == torch.float64
        assert ops.precision_of(module.gram([None, x.half()])) == torch.float16
        total = module.gram_(G.clone(), x.double())
        assert ops.precision_of(total) == torch.float64
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            module.gram_(total, x.to(dtype))
        assert ops.precision_of(total) == torch.bfloat16
    mixed_rows = mixed.gram([x.double(), None, x])
    assert ops.precision_of(mixed_rows) == torch.float32
    assert ops.precision_of(mixed_rows.clone()) == torch.float64


def test_aligned_mtl_of_the_authors_is_the_sum() -> None:
    """Their code: B = sigma_min V Lambda^(-1/2) V^T, and the direction is the sum of the rows of B J."""
    J = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values, V = torch.linalg.eigh(J @ J.T)
    released = (values[0].sqrt() * (V / values.sqrt()) @ V.T).sum(0)
    for module in (ops, reference):
        got = module.gram_weights(gram(J), "aligned_mtl", reduction="sum")
        torch.testing.assert_close(got, released, rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_default_is_the_sum_over_k(k: int) -> None:
    G = gram(rows("conflicting", k))
    for module in (ops, reference):
        mean, total = (module.gram_weights(G, "config", reduction=reduction) for reduction in ("mean", "sum"))
        assert torch.equal(mean, total / k)
        assert torch.equal(module.gram_weights(G, "config"), mean)
        steps = []
        for reduction in ("mean", "sum"):
            generator = torch.Generator().manual_seed(0)
            steps.append(module.gradvac_weights(G, torch.zeros_like(G), generator=generator, reduction=reduction))
        torch.testing.assert_close(steps[0][0], steps[1][0] / k, rtol=1e-15, atol=0)
        assert torch.equal(steps[0][1], steps[1][1]), "the targets do not depend on the reduction"


@example(kind="scaled", k=3, seed=21562, method="aligned_mtl")  # an eigenvalue of 26 times the threshold for zero
@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS), k=st.integers(1, 5), seed=st.integers(0, 2**31 - 1), method=st.sampled_from(METHODS)
)
def test_matches_the_twin(kind: str, k: int, seed: int, method: Method) -> None:
    assume(not (method == "cagrad" and kind == "scaled"))  # the range of nu in the twin is too small
    assume(not (method == "fairgrad" and kind in STATIONARY))  # there may be no solution, and the twin has no ridge
    J = rows(kind, k, 12, seed)
    assume_rank_is_clear(method, J)
    mine, twin = (module.gram_weights(gram(J), method) for module in (ops, reference))
    assert_same_direction(method, J, mine, twin)


# ---- cvxpy: the problems as stated in the papers, on the gradients ---------------------------------------------------


def with_cvxpy(method: str, J: Tensor) -> Tensor:
    """Return the direction [P]."""
    cp: Any = pytest.importorskip("cvxpy")

    def solve(objective: Any, constraints: list[Any]) -> None:
        cp.Problem(objective, constraints).solve(solver=cp.CLARABEL)

    k, P = J.shape
    g, mean = J.numpy(), J.mean(0).numpy()
    d = cp.Variable(P)
    if method == "dualproj":
        solve(cp.Minimize(cp.sum_squares(d - mean)), [g @ d >= 0])
    elif method == "upgrad":
        total = torch.zeros(P, dtype=torch.float64)
        for row in g:
            solve(cp.Minimize(cp.sum_squares(d - row)), [g @ d >= 0])
            total += torch.from_numpy(d.value)
        return total / k
    elif method == "mgda":
        a = cp.Variable(k, nonneg=True)
        solve(cp.Minimize(cp.sum_squares(g.T @ a)), [cp.sum(a) == 1])
        return torch.from_numpy(g.T @ a.value)
    elif method == "cagrad":
        solve(cp.Maximize(cp.min(g @ d)), [cp.norm(d - mean) <= 0.5 * float(J.mean(0).norm())])
    else:  # fairgrad, alpha = 2
        w = cp.Variable(k, nonneg=True)
        solve(cp.Minimize(cp.sum_squares(g.T @ w) / 2 - 2 * cp.sum(cp.sqrt(w))), [])
        return torch.from_numpy(g.T @ w.value)
    return torch.from_numpy(d.value)


@pytest.mark.parametrize("method", ["upgrad", "dualproj", "mgda", "cagrad", "fairgrad"])
@pytest.mark.parametrize("kind", ["random", "conflicting", "duplicates"])
@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_cvxpy_finds_the_same_direction(method: Method, kind: str, k: int) -> None:
    for seed in range(2):
        J = rows(kind, k, 10, seed)
        got = direction(J, ops.gram_weights(gram(J), method))
        assert (got - with_cvxpy(method, J)).norm() <= CONIC_SOLVER * J.norm(dim=1).max()


# ---- TorchJD, where it is exact --------------------------------------------------------------------------------------


# TorchJD's class, its options, and how far its result is from the optimum. Its projections onto the dual cone add 1e-4
# to a scaled G, MGDA takes 1 / t steps, CAGrad stops at the tolerance of a conic solver, and FairGrad at a residual.
# The spectral methods are exact up to rounding errors times condition numbers of some hundreds.
TORCHJD = {
    "upgrad": ("UPGrad", {}, 1e-3),
    "dualproj": ("DualProj", {}, 1e-3),
    "aligned_mtl": ("AlignedMTL", {}, 1e-12),
    "mgda": ("MGDA", {"epsilon": 1e-9, "max_iters": 5000}, 1e-2),
    "cagrad": ("CAGrad", {"c": 0.5}, 1e-2),
    "imtl_g": ("IMTLG", {}, 1e-12),
    "config": ("ConFIG", {}, 1e-12),
    "fairgrad": ("FairGrad", {"alpha": 2.0}, 1e-3),
}


def peer(method: str) -> Any:
    aggregation = pytest.importorskip("torchjd.aggregation")
    name, options, _ = TORCHJD[method]
    try:
        return getattr(aggregation, name)(**options)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("k", [2, 5, 8])
@pytest.mark.parametrize("kind", ["random", "conflicting"])
@pytest.mark.parametrize("method", TORCHJD)
def test_torchjd_finds_the_same_direction(method: Method, kind: str, k: int) -> None:
    """Compare on independent gradients of ordinary size, where TorchJD is exact.

    Below |J|^2 = 1e-4 its UPGrad returns the mean and its CAGrad returns zero. For nearly dependent rows its IMTL-G and
    ConFIG cut off singular values of G and J.
    """
    J = rows(kind, k, 40)
    got = direction(J, ops.gram_weights(gram(J), method, reduction=published(method)))
    assert (got - peer(method)(J)).norm() <= TORCHJD[method][2] * J.norm(dim=1).max()


@pytest.mark.parametrize("method", ["upgrad", "cagrad"])
def test_small_gradients_stay_exact_where_torchjd_is_not(method: Method) -> None:
    J = CONFLICT * 1e-6
    right = torch.tensor(FIXED[method], dtype=torch.float64) * 1e-6
    torch.testing.assert_close(direction(J, ops.gram_weights(gram(J), method)), right, rtol=0, atol=5e-5 * 1e-6)
    assert (peer(method)(J) - right).norm() > 0.1 * right.norm()


# ---- optimality for all kinds of rows --------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(J=examples())
def test_optimality_conditions(J: Tensor) -> None:
    G, norms, k = gram(J), J.norm(dim=1), len(J)
    e = minimiser(k, worst_condition(J))
    mean = torch.full((k,), 1 / k, dtype=torch.float64)
    for method in ("upgrad", "dualproj"):
        w = ops.gram_weights(G, method)
        slack = J @ direction(J, w)
        terms = norms * (w * norms).sum()
        assert (slack >= -e * terms).all(), "the dual cone"
        assert (w[norms > 0] >= mean[norms > 0]).all()
        if method == "dualproj":
            used = w > 1 / k
            assert (slack[used].abs() <= e * terms[used]).all(), (
                "the added gradients are perpendicular to the direction"
            )
    a = ops.gram_weights(G, "mgda")
    if (norms > 0).any():
        torch.testing.assert_close(a.sum(), torch.ones((), dtype=torch.float64), rtol=minimiser(k, 1), atol=0)
        least, products = a @ G @ a, G @ a
        assert (a >= 0).all()
        assert (products[norms > 0] >= least - e * (norms[norms > 0] * (a * norms).sum())).all()
    e += CAGRAD_SEARCH
    for c in (0.0, 0.5, 2.0):
        x = ops.gram_weights(G, "cagrad", parameter=c) - torch.where(norms > 0, mean, 0.0)
        g0, d = direction(J, mean), direction(J, x)
        terms = ((x + mean) * norms).sum()
        assert (x >= 0).all()
        assert d.norm() <= c * g0.norm() + e * terms, "the ball"
        worst, scale = (J @ (g0 + d))[norms > 0], e * norms[norms > 0] * terms
        used = x[norms > 0] > 0
        if used.any():
            assert (worst - scale)[used].max() <= (worst + scale).min(), "only the worst-off are helped"


@settings(max_examples=100, deadline=None)
@given(J=examples())
def test_equal_cosines_and_projections(J: Tensor) -> None:
    assume(len(J) == len(unit_rows(J)) and not dependent(J))
    norms = J.norm(dim=1)
    e = equal_cosines(len(J), condition(unit_rows(J)), dependent=False)
    for method in ("imtl_g", "config"):
        w = ops.gram_weights(gram(J), method, reduction=published(method))
        d = direction(J, w)
        cosines = J @ d / norms
        assert (cosines - cosines.mean()).abs().max() <= e * (w.abs() * norms).max()
        if method == "imtl_g":
            assert abs(float(w.sum()) - 1) <= e * float(w.abs().sum())
        else:
            # |d| is the sum of the projections; the error is relative to its terms.
            assert abs(float(d @ d - (J @ d).sum())) <= e * float((w.abs() * norms).sum() * norms.sum())


@settings(max_examples=200, deadline=None)
@given(J=examples(), seed=st.integers(0, 2**31 - 1), method=st.sampled_from(METHODS))
def test_permuted_rows_give_the_same_direction(J: Tensor, seed: int, method: Method) -> None:
    """The direction is unique even if the weights are not, or are poorly determined."""
    assume_rank_is_clear(method, J)
    p = torch.randperm(len(J), generator=torch.Generator().manual_seed(seed))
    weights, permuted = ops.gram_weights(gram(J), method), ops.gram_weights(gram(J[p]), method)
    assert_same_direction(method, J, permuted[p.argsort()], weights)


def test_opposed_gradients_have_no_equal_projections() -> None:
    """The vector 1 can be perpendicular to the range of the correlations.

    Rounding errors must then not be amplified into a direction, for any size of the least eigenvalue.
    """
    for angle in (1.0, 1e-2, 1e-4):
        half = torch.tensor([[1.0, 0, 0], [1.0, angle, 0], [1.0, angle, angle]], dtype=torch.float64)
        J = torch.cat([half, -half]) * torch.tensor([[1.45], [0.95], [3.03], [1.45], [0.95], [3.03]]).double()
        for module in (ops, reference):
            for method in ("imtl_g", "config"):
                assert not module.gram_weights(gram(J), method).any()


def test_fairgrad_with_alpha_one_is_nash() -> None:
    for kind in ("random", "conflicting", "duplicates", "scaled", "zeros"):
        J = rows(kind, 6)
        rtol = FAIRGRAD_RESIDUAL + nash(worst_condition(J))
        w = ops.gram_weights(gram(J), "fairgrad", parameter=1.0)
        torch.testing.assert_close(w, ops.nash_weights(gram(J)), rtol=rtol, atol=0)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 2.0, 8.0])
def test_fairgrad_solves_its_equation(alpha: float) -> None:
    for kind in ("random", "conflicting", "scaled", "duplicates"):
        G = gram(rows(kind, 6, 20))
        w = ops.gram_weights(G, "fairgrad", parameter=alpha)
        assert ((G @ w - w ** (-1 / alpha)).abs() <= 2 * FAIRGRAD_RESIDUAL * (G.abs() @ w)).all(), kind


def test_cagrad_between_the_mean_and_the_dual_cone() -> None:
    J = rows("conflicting", 5)
    G, mean = gram(J), torch.full((5,), 0.2, dtype=torch.float64)
    assert torch.equal(ops.gram_weights(G, "cagrad", parameter=0.0), mean)
    w = ops.gram_weights(G, "cagrad", parameter=1.5)
    assert (J @ direction(J, w) >= -minimiser(5, worst_condition(J)) * J.norm(dim=1) * (w * J.norm(dim=1)).sum()).all()
    opposed = torch.tensor([[3.0, -4.0], [-6.0, 8.0]], dtype=torch.float64)
    w = ops.gram_weights(gram(opposed), "cagrad", parameter=5.0)  # |J^T x| stays below c |g_0|, so x is the limit
    assert direction(opposed, w).norm() <= minimiser(2, worst_condition(opposed)) * (w * opposed.norm(dim=1)).max()


# ---- GradVac ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(J=examples(6), seed=st.integers(0, 2**31 - 1))
def test_gradvac_is_pcgrad_where_targets_are_zero(J: Tensor, seed: int) -> None:
    G, g = gram(J), torch.Generator()
    weights, targets = ops.gradvac_weights(
        G, torch.zeros_like(G), beta=0.0, generator=g.manual_seed(seed), reduction="sum"
    )
    want = ops.pcgrad_weights(G, generator=g.manual_seed(seed), reduction="sum")
    assert (targets == 0).all()
    assert direction(J, weights - want).norm() <= vanishing(len(J)) * J.norm(dim=1).sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["random", "conflicting", "zeros"])
@pytest.mark.parametrize("k", [1, 3, 6, 33])
def test_gradvac_matches_its_twin_over_steps(device: str, kind: str, k: int) -> None:
    states = []
    for module in (ops, reference):
        generator, targets = torch.Generator(device).manual_seed(1), torch.zeros(2, k, k, dtype=torch.float64)
        targets = targets.to(device)
        for step in range(4):
            G = gram(torch.stack([rows(kind, k, 40, seed=10 * step + s) for s in range(2)])).to(device)
            weights, targets = module.gradvac_weights(G, targets, beta=0.3, generator=generator, reduction="sum")
        states.append((weights, targets))
    (mine, my_targets), (twin, twin_targets) = states
    torch.testing.assert_close(mine, twin, rtol=projected(k), atol=projected(k))
    torch.testing.assert_close(my_targets, twin_targets, rtol=projected(k), atol=projected(k))
    assert k == 1 or kind == "zeros" or (my_targets != 0).any()


def test_gradvac_raises_a_cosine_to_its_target() -> None:
    J = torch.tensor([[1.0, 0, 0], [-1.0, 1, 0]], dtype=torch.float64)
    targets = torch.full((2, 2), 0.5, dtype=torch.float64)
    weights, after = ops.gradvac_weights(gram(J), targets, beta=0.5, reduction="sum")
    cosine = -(0.5**0.5)
    torch.testing.assert_close(after[0, 1], torch.tensor(0.25 + 0.5 * cosine, dtype=torch.float64))
    assert (targets == 0.5).all(), "the input is not written to"
    # Each p_i = g_i + c g_j has cosine 1/2 with g_j. The weights of the sum give the two steps c.
    steps = weights.flip(0) - 1
    for i in range(2):
        p = J[i] + steps[i] * J[1 - i]
        torch.testing.assert_close(p @ J[1 - i] / (p.norm() * J[1 - i].norm()), torch.tensor(0.5, dtype=torch.float64))


# ---- contract --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_batches_sizes_and_extremes(device: str, method: Method) -> None:
    J = torch.stack([rows("conflicting", 5, 9, seed) for seed in range(6)]).view(3, 2, 5, 9)
    G = gram(J).to(device)
    weights = ops.gram_weights(G, method)
    assert weights.shape == (3, 2, 5)
    assert torch.equal(weights[1, 1], ops.gram_weights(G[1, 1], method))
    assert ops.gram_weights(G[:0], method).shape == (0, 2, 5)
    assert not ops.gram_weights(G.requires_grad_(), method).requires_grad
    assert torch.equal(
        ops.gram_weights(torch.zeros(4, 4, dtype=torch.float64).to(device), method).cpu(), torch.zeros(4)
    )
    for k in (32, 33):
        assert ops.gram_weights(gram(rows("random", k, 100)).to(device), method).isfinite().all()
    extreme = torch.diag(torch.tensor([1e-30, 1.0, 1e30], dtype=torch.float64)).to(device)
    assert ops.gram_weights(extreme, method).isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_compile(device: str) -> None:
    G = gram(torch.stack([rows("conflicting", 4, seed=s) for s in range(3)])).to(device)
    torch.library.opcheck(torch.ops.antdiff.gram_weights, (G.mT, "cagrad", 0.5, True, False))
    keys, targets = torch.rand_like(G), torch.zeros_like(G)
    torch.library.opcheck(torch.ops.antdiff.gram_weights, (G, "config", 0.0, True, False))
    torch.library.opcheck(torch.ops.antdiff.gradvac_weights, (G, targets, keys, 0.1, True, False))

    def step(G: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return ops.gram_weights(G * 2, "upgrad") + 1, ops.gradvac_weights(G, targets)[1]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(G, targets)[0], step(G, targets)[0])


EYE = torch.eye(3, dtype=torch.float64)
NAN = torch.where(EYE.roll(1, 0) > 0, math.nan, EYE)
BAD = {
    "method": (lambda: ops.gram_weights(EYE, "nash"), ValueError, "method must be one of 'upgrad'"),  # type: ignore
    "float32": (lambda: ops.gram_weights(EYE.float(), "mgda"), TypeError, "float64"),
    "shape": (lambda: ops.gram_weights(EYE[:2], "mgda"), ValueError, r"\[..., k, k\]"),
    "no parameter": (lambda: ops.gram_weights(EYE, "mgda", parameter=1.0), ValueError, "parameter must be None"),
    "c": (lambda: ops.gram_weights(EYE, "cagrad", parameter=-1.0), ValueError, "c, must be finite and >= 0"),
    "alpha": (lambda: ops.gram_weights(EYE, "fairgrad", parameter=0.0), ValueError, "alpha, must be finite and > 0"),
    "NaN alpha": (lambda: ops.gram_weights(EYE, "fairgrad", parameter=math.nan), ValueError, "must be finite"),
    "type": (lambda: ops.gram_weights(EYE, "cagrad", parameter="a"), TypeError, "parameter"),  # type: ignore
    "NaN": (lambda: ops.gram_weights(NAN, "mgda"), ValueError, r"finite; got nan at \[0, 2\]"),
    "nonfinite": (lambda: ops.gram_weights(EYE, "mgda", nonfinite="no"), ValueError, "nonfinite"),  # type: ignore
    "reduction": (lambda: ops.gram_weights(EYE, "config", reduction="max"), ValueError, "reduction must be one of"),  # type: ignore
    "no sum": (lambda: ops.gram_weights(EYE, "mgda", reduction="sum"), ValueError, "reduction must be 'mean' for"),
    "GradVac's reduction": (lambda: ops.gradvac_weights(EYE, EYE, reduction=1), ValueError, "reduction must"),  # type: ignore
    "targets": (lambda: ops.gradvac_weights(EYE, EYE[:2]), ValueError, "targets must have the shape"),
    "targets dtype": (lambda: ops.gradvac_weights(EYE, EYE.float()), TypeError, "targets must be float64"),
    "beta": (lambda: ops.gradvac_weights(EYE, EYE, beta=1.5), ValueError, r"beta must be in \[0, 1\]"),
    "beta type": (lambda: ops.gradvac_weights(EYE, EYE, beta="a"), TypeError, "beta"),  # type: ignore
    "generator": (lambda: ops.gradvac_weights(EYE, EYE, generator=3), TypeError, "generator"),  # type: ignore
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, text = BAD[case]
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("device", DEVICES)
def test_poison_reaches_its_own_problem_only(device: str) -> None:
    G = torch.stack([EYE, NAN, EYE]).to(device)
    for module in (ops, reference):
        for method in METHODS:
            weights = module.gram_weights(G, method, nonfinite="poison")
            assert weights.isnan().all(-1).tolist() == [False, True, False]
        weights, targets = module.gradvac_weights(G, torch.full_like(G, 0.25), beta=0.5, nonfinite="poison")
        assert weights.isnan().all(-1).tolist() == [False, True, False]
        assert (targets[1] == 0.25).all()
    ops.check_errors(device)


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
def test_cuda_costs_no_sync() -> None:
    G = gram(rows("conflicting", 8)).cuda()
    targets = torch.zeros_like(G)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for method in METHODS:
            ops.gram_weights(G, method)
        ops.gradvac_weights(G, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
