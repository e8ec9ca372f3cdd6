"""`grouped` where the batch is not the first dimension: a probe shows to which sample each row belongs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from antdiff import BalancedBackward, ClusterGradients, balancing
from antdiff.gradients import GroupingError
from antdiff.gradients.grouped.layout import Layout, decode
from antdiff.gradients.probe import binary_codes

B, L, D, K = 6, 4, 8, 3
CLUSTER = torch.tensor([2, 0, 1, 0, 2, 0])
# Float64 sums of some hundred terms, in another order. Rows of the wrong samples differ by 0.1 and more.
EXACT = 1e-10


class Block(nn.Module):
    """Every kind of rule that a layout with the batch further back can meet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.rms = nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D), nn.RMSNorm(D)
        self.bias, self.gain = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(1, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.a(self.norm(x)) * self.gain + self.bias)
        return x + self.b(self.rms(h))


class SequenceFirst(nn.Module):
    def __init__(self, tokens: int = L) -> None:
        super().__init__()
        self.block, self.positions = Block(), nn.Parameter(torch.randn(tokens, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.transpose(0, 1) + self.positions).transpose(0, 1)


class Heads(nn.Module):
    """``[sequence, batch, heads, channels]``, with a scale per position and head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(D // 2), nn.Parameter(torch.randn(L, 1, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x.transpose(0, 1).unflatten(-1, (2, D // 2))) * self.scale
        return h.flatten(2).transpose(0, 1)


class TwoBatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.block(torch.cat([x, x.square()])).chunk(2)  # row r belongs to sample r mod B
        return first * second


class OneByOne(nn.Module):
    """One sample after the other, and packed into one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.packed = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.each(sample)[:-1] for sample in x]
        rows = self.packed(torch.cat(parts[::-1])).split(L - 1)[::-1]
        return torch.stack([F.pad(r, (0, 0, 0, 1)) for r in rows])


