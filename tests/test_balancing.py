"""The registry of balancing methods: what each declares, the contract of those that need G, and the state of each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from grams import KINDS, gram, rows
from torch import Tensor

from antdiff import balancing, ops
from antdiff.balancing import Balancer, Linear, NashMTL, PCGrad, UncertaintyWeighting

GRAM_METHODS = [name for name in balancing.names() if balancing.get(name).needs == "gram"]
LOSS_METHODS = [name for name in balancing.names() if balancing.get(name).needs == "losses"]
CONFLICT = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64)


def make(name: str, k: int = 5, **options: Any) -> Any:
    method = balancing.get(name)
    return method(**options) if method.needs == "gram" else method(k, **options)


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


@pytest.mark.parametrize("name", balancing.names())
def test_every_method_declares_itself(name: str) -> None:
    method = make(name)
    assert isinstance(method, Balancer)
    assert type(method).name == name
    assert method.needs in ("gram", "losses")
    assert method.scale in ("sum", "mean")
    assert type(method).__doc__
    method.load_state_dict(copy.deepcopy(method.state_dict()))
    method.reset()


@pytest.mark.parametrize("name", balancing.names())
def test_sum_type_methods_keep_the_meaning_of_a_learning_rate(name: str) -> None:
    """Without conflict, weights / K of a sum-type method are the mean's, up to the constant 1/2 of a fresh UW."""
    method = make(name, k=4)
    if method.scale == "sum":
        x = torch.eye(4, dtype=torch.float64) if method.needs == "gram" else torch.ones(4)
        assert torch.equal(
            method.weights(x), torch.full_like(x[0] if x.dim() == 2 else x, 0.5 if name == "uw" else 1.0)
        )


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
        unscaled = scaled if torch.equal(scaled, weights) else scaled * 2.0**exponent  # weights of degree 0 or -1
        torch.testing.assert_close(unscaled, weights, rtol=1e-9, atol=0)


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
        second.load_state_dict(copy.deepcopy(second.state_dict()))  # saved again before its first call
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
    assert method.weights(second * float("nan")).isnan().all()  # this step is skipped by the scaler
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
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is left alone
    assert not torch.equal(PCGrad(seed=8).weights(G), PCGrad(seed=7).weights(G))
    assert torch.equal(PCGrad().weights(G), PCGrad().weights(G))  # two ranks draw the same orders
    shared = torch.Generator().manual_seed(7)
    given = PCGrad(generator=shared)
    assert given.generator is shared
    assert torch.equal(given.weights(G), PCGrad(seed=7).weights(G))
    given.reset()
    assert given.generator is shared
    torch.testing.assert_close(
        PCGrad().weights(CONFLICT @ CONFLICT.T) @ CONFLICT,
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
    torch.testing.assert_close(NashMTL(solver="cvxpy").weights(G), ops.nash_weights(G), rtol=1e-3, atol=0)
    batch = torch.stack([G, G * 1e-40, G * 1e200, torch.zeros_like(G)])
    norms = (NashMTL(max_norm=0.5).weights(batch[:3]) * batch.diagonal(dim1=-2, dim2=-1)[:3].sqrt())[:, 0]
    torch.testing.assert_close(norms, norms[:1].expand(3))
    assert NashMTL(max_norm=1.0).weights(batch[3]).tolist() == [0, 0]
    opposed = torch.tensor([[1.0, -1], [-1, 1]], dtype=torch.float64)  # stationary: never stretched to max_norm
    assert torch.equal(NashMTL(max_norm=1.0).weights(opposed), ops.nash_weights(opposed))
    with pytest.raises(ValueError, match="max_norm must be positive"):
        NashMTL(max_norm=0.0)


# ---- methods that need the losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSS_METHODS)
def test_loss_is_what_the_weights_say(name: str) -> None:
    """The gradient of loss(losses) in the losses is weights(losses) / K for a sum-type method."""
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
    torch.testing.assert_close(losses.grad, weights / (3 if method.scale == "sum" else 1))
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
    uw.loss(losses, counts).backward()  # d/ds = 1/2 (1 - exp(-s) l / K), nothing for the empty cluster
    torch.testing.assert_close(uw.log_variance.grad, torch.tensor([0.5 * (1 - 0.2), 0.5 * (1 - 1.0), 0.0]))
    assert uw(losses, counts) == uw.loss(losses, counts) == uw.loss(losses)

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-4, weight_decay=0.1)
    optimizer.add_param_group(group)
    for _ in range(600):
        optimizer.zero_grad()
        uw.loss(losses, counts).backward()
        optimizer.step()
    torch.testing.assert_close(uw.log_variance.detach()[:2], (losses[:2] / 3).log(), rtol=1e-3, atol=1e-3)
    assert uw.log_variance[2] == 0
    torch.testing.assert_close(uw.weights(losses)[:2], 1.5 / losses[:2], rtol=1e-3, atol=0)

    other = UncertaintyWeighting(3)
    other.load_state_dict(uw.state_dict())
    assert torch.equal(other.weights(losses), uw.weights(losses))
    parameter = other.log_variance
    other.reset()
    assert other.log_variance is parameter
    assert not parameter.any()
    with pytest.raises(ValueError, match="k must be at least 1"):
        UncertaintyWeighting(0)


def test_linear() -> None:
    losses = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    assert Linear().weights(losses).tolist() == [1, 1, 1]
    assert Linear().loss(losses) == losses.mean()
    with pytest.raises(ValueError, match=r"losses must have shape \[K\]; got \[1, 3\]"):
        Linear().weights(losses[None])
