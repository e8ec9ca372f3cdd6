"""The registry of balancing methods: their declarations, the contract of methods that need G, and their state."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from grams import KINDS, gram, rows, worst_condition
from tolerances import ADAM_AT_REST, CLARABEL, LOG_SHARES, minimiser, nash, power
from torch import Tensor

from antdiff import BalancedBackward, ClusterGradients, balancing, ops
from antdiff.balancing import Balancer, DirectionBalancer, Linear, NashMTL, PCGrad, UncertaintyWeighting

GRAM_METHODS = [name for name in balancing.names() if balancing.get(name).needs == "gram"]
LOSS_METHODS = [name for name in balancing.names() if balancing.get(name).needs == "losses"]
PUBLISHED_AS_SUMS = ("pcgrad", "config", "gradvac", "uw", "linear", "dwa", "imtl_l")  # divided by K here, like graddrop
CONFLICT = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64)


def make(name: str, k: int = 5, **options: Any) -> Any:
    method = balancing.get(name)
    return method(k, **options) if method.needs == "losses" else method(**options)


def grams(n: int, k: int = 5) -> list[Tensor]:
    return [gram(rows("conflicting", k, seed=seed)) for seed in range(n)]


# ---- the registry ----------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert {"pcgrad", "nash", "uw", "linear"} <= set(balancing.names())
    assert balancing.get("pcgrad") is PCGrad
    assert balancing.get("nash") is NashMTL
    assert balancing.get("uw") is UncertaintyWeighting
    assert balancing.get("linear") is Linear
    with pytest.raises(ValueError, match=r"name must be one of pcgrad, nash.*got 'ucw'"):
        balancing.get("ucw")
    for name in balancing.__all__:  # every exported name exists, and every method is exported
        getattr(balancing, name)
    assert {balancing.get(name).__name__ for name in balancing.names()} < set(balancing.__all__)
    assert all(balancing.get(name).name == name for name in balancing.names())
    with pytest.raises(AttributeError, match="has no attribute 'UCW'"):
        balancing.UCW  # noqa: B018


@pytest.mark.parametrize("name", balancing.names())
def test_every_method_declares_itself(name: str) -> None:
    method = make(name)
    assert type(method).name == name
    assert method.needs in ("gram", "losses", "rows")
    assert isinstance(method, Balancer) == (method.needs != "rows")
    assert isinstance(method, DirectionBalancer) == (method.needs == "rows")
    about = method.about
    assert all((about.title, about.paper, about.solves, about.when))
    make(name, **balancing.published(name))
    assert not hasattr(method, "scale")
    assert type(method).__doc__
    method.load_state_dict(copy.deepcopy(method.state_dict()))
    method.reset()


@pytest.mark.parametrize("name", [*PUBLISHED_AS_SUMS, "graddrop"])
def test_sum_type_methods_keep_the_meaning_of_a_learning_rate(name: str) -> None:
    """Without conflict, the weights of a sum-type method are 1/K, those of the mean; a new UW has half of that."""
    method = make(name, k=4)
    if name == "graddrop":
        J = torch.arange(1.0, 13).view(4, 3)
        torch.testing.assert_close(method.direction(J), J.mean(0))
        return
    x = torch.eye(4, dtype=torch.float64) if method.needs == "gram" else torch.ones(4)
    want = torch.full_like(x[0] if x.dim() == 2 else x, 0.125 if name == "uw" else 0.25)
    assert torch.equal(method.weights(x), want)


# ---- methods that need the Gram matrix -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAM_METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_any_gram_gives_finite_weights_and_any_scale_the_same_direction(name: str, kind: str, k: int) -> None:
    J = rows(kind, k)
    weights = make(name).weights(gram(J))
    assert weights.shape == (k,)
    assert weights.dtype == torch.float64
    assert weights.isfinite().all()
    for exponent in (-66, 66):  # 1e-20 and 1e20
        scaled = make(name).weights(gram(J) * 4.0**exponent)
        if name == "fairgrad":  # the weights have degree -4/3 in J
            rtol = power(abs(exponent) * 4 / 3 * math.log(2))
            torch.testing.assert_close(scaled * 2.0 ** (exponent * 4 / 3), weights, rtol=rtol, atol=0)
        else:  # degree 0, or -1 for NashMTL: no bit changes
            assert torch.equal(scaled * (2.0**exponent if name == "nash" else 1), weights)


@pytest.mark.parametrize("name", GRAM_METHODS)
@pytest.mark.parametrize("k", [2, 5, 8])
def test_what_a_method_declares_holds(name: str, k: int) -> None:
    """conflict_free: no loss rises to first order. invariant: rescaling single losses does not change the direction."""
    about = balancing.get(name).about
    for seed in range(5):
        J = rows("conflicting", k, 20, seed)
        weights = make(name).weights(gram(J))
        d, terms = weights @ J, (weights.abs() * J.norm(dim=1)).max()
        if about.conflict_free:
            assert (J @ d >= -minimiser(k, worst_condition(J)) * J.norm(dim=1) * terms).all()
        scaled = J * (10.0 ** torch.linspace(-2, 2, k, dtype=torch.float64))[:, None]
        other = make(name).weights(gram(scaled)) @ scaled
        if about.invariant:
            off = (d / d.norm() - other / other.norm()).norm()
            assert off <= nash(worst_condition(J)) * terms / d.norm()


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_rows_in_another_order_give_the_same_direction(name: str) -> None:
    """Methods that draw orders are tested with their ops, which can be given permuted orders.

    test_gram_weights.py tests all kinds of rows up to rounding.
    """
    if hasattr(balancing.get(name), "generator"):
        return
    for kind in ("random", "conflicting", "zeros", "duplicates"):
        J = rows(kind, 5)
        p = torch.tensor([3, 0, 4, 2, 1])
        weights, permuted = make(name).weights(gram(J)), make(name).weights(gram(J[p]))
        terms = (weights.abs() * J.norm(dim=1)).max()
        assert (weights @ J - permuted @ J[p]).norm() <= nash(worst_condition(J)) * terms


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_one_gradient_is_its_own_direction(name: str) -> None:
    for scale in (1e-20, 1.0, 1e20):
        assert make(name).weights(torch.tensor([[scale]], dtype=torch.float64)) > 0


def test_graddrop() -> None:
    """Each parameter gets the sum of its positive or of its negative gradients, divided by K.

    The probability of either is proportional to the sum.
    """
    method = balancing.GradDrop(seed=3)
    J = torch.tensor([[3.0, 1.0, -2.0, 0.0], [-1.0, 2.0, -1.0, 0.0]])
    draws = 2 * torch.stack([method.direction(J) for _ in range(4000)])  # [4000, 4], the published sums
    assert set(draws[:, 0].tolist()) == {3.0, -1.0}
    assert abs((draws[:, 0] == 3).double().mean() - 0.75) < 5 * (0.75 * 0.25 / 4000) ** 0.5
    assert (draws[:, 1:] == torch.tensor([3.0, -3.0, 0.0])).all()
    assert torch.equal(2 * balancing.GradDrop(seed=3).direction(J), draws[0])
    assert torch.equal(method.direction(J[:1]), J[0])
    listed = method.direction([J, None, J.bfloat16().view(2, 2, 2)])
    assert listed[1] is None
    assert (listed[2].shape, listed[2].dtype) == ((2, 2), torch.float32)
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoilt = J.clone()
        spoilt[0, 1] = bad
        assert method.direction(spoilt).isfinite().tolist() == [True, False, True, True]
    resumed = balancing.GradDrop(seed=9)
    resumed.load_state_dict(copy.deepcopy(method.state_dict()))
    assert torch.equal(resumed.direction(J), method.direction(J))
    assert not hasattr(method, "weights")
    with pytest.raises(TypeError, match="rows must be a floating-point tensor"):
        method.direction([J.long()])


def test_gradvac() -> None:
    steps = grams(4)
    method = balancing.GradVac(beta=0.5)
    assert torch.equal(method.weights(steps[0]), PCGrad().weights(steps[0]))  # no targets yet
    assert method.targets is not None
    before = method.targets.clone()
    poisoned = balancing.GradVac(nonfinite="poison")
    poisoned.load_state_dict(copy.deepcopy(method.state_dict()))
    assert poisoned.weights(steps[1] * float("nan")).isnan().all()
    assert torch.equal(poisoned.targets, before)
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]"):
        balancing.GradVac(beta=2.0)


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_batches_and_bad_grams(name: str) -> None:
    G = torch.stack(grams(3))
    assert make(name).weights(G).shape == (3, 5)
    assert make(name).weights(torch.tensor([[4.0]], dtype=torch.float64)).shape == (1,)
    G[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"got nan at \[1, 2, 3\]"):
        make(name).weights(G)
    poisoned = make(name, nonfinite="poison").weights(G)
    assert poisoned.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("name", GRAM_METHODS)
@pytest.mark.parametrize("update_every", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one(name: str, update_every: int) -> None:
    steps = grams(9)
    method = make(name, update_every=update_every)
    want = [method.weights(G) for G in steps]
    for stop in range(len(steps)):
        first = make(name, update_every=update_every)
        for G in steps[:stop]:
            first.weights(G)
        second = make(name, update_every=update_every)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        second.load_state_dict(copy.deepcopy(second.state_dict()))  # save again before the first call
        for G, weights in zip(steps[stop:], want[stop:], strict=True):
            assert torch.equal(second.weights(G), weights)
    method.reset()
    assert torch.equal(method.weights(steps[0]), want[0])


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_update_every(name: str) -> None:
    steps = grams(7)
    method = make(name, update_every=3)
    seen = []
    for i, G in enumerate(steps):
        assert method.due == (i % 3 == 0)
        seen.append(method.weights(G if method.due else None))
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[3], seen[5])
    assert not torch.equal(seen[2], seen[3])
    every = make(name)
    every.weights(steps[0])
    assert every.due
    with pytest.raises(ValueError, match="gram must be given"):
        every.weights()
    with pytest.raises(ValueError, match="update_every must be at least 1"):
        make(name, update_every=0)


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_a_poisoned_step_does_not_spoil_the_next_ones(name: str) -> None:
    first, second = grams(2)
    method = make(name, update_every=2, nonfinite="poison")
    good = method.weights(first)
    method.weights()
    assert method.weights(second * float("nan")).isnan().all()  # a scaler skips this step
    assert torch.equal(method.weights(), good)
    fresh = make(name, update_every=2, nonfinite="poison")
    assert fresh.weights(second * float("nan")).isnan().all()


def test_pcgrad() -> None:
    G = grams(1)[0]
    ours = PCGrad(seed=7)
    generator = torch.Generator().manual_seed(7)
    state = torch.random.get_rng_state()
    for _ in range(3):
        assert torch.equal(ours.weights(G), ops.pcgrad_weights(G, generator=generator))
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is not used
    assert not torch.equal(PCGrad(seed=8).weights(G), PCGrad(seed=7).weights(G))
    assert torch.equal(PCGrad().weights(G), PCGrad().weights(G))  # two ranks draw the same orders
    shared = torch.Generator().manual_seed(7)
    given = PCGrad(generator=shared)
    assert given.generator is shared
    assert torch.equal(given.weights(G), PCGrad(seed=7).weights(G))
    given.reset()
    assert given.generator is shared
    torch.testing.assert_close(
        2 * PCGrad().weights(CONFLICT @ CONFLICT.T) @ CONFLICT,  # the published sum of two
        torch.tensor([0.5848, 3.8012, 3.8012], dtype=torch.float64),
        rtol=0,
        atol=5e-5,
    )


def test_nash() -> None:
    G = CONFLICT @ CONFLICT.T
    clipped = NashMTL(max_norm=1.0).weights(G) @ CONFLICT
    torch.testing.assert_close(clipped, torch.tensor([0.0542, 0.7061, 0.7061], dtype=torch.float64), rtol=0, atol=5e-5)
    torch.testing.assert_close(clipped.norm(), torch.tensor(1.0, dtype=torch.float64))
    assert torch.equal(NashMTL(max_norm=10.0).weights(G), ops.nash_weights(G))
    batch = torch.stack([G, G * 1e-40, G * 1e200, torch.zeros_like(G)])
    norms = (NashMTL(max_norm=0.5).weights(batch[:3]) * batch.diagonal(dim1=-2, dim2=-1)[:3].sqrt())[:, 0]
    torch.testing.assert_close(norms, norms[:1].expand(3))
    assert NashMTL(max_norm=1.0).weights(batch[3]).tolist() == [0, 0]
    # These rows are stationary, and the direction is never stretched to max_norm.
    opposed = torch.tensor([[1.0, -1], [-1, 1]], dtype=torch.float64)
    assert torch.equal(NashMTL(max_norm=1.0).weights(opposed), ops.nash_weights(opposed))
    with pytest.raises(ValueError, match="max_norm must be positive"):
        NashMTL(max_norm=0.0)


def test_published_nash_is_the_step_of_ant() -> None:
    """ANT back-propagates sum(alpha_i loss_i) / K with alpha of every 25th step, and clips to norm 1 in every step.

    At a solution the length is 1 / sqrt(K), so the clip does nothing there.
    """
    k, published = 5, balancing.get("nash")(**balancing.published("nash"))
    assert published.update_every == 25
    alpha, lengths = torch.zeros(k, dtype=torch.float64), []
    for step in range(27):
        J = torch.randn(k, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) * (1 + step)
        if step % 25 == 0:
            alpha = ops.reference.nash_weights(J @ J.T)
            torch.testing.assert_close((J @ J.T) @ alpha, 1 / alpha, rtol=nash(100), atol=0)
        g = alpha @ J / k
        want = g / max(1.0, float(g.norm()))
        torch.testing.assert_close(published.weights(gram(J)) @ J, want, rtol=1e-9, atol=1e-12)
        lengths.append(float(want.norm()))
    assert lengths[0] == pytest.approx(5**-0.5)
    assert lengths[25] == pytest.approx(5**-0.5)
    assert lengths[24] == pytest.approx(1)


@pytest.mark.parametrize("options", [{}, {"reduction": "mean"}])
@pytest.mark.parametrize("max_norm", [None, 0.3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_steps_between_two_solutions_respect_max_norm(
    dtype: torch.dtype, max_norm: float | None, options: dict[str, Any]
) -> None:
    """A backward without a Jacobian gives p.grad the length that the Gram matrix of the step would have given it."""
    k, n = 3, 12
    g = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 2)
    model.to(dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6) if dtype == torch.float16 else None
    nash_mtl, twin = (NashMTL(max_norm=max_norm, update_every=3, nonfinite="poison", **options) for _ in range(2))
    backward, gradients = BalancedBackward(model, nash_mtl, k=k, scaler=scaler), ClusterGradients(model, k=k)
    seen: list[Tensor] = []
    first = next(model.parameters())
    first.register_hook(lambda grad: seen.append(grad.clone()))

    def loss_fn(x: Tensor) -> Tensor:
        return (model(x)[:, 0] - x.sum(1)).square()

    for step in range(5):
        x = (torch.randn(n, 4, generator=g) * (1 + step) / 4).to(dtype)
        cluster = torch.arange(n) % k
        jacobian = gradients(loss_fn, (x,), cluster)
        weights = twin.weights(jacobian.gram())
        want = [torch.einsum("k, k... -> ...", weights, row.double()) for row in jacobian.rows if row is not None]
        seen.clear()
        result = backward(loss_fn, (x,), cluster)
        assert result.weights is not None
        # float32 norms; float16 gradients of the loss scale 64, summed over the samples in another order
        tolerance = 1e-6 if scaler is None else 0.02
        torch.testing.assert_close(result.weights, weights, rtol=tolerance, atol=0)
        length = torch.cat([y.flatten() for y in want]).norm()
        for p, grad in zip(model.parameters(), want, strict=True):
            assert p.grad is not None
            assert (
                p.grad.double() / (1.0 if scaler is None else scaler.get_scale()) - grad
            ).norm() <= tolerance * length
        if max_norm is not None:
            assert length <= max_norm * (1 + tolerance)
        assert len(seen) == 1  # a hook sees the limited gradient
        assert first.grad is not None
        assert torch.equal(seen[0], first.grad)


def test_nash_with_cvxpy() -> None:
    pytest.importorskip("cvxpy")
    G = CONFLICT @ CONFLICT.T
    torch.testing.assert_close(NashMTL(solver="cvxpy").weights(G), ops.nash_weights(G), rtol=CLARABEL, atol=0)


# ---- methods that need the losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSS_METHODS)
def test_loss_is_what_the_weights_say(name: str) -> None:
    """The gradient of loss(losses) with respect to the losses is weights(losses)."""
    method = make(name, k=3)
    if isinstance(method, torch.nn.Module):
        with torch.no_grad():
            for p in method.parameters():
                p.copy_(torch.tensor([0.3, -1.0, 2.0]))
    losses = torch.tensor([0.5, 2.0, 0.1], requires_grad=True)
    method.loss(losses).backward()
    weights = method.weights(losses)
    assert not weights.requires_grad
    assert weights.dtype == losses.dtype
    torch.testing.assert_close(losses.grad, weights)
    assert method.weights(losses.double()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"losses must have shape \[K\] with K=3; got \[2\]"):
        method.weights(losses[:2])


def test_uncertainty_weighting() -> None:
    uw = UncertaintyWeighting(3)
    losses = torch.tensor([0.6, 3.0, 0.0])
    torch.testing.assert_close(uw.loss(losses), losses.sum() / 6)  # s = 0
    (group,) = uw.param_groups()
    assert group["params"] == [uw.log_variance]
    assert (group["lr"], group["weight_decay"]) == (0.025, 0.0)

    counts = torch.tensor([4, 4, 0])
    uw.loss(losses, counts).backward()  # d/ds = 1/2 (1 - exp(-s) l / K), and 0 for the empty cluster
    torch.testing.assert_close(uw.log_variance.grad, torch.tensor([0.5 * (1 - 0.2), 0.5 * (1 - 1.0), 0.0]))
    assert uw(losses, counts) == uw.loss(losses, counts) == uw.loss(losses)

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-4, weight_decay=0.1)
    optimizer.add_param_group(group)
    for _ in range(600):
        optimizer.zero_grad()
        uw.loss(losses, counts).backward()
        optimizer.step()
    torch.testing.assert_close(uw.log_variance.detach()[:2], (losses[:2] / 3).log(), rtol=0, atol=ADAM_AT_REST)
    assert uw.log_variance[2] == 0
    torch.testing.assert_close(uw.weights(losses)[:2], 0.5 / losses[:2], rtol=2 * ADAM_AT_REST, atol=0)

    other = UncertaintyWeighting(3)
    other.load_state_dict(uw.state_dict())
    assert torch.equal(other.weights(losses), uw.weights(losses))
    parameter = other.log_variance
    other.reset()
    assert other.log_variance is parameter
    assert not parameter.any()
    with pytest.raises(ValueError, match="k must be at least 1"):
        UncertaintyWeighting(0)


PLAIN = [name for name in LOSS_METHODS if isinstance(balancing.get(name)(2), balancing.LossBalancer)]


@pytest.mark.parametrize("name", PLAIN)
def test_empty_clusters_and_resumed_runs(name: str) -> None:
    options = {"dwa": {"epoch": 2}, "stch": {"warmup": 1, "epoch": 2}}.get(name, {})
    steps = 0.1 + torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    steps[2, 1] = 0  # an empty cluster
    method = make(name, 3, **options)
    want = [method.loss(x, (x > 0).long()) for x in steps]
    assert torch.stack(want).isfinite().all()
    assert method.weights(steps[2]).isfinite().all()
    for stop in (0, 3, 5, 8):
        first, second = make(name, 3, **options), make(name, 3, **options)
        for x in steps[:stop]:
            first.loss(x)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for x, value in zip(steps[stop:], want[stop:], strict=True):
            assert torch.equal(second.loss(x), value)
    method.reset()
    assert torch.equal(method.loss(steps[0]), want[0])
    with pytest.raises(ValueError, match="k must be at least 1"):
        make(name, 0)


@pytest.mark.parametrize("name", PLAIN)
def test_rescaled_losses_give_the_same_step(name: str) -> None:
    """Factors 1e-20 and 1e20 on all losses keep the ratios of weights_i losses_i.

    Factors on single losses keep them too if the method declares itself invariant.
    """
    method = balancing.get(name)
    factors = [torch.full((3,), 1e-20), torch.full((3,), 1e20)]
    if method.about.invariant:
        factors.append(torch.tensor([1e-3, 1.0, 1e3]))
    steps = (0.1 + torch.rand(6, 3, generator=torch.Generator().manual_seed(1))).double()
    options = {"dwa": {"epoch": 2}, "stch": {"warmup": 1, "epoch": 2}}.get(name, {})
    for factor in factors:
        shares = []
        for scale in (torch.ones(3), factor):
            balancer = make(name, 3, **options)
            for x in steps:
                balancer.loss(x * scale)
            share = balancer.weights(steps[-1] * scale) * steps[-1] * scale
            shares.append(share / share.sum())
        torch.testing.assert_close(shares[1], shares[0], rtol=LOG_SHARES, atol=0)


def test_random_loss_weighting() -> None:
    method = balancing.RandomLossWeighting(4, seed=1)
    losses = torch.ones(4)
    first = method.weights(losses)
    assert torch.equal(method.weights(losses), first)  # without observe, weights are drawn only once
    torch.testing.assert_close(first.sum(), torch.tensor(1.0))
    method.loss(losses)
    assert not torch.equal(method.weights(losses), first)
    generator = torch.Generator().manual_seed(1)
    torch.testing.assert_close(first, torch.randn(4, generator=generator).softmax(0))


def test_dynamic_weight_average() -> None:
    """Liu et al., eq. 5, divided by K: softmax(r / T), r the ratio of the mean losses of the last two epochs."""
    method = balancing.DynamicWeightAverage(2, temperature=2.0, epoch=2)
    for losses in ([4.0, 2.0], [2.0, 2.0], [1.0, 2.0]):
        method.loss(torch.tensor(losses))
        assert method.weights(torch.ones(2)).tolist() == [0.5, 0.5]
    method.loss(torch.tensor([2.0, 4.0]))  # means 3, 2 and then 1.5, 3
    want = (torch.tensor([0.5, 1.5]) / 2).softmax(0)
    torch.testing.assert_close(method.weights(torch.ones(2)), want)


EPOCHS = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 4.0], [1.0, 2.0], [1.0, 1.0], [2.0, 1.0], [1.0, 1.0]])


def test_every_step_of_an_epoch_has_the_weights_of_its_epoch() -> None:
    """LibMTL and Liu et al.: DWA takes the means of the two epochs before, so the first two epochs weigh alike.

    Lin et al.'s code: STCH minimises the mean log loss up to the last step of the epoch that is averaged.
    """
    dwa = balancing.DynamicWeightAverage(2, epoch=2)
    stch = balancing.SmoothTchebycheff(2, warmup=1, epoch=2)
    early = EPOCHS[2:4].mean(0)
    for step, row in enumerate(EPOCHS):
        x, y = row.clone().requires_grad_(), row.clone().requires_grad_()
        (a,) = torch.autograd.grad(dwa.loss(x), x)
        (b,) = torch.autograd.grad(stch.loss(y), y)
        epoch = step // 2
        want = torch.full((2,), 0.5)
        if epoch >= 2:
            want = (
                EPOCHS[2 * epoch - 2 : 2 * epoch].mean(0) / EPOCHS[2 * epoch - 4 : 2 * epoch - 2].mean(0) / 2
            ).softmax(0)
        torch.testing.assert_close(a, want)
        torch.testing.assert_close(b * row, torch.full((2,), 0.5) if epoch < 2 else (row / early) / (row / early).sum())


@pytest.mark.parametrize("name", LOSS_METHODS)
def test_a_backward_reports_the_weights_that_it_has_used(name: str) -> None:
    """The weights of an epoch's last step are those of the epoch, though the method has new ones afterwards."""
    options = {"dwa": {"epoch": 1}, "stch": {"warmup": 0, "epoch": 1}}.get(name, {})
    losses = torch.tensor([[0.5, 2.0], [1.0, 3.0], [0.2, 3.0], [0.5, 0.1]])
    model = torch.nn.Linear(2, 1, bias=False)  # its gradient is the weighted losses
    torch.nn.init.ones_(model.weight)
    backward = BalancedBackward(model, make(name, 2, **options), k=2)
    for row in losses:
        result = backward(lambda x: model(x)[:, 0], (torch.diag(row),), torch.arange(2))
        assert result.weights is not None
        assert model.weight.grad is not None
        torch.testing.assert_close(model.weight.grad[0], result.weights * row)


