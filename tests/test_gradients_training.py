"""Cluster gradients in training: networks of diffusers, mixed precision, micro-batches, the balanced backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_cases import (
    SIZES,
    B,
    DiT,
    K,
    Tied,
    by_hand,
    cluster_ids,
    denoising,
    diffusion_batch,
    spread,
    transformer,
    unet,
    worst,
)
from torch import Tensor, nn

from antdiff import BalancedBackward, ClusterGradients, balancing, ops
from antdiff.gradients import GroupingError
from antdiff.gradients.grouped import products
from antdiff.gradients.routes import Route

EXACT = 1e-11  # as in test_gradients_grouped


def dit(dtype: torch.dtype = torch.float64, **options: Any) -> DiT:
    torch.manual_seed(0)
    return spread(DiT(**options)).to(dtype)  # type: ignore[return-value]


# ---- networks of diffusers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: unet(16, 32), transformer], ids=["unet", "transformer"])
def test_networks_of_diffusers(make: Callable[[], nn.Module]) -> None:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = spread(make().double()).eval()  # in training mode the transformer drops labels at random
    x, t, y, noise = diffusion_batch()

    def loss_fn(x: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        return (model(x, t, class_labels=y).sample - noise).flatten(1).square().mean(1)

    cluster = cluster_ids(shuffled=True)
    batch = (x, t.long(), y % 10, noise)
    want = by_hand(model, loss_fn(*batch), cluster)
    routes: list[Route] = ["auto", "grouped", "split", "loop"]
    for route in routes:
        cg = ClusterGradients(model, K, route)
        assert worst(cg(loss_fn, batch, cluster).rows, want) < EXACT, route
        if route == "auto":
            assert cg.explain().startswith("route 'grouped'")
    assert cg.verify(loss_fn, batch, cluster) < 1e-10


def test_dropped_labels_draw_what_a_plain_step_draws() -> None:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = spread(transformer().double()).train()
    x, t, y, noise = diffusion_batch()
    batch, cluster = (x, t.long(), y % 10, noise), cluster_ids()
    loss_fn = lambda x, t, y, noise: (model(x, t, class_labels=y).sample - noise).flatten(1).square().mean(1)  # noqa: E731
    torch.manual_seed(1)
    want = by_hand(model, loss_fn(*batch), cluster)
    torch.manual_seed(1)
    assert worst(ClusterGradients(model, K, "grouped")(loss_fn, batch, cluster).rows, want) < EXACT


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["grouped", "split"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_no_worse_than_loop(dtype: torch.dtype, route: Route) -> None:
    """Compare the errors of both against float64.

    Both round the same activations, and only the sums over samples differ. The limit leaves 5 % for chance.
    """
    double = dit()
    want = by_hand(double, denoising(double)(*diffusion_batch()), cluster_ids())
    model, batch = dit(torch.float32), diffusion_batch(dtype=torch.float32)

    def loss_fn(*batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return denoising(model)(*batch)

    def whole(J: list[Tensor | None]) -> float:
        got, ref = (torch.cat([x.double().reshape(K, -1) for x in y if x is not None], 1) for y in (J, want))
        return float(((got - ref).norm(dim=1) / ref.norm(dim=1).clamp(min=1e-300)).max())

    errors = {}
    routes: list[Route] = [route, "loop"]
    for name in routes:
        J = ClusterGradients(model, K, name)(loss_fn, batch, cluster_ids()).rows
        assert {x.dtype for x in J if x is not None} == {torch.float32}
        errors[name] = whole(J)
    assert 1e-4 < errors["loop"] < 0.1  # half precision was used
    assert errors[route] < 1.05 * errors["loop"]


def test_autocast_around_everything() -> None:
    model, batch = dit(torch.float32), diffusion_batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ClusterGradients(model, K, "grouped")(denoising(model), batch, cluster_ids()).rows
        cg = ClusterGradients(model, K)
        cg(denoising(model), batch, cluster_ids())
    assert cg.explain().startswith("route 'grouped'")

    def loss_fn(*batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return denoising(model)(*batch)

    outside = ClusterGradients(model, K, "grouped")(loss_fn, batch, cluster_ids()).rows
    # The casts are the same, but in one of the two the loss is in bfloat16, so its rounding differs: a few 2^-8.
    assert worst(inside, outside) < 0.05


@pytest.mark.parametrize("route", ["grouped", "split", "loop"])
def test_j_in_bfloat16_is_j_rounded(route: Route) -> None:
    model, batch = dit(torch.float32), diffusion_batch(dtype=torch.float32)
    full = ClusterGradients(model, K, route)(denoising(model), batch, cluster_ids()).rows
    half = ClusterGradients(model, K, route, dtype=torch.bfloat16)(denoising(model), batch, cluster_ids()).rows
    for a, b in zip(full, half, strict=True):
        assert a is not None
        assert b is not None
        assert b.dtype == torch.bfloat16
        # Products are computed in float32, and each number is then rounded once, by a relative 2^-8.
        torch.testing.assert_close(b.float(), a, rtol=2.0**-8, atol=1e-6 * float(a.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm_gives_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 16).to(dtype), torch.randn(B, 4, 8).to(dtype)
    loss_fn = lambda x: model(x).flatten(1).square().mean(1)  # noqa: E731
    plain = [J.clone() for J in ClusterGradients(model, K, "grouped")(loss_fn, (x,), cluster_ids()).rows]
    monkeypatch.setattr(products, "GROUPED_MM", {"cpu"})
    fused = ClusterGradients(model, K, "grouped")(loss_fn, (x,), cluster_ids()).rows
    assert worst(fused, plain) < (1e-6 if dtype == torch.float32 else 2.0**-7)  # one rounding to the dtype each


# ---- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["auto", "grouped", "split", "loop"])
def test_micro_batches_add_up_to_the_batch(route: Route) -> None:
    model, batch, cluster = dit(), diffusion_batch(), cluster_ids(shuffled=True)
    loss_fn = denoising(model)
    want = by_hand(model, loss_fn(*batch), cluster)
    cg = ClusterGradients(model, K, route)
    for _ in range(2):
        with cg.accumulate() as total:
            for piece in (slice(0, 3), slice(3, 15), slice(15, 20)):  # some clusters have no samples in a piece
                total.add(loss_fn, [x[piece] for x in batch], cluster[piece])
        assert worst(total.jacobian.rows, want) < EXACT
    assert total.jacobian.counts.tolist() == SIZES
    whole = ClusterGradients(model, K, "loop")(loss_fn, batch, cluster)
    torch.testing.assert_close(total.jacobian.losses, whole.losses)
    with pytest.raises(RuntimeError, match="this accumulation has ended"):
        total.add(loss_fn, batch, cluster)
    with pytest.raises(ValueError, match="at least one micro-batch"), cg.accumulate() as total:
        pass
    with pytest.raises(RuntimeError, match="after the block"):
        _ = total.jacobian


@pytest.mark.parametrize("route", ["grouped", "split", "loop"])
@pytest.mark.parametrize("hold", ["jacobian", "gram"])
def test_a_jacobian_whose_buffers_were_reused_raises(route: Route, hold: Any) -> None:
    if hold == "gram" and route != "grouped":
        return
    model, batch, cluster = dit(), diffusion_batch(), cluster_ids()
    cg = ClusterGradients(model, K, route, hold=hold)
    first = cg(denoising(model), batch, cluster)
    losses = first.losses.clone()
    with pytest.raises(ValueError, match="got id"):
        cg(denoising(model), batch, cluster + K)
    first.combine(torch.ones(K))  # a call that was refused has not reused the buffers
    second = cg(denoising(model), batch, cluster)
    for use in (first.gram, lambda: first.combine(torch.ones(K))):
        with pytest.raises(RuntimeError, match="stale"):
            use()
    assert torch.equal(first.losses, losses)
    second.combine(torch.ones(K))
    if hold == "jacobian":
        with pytest.raises(RuntimeError, match="stale"):
            _ = first.rows
        with pytest.raises(RuntimeError, match="stale"):
            first.write([])

        def interrupted() -> None:
            with cg.accumulate() as total:
                total.add(denoising(model), batch, cluster)
                cg(denoising(model), batch, cluster)
                total.add(denoising(model), batch, cluster)

        with pytest.raises(RuntimeError, match="another call has reused"):
            interrupted()


# ---- the balanced backward -------------------------------------------------------------------------------------------


def expected(model: nn.Module, batch: tuple[Tensor, ...], cluster: Tensor, balancer: Any) -> list[Tensor]:
    J = [x for x in by_hand(model, denoising(model)(*batch), cluster) if x is not None]
    w = balancer.weights(ops.gram(J))
    return [torch.tensordot(w, x, 1) for x in J]


@pytest.mark.parametrize("micro_batch", [None, 6])
@pytest.mark.parametrize("make", [balancing.PCGrad, balancing.NashMTL], ids=lambda m: m.name)
def test_balanced_backward_writes_the_direction(make: Any, micro_batch: int | None) -> None:
    model, batch, cluster = dit(), diffusion_batch(), cluster_ids(shuffled=True)
    next(model.parameters()).grad = torch.full_like(next(model.parameters()), 7)  # overwritten
    backward = BalancedBackward(model, make(), K, micro_batch=micro_batch)
    losses = backward(denoising(model), batch, cluster).losses
    for p, want in zip(model.parameters(), expected(model, batch, cluster, make()), strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-11)
    per_sample = denoising(model)(*batch)
    torch.testing.assert_close(losses[0], per_sample[cluster == 0].mean().detach())
    assert losses[3] == 0


def test_a_method_that_chooses_per_parameter_writes_its_direction() -> None:
    model, batch, cluster = dit(), diffusion_batch(), cluster_ids(shuffled=True)
    result = BalancedBackward(model, balancing.GradDrop(), K)(denoising(model), batch, cluster)
    want = balancing.GradDrop().direction(by_hand(model, denoising(model)(*batch), cluster))
    for p, d in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, d, rtol=1e-9, atol=1e-11)
    assert result.weights is None
    assert result.gram.shape == (K, K)
    jacobian = ClusterGradients(model, K)(denoising(model), batch, cluster)
    with pytest.raises(ValueError, match="direction must have one entry for each of the"):
        jacobian.write([])
    with pytest.raises(ValueError, match="direction must have a tensor"):
        jacobian.write([None for _ in model.parameters()])


@pytest.mark.parametrize("micro_batch", [None, 6])
def test_between_solutions_a_step_is_one_plain_backward(micro_batch: int | None) -> None:
    model, batch, cluster = dit(), diffusion_batch(), cluster_ids(shuffled=True)
    balancer = balancing.PCGrad(update_every=3)
    backward = BalancedBackward(model, balancer, K, micro_batch=micro_batch, route="grouped")
    calls: list[int] = []

    def loss_fn(*batch: Tensor) -> Tensor:
        calls.append(len(batch[0]))
        return denoising(model)(*batch)

    solved = backward(loss_fn, batch, cluster)
    first = [p.grad for p in model.parameters()]
    jacobian = backward.gradients(loss_fn, batch, cluster)
    calls.clear()
    between = backward(loss_fn, batch, cluster)  # the same batch and weights: the same direction
    assert calls == ([B] if micro_batch is None else [6, 6, 6, 2])
    assert torch.equal(between.weights, solved.weights)
    assert jacobian.rows, "no buffer of rows was used"
    for p, grad in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(between.losses, solved.losses)
    assert torch.equal(between.counts, solved.counts)
    assert between.gram is None
    assert backward(loss_fn, batch, cluster).gram is None
    assert backward(loss_fn, batch, cluster).gram is not None  # the fourth call solves again


def test_methods_of_losses_take_one_plain_backward() -> None:
    model, batch, cluster = dit(), diffusion_batch(), cluster_ids(shuffled=True)
    balancer = balancing.UncertaintyWeighting(K)
    result = BalancedBackward(model, balancer, K)(denoising(model), batch, cluster)
    got = [p.grad for p in model.parameters()]
    s_grad = balancer.log_variance.grad
    for p in model.parameters():
        p.grad = None
    balancer.log_variance.grad = None
    want, counts = ops.cluster_mean(denoising(model)(*batch), cluster, K)
    balancer.loss(want, counts).backward()
    torch.testing.assert_close(result.losses, want.detach())
    assert torch.equal(result.counts, counts)
    assert torch.equal(result.weights, balancer.weights(want))
    torch.testing.assert_close(s_grad, balancer.log_variance.grad)
    for p, grad in zip(model.parameters(), got, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="micro_batch must be None"):
        BalancedBackward(model, balancer, K, micro_batch=4)
    with pytest.raises(TypeError, match="balancer must be a method"):
        BalancedBackward(nn.Linear(2, 2), balancing.PCGrad, K)  # the class
    with pytest.raises(ValueError, match="chooses per parameter, which needs the rows"):
        BalancedBackward(nn.Linear(2, 2), balancing.GradDrop(), K, hold="gram")
    with pytest.raises(TypeError, match="balancer must be a method"):
        BalancedBackward(model, "pcgrad", K)


@pytest.mark.parametrize("update_every", [1, 2])
@pytest.mark.parametrize("route", ["auto", "split"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_ordinary_grad_scaler(dtype: torch.dtype, route: Route, update_every: int) -> None:
    """The scaled run takes the same steps as the unscaled one if nothing overflows, and skips a step that overflows."""
    batch, cluster = diffusion_batch(dtype=torch.float32), cluster_ids()

    def train(scaler: torch.amp.GradScaler | None, spoil: int | None) -> tuple[list[Tensor], list[Tensor]]:
        model = dit(torch.float32)
        balancer = balancing.NashMTL(update_every=update_every, nonfinite="poison" if scaler else "raise")
        backward = BalancedBackward(model, balancer, K, route=route, scaler=scaler)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        history, seen = [], []
        for step in range(4):

            def loss_fn(*batch: Tensor, step: int = step) -> Tensor:
                with torch.autocast("cpu", dtype):
                    losses = denoising(model)(*batch)
                return losses * torch.inf if step == spoil else losses

            seen.append(backward(loss_fn, batch, cluster).losses)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            history.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())
        return history, seen

    # A power of two changes only exponents, so bfloat16 takes exactly the same steps. float16 has subnormal numbers.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    plain, plain_losses = train(None, None)
    scaled, losses = train(scaler, None)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(losses, plain_losses, rtol=1e-2, atol=1e-3)  # not multiplied by the scale
    assert scaler.get_scale() == 2.0**10
    skipped, _ = train(scaler, 2)
    assert torch.equal(skipped[2], skipped[1])
    assert not torch.equal(skipped[3], skipped[2])
    assert skipped[3].isfinite().all()
    assert scaler.get_scale() == 2.0**9
    with pytest.raises(ValueError, match="nonfinite='poison'"):
        BalancedBackward(dit(), balancing.PCGrad(), K, scaler=scaler)


def test_copies_of_a_model_are_independent() -> None:
    """Nothing is attached to the model, so a deepcopy (for a weight average, for example) needs no clean-up."""
    torch.manual_seed(0)
    model = Tied()
    cg = ClusterGradients(model, K, "grouped")
    x = torch.randn(B, 6, 8)
    cg(lambda x: model(x).flatten(1).square().mean(1), (x,), cluster_ids())
    copied = copy.deepcopy(model)
    copied(x).sum().backward()
    assert all(p.grad is not None for p in copied.parameters())
    assert set(vars(model)) == set(vars(Tied()))


def test_a_parameter_of_another_model_keeps_its_plain_gradient() -> None:
    torch.manual_seed(0)
    model, other = Tied().double(), nn.Linear(8, 1).double()
    x = torch.randn(B, 6, 8, dtype=torch.float64)
    loss_fn = lambda x: model(x).flatten(1).square().mean(1) * other(x[:, 0])[:, 0].exp()  # noqa: E731
    routes: list[Route] = ["grouped", "split", "loop"]
    for route in routes:
        cg = ClusterGradients(model, K, route)
        other.weight.grad = None
        assert worst(cg(loss_fn, (x,), cluster_ids()).rows, by_hand(model, loss_fn(x), cluster_ids())) < EXACT
        per_sample, counts = loss_fn(x), torch.tensor(SIZES).clamp(min=1)[cluster_ids()]
        (want,) = torch.autograd.grad((per_sample / counts).sum(), other.weight)
        torch.testing.assert_close(other.weight.grad, want)


def test_errors_are_of_one_kind() -> None:
    assert issubclass(GroupingError, RuntimeError)


def test_an_error_in_a_micro_batch_leaves_nothing_behind() -> None:
    net = torch.nn.Linear(3, 2)
    x, cluster = torch.randn(8, 3), torch.tensor([0, 1] * 4)
    step = BalancedBackward(net, balancing.get("pcgrad")(), 2, micro_batch=4)
    calls = 0

    def fails_late(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return net(x).square().mean(1)

    loss_fn = lambda x: net(x).square().mean(1)  # noqa: E731
    step.gradients(loss_fn, (x,), cluster)  # settles the route
    with pytest.raises(MemoryError):
        step(fails_late, (x,), cluster)
    assert step(loss_fn, (x,), cluster).counts.tolist() == [4, 4]


def test_grads_replaces_what_combine_cannot_write() -> None:
    net = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    net(torch.randn(2, 2, 5, 5).to(memory_format=torch.channels_last)).sum().backward()
    net.weight.grad = net.weight.grad.to(memory_format=torch.channels_last)
    loss_fn = lambda x: net(x).square().mean((1, 2, 3))  # noqa: E731
    ClusterGradients(net, 2)(loss_fn, (torch.randn(2, 2, 5, 5),), torch.arange(2)).combine(torch.ones(2))
    assert all(p.grad.is_contiguous() for p in net.parameters())
