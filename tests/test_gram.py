"""gram and gram_ against their float64 twin, for all sizes, dtypes and layouts, and misuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from devices import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import gram as gram_tolerance
from torch import Tensor

from antdiff import ops
from antdiff.ops import reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(7,), (3, 5), (), (130, 70), (0,), (1, 4, 4), (2048,), (33, 9)]  # shapes of parameters; P is about 13,000


def matrix(k: int, P: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1000 * k + P)
    shared = torch.randn(P, generator=g, dtype=torch.float64)  # rows have a common part, as gradients do
    return (torch.randn(k, P, generator=g, dtype=torch.float64) + shared).to(device, dtype)


def pieces(k: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    return [
        matrix(k, torch.Size(s).numel(), dtype, device, seed=i).view(k, *s)
        if s != ()
        else matrix(k, 1, dtype, device)[:, 0]
        for i, s in enumerate(SHAPES)
    ]


def oracle(J: Tensor | list[Tensor]) -> Tensor:
    """Return the float64 twin's result, or that of extended precision for float64 input.

    For float64 input, the rounding errors of the twin would be as large as those of the op.
    """
    if not isinstance(J, Tensor):
        return sum(oracle(x.unsqueeze(-1).flatten(1)) for x in J)
    if J.dtype != torch.float64:
        return reference.gram(J)
    rows = J.cpu().numpy().astype(np.longdouble)
    return torch.from_numpy((rows[:, None] * rows).sum(-1).astype(np.float64)).to(J.device)


def check(G: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert G.dtype == torch.float64
    assert torch.equal(G, G.T)
    scale = want.diagonal().sqrt()
    scale = scale[:, None] * scale
    error = (G - want).abs() / torch.where(scale > 0, scale, 1.0)
    assert error.max() <= gram_tolerance(dtype), error.max()


@pytest.mark.sanitize
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 33, 64])
def test_matrix_matches_the_float64_twin(device: str, dtype: torch.dtype, k: int) -> None:
    for P in (0, 1, 37, 5000):
        J = matrix(k, P, dtype, device)
        check(ops.gram(J), oracle(J), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 5, 16])
def test_list_is_the_matrix_of_its_columns(device: str, dtype: torch.dtype, k: int) -> None:
    J = pieces(k, dtype, device)
    want = oracle(torch.cat([x.unsqueeze(-1).flatten(1) for x in J], dim=1))
    check(ops.gram(J), want, dtype)
    check(ops.gram((None, *J, None)), want, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large(device: str, dtype: torch.dtype) -> None:
    # This uses many chunks, slabs and threads. A float32 sum over all of P would exceed the tolerance by far.
    J = matrix(5, 1_000_003, dtype, device)
    check(ops.gram(J), oracle(J), dtype)
    check(ops.gram([J[:, :7].contiguous(), J[:, 7:].contiguous()]), oracle(J), dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_gram_accumulates_over_chunks_shards_and_dtypes(device: str) -> None:
    J = matrix(6, 3000, torch.float64, device)
    chunks = [J[:, :1000].float(), J[:, 1000:1200].contiguous(), J[:, 1200:].bfloat16()]
    want = sum(oracle(c) for c in chunks)
    G = torch.zeros(6, 6, dtype=torch.float64, device=device)
    for c in chunks:
        assert ops.gram_(G, c) is G
    check(G, want, torch.float32)
    G = torch.full((6, 6), 3.0, dtype=torch.float64, device=device)
    ops.gram_(G, [chunks[1], None])
    torch.testing.assert_close(G, oracle(chunks[1]) + 3.0)


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_for_any_number_of_threads_and_every_run(device: str) -> None:
    for J in (matrix(5, 300_001, device=device), [matrix(8, n, device=device) for n in (1, 200_000, 30, 70_001)]):
        first = ops.gram(J)
        threads = torch.get_num_threads()
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                assert torch.equal(ops.gram(J), first)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-10, 1e-3, 1e10])
def test_scales(device: str, scale: float) -> None:
    J = matrix(5, 3000, device=device) * scale
    check(ops.gram(J), oracle(J), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_special_rows(device: str) -> None:
    J = matrix(6, 700, device=device)
    J[1], J[3], J[4] = 0, J[2], -J[2]
    G = ops.gram(J)
    assert torch.equal(G[1], torch.zeros_like(G[1]))
    check(G, oracle(J), torch.float32)
    J[0, 699], J[5, 3] = float("inf"), float("nan")
    G = ops.gram(J)
    assert G[0, 0] == float("inf")
    assert G[5].isnan().all()
    assert G[1:5, 1:5].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(device: str, dtype: torch.dtype) -> None:
    J = matrix(5, 4096, dtype, device)
    want = oracle(J)
    check(ops.gram(J.T.contiguous().T), want, dtype)  # one copy
    check(ops.gram(torch.cat([J, J], dim=1)[:, :4096]), want, dtype)
    shifted = torch.empty(J.numel() + 1, dtype=dtype, device=device)[1:].view(J.shape).copy_(J)  # not 16-byte aligned
    check(ops.gram(shifted), want, dtype)
    check(ops.gram(J[:, :4001].contiguous()), oracle(J[:, :4001]), dtype)  # rows not aligned
    check(ops.gram(J.clone().requires_grad_()), want, dtype)
    assert not ops.gram(J.clone().requires_grad_()).requires_grad
    check(ops.gram([torch.nn.Parameter(J)]), want, dtype)


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 20),
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_list(k: int, sizes: list[int], dtype: torch.dtype, seed: int) -> None:
    J = [matrix(k, n, dtype, seed=seed) for n in sizes]
    check(ops.gram(J), oracle(J), dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_compile(device: str) -> None:
    J = pieces(5, device=device)
    lib = torch.ops.antdiff
    torch.library.opcheck(lib.gram, (J,))
    torch.library.opcheck(lib.gram_, (torch.zeros(5, 5, dtype=torch.float64, device=device), J))

    def step(out: Tensor, rows: list[Tensor]) -> Tensor:
        ops.gram_(out, [x * 2 for x in rows])
        return ops.gram([*rows, None]) + out

    want_out = torch.ones(5, 5, dtype=torch.float64, device=device)
    out = want_out.clone()
    want = step(want_out, J)
    J[0].requires_grad_()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(out, J)
    assert torch.equal(got, want)
    assert torch.equal(out, want_out)
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert ops.gram([torch.randn(4, 3), torch.randn(4, 2, 2)]).shape == (4, 4)


class Subclass(Tensor):
    pass


J3 = torch.ones(3, 10)
BAD = {
    "a number": (3.0, TypeError, "J must be a torch.Tensor"),
    "empty list": ([], ValueError, "at least one tensor"),
    "only None": ([None, None], ValueError, "at least one tensor"),
    "a list of numbers": ([1.0], TypeError, "J must be a torch.Tensor; got float"),
    "nested": ([J3, [J3]], TypeError, r"J\[1\] must be a torch.Tensor; got list"),
    "1-d": (torch.ones(3), ValueError, r"J must be \[k, P\]"),
    "0-d in a list": ([J3, torch.ones(())], ValueError, "0-d"),
    "0-d first": ([torch.ones(())], ValueError, "0-d"),
    "no rows": (torch.ones(0, 4), ValueError, "at least one row"),
    "mixed k": ([J3, torch.ones(4, 10)], ValueError, r"J\[1\] must have k=3 rows"),
    "mixed dtype": ([J3, J3.double()], TypeError, r"J\[1\] must be float32 \(the dtype of the other entries of J\)"),
    "integer": (J3.long(), TypeError, "J must be float32"),
    "complex": (J3.to(torch.complex64), TypeError, "J must be float32"),
    "bool": ([None, J3.bool()], TypeError, r"J\[1\] must be float32"),
    "sparse": ([J3, J3.to_sparse()], TypeError, r"J\[1\] must be a dense"),
    "sparse matrix": (J3.to_sparse(), TypeError, "J must be a dense"),
    "meta": (J3.to("meta"), TypeError, "J must"),
    "mixed meta": ([J3, J3.to("meta")], TypeError, r"J\[1\] must"),
    "subclass": ([J3.as_subclass(Subclass)], TypeError, "plain torch.Tensor"),
    "expanded": (torch.ones(10).expand(3, 10), ValueError, "must not overlap itself"),
    "expanded in a list": ([J3, torch.ones(3, 1).expand(3, 10)], ValueError, r"J\[1\] must not overlap itself"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(case: str) -> None:
    J, error, text = BAD[case]
    with pytest.raises(error, match=text):
        ops.gram(J)
    with pytest.raises(error, match=text):
        ops.gram_(torch.zeros(3, 3, dtype=torch.float64), J)
    with pytest.raises(error, match=text):
        ops.combine(torch.ones(3, dtype=torch.float64), J)


def test_bad_out() -> None:
    for out, error, text in [
        (torch.zeros(3, 3), TypeError, "out must be float64"),
        (torch.zeros(4, 4, dtype=torch.float64), ValueError, "k=3"),
        (torch.zeros(3, dtype=torch.float64), ValueError, "k=3"),
        (torch.zeros(6, 3, dtype=torch.float64)[::2], ValueError, "out must be contiguous"),
        (torch.zeros(3, 3, dtype=torch.float64, requires_grad=True), ValueError, "out must not require grad"),
        (torch.zeros(3, 3, dtype=torch.float64, device="meta"), TypeError, "out must"),
        ([[0.0]], TypeError, "out must be a torch.Tensor"),
    ]:
        with pytest.raises(error, match=text):
            ops.gram_(out, J3)


def test_transforms_are_refused() -> None:
    with pytest.raises((TypeError, RuntimeError)):
        torch.func.vmap(ops.gram)(torch.ones(2, 3, 4))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    P = 2**31 + 40
    try:
        J = torch.zeros(1, P, dtype=torch.bfloat16)  # 4.3 GB
    except RuntimeError:
        pytest.skip("needs 4.3 GB of memory")
    J[0, 0], J[0, 2**31 - 1], J[0, 2**31 + 3], J[0, -1] = 1, 2, 4, 8
    assert ops.gram(J).item() == 85
    out = ops.combine(torch.tensor([3.0]), J, out=torch.empty(P, dtype=torch.bfloat16))
    assert out[[0, 2**31 - 1, 2**31 + 3, -1]].tolist() == [3, 6, 12, 24]