def test_geometric_loss() -> None:
    losses = torch.tensor([0.5, 2.0, 27.0], requires_grad=True)
    value = balancing.GeometricLoss(3).loss(losses)
    torch.testing.assert_close(value, torch.tensor(3.0))
    value.backward()
    torch.testing.assert_close(losses.grad, 1 / losses.detach())
    assert balancing.GeometricLoss(3).loss(torch.tensor([4.0, 9.0, 0.0])) == 6


def test_imtl_l() -> None:
    method = balancing.IMTLL(3)
    losses = torch.tensor([0.6, 3.0, 0.0])
    torch.testing.assert_close(method.loss(losses), losses.mean())
    optimizer = torch.optim.Adam(method.param_groups())
    for _ in range(600):
        optimizer.zero_grad()
        method(losses, torch.tensor([1, 1, 0])).backward()
        optimizer.step()
    torch.testing.assert_close((method.weights(losses) * losses)[:2], torch.ones(2), rtol=2 * ADAM_AT_REST, atol=0)
    method.reset()
    assert not method.log_variance.any()
    with pytest.raises(ValueError, match="k must be at least 1"):
        balancing.IMTLL(0)


def test_famo_is_the_published_update() -> None:
    """Compare with Liu et al., algorithm 1, computed by autograd and torch's Adam."""
    method = balancing.FAMO(3, lr=0.025, weight_decay=0.01)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.025, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        before = torch.rand(3, generator=generator, dtype=torch.float64) + 0.1
        after = before * (0.8 + 0.3 * torch.rand(3, generator=generator, dtype=torch.float64))
        leaf = before.clone().requires_grad_()
        method.loss(leaf).backward()
        z = logits.detach().softmax(0)
        torch.testing.assert_close(leaf.grad, (z / before) / (z / before).sum(), rtol=LOG_SHARES, atol=0)
        method.update(after)
        optimizer.zero_grad()
        (logits.softmax(0) * (before.log() - after.log())).sum().backward()
        optimizer.step()
    with pytest.raises(RuntimeError, match="before the step"):
        method.update(after)
    for losses in (before, after, before):
        method.loss(losses)  # without update, the losses of the next step are used
    assert not torch.equal(method.weights(torch.ones(3)), torch.full((3,), 1 / 3))


