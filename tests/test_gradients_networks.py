"""Cluster gradients of unusual cases: few samples, other memory layouts, custom ops, parameters modified in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_cases import B, DiT, K, by_hand, cluster_ids, denoising, diffusion_batch, peak, spread, worst
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from antdiff import BalancedBackward, ClusterGradients, balancing
from antdiff.gradients import GroupingError, Route

EXACT = 1e-11  # as in test_gradients_grouped
ROUTES: list[Route] = ["auto", "grouped", "split", "loop"]


def prepared(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return spread(make().double())


def squares(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).flatten(1).square().mean(1)


def images(n: int = B) -> Tensor:
    return torch.randn(n, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("ids", [[2, 0, 2], [4]], ids=["3 of 5", "1 of 5"])
def test_more_clusters_than_samples(ids: list[int], route: Route) -> None:
    model, batch, cluster = prepared(DiT), diffusion_batch(len(ids)), torch.tensor(ids)
    cg = ClusterGradients(model, K, route)
    jacobian = cg(denoising(model), batch, cluster)
    J = jacobian.rows
    assert worst(J, by_hand(model, denoising(model)(*batch), cluster)) < EXACT
    assert jacobian.counts.tolist() == [ids.count(i) for i in range(K)]
    assert all(j[i].eq(0).all() for j in J for i in range(K) if i not in ids)


@pytest.mark.parametrize("name", ["pcgrad", "nash", "mgda", "uw"])
def test_three_lines_with_clusters_that_are_empty(name: str) -> None:
    """The direction is finite and decreases the losses of the clusters that have samples."""
    model, batch, cluster = prepared(DiT), diffusion_batch(3), torch.tensor([2, 0, 2])
    make = balancing.get(name)
    backward = BalancedBackward(model, make(K) if name == "uw" else make(), K)
    losses = backward(denoising(model), batch, cluster).losses
    grads = [p.grad for p in model.parameters()]
    assert all(g.isfinite().all() for g in grads)
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-4 * p.grad
    after = denoising(model)(*batch)
    assert after[1] < losses[0]
    assert (after[0] + after[2]) / 2 < losses[2]
    assert losses[[1, 3, 4]].eq(0).all()


class ChannelsLast(nn.Module):
    """1 x 1 and strided convolutions and GroupNorm, for weights and activations in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.Conv2d(8, 8, 1)
        self.n, self.up = nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.b(F.silu(self.n(self.a(x)))))


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("inputs", [False, True])
def test_channels_last(weights: bool, inputs: bool) -> None:
    model, x, cluster = prepared(ChannelsLast), images(), cluster_ids(shuffled=True)
    want = by_hand(model, squares(model)(x), cluster)
    if weights:
        model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last) if inputs else x
    cg = ClusterGradients(model, K, "grouped")
    jacobian = cg(squares(model), (x,), cluster)
    J = jacobian.rows
    assert worst(J, want) < EXACT
    jacobian.combine(torch.ones(K, dtype=torch.float64))
    for p, j in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, j.sum(0))


