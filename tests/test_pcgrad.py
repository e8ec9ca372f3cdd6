"""pcgrad_weights and pcgrad against the algorithm on the gradients themselves, and misuse."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from devices import DEVICES, HAS_CUDA
from grams import KINDS, examples, gram, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import combined, projected
from torch import Tensor

from antdiff import ops
from antdiff._checks import check_generator, same_device
from antdiff.ops import reference

DIAMOND = torch.tensor([[-2.0, 1, 4], [1, 4, 2], [-3, 2, -1], [3, -4, -3]], dtype=torch.float64)
CONFLICT = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64)


def pairwise(J: Tensor, perms: Tensor) -> Tensor:
    """Run the paper's algorithm 1 on the gradients [k, P]; return the direction [P], a sum."""
    projected_rows = []
    for i, order in enumerate(perms.tolist()):
        p = J[i].clone()
        for j in order:
            dot, norm = p @ J[j], J[j] @ J[j]
            if dot < 0 and norm > 0:
                p -= dot / norm * J[j]
        projected_rows.append(p)
    return torch.stack(projected_rows).sum(0)


def random_perms(k: int, seed: int) -> Tensor:
    return reference.pcgrad_perms(torch.rand(k, k, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.sanitize
@pytest.mark.parametrize("device", DEVICES)
def test_fixed_values(device: str) -> None:
    J = CONFLICT.to(device)
    want = torch.tensor([0.5848, 3.8012, 3.8012], dtype=torch.float64, device=device)
    torch.testing.assert_close(ops.pcgrad_weights(J @ J.T, reduction="sum") @ J, want, rtol=0, atol=5e-5)
    torch.testing.assert_close(ops.pcgrad_weights(J @ J.T) @ J, want / 2, rtol=0, atol=5e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 2, 5, 33])
def test_the_default_is_the_sum_over_k(device: str, k: int) -> None:
    J, perms = rows("conflicting", k).to(device), random_perms(k, 0).to(device)
    for module in (ops, reference):
        total = module.pcgrad_weights(ops.gram(J), perms, reduction="sum")
        for mean in (module.pcgrad_weights(ops.gram(J), perms), module.pcgrad(J, perms)[1]):
            torch.testing.assert_close(mean, total / k, rtol=1e-15, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_never_visits_itself(device: str) -> None:
    """After two projections <p_i, g_i> can be negative; implementations that visit j = i get a different direction."""
    J = DIAMOND.to(device)
    orders = torch.tensor([[j for j in range(4) if j != i] for i in range(4)], device=device)
    direction = ops.pcgrad_weights(J @ J.T, orders, reduction="sum") @ J
    right = torch.tensor([0.32249, 0.42802, 1.53562], dtype=torch.float64, device=device)
    torch.testing.assert_close(direction, right, rtol=0, atol=5e-6)
    assert (direction - torch.tensor([0.79468, -0.20157, 1.06343], device=device)).abs().max() > 0.4
    backwards = ops.pcgrad_weights(J @ J.T, orders.flip(-1), reduction="sum") @ J
    assert (backwards - right).abs().max() > 0.1  # the order matters
    torch.testing.assert_close(backwards, pairwise(J.cpu(), orders.cpu().flip(-1)).to(device), rtol=1e-13, atol=0)


def assert_directions_match(J: Tensor, weights: Tensor, perms: Tensor) -> None:
    k = len(J)
    direction, want = (weights[:, None] * J).sum(0), pairwise(J, perms)
    assert (direction - want).norm() <= projected(k) * J.norm(dim=1).sum()


@settings(max_examples=150, deadline=None)
@given(J=examples(), seed=st.integers(0, 2**31 - 1))
def test_matches_the_pairwise_algorithm(J: Tensor, seed: int) -> None:
    perms = random_perms(len(J), seed)
    assert_directions_match(J, ops.pcgrad_weights(gram(J), perms, reduction="sum"), perms)
    assert_directions_match(J, reference.pcgrad_weights(gram(J), perms, reduction="sum"), perms)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 5, 8, 32, 33, 64])
