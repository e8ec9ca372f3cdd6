"""Route `auto` never settles on wrong gradients, whatever the weights are now, and an audit finds what changes later.

Each network here is one that a comparison of numbers on a few samples, once, at initialisation, calls right.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from antdiff import BalancedBackward, ClusterGradients, balancing
from antdiff.gradients import GroupingError
from antdiff.gradients.audit import Audit
from antdiff.gradients.grouped.tracking import loses_track
from antdiff.gradients.probe import binary_codes, random_code
from antdiff.gradients.sinks import GradientStore

# Float32 sums of some hundred terms in another order; rows of the wrong samples differ by 0.1 and more.
EXACT = 1e-4


def plain_rows(model: nn.Module, loss_fn: Callable[..., Tensor], batch: Any, cluster: Tensor, k: int) -> list[Tensor]:
    """The definition: one backward per cluster through one forward of the whole batch."""
    per_sample, rows = loss_fn(*batch), []
    for i in range(k):
        mask = cluster == i
        loss = (per_sample * mask).sum() / mask.sum().clamp(min=1)
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), grads, strict=True)])
    return [torch.stack(x) for x in zip(*rows, strict=True)]


def error(model: nn.Module, cg: ClusterGradients, loss_fn: Callable[..., Tensor], batch: Any, cluster: Tensor) -> float:
    """The largest relative difference of a parameter's row from the definition."""
    want = plain_rows(model, loss_fn, batch, cluster, cg.k)
    got = cg(loss_fn, batch, cluster).rows
    gaps = [(a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp(min=1e-12) for a, b in
            zip(got, want, strict=True) if b.abs().max() > 1e-10]  # fmt: skip
    return float(torch.stack(gaps).max())


class SequenceFirst(nn.Module):
    """Tokens first inside, as in torch.nn.Transformer; ``[B, L, 4]`` with L a multiple of B."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.main, self.branch, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.scale * torch.tanh(self.branch(x.transpose(0, 1))).transpose(0, 1)


class ZeroHead(SequenceFirst):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


class Chunked(nn.Module):
    """Frames are normalised 8 at a time, across samples."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.flatten(0, 1)[..., None]
        return torch.cat([self.norm(part) for part in frames.split(8)])[..., 0].view_as(x)


class Attends(nn.Module):
    """Attention over the batch that contributes little."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + 0.002 * self.attention(x, x, x)[0])


class Routed(nn.Module):
    """Tokens are sorted by expert; with the gate at zero the order is that of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.expert = nn.Linear(4, 2, bias=False), nn.Linear(4, 4)
        nn.init.zeros_(self.gate.weight)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        probability = self.gate(tokens).softmax(-1)
        order = probability.argmax(-1).argsort(stable=True)
        out = self.expert(tokens[order])[order.argsort()]
        return (out * probability.max(-1, keepdim=True).values).view_as(x)


class Swallows(nn.Module):
    """Mixes samples by an op through which no NaN passes, once `open` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.open = nn.Linear(4, 4), nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h + torch.nan_to_num(h).mean(0)) if self.open else self.b(h)


def squares(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: (model(x) - x.flip(1)).square().flatten(1).mean(1)


CLUSTER = torch.tensor([0, 0, 0, 1])
LAYOUTS = {
    "zero-initialised head": (ZeroHead, "split"),
    "a branch scaled by 1e-4": (lambda: SequenceFirst(1e-4), "split"),
    "chunks across samples": (Chunked, "split"),
    "little attention over the batch": (Attends, "loop"),
    "routing that is the identity at first": (Routed, "split"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_auto_does_not_depend_on_the_values_of_the_weights(name: str) -> None:
    torch.manual_seed(0)
    make, route = LAYOUTS[name]
    model: nn.Module = make()
    cg, x = ClusterGradients(model, 2), torch.randn(4, 12, 4)
    cg(squares(model), (x,), CLUSTER)
    assert cg.explain().startswith(f"route {route!r}: not 'grouped'"), cg.explain()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    assert error(model, cg, squares(model), (x,), CLUSTER) < EXACT


def test_packing_by_a_mask_is_refused_by_name() -> None:
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            out[mask] = torch.tanh(self.inside(x[mask]))
            return self.head(out)

    torch.manual_seed(0)
    model, x = Packs(), torch.randn(4, 3, 4)
    loss_fn = lambda x, mask: model(x, mask).square().mean((1, 2))  # noqa: E731
    everything = torch.ones(4, 3, dtype=torch.bool)
    some = torch.arange(3) < torch.tensor([1, 2, 2, 3])[:, None]  # 8 tokens of 4 samples
    cg = ClusterGradients(model, 2)
    cg(loss_fn, (x, everything), CLUSTER)
    assert error(model, cg, loss_fn, (x, some), CLUSTER) < EXACT
    assert cg.explain().startswith(
        "route 'split': not 'grouped': torch.Tensor.__getitem__ places rows by the values of"
    )
    unprobed = ClusterGradients(model, 2, "grouped", audit=None)
    with pytest.raises(GroupingError, match=r"__getitem__ places rows by the values of the batch.* meet inside\.bias"):
        unprobed(loss_fn, (x, everything), CLUSTER)
    by_hand = ClusterGradients(model, 2, "grouped")  # every batch is probed
    for mask in (everything, some, everything):
        assert error(model, by_hand, loss_fn, (x, mask), CLUSTER) < EXACT


def test_a_table_that_the_loss_looks_up_is_no_packing() -> None:
    torch.manual_seed(0)
    model, images, index = nn.Linear(4, 4), torch.randn(9, 4), torch.tensor([3, 8, 0, 3])
    cg = ClusterGradients(model, 2, "grouped")
    loss_fn = lambda index: (model(images[index]) - images[index].flip(1)).square().mean(1)  # noqa: E731
    assert error(model, cg, loss_fn, (index,), CLUSTER) < EXACT
    with pytest.raises(GroupingError, match="__getitem__ places rows by the values of the batch"):
        cg(lambda x, index: model(x[index]).square().mean(1), (images[:4], index % 4), CLUSTER)


class Levels(nn.Module):
    """Reads a table that the loss function holds, with as many rows as divide by the batch, behind a closed gate."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.x, self.t, self.gate = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.zeros(4))
        self.hidden = lambda: table

    def forward(self, x: Tensor) -> Tensor:
        c = torch.tanh(self.t(self.hidden()))[:3].expand(len(x), -1, -1)
        return self.x(x) + self.gate * c * x


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [4, 8])
def test_a_constant_of_the_loss_has_no_samples(rows: int, compiled: bool) -> None:
    torch.manual_seed(0)
    model, x = Levels(torch.randn(rows, 4)), torch.randn(4, 3, 4)
    options: dict[str, Any] = {"compile": {"backend": "aot_eager"}} if compiled else {}
    cg = ClusterGradients(model, 2, **options)
    cg(squares(model), (x,), CLUSTER)
    assert cg.explain().startswith("route 'grouped'"), cg.explain()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    assert error(model, cg, squares(model), (x,), CLUSTER) < EXACT


