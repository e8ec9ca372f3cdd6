"""The Gram matrix without J (``hold="gram"``): the results against the definition, and the memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_cases import (
    LAYERS,
    B,
    DiT,
    K,
    Tied,
    by_hand,
    cluster_ids,
    denoising,
    diffusion_batch,
    peak,
    spread,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from antdiff import BalancedBackward, ClusterGradients, balancing, ops
from antdiff.gradients import GroupingError
from antdiff.gradients.batch import ClusteredBatch
from antdiff.gradients.grouped.deferred import DeferredGradient, GramMode
from antdiff.gradients.sinks import Sink

# Relative to the norm. G and the combined gradient are sums of float64 products over all parameters, in another order
# than in the reference, which gives some hundred rounding errors.
EXACT = 1e-12
WEIGHTS = torch.tensor([0.3, -1.2, 0.7, 5.0, 2.0], dtype=torch.float64)


def agrees(model: nn.Module, loss_fn: Callable[..., Tensor], batch: Any, cluster: Tensor, **options: Any) -> None:
    cg = ClusterGradients(model, K, "grouped", hold="gram", **options)
    J = by_hand(model, loss_fn(*batch), cluster)
    for _ in range(2):
        jacobian = cg(loss_fn, batch, cluster)
        G, want = jacobian.gram(), ops.gram(J)
        assert float((G - want).norm() / want.norm()) < EXACT
        assert all(p.grad is None for p in model.parameters())
        jacobian.combine(WEIGHTS)
        total = [torch.tensordot(WEIGHTS, j, 1) for j in J if j is not None]
        size = torch.stack([x.norm() for x in total]).norm()
        trained = [p for p in model.parameters() if p.requires_grad]
        for p, x in zip(trained, total, strict=True):
            # A parameter that no sample has reached has no gradient, and its rows are zero.
            got = p.grad if p.grad is not None or x.any() else torch.zeros_like(p)
            assert float((got - x).norm() / size) < EXACT
            p.grad = None
    assert all(p.grad is None for p in model.parameters())


def case(make: Callable[[], nn.Module]) -> tuple[nn.Module, Callable[[Tensor], Tensor], tuple[Tensor]]:
    torch.manual_seed(0)
    model = spread(make().double())
    return model, lambda x: model(x).flatten(1).square().mean(1), (torch.randn(B, 6, 8, dtype=torch.float64),)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("make", LAYERS, ids=lambda m: m.__name__)
def test_layers(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss_fn, batch = case(make)
    agrees(model, loss_fn, batch, cluster_ids(shuffled=True))
    monkeypatch.setattr(DeferredGradient, "nbytes", lambda *_: -1)  # no rows are small enough to keep
    agrees(model, loss_fn, batch, cluster_ids(shuffled=True))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_dit_and_checkpoints(reentrant: bool | None) -> None:
    torch.manual_seed(0)
    model, plain = spread(DiT(reentrant=reentrant)).double(), spread(DiT()).double()
    plain.load_state_dict(model.state_dict())
    x, *rest = diffusion_batch()
    batch, cluster = (x.requires_grad_(reentrant is True), *rest), cluster_ids()
    J = by_hand(plain, denoising(plain)(*batch), cluster)
    jacobian = ClusterGradients(model, K, "grouped", hold="gram")(denoising(model), batch, cluster)
    torch.testing.assert_close(jacobian.gram(), ops.gram(J), rtol=1e-11, atol=1e-14)
    jacobian.combine(WEIGHTS)
    for p, j in zip(model.parameters(), J, strict=True):
        torch.testing.assert_close(p.grad, torch.tensordot(WEIGHTS, j, 1), rtol=1e-9, atol=1e-12)
    assert jacobian.losses[3] == 0


def test_a_parameter_inside_a_reentrant_checkpoint_and_outside() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(checkpoint(lambda x: torch.tanh(self.a(x)), x, use_reentrant=True))

    torch.manual_seed(0)
    model, x = Both().double(), torch.randn(B, 32, dtype=torch.float64, requires_grad=True)
    cg = ClusterGradients(model, K, "grouped", hold="gram")
    with pytest.raises(GroupingError, match=r"a\.weight is used inside a checkpoint and again elsewhere"):
        cg(lambda x: model(x).square().mean(1), (x,), cluster_ids())


def test_combine_works_once_and_says_so() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8).double(), torch.randn(B, 8, dtype=torch.float64)
    clustered = ClusteredBatch.of(cluster_ids(), K)
    mode = GramMode(model, clustered, [Sink(name, p, K) for name, p in model.named_parameters()])
    with mode:
        losses = model(x).square().mean(1)
    mode.backward(losses, torch.ones_like(losses))
    with pytest.raises(ValueError, match="weights"):  # nothing has been freed yet
        mode.combine(torch.ones(K + 1, dtype=torch.float64))
    mode.combine(torch.ones(K, dtype=torch.float64))
    (want,) = torch.autograd.grad(model(x).square().mean(1).sum(), [model.weight])
    torch.testing.assert_close(model.weight.grad, want)
    with pytest.raises(RuntimeError, match="works once"):
        mode.combine(torch.ones(K, dtype=torch.float64))


def test_memory_is_that_of_a_plain_step_and_one_parameter() -> None:
    """Six layers of 128 x 128 and 20 samples: J is 6 K times as large as a layer, and activations are negligible."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(6)])
    x, cluster = torch.randn(B, 128), cluster_ids()
    loss_fn = lambda x: model(x).square().mean(1)  # noqa: E731
    layer = 4 * 128 * 128

    def layers(step: Callable[[], Any]) -> float:
        step()
        for p in model.parameters():
            p.grad = None
        return peak(step) / layer

    cg = ClusterGradients(model, K, "grouped", hold="gram", audit=None)

    def deferred() -> None:
        jacobian = cg(loss_fn, (x,), cluster)
        assert jacobian.nbytes == 0
        jacobian.combine(WEIGHTS)

    plain = layers(lambda: loss_fn(x).mean().backward())
    assert 6 < plain < 8
    assert layers(deferred) < plain + K + 0.5
    with pytest.raises(ValueError, match="rows are not held"):
        _ = cg(loss_fn, (x,), cluster).rows
    full = layers(lambda: ClusterGradients(model, K, "grouped", audit=None)(loss_fn, (x,), cluster).rows)
    assert full > 6 * K


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_balanced_backward(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = spread(DiT()).to(torch.float64 if dtype is None else torch.float32)
    batch, cluster = diffusion_batch(dtype=next(model.parameters()).dtype), cluster_ids(shuffled=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if dtype is torch.float16 else None

    def loss_fn(*batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return denoising(model)(*batch)

    grads = {}
    for hold in ("jacobian", "gram"):
        balancer = balancing.NashMTL(nonfinite="poison" if scaler else "raise")
        backward = BalancedBackward(model, balancer, K, route="grouped", scaler=scaler, hold=hold)
        result = backward(loss_fn, batch, cluster)
        grads[hold] = torch.cat([p.grad.flatten() for p in model.parameters()]), result.gram, result.losses
    for a, b, exact in zip(*grads.values(), (1e-9, 1e-11, 1e-12), strict=True):
        # In half precision the gradients of outputs are rounded once more, after they are multiplied by the weights.
        assert float((a - b).norm() / b.norm()) < (exact if dtype is None else 2.0**-7)


def test_what_it_cannot_do_is_said() -> None:
    model, loss_fn, batch = case(Tied)
    with pytest.raises(ValueError, match=r"hold='gram' needs the grouped route .* use hold='jacobian'"):
        ClusterGradients(model, K, "split", hold="gram")(loss_fn, batch, cluster_ids())
    once = ClusterGradients(model, K, "grouped", hold="gram")(loss_fn, batch, cluster_ids())
    once.combine(WEIGHTS)
    with pytest.raises(RuntimeError, match="combine"):
        once.combine(WEIGHTS)
    with pytest.raises(ValueError, match="direction needs the rows"):
        once.write([])
    with pytest.raises(ValueError, match="hold must be"):
        BalancedBackward(model, balancing.PCGrad(), K, hold="nothing")
    with pytest.raises(ValueError, match="micro_batch must be None with hold='gram'"):
        BalancedBackward(model, balancing.PCGrad(), K, hold="gram", micro_batch=4)
    with pytest.raises(ValueError, match="hold must be 'jacobian' to accumulate"):
        ClusterGradients(model, K, "grouped", hold="gram").accumulate().__enter__()
    cg = ClusterGradients(model, K, "grouped", hold="gram")
    empty = cg(loss_fn, (batch[0][:0],), torch.zeros(0, dtype=torch.int64))
    empty.combine(WEIGHTS)
    assert empty.gram().eq(0).all()
    assert all(p.grad.eq(0).all() for p in model.parameters())


class FoldedEarly(nn.Module):
    """A weight whose plain use comes first in the backward. A tensor computed from it follows in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(40, 40) / 6)

    def forward(self, x: Tensor) -> Tensor:
        inside = partial(lambda w, h: torch.tanh(F.linear(h, w * 2.0)), self.w)
        return F.linear(checkpoint(inside, x, use_reentrant=True), self.w)


def test_a_gram_matrix_taken_too_early_is_refused() -> None:
    model, x = FoldedEarly(), torch.randn(3, 40, requires_grad=True)
    with pytest.raises(GroupingError, match="w is used inside a checkpoint and again elsewhere"):
        ClusterGradients(model, 3, "grouped", hold="gram")(lambda x: model(x).square().mean(1), (x,), torch.arange(3))


def test_no_samples_in_a_step_or_micro_batch() -> None:
    model, loss_fn, batch = case(Tied)
    nothing = (batch[0][:0],), torch.zeros(0, dtype=torch.int64)
    pieces = BalancedBackward(model, balancing.PCGrad(), K, route="grouped", micro_batch=4)
    assert pieces(loss_fn, *nothing).losses.eq(0).all()
    assert all(p.grad.eq(0).all() for p in model.parameters())
    backward = BalancedBackward(model, balancing.NashMTL(update_every=2), K, route="grouped")
    backward(loss_fn, batch, cluster_ids())
    assert backward(loss_fn, *nothing).losses.eq(0).all()