def test_smooth_tchebycheff() -> None:
    method = balancing.SmoothTchebycheff(2, mu=0.5, warmup=1, epoch=2)
    for losses in ([9.0, 9.0], [7.0, 7.0], [1.0, 4.0], [3.0, 8.0]):  # means of the second epoch: 2, 6
        torch.testing.assert_close(method.weights(torch.tensor(losses)), 0.5 / torch.tensor(losses))
        method.loss(torch.tensor(losses))
    losses = torch.tensor([1.0, 6.0], dtype=torch.float64, requires_grad=True)
    smooth_maximum = 0.5 * torch.logsumexp((losses / torch.tensor([2.0, 6.0])).log() / 0.5, 0)
    (want,) = torch.autograd.grad(smooth_maximum, losses)
    torch.testing.assert_close(method.weights(losses), want)
    method.loss(losses)
    torch.testing.assert_close(method.weights(losses), want)  # the mean does not change any more


def test_linear() -> None:
    losses = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    assert torch.equal(Linear().weights(losses), torch.full((3,), 1 / 3))
    assert Linear().loss(losses) == losses.mean()
    with pytest.raises(ValueError, match=r"losses must have shape \[K\]; got \[1, 3\]"):
        Linear().weights(losses[None])


@pytest.mark.parametrize("hold", ["jacobian", "gram"])
@pytest.mark.parametrize("name", ["aligned_mtl", "imtl_g", "config"])
def test_gradients_of_float32_that_depend_on_each_other_have_their_length(
    name: str, hold: Literal["jacobian", "gram"]
) -> None:
    """Four clusters, three parameters: the Gram matrix has an eigenvalue of zero up to the rounding of float32."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 3, generator=g, dtype=torch.float64), torch.randn(16, generator=g, dtype=torch.float64)
    cluster = torch.arange(16) % 4
    grads = {}
    for dtype in (torch.float64, torch.float32):
        model = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        model.to(dtype)

        def loss_fn(x: Tensor, y: Tensor, model: torch.nn.Module = model) -> Tensor:
            return (model(x)[:, 0] - y).square()

        backward = BalancedBackward(model, balancing.get(name)(), k=4, hold=hold)
        backward(loss_fn, (x.to(dtype), y.to(dtype)), cluster)
        assert model.weight.grad is not None
        grads[dtype] = model.weight.grad.double()
    torch.testing.assert_close(grads[torch.float32], grads[torch.float64], rtol=1e-3, atol=0)


def test_the_table_of_the_documentation_is_up_to_date() -> None:
    script = Path(__file__).resolve().parent.parent / "docs" / "balancing_table.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
