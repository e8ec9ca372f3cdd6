"""cluster_loss, cluster_loss_and_grad and cluster_mean against their float64 twins, and misuse."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import rounded, smallest, summed
from torch import Tensor

from antdiff import ops
from antdiff.ops import reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
KINDS = ["mse", "huber", "l1"]


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def example(
    B: int = 12, shape: tuple[int, ...] = (3, 5, 7), k: int = 4, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(B * 100 + k)
    pred = torch.randn(B, *shape, generator=g).to(device, dtype)
    target = torch.randn(B, *shape, generator=g).to(device, dtype)
    cluster = torch.randint(0, max(k - 1, 1), (B,), generator=g).to(device)  # the last cluster is empty
    weight = (torch.rand(B, generator=g) + 0.5).to(device, loss_dtype(dtype))
    return pred, target, cluster, weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_the_float64_twin(device: str, dtype: torch.dtype, kind: str, weighted: bool) -> None:
    pred, target, cluster, weight = example(dtype=dtype, device=device)
    w = weight.clone().requires_grad_() if weighted else None
    x = pred.clone().requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=weight.dtype, device=device)
    losses, counts = ops.cluster_loss(x, target, cluster, 4, w, kind=kind, delta=0.7)
    (losses * upstream).sum().backward()

    x64 = pred.double().requires_grad_()
    w64 = weight.double().requires_grad_() if weighted else None
    want, want_counts = reference.cluster_loss(x64, target.double(), cluster, 4, w64, kind=kind, delta=0.7)
    (want * upstream.double()).sum().backward()

    assert losses.dtype == loss_dtype(dtype)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, want_counts)
    torch.testing.assert_close(losses.double(), want.detach(), rtol=summed(dtype), atol=0)
    assert losses[3] == 0
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=rounded(dtype), atol=smallest(dtype))
    if weighted:
        torch.testing.assert_close(w.grad.double(), w64.grad, rtol=summed(dtype), atol=0)

    both = ops.cluster_loss_and_grad(pred, target, cluster, 4, w, cluster_weight=upstream, kind=kind, delta=0.7)
    # The bits may differ: the compiler may contract a multiply and an add in only one of the loop's instantiations.
    torch.testing.assert_close(both[0].double(), want.detach(), rtol=summed(dtype), atol=0)
    assert torch.equal(both[1], counts)
    torch.testing.assert_close(both[2].double(), x64.grad, rtol=rounded(dtype), atol=smallest(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cluster_mean(device: str, dtype: torch.dtype) -> None:
    _, _, cluster, weight = example(dtype=dtype, device=device)
    per_sample = torch.rand(12, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    x, w = per_sample.clone().requires_grad_(), weight.clone().requires_grad_()
    losses, counts = ops.cluster_mean(x, cluster, 4, w)
    losses.square().sum().backward()
    x64, w64 = per_sample.double().requires_grad_(), weight.double().requires_grad_()
    want, want_counts = reference.cluster_mean(x64, cluster, 4, w64)
    want.square().sum().backward()
    assert torch.equal(counts, want_counts)
    torch.testing.assert_close(losses.double(), want, rtol=summed(dtype), atol=0)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=max(rounded(dtype), summed(dtype)), atol=0)
    torch.testing.assert_close(w.grad.double(), w64.grad, rtol=summed(dtype), atol=0)


@settings(max_examples=40, deadline=None)
@given(B=st.integers(0, 9), N=st.integers(1, 40), k=st.integers(1, 12), seed=st.integers(0, 2**31 - 1))
def test_any_size(B: int, N: int, k: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    pred, target = torch.randn(2, B, N, generator=g, dtype=torch.float64)
    cluster = torch.randint(0, k, (B,), generator=g)
    losses, counts = ops.cluster_loss(pred, target, cluster, k)
    want, want_counts = reference.cluster_loss(pred, target, cluster, k)
    assert torch.equal(counts, want_counts)
    torch.testing.assert_close(losses, want, rtol=summed(torch.float64), atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_long_samples_and_many_threads_give_the_same_bits(device: str) -> None:
    pred, target, cluster, weight = example(B=9, shape=(3, 128, 130), device=device)
    first = ops.cluster_loss_and_grad(pred, target, cluster, 4, weight)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        second = ops.cluster_loss_and_grad(pred, target, cluster, 4, weight)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    want, _ = reference.cluster_loss(pred.double(), target.double(), cluster, 4, weight.double())
    torch.testing.assert_close(first[0].double(), want, rtol=summed(torch.float32), atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_strides(device: str) -> None:
    pred, target, cluster, _ = example(device=device)
    want = ops.cluster_loss_and_grad(pred, target, cluster, 4)
    nhwc = torch.channels_last
    got = ops.cluster_loss_and_grad(
        pred.to(memory_format=nhwc), target.to(memory_format=nhwc), cluster.repeat_interleave(2)[::2], 4
    )
    assert got[2].is_contiguous(memory_format=nhwc)
    torch.testing.assert_close(got[0], want[0], rtol=summed(torch.float32), atol=0)
    assert torch.equal(got[2], want[2])
    shifted = torch.empty(pred.numel() + 1, device=device)[1:].view(pred.shape).copy_(pred)  # not 16-byte aligned
    assert torch.equal(ops.cluster_loss_and_grad(shifted, target, cluster, 4)[2], want[2])
    transposed = pred.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.cluster_loss_and_grad(transposed, target, cluster, 4)[2], want[2])
    for x, y in ((transposed, target), (pred.to(memory_format=nhwc), target.to(memory_format=nhwc))):
        torch.library.opcheck(torch.ops.antdiff.cluster_loss_and_grad, (x, y, cluster, None, 4, None, "mse", 1.0))


def test_gradcheck() -> None:
    pred, target, cluster, weight = example(B=5, shape=(3,), k=3, dtype=torch.float64)
    pred.requires_grad_(), weight.requires_grad_()
    for kind in KINDS:
        assert torch.autograd.gradcheck(
            lambda p, w, kind=kind: ops.cluster_loss(p, target, cluster, 3, w, kind=kind)[0], (pred, weight)
        )
    sample = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, w: ops.cluster_mean(s, cluster, 3, w)[0], (sample, weight))
    loss, _ = ops.cluster_loss(pred, target, cluster, 3)
    with pytest.raises(RuntimeError, match="reference"):
        torch.autograd.grad(loss.sum(), pred, create_graph=True)


@pytest.mark.sanitize
@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_cluster(device: str) -> None:
    pred, target, cluster, _ = example(device=device)
    pred[0, 0, 0, 0] = float("nan")
    for kind in KINDS:
        losses, _, grad = ops.cluster_loss_and_grad(pred, target, cluster, 4, kind=kind)
        assert losses.isnan().tolist() == [i == int(cluster[0]) for i in range(4)]
        assert grad.isnan().sum() == 1


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_compile(device: str) -> None:
    pred, target, cluster, weight = example(device=device)
    lib = torch.ops.antdiff
    args = (target, cluster, weight, 4, "huber", 1.0)
    losses, counts, _ = lib.cluster_loss(pred, *args)
    torch.library.opcheck(lib.cluster_loss, (pred.clone().requires_grad_(), *args))
    torch.library.opcheck(lib.cluster_loss_backward, (losses, pred, target, cluster, weight, counts, "mse", 1.0))
    torch.library.opcheck(lib.cluster_loss_and_grad, (pred, target, cluster, weight, 4, losses, "l1", 1.0))
    sample = torch.rand(12, device=device, requires_grad=True)
    torch.library.opcheck(lib.cluster_mean, (sample, cluster, weight, 4))

    def step(x: Tensor, w: Tensor) -> Tensor:
        return ops.cluster_loss(x * 2, target, cluster, 4, w)[0].square().sum()

    x, w = pred.clone().requires_grad_(), weight.clone().requires_grad_()
    step(x, w).backward()
    y, v = pred.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.compile(step, fullgraph=True, backend="aot_eager")(y, v).backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(w.grad, v.grad)


BAD = {
    "pred a list": (lambda p, t, c, w: ([1.0], t, c, 4), TypeError, "pred must be a torch.Tensor"),
    "pred integer": (lambda p, t, c, w: (p.long(), t.long(), c, 4), TypeError, "pred must be float32"),
    "pred sparse": (lambda p, t, c, w: (p.to_sparse(), t, c, 4), TypeError, "pred must be a dense"),
    "pred meta": (lambda p, t, c, w: (p.to("meta"), t, c, 4), TypeError, "pred must be"),
    "pred a number": (lambda p, t, c, w: (p[0, 0, 0, 0], t[0, 0, 0, 0], c, 4), ValueError, "batch dimension"),
    "pred empty rows": (lambda p, t, c, w: (p[:, :0], t[:, :0], c, 4), ValueError, "at least one element"),
    "target shape": (lambda p, t, c, w: (p, t[:, :1], c, 4), ValueError, "target must have the shape of pred"),
    "target dtype": (lambda p, t, c, w: (p, t.double(), c, 4), TypeError, "target must be float32"),
    "target grad": (lambda p, t, c, w: (p, t.requires_grad_(), c, 4), ValueError, "target.detach"),
    "cluster dtype": (lambda p, t, c, w: (p, t, c.int(), 4), TypeError, "cluster must be int64"),
    "cluster shape": (lambda p, t, c, w: (p, t, c[:-1], 4), ValueError, r"cluster must have shape \[B\]"),
    "cluster 2-d": (lambda p, t, c, w: (p, t, c[:, None], 4), ValueError, r"cluster must have shape \[B\]"),
    "id too large": (lambda p, t, c, w: (p, t, c.fill_(1).index_fill_(0, torch.tensor(5), 4), 4), ValueError,
                     "got id 4 with k=4 at row 5"),
    "id negative": (lambda p, t, c, w: (p, t, c - 1, 4), ValueError, "got id -1"),
    "k zero": (lambda p, t, c, w: (p, t, c, 0), ValueError, "k must be at least 1"),
    "k a float": (lambda p, t, c, w: (p, t, c, 4.0), TypeError, "k must be an int"),
    "weight dtype": (lambda p, t, c, w: (p, t, c, 4, w.double()), TypeError, "weight must be float32"),
    "weight shape": (lambda p, t, c, w: (p, t, c, 4, w[:-1]), ValueError, r"weight must have shape \[B\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    make, error, text = BAD[case]
    for op in (ops.cluster_loss, ops.cluster_loss_and_grad):
        if case == "target grad" and op is ops.cluster_loss_and_grad:
            continue  # its results do not require grad, so there is no gradient for target
        with pytest.raises(error, match=text):
            op(*make(*example()))


def test_bad_options() -> None:
    pred, target, cluster, _ = example()
    with pytest.raises(ValueError, match="kind must be"):
        ops.cluster_loss(pred, target, cluster, 4, kind="l2")
    with pytest.raises(ValueError, match="delta must be positive"):
        ops.cluster_loss(pred, target, cluster, 4, kind="huber", delta=0.0)
    with pytest.raises(TypeError, match="per_sample must be"):
        ops.cluster_mean(pred, cluster, 4)


def test_subclasses_and_transforms() -> None:
    pred, target, cluster, _ = example()

    class Subclass(Tensor):
        pass

    with pytest.raises(TypeError, match=r"plain torch\.Tensor"):
        ops.cluster_loss(pred.as_subclass(Subclass), target, cluster, 4)
    with pytest.raises((TypeError, RuntimeError)):
        torch.func.grad(lambda x: ops.cluster_loss(x, target, cluster, 4)[0].sum())(pred)
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = ops.cluster_loss(torch.randn(4, 3), torch.randn(4, 3), torch.zeros(4, dtype=torch.long), 2)
    assert [tuple(x.shape) for x in fake] == [(2,), (2,)]


def test_a_scale_for_bad_ids_is_nan_and_never_an_address() -> None:
    """The backward on CUDA relies on these NaNs, because the forward cannot raise an error on CUDA."""
    from antdiff.ops.cluster_loss import _per_sample_scale

    scale = _per_sample_scale(torch.tensor([2.0, 6.0]), torch.tensor([0, -1, 1, 2, 1]), torch.tensor([1, 2]))
    assert scale.isnan().tolist() == [False, True, False, True, False]
    assert scale[[0, 2, 4]].tolist() == [2.0, 3.0, 3.0]
