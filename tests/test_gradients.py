"""ClusterGradients against one retained backward per cluster."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import antdiff
from antdiff import balancing
from antdiff.gradients import ClusterGradients, Route

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gradients.md"


class Net(nn.Module):
    """A network with a shared weight, a frozen parameter and an unused parameter."""

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.first = nn.Linear(32, 8)
        self.again = nn.Linear(8, 8)
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.checkpointed = checkpointed

    def body(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.norm(self.conv(x[:, None])).flatten(1)
        h = torch.tanh(self.first(h) + self.embed(t))
        return self.again(torch.tanh(self.again(h))) * self.frozen

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.checkpointed is None:
            return self.body(x, t)
        return checkpoint(self.body, x, t, use_reentrant=self.checkpointed)


def setup(checkpointed: bool | None = None, dtype: torch.dtype = torch.float64) -> tuple[Net, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = Net(checkpointed).to(dtype)
    # Re-entrant checkpointing needs an input that requires a gradient.
    return net, (torch.randn(12, 8, dtype=dtype, requires_grad=checkpointed is True), torch.randint(0, 10, (12,)))


def by_hand(net: Net, x: Tensor, t: Tensor, cluster: Tensor, k: int) -> list[Tensor | None]:
    per_sample = net(x, t).square().mean(1)
    rows: list[list[Tensor]] = [[] for _ in net.parameters()]
    for i in range(k):
        mask = cluster == i
        loss = (per_sample * mask).sum() / mask.sum().clamp(min=1)
        for row, p in zip(rows, net.parameters(), strict=True):
            grad = torch.autograd.grad(loss, p, retain_graph=True, allow_unused=True)[0] if p.requires_grad else None
            row.append(torch.zeros_like(p) if grad is None else grad)
    return [torch.stack(r) if p.requires_grad else None for r, p in zip(rows, net.parameters(), strict=True)]


CLUSTERS = {
    "grouped": [0] * 4 + [1] * 5 + [2] * 3,
    "any order": [2, 0, 1, 1, 0, 2, 2, 0, 0, 1, 0, 1],
    "empty": [1] * 4 + [3] * 8,
    "one": [0] * 12,
}


ROUTES = ["auto", "grouped", "split", "loop"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CLUSTERS)
def test_equals_a_backward_for_each_cluster(name: str, route: Route) -> None:
    net, (x, t) = setup()
    cluster, k = torch.tensor(CLUSTERS[name]), max(CLUSTERS[name]) + 1
    cg = ClusterGradients(net, k, route)
    jacobian = cg(lambda x, t: net(x, t).square().mean(1), (x, t), cluster)
    for got, want in zip(jacobian.rows, by_hand(net, x, t, cluster, k), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert got.shape == want.shape
            # float64. The slices are summed in another order, which gives a few hundred rounding errors relative to the
            # largest entry.
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    assert jacobian.counts.tolist() == [CLUSTERS[name].count(i) for i in range(k)]
    assert jacobian.losses[jacobian.counts == 0].eq(0).all()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, route: Route) -> None:
    net, (x, t) = setup(reentrant)
    plain, _ = setup()
    cluster = torch.tensor(CLUSTERS["any order"])
    J = ClusterGradients(net, 3, route)(lambda x, t: net(x, t).square().mean(1), (x, t), cluster).rows
    for got, want in zip(J, by_hand(plain, x.detach(), t, cluster, 3), strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("route", ROUTES)
def test_given_counts_change_nothing_and_skip_the_sort(route: Route) -> None:
    net, (x, t) = setup()
    cluster = torch.tensor(CLUSTERS["grouped"])
    cg = ClusterGradients(net, 3, route)
    loss_fn = lambda x, t: net(x, t).square().mean(1)  # noqa: E731
    first = [None if J is None else J.clone() for J in cg(loss_fn, (x, t), cluster).rows]
    again = cg(loss_fn, (x, t), cluster, counts=[4, 5, 3]).rows
    for a, b in zip(first, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("route", ROUTES)
def test_a_batch_without_samples(route: Route) -> None:
    net, (x, t) = setup()
    cg = ClusterGradients(net, 3, route)
    jacobian = cg(lambda x, t: net(x, t).square().mean(1), (x[:0], t[:0]), torch.zeros(0, dtype=torch.int64))
    assert all(rows.eq(0).all() for rows in jacobian.rows if rows is not None)
    assert jacobian.losses.tolist() == jacobian.counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize("route", ROUTES)
def test_existing_grads_survive_even_an_error(route: Route) -> None:
    net, (x, t) = setup()
    net.first.weight.grad = torch.ones_like(net.first.weight)
    cg = ClusterGradients(net, 3, route)
    cluster = torch.tensor(CLUSTERS["grouped"])

    def broken(x: Tensor, t: Tensor) -> Tensor:
        if x.shape[0] in (5, 12):
            raise KeyError("data")
        return net(x, t).square().mean(1)

    with pytest.raises(KeyError):
        cg(broken, (x, t), cluster)
    assert net.first.weight.grad.eq(1).all()
    assert net.again.weight.grad is None
    cg(lambda x, t: net(x, t).square().mean(1), (x, t), cluster).combine(torch.ones(3))
    assert net.frozen.grad is None
    assert net.again.weight.grad is not None


def test_batches_of_any_structure_and_dtype_of_j() -> None:
    net, (x, t) = setup(dtype=torch.float32)
    cluster = torch.tensor(CLUSTERS["any order"])
    seen: list[tuple[int, float]] = []

    def loss_fn(pair: tuple[Tensor, dict[str, Tensor]], scale: float, table: Tensor) -> Tensor:
        seen.append((pair[0].shape[0], scale))
        assert table.shape == (3,)
        return net(pair[0], pair[1]["t"]).square().mean(1) * scale

    cg = ClusterGradients(net, 3, "split", dtype=torch.bfloat16)
    J = cg(loss_fn, ((x, {"t": t}), 2.0, torch.zeros(3)), cluster).rows
    assert seen == [(5, 2.0), (4, 2.0), (3, 2.0)]
    assert {j.dtype for j in J if j is not None} == {torch.bfloat16}


@pytest.mark.parametrize("route", ROUTES)
def test_bad_input(route: Route) -> None:
    net, (x, t) = setup()
    cluster = torch.tensor(CLUSTERS["grouped"])
    loss_fn = lambda x, t: net(x, t).square().mean(1)  # noqa: E731
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        ClusterGradients([net], 3)
    with pytest.raises(ValueError, match="k must be at least 1"):
        ClusterGradients(net, 0)
    with pytest.raises(ValueError, match="route must be"):
        ClusterGradients(net, 3, "magic")
    with pytest.raises(ValueError, match="requires grad"):
        ClusterGradients(Net().requires_grad_(False), 3)
    cg = ClusterGradients(net, 3, route)
    with pytest.raises(TypeError, match="int64 tensor"):
        cg(loss_fn, (x, t), cluster.int())
    with pytest.raises(ValueError, match="got id 3 with k=3 at row 4"):
        cg(loss_fn, (x, t), cluster.index_fill(0, torch.tensor(4), 3))
    with pytest.raises(ValueError, match="add up to B=12"):
        cg(loss_fn, (x, t), cluster, counts=[4, 5, 4])
    with pytest.raises(ValueError, match="one loss for each sample"):
        cg(lambda x, t: net(x, t).square().mean(), (x, t), cluster)
    with pytest.raises(ValueError, match="depend on model's parameters"):
        cg(lambda x, t: x.sum(1), (x, t), cluster)


def test_the_code_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # Inductor takes seconds
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
    x, noise, t, cluster = torch.randn(10, 8), torch.randn(10, 8), torch.arange(10), torch.arange(10) // 2

    def loss_fn(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return (names["model"](x) - noise.reshape(len(x), -1)).square().mean(1)

    names = {
        **{"antdiff": antdiff, "torch": torch, "balancing": balancing, "model": model, "loss_fn": loss_fn},
        **{"x": x, "noise": noise, "t": t, "cluster": cluster, "batch": (x, noise, t)},
        "balancer": balancing.PCGrad(),
        "table": torch.randn(10, 8),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "micro_batches": [((x[i::2], noise[i::2], t[i::2]), cluster[i::2]) for i in (0, 1)],
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        for p in model.parameters():
            p.grad = None
        names.update(model=model, cluster_gradients=ClusterGradients(model, 5))
        exec(block.replace('GradScaler("cuda")', 'GradScaler("cpu")'), names)
        if "combine" in block or "optimizer.step" in block:
            assert all(p.grad is not None and p.grad.any() for p in model.parameters()), block
