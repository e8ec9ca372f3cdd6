"""combine against its float64 twin, for all sizes, dtypes and outputs, and misuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gram import DEVICES, DTYPES, J3, matrix, pieces
from tolerances import combined, smallest
from torch import Tensor

from antdiff import ops
from antdiff.ops import reference


def weights_for(k: int, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(k, generator=torch.Generator().manual_seed(seed + k), dtype=torch.float64).to(device)


def check(out: Tensor, weights: Tensor, J: Tensor) -> None:
    """Compare ``out`` with the float64 twin, relative to sum_k |w_k J_kp|."""
    want = reference.combine(weights, J.double())
    size = reference.combine(weights.abs(), J.double().abs())
    assert out.shape == J.shape[1:]
    slack = combined(J.dtype, out.dtype, len(weights)) * size + smallest(out.dtype)
    assert ((out.double() - want).abs() <= slack).all()


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.sanitize
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 33, 64])
def test_matrix_matches_the_float64_twin(device: str, dtype: torch.dtype, k: int) -> None:
    w = weights_for(k, device)
    for P in (0, 1, 37, 5000):
        J = matrix(k, P, dtype, device)
        out = ops.combine(w, J)
        assert out.dtype == result_dtype(dtype)
        check(out, w, J)
        for out_dtype in {dtype, torch.float32}:
            given_out = torch.full((P,), float("nan"), dtype=out_dtype, device=device)  # overwritten, not added to
            assert ops.combine(w, J, given_out) is given_out
            check(given_out, w, J)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 5, 16])
def test_list(device: str, dtype: torch.dtype, k: int) -> None:
    J, w = pieces(k, dtype, device), weights_for(k, device)
    outs = ops.combine(w, [J[0], None, *J[1:]])
    assert outs[1] is None
    for out, x in zip([outs[0], *outs[2:]], J, strict=True):
        assert out.dtype == result_dtype(dtype)
        check(out, w, x)
        assert torch.equal(out, ops.combine(w, x.reshape(k, -1)).view(out.shape))  # the same bits as for a matrix


@pytest.mark.parametrize("device", DEVICES)
def test_into_p_grad(device: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 3)).to(device)
    model[0].bias.requires_grad_(False)
    parameters = list(model.parameters())
    J = [None if not p.requires_grad else matrix(5, p.numel(), device=device).view(5, *p.shape) for p in parameters]
    for p in parameters:
        p.grad = torch.full_like(p, 7.0) if p.requires_grad else None
    grads = [p.grad for p in parameters]
    w = weights_for(5, device)
    assert ops.combine(w, J, out=grads) is grads
    for p, x in zip(parameters, J, strict=True):
        if x is not None:
            check(p.grad, w, x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_any_number_of_threads(device: str, dtype: torch.dtype) -> None:
    J, w = [matrix(5, n, dtype, device) for n in (5, 1_000_003, 0, 3000)], weights_for(5, device)
    outs = ops.combine(w, J)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = ops.combine(w, J)
    finally:
        torch.set_num_threads(threads)
    for out, same, x in zip(outs, again, J, strict=True):
        check(out, w, x)
        assert torch.equal(out, same)


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device: str) -> None:
    J, w = matrix(5, 4096, device=device), weights_for(5, device)
    want = ops.combine(w, J)
    assert torch.equal(ops.combine(w, J.T.contiguous().T), want)
    assert torch.equal(ops.combine(w.float().double(), J), ops.combine(w.float(), J))  # float32 weights are converted
    assert torch.equal(ops.combine(torch.stack([w, w], 1)[:, 0], J), want)
    shifted = torch.empty(J.numel() + 1, device=device)[1:].view(J.shape).copy_(J)  # not 16-byte aligned
    assert torch.equal(ops.combine(w, shifted), want)
    out = torch.empty(4097, device=device)[1:]
    assert torch.equal(ops.combine(w, J, out), want)
    assert not ops.combine(w.clone().requires_grad_(), J.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_a_diverged_row_is_never_hidden(device: str) -> None:
    J, w = matrix(3, 40, device=device), torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64, device=device)
    J[1, 7], J[1, 9], J[0, 11] = float("inf"), float("nan"), float("-inf")
    out = ops.combine(w, J)
    assert out.isnan().nonzero().flatten().tolist() == [7, 9]
    assert out[11] == float("-inf")
    assert ops.combine(torch.full_like(w, float("nan")), J).isnan().all()


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 20),
    sizes=st.lists(st.integers(0, 2100), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_list(k: int, sizes: list[int], dtype: torch.dtype, seed: int) -> None:
    J, w = [matrix(k, n, dtype, seed=seed) for n in sizes], weights_for(k, seed=seed)
    for out, x in zip(ops.combine(w, J), J, strict=True):
        check(out, w, x)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_compile(device: str) -> None:
    J, w = pieces(5, device=device), weights_for(5, device)
    outs = [torch.zeros_like(x[0]) for x in J]
    torch.library.opcheck(torch.ops.antdiff.combine, (w, J))
    torch.library.opcheck(torch.ops.antdiff.combine_out, (w, J, outs))

    def step(weights: Tensor, rows: list[Tensor], out: list[Tensor]) -> Tensor:
        ops.combine(weights * 2, [x + 1 for x in rows], out)
        a, _, b = ops.combine(weights, [rows[0], None, rows[1]])
        return out[0].sum() + a.sum() + b.sum()

    want_outs = [torch.zeros_like(x[0]) for x in J]
    want = step(w, J, want_outs)
    J[0].requires_grad_()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(w, J, outs)
    assert torch.equal(got, want)
    for a, b in zip(outs, want_outs, strict=True):
        assert torch.equal(a, b)
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert ops.combine(torch.ones(4), torch.randn(4, 3, dtype=torch.bfloat16)).dtype == torch.float32


W3, O10 = torch.ones(3, dtype=torch.float64), torch.zeros(10)
BOTH = torch.zeros(40)
BAD = {
    "weights a list": ([1.0, 1.0, 1.0], J3, None, TypeError, "weights must be a torch.Tensor"),
    "weights short": (W3[:2], J3, None, ValueError, r"weights must have shape \[k\] with k=3"),
    "weights 2-d": (W3[None], J3, None, ValueError, r"weights must have shape \[k\]"),
    "weights half": (W3.half(), J3, None, TypeError, "weights must be float64"),
    "weights integer": (W3.long(), J3, None, TypeError, "weights must be float64"),
    "weights meta": (W3.to("meta"), J3, None, TypeError, "weights must"),
    "out a list": (W3, J3, [O10], TypeError, "out must be a torch.Tensor for a matrix"),
    "out a tensor": (W3, [J3], O10, TypeError, "a list for a list"),
    "out too short": (W3, [J3, J3], [O10], ValueError, "as long as J"),
    "out None": (W3, [J3, J3], [O10, None], ValueError, r"out\[1\] must be None exactly where"),
    "out not None": (W3, [J3, None], [O10, O10], ValueError, r"out\[1\] must be None exactly where"),
    "out shape": (W3, J3, O10[:9], ValueError, "out must have the shape of one row of J"),
    "out extra dim": (W3, J3, O10[None], ValueError, "out must have the shape of one row of J"),
    "out dtype": (W3, J3, O10.double(), TypeError, "out must be float32 or have the dtype of J"),
    "out integer": (W3, J3, O10.long(), TypeError, "out must be float32"),
    "out mixed": (W3, [J3.half()] * 2, [O10, O10.half()], TypeError, r"out\[1\] must have the dtype of the other"),
    "out strided": (W3, J3, torch.zeros(20)[::2], ValueError, "out must be contiguous"),
    "out requires grad": (W3, J3, O10.clone().requires_grad_(), ValueError, "must not require grad"),
    "out meta": (W3, J3, O10.to("meta"), TypeError, "out must"),
    "out a number": (W3, [J3], [1.0], TypeError, r"out must be a plain torch.Tensor; got float"),
    "out in J": (W3, BOTH[:30].view(3, 10), BOTH[25:35], ValueError, "out must not share memory with J"),
    "out twice": (W3, [J3, J3], [O10, O10], ValueError, "must not share memory with out"),
    "outs overlap": (W3, [J3, J3, J3], [BOTH[5:15], O10, BOTH[:10]], ValueError, "must not share memory with out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    weights, J, out, error, text = BAD[case]
    with pytest.raises(error, match=text):
        ops.combine(weights, J, out)