def test_sizes(device: str, kind: str, k: int) -> None:
    J = rows(kind, k, 100)
    perms = random_perms(k, k)
    weights = ops.pcgrad_weights(gram(J).to(device), perms.to(device), reduction="sum")
    assert weights.dtype == torch.float64
    assert_directions_match(J, weights.cpu(), perms)


def test_no_conflict_and_one_row() -> None:
    J = rows("random", 6, 20).abs()
    assert torch.equal(ops.pcgrad_weights(gram(J), reduction="sum"), torch.ones(6, dtype=torch.float64))
    assert torch.equal(ops.pcgrad_weights(gram(J)), torch.full((6,), 1 / 6, dtype=torch.float64))
    assert ops.pcgrad_weights(torch.tensor([[3.0]], dtype=torch.float64)).tolist() == [1]
    assert ops.pcgrad_weights(torch.zeros(4, 4, dtype=torch.float64), reduction="sum").tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("scale", [2.0**-600, 1.0, 2.0**600])
def test_other_entries_of_a_row_with_a_zero_diagonal_are_not_used(scale: float) -> None:
    G = torch.tensor([[0.0, -1.0, -2.0], [-1.0, 4.0, -1.0], [-2.0, -1.0, 1.0]], dtype=torch.float64) * scale
    perms = torch.tensor([[1, 2], [0, 2], [0, 1]])
    expected = torch.tensor([1.0, 1.25, 2.0], dtype=torch.float64)  # rows 1 and 2 alone: 1 + 1/4 and 1 + 1/1
    for weights in (ops.pcgrad_weights, ops.reference.pcgrad_weights):
        assert torch.equal(weights(G, perms, reduction="sum"), expected)


def test_exactly_opposed_rows_cancel() -> None:
    J = torch.tensor([[3.0, -4.0], [-6.0, 8.0]], dtype=torch.float64)
    assert (ops.pcgrad_weights(J @ J.T, reduction="sum") @ J).abs().max() <= 1e-14


@settings(max_examples=60, deadline=None)
@given(J=examples(), seed=st.integers(0, 2**31 - 1))
def test_permuted_rows_give_permuted_weights(J: Tensor, seed: int) -> None:
    k = len(J)
    perms = random_perms(k, seed)
    p = torch.randperm(k, generator=torch.Generator().manual_seed(seed))  # new row i is old row p[i]
    permuted = ops.pcgrad_weights(gram(J[p]), p.argsort()[perms[p]].view(k, k - 1), reduction="sum")
    weights = ops.pcgrad_weights(gram(J), perms, reduction="sum")
    norms = J.norm(dim=1)
    assert ((permuted - weights[p]) * norms[p]).abs().max() <= projected(k) * norms.sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_scale_gives_the_same_bits(device: str, kind: str) -> None:
    G, perms = gram(rows(kind, 5)).to(device), random_perms(5, 1).to(device)
    want = ops.pcgrad_weights(G, perms)
    for exponent in (-780, -66, 66, 780):  # 1e-235, 1e-20, 1e20, 1e235
        assert torch.equal(ops.pcgrad_weights(G * 2.0**exponent, perms), want)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e-20, 1e20, 1e30, 1e290])
