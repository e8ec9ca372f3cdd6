"""nash_weights, nash_residual and nash: the bargaining equation, two solvers against each other, and misuse."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings

import pytest
import torch
from devices import DEVICES, HAS_CUDA
from grams import KINDS, STATIONARY, examples, gram, rows
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tolerances import CLARABEL, NASH_RESIDUAL, combined, nash
from torch import Tensor

from antdiff import ops
from antdiff.ops import reference

CONFLICT = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64)
needs_cvxpy = pytest.mark.skipif(importlib.util.find_spec("cvxpy") is None, reason="needs cvxpy")
SOLVABLE = [kind for kind in KINDS if kind not in STATIONARY]


def correlations(G: Tensor) -> Tensor:
    """Return the correlation matrix of the non-zero rows."""
    live = G.diagonal() > 0
    scale = G.diagonal()[live].rsqrt()
    return G[live][:, live] * scale * scale[:, None]


def condition(G: Tensor) -> float:
    """Return the condition of the correlation matrix, infinite if it is singular up to rounding."""
    if not (G.diagonal() > 0).any():
        return 1.0
    values = torch.linalg.eigvalsh(correlations(G))
    return float(values[-1] / values[0]) if values[0] > 1e-14 * len(values) else float("inf")


@pytest.mark.sanitize
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("solver", ["newton", pytest.param("cvxpy", marks=needs_cvxpy)])
def test_fixed_values(device: str, solver: str) -> None:
    J = CONFLICT.to(device)
    weights = ops.nash_weights(J @ J.T, solver=solver)
    want = torch.tensor([0.0766, 0.9985, 0.9985], dtype=torch.float64, device=device)
    torch.testing.assert_close(weights @ J, want, rtol=0, atol=5e-5)
    assert weights.device == J.device


@settings(max_examples=150, deadline=None)
@given(J=examples())
def test_solves_the_bargaining_equation(J: Tensor) -> None:
    G = gram(J)
    c = condition(G)
    weights = ops.nash_weights(G)
    live = G.diagonal() > 0
    assert weights.isfinite().all()
    assert (weights[live] > 0).all()
    assert (weights[~live] == 0).all()
    assume(c < 1e10)
    assert ops.nash_residual(G, weights) <= nash(c)
    assert abs(float(weights @ G @ weights) - int(live.sum())) <= len(J) * nash(c)
    torch.testing.assert_close(weights, reference.nash_weights(G), rtol=nash(c), atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", SOLVABLE)
@pytest.mark.parametrize("k", [1, 2, 5, 8, 32, 33, 64])
def test_sizes(device: str, kind: str, k: int) -> None:
    G = gram(rows(kind, k, 200)).to(device)
    weights = ops.nash_weights(G)
    # Duplicate rows make G singular, but no positive combination of them vanishes, so the weights stay well determined.
    c = condition(G.cpu()) if kind != "duplicates" else condition(G.cpu()[::2, ::2])
    assert ops.nash_residual(G, weights) <= nash(c)
    torch.testing.assert_close(ops.nash_residual(G, weights), reference.nash_residual(G, weights), rtol=0, atol=1e-14)


@needs_cvxpy
@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(SOLVABLE), k=st.integers(1, 9), seed=st.integers(0, 2**31 - 1))
def test_newton_and_cvxpy_agree(kind: str, k: int, seed: int) -> None:
    G = gram(rows(kind, k, 12, seed))
    assume(condition(G) < 1e4 or kind == "duplicates")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = ops.nash_weights(G, solver="cvxpy")
    torch.testing.assert_close(ops.nash_weights(G), theirs, rtol=CLARABEL, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gap", [1e-3, 1e-6, 5e-11, 1e-12])
def test_nearly_opposed_rows_are_solved_not_regularised(device: str, gap: float) -> None:
    """G = [[1, c], [c, 1]] has a = 1 / sqrt(1 + c) exactly; a ridge of 1e-9 would shorten the direction 20-fold."""
    c = gap - 1
    G = torch.tensor([[1, c], [c, 1]], dtype=torch.float64, device=device)
    weights = ops.nash_weights(G)
    want = torch.full_like(weights, (1 + c) ** -0.5)
    torch.testing.assert_close(weights, want, rtol=nash(2 / gap), atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [2, 3, 5, 8, 40])
def test_pareto_stationary(device: str, k: int) -> None:
    """If a positive combination of rows is zero, there is no solution; weights are finite and the direction is short.

    With one more row that is independent of these, only that row is left in the direction.
    """
    J = rows("random", k, 2 * k)
    J[-1] = -(torch.arange(1, k, dtype=torch.float64)[:, None] * J[:-1]).sum(0)
    weights = ops.nash_weights(gram(J).to(device)).cpu()
    assert weights.isfinite().all()
    assert (weights > 0).all()
    assert (weights @ J).norm() < 1e-2
    more = torch.cat([J, torch.zeros(k, 1, dtype=torch.float64)], 1)
    more = torch.cat([more, torch.eye(2 * k + 1, dtype=torch.float64)[-1:] * 7])
    direction = ops.nash_weights(gram(more).to(device)).cpu() @ more
    assert direction[:-1].norm() < 1e-2
    torch.testing.assert_close(direction[-1], torch.tensor(1.0, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(J=examples(), seed=st.integers(0, 2**31 - 1))
def test_permuted_rows_give_permuted_weights(J: Tensor, seed: int) -> None:
    c = condition(gram(J))
    assume(c < 1e10)
    p = torch.randperm(len(J), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ops.nash_weights(gram(J[p])), ops.nash_weights(gram(J))[p], rtol=nash(c), atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_scale_gives_the_same_bits(device: str, kind: str) -> None:
    J = rows(kind, 5)
    G = gram(J).to(device)
    want = ops.nash_weights(G)
    for exponent in (-390, -66, 66, 390):  # factors of J: 1e-117, 1e-20, 1e20, 1e117
        assert torch.equal(ops.nash_weights(G * 4.0**exponent) * 2.0**exponent, want)
    each = 2.0 ** torch.tensor([-200, -100, 0, 100, 200], dtype=torch.float64, device=device)
    assert torch.equal(ops.nash_weights(G * each * each[:, None]) * each, want)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e-20, 1e20, 1e30, 1e290])
def test_range_of_gram(scale: float) -> None:
    G = CONFLICT @ CONFLICT.T
    torch.testing.assert_close(ops.nash_weights(G * scale) * scale**0.5, ops.nash_weights(G), rtol=1e-11, atol=0)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_small_cases(k: int) -> None:
    orthogonal = torch.diag(torch.arange(1.0, k + 1, dtype=torch.float64) ** 2)
    torch.testing.assert_close(
        ops.nash_weights(orthogonal), 1 / torch.arange(1.0, k + 1, dtype=torch.float64), rtol=NASH_RESIDUAL, atol=0
    )
    same = torch.full((k, k), 9.0, dtype=torch.float64)  # k equal rows of length 3
    torch.testing.assert_close(
        ops.nash_weights(same), torch.full((k,), k**-0.5 / 3, dtype=torch.float64), rtol=NASH_RESIDUAL, atol=0
    )
    assert ops.nash_weights(torch.zeros(k, k, dtype=torch.float64)).tolist() == [0] * k


def test_gram_rounded_to_float32_is_survived() -> None:
    """Singular matrices rounded to float32 have eigenvalues near -1e-7. The ridge grows until it exceeds them."""
    for k in (3, 8, 20):
        for kind in KINDS:
            G = gram(rows(kind, k, 4)).float().double()
            assert ops.nash_weights(G).isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_batches(device: str) -> None:
    G = gram(torch.stack([rows("conflicting", 5, 9, seed) for seed in range(6)]).view(3, 2, 5, 9)).to(device)
    weights = ops.nash_weights(G)
    assert weights.shape == (3, 2, 5)
    for i in range(3):
        for j in range(2):
            assert torch.equal(weights[i, j], ops.nash_weights(G[i, j]))
    assert torch.equal(weights, ops.nash_weights(G.transpose(0, 1)).transpose(0, 1))
    assert ops.nash_weights(G[:0]).shape == (0, 2, 5)
    assert torch.equal(ops.nash_weights(G[:1].repeat(500, 1, 1, 1)), weights[:1].repeat(500, 1, 1))
    assert not ops.nash_weights(G.requires_grad_()).requires_grad


@needs_cvxpy
@pytest.mark.parametrize("device", DEVICES)
def test_batches_with_cvxpy(device: str) -> None:
    G = gram(torch.stack([rows("conflicting", 5, 9, seed) for seed in range(6)]).view(3, 2, 5, 9)).to(device)
    torch.testing.assert_close(ops.nash_weights(G, solver="cvxpy"), ops.nash_weights(G), rtol=CLARABEL, atol=0)


@needs_cvxpy
def test_cvxpy_reports_what_it_could_not_reach() -> None:
    J = torch.tensor([[3.0, 1.0], [-6.0, -2.0]], dtype=torch.float64)  # no solution
    with pytest.warns(RuntimeWarning, match=r"max \|a \* \(G a\) - 1\| = 1\.0e\+00"):
        weights = ops.nash_weights(J @ J.T, solver="cvxpy")
    assert (weights @ J).norm() < 1e-2
    torch.testing.assert_close(weights, ops.nash_weights(J @ J.T), rtol=CLARABEL, atol=0)


def test_a_missing_cvxpy_is_explained() -> None:
    program = (
        "import sys; sys.modules['cvxpy'] = None\n"
        "import torch; from antdiff import ops\n"
        "eye = torch.eye(2, dtype=torch.float64); ops.nash_weights(eye)\n"
        "ops.nash_weights(eye, solver='cvxpy')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ImportError: solver='cvxpy' needs the cvxpy package" in done.stderr


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_one_call(device: str, dtype: torch.dtype) -> None:
    J = rows("conflicting", 5, 40).to(device, dtype)
    direction, weights = ops.nash(J)
    assert torch.equal(weights, ops.nash_weights(ops.gram(J)))
    want, want_weights = reference.nash(J.double())
    # G has some float32 rounding errors in its entries, and the weights have these times the condition number.
    error = 1e-5 if dtype != torch.float64 else combined(dtype, dtype, 5) + nash(condition(gram(J.double())))
    assert (direction - want).norm() <= error * (want_weights[:, None] * J).norm(dim=1).sum()
    pieces = [J[:, :32].reshape(5, 8, 4), None, J[:, 32:].contiguous()]
    out = [torch.empty_like(x) if x is not None else None for x in ops.nash(pieces)[0]]
    assert ops.nash(pieces, out=out)[0][0] is out[0]


@needs_cvxpy
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_one_call_with_cvxpy(device: str, dtype: torch.dtype) -> None:
    J = rows("conflicting", 5, 40).to(device, dtype)
    listed, _ = ops.nash([J[:, :32].reshape(5, 8, 4), None, J[:, 32:].contiguous()], solver="cvxpy")
    torch.testing.assert_close(torch.cat([listed[0].flatten(), listed[2]]), ops.nash(J)[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_compile_and_fake(device: str) -> None:
    G = gram(torch.stack([rows("conflicting", 4, seed=s) for s in range(3)])).to(device)
    torch.library.opcheck(torch.ops.antdiff.nash_weights, (G, False))
    torch.library.opcheck(torch.ops.antdiff.nash_weights, (G.mT, True))

    def step(G: Tensor) -> Tensor:
        return ops.nash_weights(G * 2) + 1

    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(G), step(G))

    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(2, 3, 3, dtype=torch.float64)
        assert ops.nash_weights(fake).shape == (2, 3)
        with pytest.raises(TypeError, match="solver='newton'"):
            ops.nash_weights(fake, solver="cvxpy")


@needs_cvxpy
@pytest.mark.parametrize("device", DEVICES)
def test_compile_with_cvxpy(device: str) -> None:
    G = gram(torch.stack([rows("conflicting", 4, seed=s) for s in range(3)])).to(device)

    def host(G: Tensor) -> Tensor:
        return ops.nash_weights(G * 2, solver="cvxpy") + 1

    compiled = torch.compile(host, backend="aot_eager")
    torch.testing.assert_close(compiled(G), ops.nash_weights(G * 2) + 1, rtol=CLARABEL, atol=0)


EYE = torch.eye(3, dtype=torch.float64)
BAD = {
    "float32": (EYE.float(), {}, TypeError, r"float64.*antdiff.ops.gram"),
    "not square": (EYE[:2], {}, ValueError, r"\[..., k, k\]"),
    "solver": (EYE, {"solver": "ecos"}, ValueError, "solver must be one of 'newton', 'cvxpy'; got 'ecos'"),
    "nonfinite": (EYE, {"nonfinite": None}, ValueError, "nonfinite must be one of"),
    "NaN": (EYE * float("nan"), {}, ValueError, r"finite; got nan at \[0, 0\]"),
    "NaN for cvxpy": (EYE * float("nan"), {"solver": "cvxpy"}, ValueError, r"finite; got nan at \[0, 0\]"),
    "negative": (-EYE, {}, ValueError, r"non-negative diagonal.*got -1 at \[0, 0\]"),
    "asymmetric": (EYE + 0.5 * EYE.roll(1, 1), {}, ValueError, "symmetric"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    G, options, error, text = BAD[case]
    with pytest.raises(error, match=text):
        ops.nash_weights(G, **options)


def test_bad_input_of_the_residual() -> None:
    weights = torch.ones(3, dtype=torch.float64)
    for bad in (weights.float(), weights[:2], weights[None]):
        with pytest.raises(ValueError, match=r"weights must be float64 \[3\] on cpu"):
            ops.nash_residual(EYE, bad)


@pytest.mark.parametrize("device", DEVICES)
def test_poison_reaches_its_own_problem_only(device: str) -> None:
    G = EYE.repeat(3, 1, 1)
    G[1, 2, 0] = float("inf")
    want = [[False] * 3, [True] * 3, [False] * 3]
    assert ops.nash_weights(G.to(device), nonfinite="poison").isnan().tolist() == want
    assert reference.nash_weights(G.to(device), nonfinite="poison").isnan().tolist() == want
    ops.check_errors(device)  # nothing was recorded


@needs_cvxpy
@pytest.mark.parametrize("device", DEVICES)
def test_poison_reaches_its_own_problem_only_with_cvxpy(device: str) -> None:
    G = EYE.repeat(3, 1, 1)
    G[1, 2, 0] = float("inf")
    weights = ops.nash_weights(G.to(device), nonfinite="poison", solver="cvxpy")
    assert weights.isnan().tolist() == [[False] * 3, [True] * 3, [False] * 3]
    ops.check_errors(device)  # nothing was recorded


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
def test_cuda_costs_no_sync_and_is_captured() -> None:
    G = gram(rows("conflicting", 8)).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        want = ops.nash_weights(G)
        ops.nash_weights(-G)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(ValueError, match="gram must be"):
        ops.check_errors("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.nash_weights(G)
    graph.replay()
    assert torch.equal(captured, want)