class Chunks(nn.Module):
    """Convolutions and group norms of five frames at a time, across samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(D, D, 1), nn.GroupNorm(2, D)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.flatten(0, 1)[..., None]
        return torch.cat([self.norm(self.conv(part)) for part in frames.split(5)])[..., 0].view_as(x)


class Checkpointed(SequenceFirst):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Reentrant(SequenceFirst):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "sequence first": SequenceFirst,
    "sequence first, as many tokens as divide by the batch": lambda: SequenceFirst(2 * B),
    "heads": Heads,
    "two batches": TwoBatches,
    "one by one": OneByOne,
    "chunks": Chunks,
    "a checkpoint": Checkpointed,
}


def case(make: Callable[[], nn.Module]) -> tuple[nn.Module, Callable[..., Tensor], Tensor]:
    torch.manual_seed(0)
    model = make().double()
    tokens = len(model.positions) if isinstance(model, SequenceFirst) else L
    x = torch.randn(B, tokens, D, dtype=torch.float64)
    return model, lambda x: (model(x) - x.flip(-1)).square().flatten(1).mean(1), x


def plain_rows(model: nn.Module, loss_fn: Callable[..., Tensor], *batch: Tensor) -> list[Tensor]:
    """The definition: a backward per cluster on the samples of the cluster alone."""
    rows = []
    for i in range(K):
        loss = loss_fn(*(x[i == CLUSTER] for x in batch)).mean()
        rows.append(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))
    return [torch.stack(x) for x in zip(*rows, strict=True)]


def worst(got: list[Any], want: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_are_those_of_the_clusters(name: str) -> None:
    model, loss_fn, x = case(NETWORKS[name])
    cg = ClusterGradients(model, K, "grouped")
    for _ in range(3):  # the first call is probed, and the others use what the probe has found
        x = torch.randn_like(x)
        assert worst(cg(loss_fn, (x,), CLUSTER).rows, plain_rows(model, loss_fn, x)) < EXACT
    assert cg.verify(loss_fn, (x,), CLUSTER) < EXACT


@pytest.mark.parametrize("name", NETWORKS)
def test_without_held_rows(name: str) -> None:
    model, loss_fn, x = case(NETWORKS[name])
    want = plain_rows(model, loss_fn, x)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    jacobian = ClusterGradients(model, K, "grouped", hold="gram")(loss_fn, (x,), CLUSTER)
    flat = torch.cat([w.flatten(1) for w in want], 1)
    torch.testing.assert_close(jacobian.gram(), flat @ flat.T, rtol=EXACT, atol=0)
    jacobian.combine(weights)
    combined = [torch.einsum("k,k...->...", weights, w) for w in want]
    assert worst([p.grad for p in model.parameters()], combined) < EXACT


@pytest.mark.parametrize("name", NETWORKS)
def test_micro_batches(name: str) -> None:
    model, loss_fn, x = case(NETWORKS[name])
    backward = BalancedBackward(model, balancing.PCGrad(), K, "grouped", micro_batch=2)
    backward(loss_fn, (x,), CLUSTER)
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    BalancedBackward(model, balancing.PCGrad(), K, "split")(loss_fn, (x,), CLUSTER)
    assert worst(got, [p.grad for p in model.parameters() if p.grad is not None]) < EXACT


def test_another_batch_size_has_other_layouts() -> None:
    model, loss_fn, x = case(SequenceFirst)
    cg = ClusterGradients(model, K, "grouped")
    cg(loss_fn, (x,), CLUSTER)
    cluster = torch.tensor([1, 0, 2, 0])
    more = torch.randn(L, L, D, dtype=torch.float64)  # as many tokens as samples
    got = cg(loss_fn, (more,), cluster).rows
    want = ClusterGradients(model, K, "split")(loss_fn, (more,), cluster).rows
    assert worst(got, want) < EXACT  # type: ignore[arg-type]


def test_a_reentrant_checkpoint_is_refused() -> None:
    model, loss_fn, x = case(Reentrant)
    with pytest.raises(GroupingError, match="checkpoint recomputes an op"):
        ClusterGradients(model, K, "grouped")(lambda x: loss_fn(x.clone()), (x,), CLUSTER)


def test_a_group_norm_whose_gradient_is_a_slice() -> None:
    torch.manual_seed(0)
    norm, weight = nn.GroupNorm(2, D).double(), torch.randn(D, 2 * L, dtype=torch.float64)

    def loss_fn(x: Tensor) -> Tensor:
        return (torch.cat([x, norm(x)], -1) * weight).sum(1).square().mean(1)

    x = torch.randn(B, D, L, dtype=torch.float64)
    got = ClusterGradients(norm, K, "grouped", audit=None)(loss_fn, (x,), CLUSTER).rows
    assert worst(got, plain_rows(norm, loss_fn, x)) < EXACT


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.transpose(0, 1))  # [L, B, D]
        return self.b(h + 1e-9 * h.roll(1, 1)).transpose(0, 1)


class CommonRow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(torch.cat([x[:, 0], x.new_ones(1, D)]))  # the last row belongs to every sample
        return x * rows[:B, None] + rows[-1]


@pytest.mark.parametrize("make", [Mixing, CommonRow])
def test_rows_of_several_samples_are_refused(make: Callable[[], nn.Module]) -> None:
    model, loss_fn, x = case(make)
    with pytest.raises(GroupingError, match=r"has not shown one sample for each row|the loss mixes samples"):
        ClusterGradients(model, K, "grouped")(loss_fn, (x,), CLUSTER)


class Reordered(nn.Module):
    """Puts the tokens that the mask of a sample keeps first, or those of another sample."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.before, self.after, self.own = nn.Linear(D, D), nn.Linear(D, D), own

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.before(x)
        if not self.own:
            h = h.flatten(0, 1)
            return self.after(torch.cat([h[mask.flatten()], h[~mask.flatten()]])).view_as(x)
        return self.after(torch.stack([torch.cat([a[m], a[~m]]) for a, m in zip(h, mask, strict=True)]))