def test_range_of_gram(scale: float) -> None:
    perms = random_perms(4, 2)
    want = ops.pcgrad_weights(DIAMOND @ DIAMOND.T, perms)
    torch.testing.assert_close(ops.pcgrad_weights(DIAMOND @ DIAMOND.T * scale, perms), want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_batches(device: str) -> None:
    J = torch.stack([rows("conflicting", 5, 9, seed) for seed in range(6)]).view(3, 2, 5, 9)
    G, perms = gram(J).to(device), torch.stack([random_perms(5, i) for i in range(6)]).view(3, 2, 5, 4).to(device)
    weights = ops.pcgrad_weights(G, perms)
    assert weights.shape == (3, 2, 5)
    for i in range(3):
        for j in range(2):
            assert torch.equal(weights[i, j], ops.pcgrad_weights(G[i, j], perms[i, j]))
    torch.testing.assert_close(weights, reference.pcgrad_weights(G, perms), rtol=1e-12, atol=0)
    strided = perms.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(weights, ops.pcgrad_weights(G.mT.contiguous().mT, strided))
    assert ops.pcgrad_weights(G[:0]).shape == (0, 2, 5)
    many = G[:1, :1].repeat(40, 50, 1, 1)
    assert torch.equal(ops.pcgrad_weights(many, perms[:1, :1].repeat(40, 50, 1, 1)), weights[:1, :1].repeat(40, 50, 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 5, 40])
def test_drawn_orders(device: str, k: int) -> None:
    """The op and its twin draw the same orders from the same generator, and from the global generator."""
    G = gram(rows("conflicting", k)).to(device)
    generator = torch.Generator(device)
    results = []
    for module in (ops, reference):
        generator.manual_seed(3)
        results.append([module.pcgrad_weights(G, generator=generator, reduction="sum") for _ in range(2)])
        torch.manual_seed(3)
        assert torch.equal(results[-1][0], module.pcgrad_weights(G, reduction="sum"))
    for mine, twin in zip(*results, strict=True):
        torch.testing.assert_close(mine, twin, rtol=0, atol=projected(k) * k)
    assert k == 1 or not torch.equal(results[0][0], results[0][1])


def test_orders_are_uniform() -> None:
    """In every row, each of the 6 orders of three other rows occurs 500 times in 3000, within 5 standard deviations."""
    keys = torch.rand(3000, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codes = reference.pcgrad_perms(keys) @ torch.tensor([16, 4, 1])  # [3000, 4]
    for i in range(4):
        _, counts = codes[:, i].unique(return_counts=True)
        assert len(counts) == 6
        assert (counts - 500).abs().max() < 5 * (3000 * 5 / 36) ** 0.5


def test_equal_keys_visit_in_row_order() -> None:
    G = DIAMOND @ DIAMOND.T
    orders = torch.tensor([[j for j in range(4) if j != i] for i in range(4)])
    equal = torch.ops.antdiff.pcgrad_weights(G, None, torch.zeros(4, 4, dtype=torch.float64), False, False)
    assert torch.equal(equal, ops.pcgrad_weights(G, orders, reduction="sum"))


def test_only_the_symmetric_part_counts_and_no_gradient_flows() -> None:
    G = gram(rows("conflicting", 5))
    perms = random_perms(5, 0)
    skew = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).triu(1) * 2**-30
    torch.testing.assert_close(
        ops.pcgrad_weights(G + skew - skew.T, perms), ops.pcgrad_weights(G, perms), rtol=1e-12, atol=0
    )
    assert not ops.pcgrad_weights(G.requires_grad_(), perms).requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_one_call(device: str, dtype: torch.dtype) -> None:
    J = rows("conflicting", 5, 40).to(device, dtype)
    perms = random_perms(5, 4).to(device)
    direction, weights = ops.pcgrad(J, perms, reduction="sum")
    assert torch.equal(weights, ops.pcgrad_weights(ops.gram(J), perms, reduction="sum"))
    want, _ = reference.pcgrad(J.double(), perms, reduction="sum")
    scale = J.double().norm(dim=1).sum()
    assert direction.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # G has an error of gram(dtype), and a coefficient some times that: 1e-5 for float32 products.
    exact = dtype == torch.float64
    assert (direction - want).norm() <= (projected(5) + combined(dtype, direction.dtype, 5) if exact else 1e-5) * scale
    out = [torch.empty(shape, device=device, dtype=direction.dtype) for shape in ((8, 4), (8,))]
    out.insert(1, None)
    listed, _ = ops.pcgrad([J[:, :32].reshape(5, 8, 4), None, J[:, 32:].contiguous()], perms, out=out)
    assert listed[0] is out[0]
    torch.testing.assert_close(torch.cat([out[0].flatten(), out[2]]), direction / 5, rtol=1e-4, atol=1e-5)
    generator = torch.Generator(device).manual_seed(0)
    first = ops.pcgrad(J, generator=generator)[0]
    assert torch.equal(first, ops.pcgrad(J, generator=generator.manual_seed(0))[0])


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_compile_and_fake(device: str) -> None:
    G = gram(torch.stack([rows("conflicting", 4, seed=s) for s in range(3)])).to(device)
    perms = torch.stack([random_perms(4, s) for s in range(3)]).to(device)
    keys = torch.rand(3, 4, 4, dtype=torch.float64, device=device)
    op = torch.ops.antdiff.pcgrad_weights
    torch.library.opcheck(op, (G, perms, None, True, False))
    torch.library.opcheck(op, (G.mT, None, keys.mT, False, True))

    def step(G: Tensor, perms: Tensor) -> Tensor:
        return ops.pcgrad_weights(G * 2, perms) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(G, perms), step(G, perms))

    drawn = torch.compile(lambda G: ops.pcgrad_weights(G), fullgraph=True, backend="aot_eager", dynamic=True)
    assert drawn(G).shape == (3, 4)
    assert drawn(G[:2, :3, :3].contiguous()).shape == (2, 3)

    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = ops.pcgrad_weights(torch.empty(2, 3, 3, dtype=torch.float64))
    assert fake.shape == (2, 3)


