"""The grouped route against the definition, in float64, for every way of applying parameters to a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from gradient_cases import (
    LAYERS,
    SIZES,
    B,
    Checkpointed,
    DiT,
    K,
    Tied,
    WeightNorm,
    by_hand,
    cluster_ids,
    diffusion_batch,
    spread,
    worst,
)
from torch import Tensor, nn

from antdiff.gradients import ClusterGradients

# float64. The products are the same, but the samples of a cluster, at most a few hundred terms, are summed in another
# order, through a few layers. The error is 1e-15 times the condition number of a small network. The contract of
# ClusterGradients is 1e-10.
EXACT = 1e-11


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).flatten(1).square().mean(1)


def layer(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return spread(make().double()), torch.randn(B, 6, 8, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("make", LAYERS, ids=lambda m: m.__name__)
def test_layers(make: Callable[[], nn.Module], shuffled: bool) -> None:
    model, x = layer(make)
    cluster = cluster_ids(shuffled=shuffled)
    want = by_hand(model, squares(model, x), cluster)
    cg = ClusterGradients(model, K, "grouped")
    assert worst(cg(partial(squares, model), (x,), cluster).rows, want) < EXACT
    with cg.record(cluster) as recording:
        jacobian = recording.backward(squares(model, x))
    assert worst(jacobian.rows, want) < EXACT
    assert jacobian.counts.tolist() == SIZES
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [Tied, WeightNorm], ids=lambda m: m.__name__)
def test_checkpointed_layers(make: Callable[[], nn.Module], reentrant: bool) -> None:
    model, x = layer(lambda: Checkpointed(make(), reentrant))
    plain, cluster = model.inner, cluster_ids()
    per_sample = plain(model.into(x)).flatten(1).square().mean(1)
    want = by_hand(model, per_sample, cluster)
    assert worst(ClusterGradients(model, K, "grouped")(partial(squares, model), (x,), cluster).rows, want) < EXACT


@pytest.mark.parametrize("route", ["grouped", "split", "loop"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_dit(route: str, reentrant: bool | None) -> None:
    torch.manual_seed(0)
    model = DiT(reentrant=reentrant).double()
    x, t, y, noise = diffusion_batch()
    x.requires_grad_(reentrant is True)  # re-entrant checkpoints need an input that requires a gradient

    def loss_fn(x: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        return (model(x, t, y) - noise).flatten(1).square().mean(1)

    cluster = cluster_ids(shuffled=True)
    J = ClusterGradients(model, K, route)(loss_fn, (x, t, y, noise), cluster).rows
    model.reentrant = None
    assert worst(J, by_hand(model, loss_fn(x, t, y, noise), cluster)) < EXACT