class Magnitude(nn.Module):
    """EDM2's layer. Its forward normalises the weight in place, and then once more with a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.weight.copy_(self.unit(self.weight))
        return F.conv2d(x, self.unit(self.weight) * self.gain, padding=1)

    @staticmethod
    def unit(w: Tensor) -> Tensor:
        return w / torch.linalg.vector_norm(w, dim=(1, 2, 3), keepdim=True)


@pytest.mark.parametrize("route", ROUTES)
def test_weights_normalised_in_place(route: Route) -> None:
    model, x, cluster = prepared(lambda: nn.Sequential(Magnitude(), nn.SiLU(), Magnitude())), images(), cluster_ids()
    want = by_hand(model, squares(model)(x), cluster)
    assert worst(ClusterGradients(model, K, route)(squares(model), (x,), cluster).rows, want) < EXACT


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x.flatten(1, 2))[0])


def test_recurrent_networks_have_no_rule() -> None:
    model, x, cluster = prepared(Recurrent), images(), cluster_ids()
    with pytest.raises(GroupingError, match=r"gru applies rnn\.bias_hh_l0, .* has no grouped rule"):
        ClusterGradients(model, K, "grouped")(squares(model), (x,), cluster)
    cg = ClusterGradients(model, K)
    assert worst(cg(squares(model), (x,), cluster).rows, by_hand(model, squares(model)(x), cluster)) < EXACT
    assert cg.explain().startswith("route 'split': not 'grouped'")


@torch.library.custom_op("antdiff_tests::scale", mutates_args=())
def scale(x: Tensor, w: Tensor) -> Tensor:
    return x * w


scale.register_autograd(
    lambda ctx, g: (g * ctx.saved_tensors[1], (g * ctx.saved_tensors[0]).sum((0, 1, 2))),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.antdiff_tests.scale(x, self.w)


@pytest.mark.parametrize("name", ["op", "overload"])
def test_operators_of_a_library(name: str) -> None:
    """An unknown operator raises an error that names it. Declared, as operator or as overload, it gives the right J."""
    model, x, cluster = prepared(Custom), images(), cluster_ids(shuffled=True)
    with pytest.raises(GroupingError, match=r"antdiff_tests.*scale.* applies w to the batch"):
        ClusterGradients(model, K, "grouped")(squares(model), (x,), cluster)
    op = torch.ops.antdiff_tests.scale
    cg = ClusterGradients(model, K, "grouped", separable=[op if name == "op" else op.default])
    want = by_hand(model, squares(model)(x), cluster)
    if name == "overload":
        model.forward = lambda x: op.default(x, model.w)  # type: ignore[method-assign]
    assert worst(cg(squares(model), (x,), cluster).rows, want) < EXACT


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_inside_a_checkpoint(reentrant: bool) -> None:
    """The recomputation draws the same random numbers as the forward, and the gradients belong to them."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.checkpointed = True

        def body(self, x: Tensor) -> Tensor:
            return F.dropout(torch.tanh(self.b(x)), 0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return checkpoint(self.body, x, use_reentrant=reentrant) if self.checkpointed else self.body(x)

    model, x, cluster = prepared(Dropped), images(), cluster_ids()
    torch.manual_seed(5)
    J = [j.clone() for j in ClusterGradients(model, K, "grouped")(squares(model), (x,), cluster).rows]
    model.checkpointed = False
    torch.manual_seed(5)
    assert worst(J, by_hand(model, squares(model)(x), cluster)) < EXACT


@pytest.mark.parametrize("route", ["grouped", "split", "loop"])
def test_j_is_made_once_and_written_in_place(route: Route) -> None:
    model, batch, cluster = prepared(DiT), diffusion_batch(), cluster_ids()
    cg = ClusterGradients(model, K, route)
    rows = cg(denoising(model), batch, cluster).rows
    first = [j.data_ptr() for j in rows]
    rows[0].fill_(torch.nan)
    second = cg(denoising(model), batch, cluster).rows
    assert [j.data_ptr() for j in second] == first
    n = sum(p.numel() for p in model.parameters())
    assert f"the rows hold {K * n * 8 / 2**20:.1f} MiB" in cg.explain()
    assert worst(second, by_hand(model, denoising(model)(*batch), cluster)) < EXACT


def test_memory_beyond_a_plain_step() -> None:
    """``grouped`` needs K x P numbers less those of p.grad. ``split`` needs less than a plain step beside J."""
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh())])
    x, cluster = torch.randn(5 * 400, 64), cluster_ids([400] * K)
    loss_fn = squares(model)
    J = 4 * K * sum(p.numel() for p in model.parameters())

    def memory(step: Callable[[], Any]) -> int:
        step()
        for p in model.parameters():
            p.grad = None
        return peak(step)

    plain = memory(lambda: loss_fn(x).mean().backward())
    routes = {route: ClusterGradients(model, K, route, audit=None) for route in ("grouped", "split")}
    grouped, split = (memory(lambda cg=cg: cg(loss_fn, (x,), cluster).rows) for cg in routes.values())
    assert grouped < 1.1 * plain  # J was already allocated in the first step
    assert split < plain / 2
    assert memory(lambda: ClusterGradients(model, K, "grouped")(loss_fn, (x,), cluster).rows) < 1.1 * plain + J


# ---- ops of single networks ------------------------------------------------------------------------------------------


class Ops(nn.Module):
    """A linear layer, a table and a token, which the cases below apply in their own ways."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table, self.token = nn.Linear(8, 8), nn.Embedding(9, 8), nn.Parameter(torch.randn(8))


def assigned(x: Tensor, index: Any, value: Tensor) -> Tensor:
    out = x * 1.0
    out[index] = value
    return out


OPS: dict[str, Callable[[Ops, Tensor], Tensor]] = {
    "type_as": lambda m, x: x + m.linear(torch.ones(1, 8, dtype=x.dtype)).type_as(x),
    "to": lambda m, x: x + m.linear(torch.ones(1, 8, dtype=x.dtype)).to(x),
    "expand_as": lambda m, x: x + m.token.expand_as(x) * m.linear(x),
    "no rows": lambda m, x: x + m.linear(x[:0]).sum() + m.linear(x),
    "a token by position": lambda m, x: m.linear(assigned(x, (slice(None), 0), m.token)),
    "a token by ellipsis": lambda m, x: m.linear(assigned(x, (..., 2), m.token[0])),
    "a token by mask": lambda m, x: m.linear(assigned(x, x[..., 0] > 0, m.token)),
    "codebook distance": lambda m, x: torch.cdist(x, m.table.weight),
    "bmm with an expanded weight": lambda m, x: torch.bmm(x, m.linear.weight.expand(len(x), 8, 8)),
    "gather from an expanded table": lambda m, x: torch.gather(
        m.table.weight.expand(len(x), 9, 8), 1, (x[..., :1] > 0).long().expand(-1, -1, 8)
    ) * x,
}  # fmt: skip


@pytest.mark.parametrize("hold", ["jacobian", "gram"])
@pytest.mark.parametrize("name", OPS)
def test_ops_of_single_networks(name: str, hold: Any) -> None:
    model, x, cluster = prepared(Ops), torch.randn(B, 6, 8, dtype=torch.float64), cluster_ids(shuffled=True)
    loss_fn = lambda x: OPS[name](model, x).flatten(1).square().mean(1)  # noqa: E731
    want = by_hand(model, loss_fn(x), cluster)
    jacobian = ClusterGradients(model, K, "grouped", hold=hold)(loss_fn, (x,), cluster)
    if hold == "jacobian":
        assert worst(jacobian.rows, want) < EXACT
    jacobian.combine(torch.arange(1.0, K + 1, dtype=torch.float64))
    for p, rows in zip(model.parameters(), want, strict=True):
        total = torch.tensordot(torch.arange(1.0, K + 1, dtype=torch.float64), rows, 1)
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, total, rtol=1e-9, atol=1e-11)