def test_another_batch_size_is_probed_before_it_is_used() -> None:
    """Eight frames of four samples are one chunk. Sixteen frames of eight samples are two, each of eight rows."""
    torch.manual_seed(0)
    model = Chunked()
    loss_fn: Callable[..., Tensor] = squares(model)
    cg = ClusterGradients(model, 2, "grouped")
    cg(loss_fn, (torch.randn(4, 2, 4),), CLUSTER)
    assert error(model, cg, loss_fn, (torch.randn(8, 2, 4),), torch.arange(8) // 4) < EXACT

    class ByRow(nn.Module):
        """Reads the batch as a table of four rows: of four samples these are the samples."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.reshape(-1, 6)).reshape(x.shape) if len(x) == 4 else (
                self.linear(x.t().reshape(-1, 6)).reshape(6, -1).t())  # fmt: skip

    other = ByRow()
    loss_fn = lambda x: other(x).square().mean(1)  # noqa: E731
    cg = ClusterGradients(other, 2, "grouped")
    cg(loss_fn, (torch.randn(4, 6),), CLUSTER)
    with pytest.raises(GroupingError, match="reached"):
        cg(loss_fn, (torch.randn(6, 6),), torch.tensor([0, 0, 0, 1, 1, 1]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_whatever_a_route_raises_auto_ends_in_a_route_that_works() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4), torch.randn(4, 4)

    def forward_mode(x: Tensor) -> Tensor:
        u, du = torch.func.jvp(lambda z: torch.tanh(model(z)), (x,), (torch.ones_like(x),))
        return (u - du.detach()).square().mean(1)

    def wants_four(x: Tensor) -> Tensor:
        if len(x) % 4:
            raise ValueError("the batch must be divisible by 4")
        return model(x).square().mean(1)

    for loss_fn, route in ((forward_mode, "split"), (wants_four, "grouped")):
        cg = ClusterGradients(model, 2)
        assert error(model, cg, loss_fn, (x,), CLUSTER) < EXACT
        assert cg.explain().startswith(f"route {route!r}")

    def broken(x: Tensor) -> Tensor:
        raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        ClusterGradients(model, 2)(broken, (x,), CLUSTER)


class Once(torch.autograd.Function):
    """A checkpoint that frees what it saved in its first backward, as in openai/guided-diffusion."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, *params: Tensor) -> Tensor:
        ctx.run, ctx.x, ctx.params = run, x, params
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x = ctx.x.detach().requires_grad_(True)
        with torch.enable_grad():
            out = ctx.run(x)
        grads = torch.autograd.grad(out, [x, *ctx.params], grad, allow_unused=True)
        del ctx.x, ctx.params
        return (None, *grads)


def test_a_checkpoint_that_goes_backward_once_is_audited_too() -> None:
    torch.manual_seed(0)
    body, head, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(4, 4)
    both = nn.ModuleList([body, head])
    loss_fn = lambda x: Once.apply(body, head(x), *body.parameters()).square().mean(1)  # noqa: E731
    cg = ClusterGradients(both, 2)
    rows = cg(loss_fn, (x,), CLUSTER).rows
    assert cg.explain().startswith("route 'grouped'")
    want = plain_rows(both, lambda x: body(head(x)).square().mean(1), (x,), CLUSTER, 2)
    for a, b in zip(rows, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recorded_forward_with_checkpoints(reentrant: bool) -> None:
    """Features and samples are four each, so rows that are taken for others have the right shape."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(4, 4)
    loss_fn = lambda x: checkpoint(net, x.requires_grad_(), use_reentrant=reentrant).square().mean(1)  # noqa: E731
    cg = ClusterGradients(net, 2, "grouped")
    with cg.record(CLUSTER) as recording:
        jacobian = recording.backward(loss_fn(x))
    for a, b in zip(jacobian.rows, plain_rows(net, lambda x: net(x).square().mean(1), (x,), CLUSTER, 2), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_written_in_the_forward_and_parts_in_float32_are_no_reason_to_leave_grouped() -> None:
    class Forced(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.copy_(self.weight / self.weight.norm(dim=1, keepdim=True))
            h = nn.functional.linear(x, self.weight, self.bias)
            return nn.functional.layer_norm(h.float(), (16,)).to(h.dtype)

    torch.manual_seed(0)
    model, x = Forced(16, 16).double(), torch.randn(4, 6, 16, dtype=torch.float64)
    cg = ClusterGradients(model, 2)
    assert error(model, cg, lambda x: model(x).square().mean((1, 2)), (x,), CLUSTER) < EXACT
    assert cg.explain().startswith("route 'grouped'")
    assert cg.verify(lambda x: model(x).square().mean((1, 2)), (x,), CLUSTER) < EXACT


# ---- the audit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", ["jacobian", "gram"])
def test_an_audit_finds_what_changes_during_training(hold: Any) -> None:
    torch.manual_seed(0)
    model, x = Swallows(), torch.randn(4, 3, 4)
    cg = ClusterGradients(model, 2, "grouped", hold=hold, audit=4)
    for _ in range(5):
        cg(squares(model), (x,), CLUSTER)
    model.open = True
    for _ in range(2):
        cg(squares(model), (x,), CLUSTER)  # calls 6 and 7 are not audited
    with pytest.raises(GroupingError, match=r"the gradient of .* differs from a plain backward.* right 4 calls ago"):
        cg(squares(model), (x,), CLUSTER)
    silent = ClusterGradients(model, 2, "grouped", hold=hold, audit=None)
    silent(squares(model), (x,), CLUSTER)
    auto = ClusterGradients(model, 2)
    assert error(model, auto, squares(model), (x,), CLUSTER) < EXACT
    assert auto.explain().startswith("route 'loop'")


def test_audits_are_at_powers_of_two_and_then_every_so_many_calls() -> None:
    audit = Audit(10)
    assert [n for n in range(1, 41) if audit.due()] == [1, 2, 4, 8, 10, 20, 30, 40]
    never = Audit(None)
    assert not any(never.due() for _ in range(40))


def test_training_with_audits_is_training_without_them() -> None:
    """Dropout, a generator of the loss function, numpy's and Python's generators, buffers: all as if never audited."""

    def train(audit: int | None) -> list[Tensor]:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.InstanceNorm1d(3, track_running_stats=True),
                              nn.Linear(16, 4))  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        x, optimizer = torch.randn(4, 3, 4), torch.optim.AdamW(model.parameters(), lr=0.1)

        def loss_fn(x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=generator) * (random.random() + np.random.rand())
            return (model(x + noise) - x).square().flatten(1).mean(1)

        backward = BalancedBackward(model, balancing.PCGrad(), 2, "grouped", audit=audit)
        for _ in range(5):
            backward(loss_fn, (x,), CLUSTER)
            optimizer.step()
        return [p.detach().clone() for p in (*model.parameters(), *model.buffers())]

    assert all(map(torch.equal, train(3), train(None)))


def test_samples_and_steps_that_are_not_finite_are_no_false_alarm() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4), torch.randn(4, 3, 4)
    x[3] = torch.nan
    for route in ("auto", "grouped"):
        cg = ClusterGradients(model, 2, route)
        for _ in range(2):
            rows = cg(squares(model), (x,), CLUSTER).rows
        assert rows[0][0].isfinite().all()
    nn.init.constant_(model.weight, torch.nan)
    cg = ClusterGradients(model, 2, "grouped")
    assert cg(squares(model), (x,), CLUSTER).losses.isnan().all()


# ---- what checks leave behind ----------------------------------------------------------------------------------------


class Reassigned(nn.Linear):
    """Writes its state in every way in which modules do."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("codes", torch.zeros(4))
        self.calls, self.history = 0, [0.0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(float(x.detach().mean()))
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        self.codes.data.add_(x.detach().mean((0, 1)))
        return super().forward(x)


GENERATOR = torch.Generator()


@pytest.mark.parametrize("route", ["auto", "grouped", "split"])
def test_checks_leave_no_nan_in_what_a_forward_writes(route: Any) -> None:
    torch.manual_seed(0)
    model, other, seen, calls = Reassigned(), nn.BatchNorm1d(4), torch.zeros(4), []

    def loss_fn(x: Tensor) -> Tensor:
        calls.append(1)
        seen.add_(x.mean((0, 1)))
        if route == "auto":
            other(x.mean(1))
        return (model(x) - x).square().flatten(1).mean(1)

    x = torch.randn(4, 3, 4)
    cg = ClusterGradients(model, 2, route)
    cg(loss_fn, (x,), CLUSTER)
    n = 2 if cg.explain().startswith("route 'split'") else 1
    assert len(calls) == model.calls == len(model.history) - 1 == n
    if n == 1:
        for value in (seen, model.codes, model.mean / 0.1):
            torch.testing.assert_close(value, x.mean((0, 1)))
    assert not any(torch.isnan(v).any() for v in (*model.buffers(), *other.buffers(), seen))
    assert int(other.num_batches_tracked) == (route == "auto")


class Scheduler:
    def __init__(self) -> None:
        self.torch, self.numpy, self.python = torch.Generator(), np.random.default_rng(0), random.Random(0)


def test_generators_are_found_wherever_the_loss_has_them() -> None:
    torch.manual_seed(0)
    model, holder, x = nn.Linear(4, 4), Scheduler(), torch.randn(4, 3, 4)

    def draw() -> Tensor:
        noise = torch.randn(4, 3, 4, generator=GENERATOR) + torch.randn(4, 3, 4, generator=holder.torch)
        return noise * holder.python.random() + torch.from_numpy(holder.numpy.standard_normal((4, 3, 4))).float()

    def loss_fn(x: Tensor) -> Tensor:
        return (model(x + draw()) - x).square().flatten(1).mean(1)

    cg = ClusterGradients(model, 2)
    GENERATOR.manual_seed(5)
    cg(loss_fn, (x,), CLUSTER)
    assert "'grouped'" in cg.explain()
    after = draw()
    holder = Scheduler()
    GENERATOR.manual_seed(5)
    draw()
    assert torch.equal(after, draw())


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grad @ w.t(), torch.einsum("bti,bto->io", x, grad)


def test_a_route_that_auto_rejects_draws_and_writes_nothing() -> None:
    model, x, states = Reassigned(), torch.randn(4, 3, 4), []
    for route in ("auto", "split"):
        torch.manual_seed(0)
        model.calls = 0
        cg = ClusterGradients(model, 2, route)
        cg(lambda x: nn.functional.dropout(Opaque.apply(model(x), model.weight)).flatten(1).mean(1), (x,), CLUSTER)
        states.append((torch.get_rng_state(), model.calls))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1] == 2


@pytest.mark.parametrize("opaque", [False, True])
def test_parameters_beside_the_model_are_trained_once(opaque: bool) -> None:
    """By an audited call, in a checkpoint whose backward no graph shows, and by a call whose first route fails."""
    model, head, hooked, results = nn.Linear(4, 4), nn.Linear(4, 4), [], []
    head.weight.register_post_accumulate_grad_hook(hooked.append)
    x = torch.randn(4, 3, 4)

    def loss_fn(x: Tensor) -> Tensor:
        h = Opaque.apply(model(x), model.weight) if opaque else model(x)
        out = checkpoint(head, h, use_reentrant=True)
        return (out - x).square().flatten(1).mean(1)

    for route, audit in (("auto", 5), ("split" if opaque else "grouped", None)):
        head.weight.grad = torch.ones(4, 4)
        hooked.clear()
        ClusterGradients(model, 2, route, audit=audit)(loss_fn, (x,), CLUSTER)
        results.append(head.weight.grad)
        assert opaque or len(hooked) == 1
    torch.testing.assert_close(*results)


def test_auto_without_held_rows_allocates_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(4, 4), torch.randn(4, 3, 4)
    cg = ClusterGradients(model, 2, hold="gram")
    monkeypatch.setattr(GradientStore, "_empty", lambda *_: pytest.fail("rows were allocated"))
    cg(squares(model), (x,), CLUSTER).combine(torch.ones(2))
    assert "'grouped'" in cg.explain()
    net = Swallows()
    net.open = True
    with pytest.raises(GroupingError, match="differs"):  # the first call is compared, though not by auto
        ClusterGradients(net, 2, hold="gram", audit=None)(squares(net), (x,), CLUSTER)


# ---- false alarms ----------------------------------------------------------------------------------------------------

TABLE = torch.linspace(0.1, 1, 10)
LOSSES: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "gather": lambda m, x, t: m(x * TABLE.gather(-1, (t * 10).long()).view(-1, 1, 1)),
    "index_select": lambda m, x, t: m(x * TABLE.index_select(0, (10 * t).to(torch.int64)).view(-1, 1, 1)),
    "take": lambda m, x, t: m(x * torch.take(TABLE, torch.bucketize(t, TABLE[:-1])).view(-1, 1, 1)),
    "embedding": lambda m, x, t: m(x * nn.functional.embedding((t * 10).int(), TABLE[:, None])[..., None]),
    "distribution": lambda m, x, t: torch.distributions.Normal(m(x), 1.0).log_prob(x),
    "entropy": lambda m, x, t: nn.functional.binary_cross_entropy(m(x).sigmoid(), (x > 0).float(), reduction="none"),
    "multinomial": lambda m, x, t: m(x + torch.multinomial(x.softmax(-1).flatten(0, 1), 1).view(4, 3, 1)),
    "keywords": lambda m, x, t: m(torch.sort(input=x, dim=1)[0] + torch.gather(input=x, dim=1, index=(x > 0).long())),
}


@pytest.mark.parametrize("name", LOSSES)
def test_grouped_serves_common_losses(name: str) -> None:
    """Tables looked up by every op, continuous timesteps, and ops that refuse NaN."""
    torch.manual_seed(0)
    model, x, t = nn.Linear(4, 4), torch.randn(4, 3, 4), torch.rand(4)
    cg = ClusterGradients(model, 2)

    def loss_fn(x: Tensor, t: Tensor) -> Tensor:
        torch.manual_seed(0)
        return LOSSES[name](model, x, t).square().flatten(1).mean(1)

    assert error(model, cg, loss_fn, (x, t), CLUSTER) < EXACT
    assert "'grouped'" in cg.explain()


def test_complex_samples_that_meet_are_found() -> None:
    model, z = nn.Linear(4, 4), torch.randn(4, 4, dtype=torch.complex64)
    cg = ClusterGradients(model, 2)
    cg(lambda z: (model(z.real + 1e-4 * z.imag.roll(1, 0)) - z.real).square().mean(1), (z,), CLUSTER)
    assert "'loop'" in cg.explain()
    cg = ClusterGradients(model, 2)
    cg(lambda z: (model(z.real + z.imag) - z.real).square().mean(1), (z,), CLUSTER)
    assert "'grouped'" in cg.explain()


def test_a_history_of_losses_stays_a_table() -> None:
    torch.manual_seed(0)
    model, history = nn.Linear(4, 4), torch.ones(10)

    def loss_fn(x: Tensor, t: Tensor) -> Tensor:
        losses = (model(x * history[t].view(-1, 1, 1)) - x).square().flatten(1).mean(1)
        history.index_add_(0, t, losses.detach())
        return losses

    cg = ClusterGradients(model, 2, "grouped")
    for _ in range(3):
        cg(loss_fn, (torch.randn(4, 3, 4), torch.randint(10, (4,))), CLUSTER)
    assert history.isfinite().all()


@pytest.mark.parametrize(
    "place",
    [
        lambda x, t: x[torch.randperm(4)],
        lambda x, t: x[torch.tensor(t.argsort().tolist())],
        lambda x, t: x[torch.from_numpy(t.numpy().argsort()).long() + 0],
        lambda x, t: nn.functional.embedding(t.argsort(), x.flatten(1)).view_as(x),
        lambda x, t: x.flatten(1)[..., t.argsort(), :].view_as(x),
    ],
)
def test_rows_placed_by_values_are_refused_though_they_happen_to_be_in_place(place: Callable[..., Tensor]) -> None:
    model = nn.Linear(4, 4)
    x, t = torch.randn(4, 3, 4), torch.arange(4)
    seed = next(s for s in range(1000) if torch.equal(_permutation(s), torch.arange(4)))
    other = next(s for s in range(1000) if torch.equal(_permutation(s), torch.tensor([1, 0, 3, 2])))

    def loss_fn(x: Tensor, t: Tensor) -> Tensor:
        torch.manual_seed(seed if t[0] == 0 else other)
        return (model(place(x, t)) - x).square().flatten(1).mean(1)

    with pytest.raises(GroupingError, match=r"by the values|rows of other samples"):
        ClusterGradients(model, 2, "grouped", audit=None)(loss_fn, (x, t), CLUSTER)
    cg = ClusterGradients(model, 2, "grouped")  # probes every batch, so that the one in order is right
    assert error(model, cg, loss_fn, (x, t), CLUSTER) < EXACT
    with pytest.raises(GroupingError, match=r"mixes samples|floating-point values"):
        cg(loss_fn, (x, torch.tensor([1, 0, 3, 2])), CLUSTER)


def _permutation(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randperm(4)


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_codes_tell_any_two_samples_apart() -> None:
    for B in (1, 2, 3, 20, 64, 65):
        codes = torch.stack(binary_codes(B, torch.device("cpu")))  # [sets, B]
        apart = (codes[:, :, None] & ~codes[:, None, :]).any(0)
        assert torch.equal(apart, ~torch.eye(B, dtype=torch.bool))
    a, b = random_code(9, 3, torch.device("cpu"))
    assert torch.equal(a, ~b)


def test_which_ops_lose_track_of_the_samples() -> None:
    x, index, mask, rows = torch.randn(4, 3), torch.tensor([1, 0, 2, 3]), torch.rand(4, 3) > 0.5, torch.arange(4)
    varying = {id(t) for t in (x, index, mask)}
    varies = lambda t: isinstance(t, Tensor) and id(t) in varying  # noqa: E731
    column = index[:, None]
    varying.add(id(column))
    lost: list[tuple[Any, tuple[Any, ...]]] = [
        (Tensor.__getitem__, (x, mask)), (Tensor.__getitem__, (x, index)), (torch.masked_select, (x, mask)),
        (torch.index_select, (x, 0, index)), (torch.gather, (x, 0, column)), (Tensor.sort, (x, 0)),
        (torch.argsort, (index,)), (Tensor.nonzero, (mask,)), (torch.where, (mask,)), (torch.unique, (x,)),
        (Tensor.__setitem__, (x, mask, x[mask])), (torch.repeat_interleave, (x, index, 0)),
        (Tensor.scatter_add, (x, 0, column, x)), (Tensor.masked_scatter, (x, mask, x)),
    ]  # fmt: skip
    varying.add(id(lost[10][1][2]))
    for func, args in lost:
        assert loses_track(func, args, {}, varies, varies), func
    kept: list[tuple[Any, tuple[Any, ...]]] = [
        (Tensor.__getitem__, (x, rows)), (Tensor.__getitem__, (x, (slice(None), index))), (Tensor.sort, (x, 1)),
        (Tensor.__getitem__, (x, (rows, index))), (torch.gather, (x, 1, column)), (torch.where, (mask, x, x)),
        (Tensor.__setitem__, (x, mask, 0.0)), (torch.topk, (x, 2)), (torch.index_select, (x, 1, index)),
        (Tensor.__getitem__, (x, (None, Ellipsis, index))), (torch.cat, ([x, x], 1)),
    ]  # fmt: skip
    for func, args in kept:
        assert not loses_track(func, args, {}, varies, varies), func