def test_rows_that_stay_with_their_sample_may_be_placed_by_values() -> None:
    torch.manual_seed(0)
    model = Reordered(own=True).double()
    weight = torch.randn(L, D, dtype=torch.float64)

    def loss_fn(x: Tensor, mask: Tensor) -> Tensor:
        return (model(x, mask) * weight).square().flatten(1).mean(1)

    cg = ClusterGradients(model, K, "grouped")
    for _ in range(3):
        x, mask = torch.randn(B, L, D, dtype=torch.float64), torch.rand(B, L) < 0.5
        assert worst(cg(loss_fn, (x, mask), CLUSTER).rows, plain_rows(model, loss_fn, x, mask)) < EXACT
    auto = ClusterGradients(model, K)
    auto(loss_fn, (x, mask), CLUSTER)
    assert auto.explain().startswith("route 'split': not 'grouped': torch.Tensor.__getitem__ places rows by")
    other = Reordered(own=False).double()  # moves rows to places of other samples, and every batch is probed

    def packed(x: Tensor, mask: Tensor) -> Tensor:
        rows = (other(x, mask) * 1.0).flatten(0, 1)
        flat, back = mask.flatten(), torch.empty(B * L, dtype=torch.int64)
        back[torch.cat([flat.nonzero(), (~flat).nonzero()]).flatten()] = torch.arange(B * L)
        return (rows[back].view_as(x) * weight).square().flatten(1).mean(1)

    cg = ClusterGradients(other, K, "grouped")
    for _ in range(3):
        x, mask = torch.randn(B, L, D, dtype=torch.float64), torch.rand(B, L) < 0.5
        got, per_sample = cg(packed, (x, mask), CLUSTER).rows, packed(x, mask)
        want = [torch.stack(w) for w in zip(*(torch.autograd.grad(per_sample[i == CLUSTER].mean(),
                list(other.parameters()), retain_graph=True) for i in range(K)), strict=True)]  # fmt: skip
        assert worst(got, want) < EXACT


class Dropped(nn.Module):
    def __init__(self, put_back: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after, self.put_back = nn.Linear(D, D), nn.Linear(D, D), put_back

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.before(x).clone()
        h[mask] = self.put_back(h[mask], mask)
        return self.after(h)


def test_a_mask_puts_its_rows_back() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(B, L, D, dtype=torch.float64), torch.rand(B, L) < 0.5
    for put_back, is_right in ((lambda rows, m: 0.5 * rows, True), (lambda rows, m: rows.flip(0), False)):
        model = Dropped(put_back).double()
        loss_fn: Callable[..., Tensor] = lambda x, m, net=model: net(x, m).square().flatten(1).mean(1)  # noqa: E731
        cg = ClusterGradients(model, K, "grouped")
        if is_right:
            assert worst(cg(loss_fn, (x, mask), CLUSTER).rows, plain_rows(model, loss_fn, x, mask)) < EXACT
        else:
            with pytest.raises(GroupingError, match="reached"):
                cg(loss_fn, (x, mask), CLUSTER)


def test_decoding_tells_one_sample_from_none_and_from_several() -> None:
    codes = binary_codes(B, torch.device("cpu"))

    def seen(depends: Tensor) -> list[list[Tensor]]:  # bool [*lead, B]
        return [[(depends & code).any(-1)] for code in codes]

    owners = torch.tensor([[3, 0], [5, 5], [1, 2]])
    layout = decode(seen(F.one_hot(owners, B).bool()), codes)
    assert layout is not None
    assert torch.equal(layout.owners, owners)
    assert decode(seen(torch.zeros(4, B, dtype=torch.bool)), codes) is None
    several = F.one_hot(torch.tensor([0, 1, 2]), B).bool()
    several[1, 4] = True
    assert decode(seen(several), codes) is None


def test_layouts_serve_any_clusters() -> None:
    from antdiff.gradients.batch import ClusteredBatch

    samples, _ = ClusteredBatch.of(CLUSTER, K).sort((CLUSTER,))
    layout = Layout(torch.tensor([[0, 1], [2, 3], [4, 5]]))
    rows = layout.rows(samples)
    assert rows is layout.rows(samples)
    assert rows.cluster.tolist() == [0, 0, 0, 1, 2, 2]
    assert rows.sizes == [3, 1, 2]
    assert rows.order is None
    assert Layout(torch.tensor([5, 0, 3])).rows(samples).order is not None