def without(**changes: object) -> dict[str, object]:
    return {"gram": gram(rows("random", 3)), **changes}


EYE = torch.eye(3, dtype=torch.float64)
BESIDE = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
BAD = {
    "no tensor": (lambda: without(gram=[[1.0]]), TypeError, "gram must be a torch.Tensor"),
    "float32": (lambda: without(gram=EYE.float()), TypeError, r"float64.*antdiff.ops.gram"),
    "sparse": (lambda: without(gram=EYE.to_sparse()), TypeError, "gram must be a dense"),
    "meta": (lambda: without(gram=EYE.to("meta")), TypeError, "gram must be"),
    "not square": (lambda: without(gram=EYE[:2]), ValueError, r"\[..., k, k\]"),
    "vector": (lambda: without(gram=EYE[0]), ValueError, r"\[..., k, k\]"),
    "k = 0": (lambda: without(gram=EYE[:0, :0]), ValueError, "k >= 1"),
    "expanded": (lambda: without(gram=EYE.expand(4, 3, 3)), ValueError, "overlap"),
    "reduction": (lambda: without(reduction="max"), ValueError, "reduction must be one of 'sum', 'mean'"),
    "nonfinite": (lambda: without(nonfinite="ignore"), ValueError, "nonfinite must be one of"),
    "perms list": (lambda: without(perms=[[1]]), TypeError, "perms must be a torch.Tensor"),
    "perms dtype": (lambda: without(perms=random_perms(3, 0).int()), TypeError, "perms must be int64"),
    "perms shape": (lambda: without(perms=random_perms(4, 0)), ValueError, r"\[..., k, k-1\]"),
    "perms batch": (lambda: without(perms=random_perms(3, 0)[None]), ValueError, r"\[..., k, k-1\]"),
    "perms self": (lambda: without(perms=torch.tensor([[1, 2], [0, 1], [0, 1]])), ValueError, "each once"),
    "perms twice": (lambda: without(perms=torch.tensor([[1, 1], [0, 2], [0, 1]])), ValueError, "each once"),
    "perms range": (lambda: without(perms=torch.tensor([[1, 2], [0, 3], [0, 1]])), ValueError, "each once"),
    "perms and generator": (lambda: without(perms=random_perms(3, 0), generator=torch.Generator()), ValueError,
                            "generator draws"),
    "generator type": (lambda: without(generator=3), TypeError, "generator must be a torch.Generator"),
    "NaN": (lambda: without(gram=torch.where(BESIDE, math.nan, EYE)), ValueError, r"finite; got nan at \[0, 2\]"),
    "infinite": (lambda: without(gram=torch.where(BESIDE, -math.inf, EYE)), ValueError, "finite; got -inf"),
    "negative": (lambda: without(gram=EYE - 2 * EYE[1].diag()), ValueError, r"diagonal.*got -1 at \[1, 1\]"),
    "asymmetric": (lambda: without(gram=EYE + 0.5 * EYE.roll(1, 1)), ValueError, "symmetric"),
    "Cauchy-Schwarz": (lambda: without(gram=EYE + 2 - 2 * EYE), ValueError, "Gram matrix"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    make, error, text = BAD[case]
    with pytest.raises(error, match=text):
        ops.pcgrad_weights(**make())


def test_a_generator_without_an_index_draws_on_any_index() -> None:
    """``torch.Generator("cuda").device`` has no index, and the device of every CUDA tensor has one."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert same_device(cuda, torch.device("cuda:1"))
    assert same_device(torch.device("cuda:1"), cuda)
    assert same_device(torch.device("cuda:1"), torch.device("cuda:1"))
    assert same_device(cpu, torch.device("cpu:0"))
    assert not same_device(torch.device("cuda:0"), torch.device("cuda:1"))
    assert not same_device(cpu, cuda)
    check_generator(torch.Generator(), torch.device("cpu:0"))
    with pytest.raises(ValueError, match=r"generator must live on the device of gram \(cuda:0\); got one on cpu"):
        check_generator(torch.Generator(), torch.device("cuda:0"))


def test_the_error_names_the_entry_of_a_batch() -> None:
    G = EYE.repeat(2, 2, 1, 1)
    G[1, 0, 2, 1] = float("-inf")
    with pytest.raises(ValueError, match=r"got -inf at \[1, 0, 2, 1\]"):
        ops.pcgrad_weights(G)
    perms = torch.stack([random_perms(3, s) for s in range(4)]).view(2, 2, 3, 2)
    perms[0, 1, 0, 0] = 7
    with pytest.raises(ValueError, match=r"in problem \[0, 1\]"):
        ops.pcgrad_weights(EYE.repeat(2, 2, 1, 1), perms)


@pytest.mark.parametrize("device", DEVICES)
def test_poison_reaches_its_own_problem_only(device: str) -> None:
    G = EYE.repeat(3, 1, 1)
    G[1, 0, 0] = float("nan")
    for module in (ops, reference):
        weights = module.pcgrad_weights(G.to(device), nonfinite="poison")
        assert weights.isnan().tolist() == [[False] * 3, [True] * 3, [False] * 3]
    ops.check_errors(device)  # nothing was recorded


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
def test_cuda_errors_are_sticky_and_cost_no_sync() -> None:
    G = EYE.cuda().clone()
    G[0, 1] = float("nan")
    perms = random_perms(3, 0).cuda()
    ops.check_errors("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert ops.pcgrad_weights(G).shape == (3,)
        ops.pcgrad_weights(EYE.cuda(), perms.clamp(max=1))
        ops.pcgrad_weights(EYE.cuda(), perms)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(ValueError, match=r"gram must be.*perms must"):
        ops.check_errors("cuda")
    ops.check_errors("cuda")
    assert ops.pcgrad_weights(G).isnan().all()
    with pytest.raises(ValueError, match="generator must live on the device"):
        ops.pcgrad_weights(EYE.cuda(), generator=torch.Generator())
    program = "import torch; from antdiff import ops; ops.pcgrad_weights(-torch.eye(3).double().cuda())"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "ANTDIFF_CHECK": "1"}, capture_output=True, text=True
    )
    assert "ValueError: on cuda" in done.stderr


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
def test_cuda_graph_draws_new_orders_at_each_replay() -> None:
    G = gram(rows("conflicting", 8)).cuda()
    generator = torch.Generator("cuda").manual_seed(5)
    eager = [ops.pcgrad_weights(G, generator=generator) for _ in range(4)]
    generator.manual_seed(5)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        weights = ops.pcgrad_weights(G, generator=generator)
    generator.manual_seed(5)
    for want in eager:
        graph.replay()
        torch.testing.assert_close(weights, want)
