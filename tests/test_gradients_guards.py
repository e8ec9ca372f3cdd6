"""Every way in which cluster gradients could be silently wrong triggers a guard, and `auto` avoids it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradient_cases import LAYERS, B, Checkpointed, DiT, K, Tied, by_hand, cluster_ids, diffusion_batch, worst
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from antdiff.gradients import ClusterGradients, GroupingError
from antdiff.gradients.grouped.mode import GroupedMode

EXACT = 1e-11  # as in test_gradients_grouped


class Net(nn.Module):
    """Linear, ``middle``, Linear, for B = 20 samples ``[B, N, 8]``."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.middle = nn.Linear(8, 8), nn.Linear(8, 8), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.middle(self.a(x))))


class SequenceFirst(nn.Module):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.a, self.tokens = nn.Linear(8, 8), tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.transpose(0, 1).contiguous()).transpose(0, 1)


class Twice(torch.autograd.Function):
    """An op that a torch function mode does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).flatten(0, 1).sum(0)


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.secret = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return Twice.apply(self.a(x), self.secret)


class NoRule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(8, 8), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cosine_similarity(self.a(x)[:, :, None], self.w, dim=-1)


def center(h: Tensor) -> Tensor:
    return h - h.mean(0)


def shifted(h: Tensor) -> Tensor:
    return h + 0.1 * h.roll(1, 0)


def attend(h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*[h.transpose(0, 1)] * 3).transpose(0, 1)


def case(model: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor], tuple[Tensor]]:
    torch.manual_seed(0)
    model = model.double()
    x = torch.randn(B, getattr(model, "tokens", 6), 8, dtype=torch.float64)
    return model, lambda x: model(x).flatten(1).square().mean(1), (x,)


BATCH_NORMS = {
    "affine": lambda: Net(nn.BatchNorm1d(6)),
    "not affine": lambda: Net(nn.BatchNorm1d(6, affine=False)),
    "no statistics kept": lambda: Net(nn.BatchNorm1d(6, track_running_stats=False)).eval(),
}


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_norm_is_refused_and_loop_serves(name: str) -> None:
    model, loss_fn, batch = case(BATCH_NORMS[name]())
    cluster = cluster_ids()
    for route in ("grouped", "split"):
        with pytest.raises(GroupingError, match=r"middle .BatchNorm1d. takes the statistics of the batch"):
            ClusterGradients(model, K, route)(loss_fn, batch, cluster)
    cg = ClusterGradients(model, K)
    assert worst(cg(loss_fn, batch, cluster).rows, by_hand(model, loss_fn(*batch), cluster)) < EXACT
    assert cg.explain().startswith("route 'loop': middle (BatchNorm1d)")


@pytest.mark.parametrize("affine", [True, False])
def test_functional_batch_norm_is_refused_where_it_runs(affine: bool) -> None:
    def norm(h: Tensor) -> Tensor:
        ones = torch.ones(6, dtype=h.dtype) if affine else None
        return F.batch_norm(h, None, None, ones, training=True)

    model, loss_fn, batch = case(Net(norm))
    with pytest.raises(GroupingError, match="BatchNorm in training mode mixes"):
        ClusterGradients(model, K, "grouped")(loss_fn, batch, cluster_ids())
    with pytest.raises(GroupingError, match="reached the losses"):
        ClusterGradients(model, K, "split").verify(loss_fn, batch, cluster_ids())
    cg = ClusterGradients(model, K)
    assert worst(cg(loss_fn, batch, cluster_ids()).rows, by_hand(model, loss_fn(*batch), cluster_ids())) < EXACT
    assert "route 'loop'" in cg.explain()


@pytest.mark.parametrize("mix", [center, shifted, attend], ids=lambda f: f.__name__)
def test_ops_that_mix_samples_are_found_and_named(mix: Callable[[Tensor], Tensor]) -> None:
    model, loss_fn, batch = case(Net(mix))
    cluster = cluster_ids()
    with pytest.raises(GroupingError, match=r"where b\.weight, b\.bias meets? the batch, the values of some samples"):
        ClusterGradients(model, K, "grouped").verify(loss_fn, batch, cluster)
    with pytest.raises(GroupingError, match="mixes samples"):
        ClusterGradients(model, K, "split").verify(loss_fn, batch, cluster)
    cg = ClusterGradients(model, K)
    assert worst(cg(loss_fn, batch, cluster).rows, by_hand(model, loss_fn(*batch), cluster)) < EXACT
    assert "not 'grouped'" in cg.explain()
    assert "not 'split'" in cg.explain()


def test_a_loss_over_the_batch_is_found() -> None:
    model, _, batch = case(Net(torch.tanh))

    def contrastive(x: Tensor) -> Tensor:
        h = F.normalize(model(x).flatten(1))
        return F.cross_entropy(h @ h.T, torch.arange(len(h)), reduction="none")

    for route in ("grouped", "split"):
        with pytest.raises(GroupingError, match=r"mixes samples"):
            ClusterGradients(model, K, route).verify(contrastive, batch, cluster_ids())
    cg = ClusterGradients(model, K)
    assert worst(cg(contrastive, batch, cluster_ids()).rows, by_hand(model, contrastive(*batch), cluster_ids())) < EXACT


def test_numbers_find_what_swallows_nan() -> None:
    model, loss_fn, batch = case(Net(lambda h: h + torch.nan_to_num(h).mean(0)))
    with pytest.raises(GroupingError, match=r"differs from 'loop' by .* in the gradient of"):
        ClusterGradients(model, K, "grouped").verify(loss_fn, batch, cluster_ids())


def test_sequence_first_layout() -> None:
    for tokens in (6, 2 * B):  # no multiple of 20, and a multiple, which only the probe can tell from a batch
        model, loss_fn, batch = case(SequenceFirst(tokens))
        want = by_hand(model, loss_fn(*batch), cluster_ids())
        known = ClusterGradients(model, K, "grouped")
        assert worst(known(loss_fn, batch, cluster_ids()).rows, want) < EXACT
        assert known.verify(loss_fn, batch, cluster_ids()) < EXACT
        unchecked = ClusterGradients(model, K, "grouped", audit=None)
        if tokens % B:
            with pytest.raises(GroupingError, match="first dimension is no multiple of the batch size 20"):
                unchecked(loss_fn, batch, cluster_ids())
        cg = ClusterGradients(model, K)
        assert worst(cg(loss_fn, batch, cluster_ids()).rows, want) < EXACT
        assert cg.explain().startswith("route 'split': not 'grouped'")


def test_gradients_past_the_rules_are_a_leak() -> None:
    model, loss_fn, batch = case(Hidden())
    with pytest.raises(GroupingError, match="secret received a gradient that is not split by cluster"):
        ClusterGradients(model, K, "grouped")(loss_fn, batch, cluster_ids())
    assert all(p.grad is None for p in model.parameters())
    cg = ClusterGradients(model, K)
    assert worst(cg(loss_fn, batch, cluster_ids()).rows, by_hand(model, loss_fn(*batch), cluster_ids())) < EXACT
    assert cg.explain().startswith("route 'split': not 'grouped': secret received")


def test_an_op_without_a_rule_is_named_before_any_backward() -> None:
    model, loss_fn, batch = case(NoRule())
    want = by_hand(model, loss_fn(*batch), cluster_ids())
    with pytest.raises(GroupingError, match=r"torch.*cosine_similarity applies w to the batch .* no grouped rule"):
        ClusterGradients(model, K, "grouped")(loss_fn, batch, cluster_ids())
    declared = ClusterGradients(model, K, "grouped", separable=[torch.cosine_similarity])
    assert worst(declared(loss_fn, batch, cluster_ids(shuffled=True)).rows, by_hand(
        model, loss_fn(*batch), cluster_ids(shuffled=True))) < EXACT  # fmt: skip
    cg = ClusterGradients(model, K)
    assert worst(cg(loss_fn, batch, cluster_ids()).rows, want) < EXACT
    assert "cosine_similarity" in cg.explain()


def test_gradients_inside_the_forward() -> None:
    model, _, (x,) = case(Tied())

    def penalty(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.flatten(1).square().mean(1)

    with pytest.raises(GroupingError, match="the forward computes a gradient"):
        ClusterGradients(model, K, "grouped")(penalty, (x,), cluster_ids())
    cg = ClusterGradients(model, K)
    assert worst(cg(penalty, (x,), cluster_ids()).rows, by_hand(model, penalty(x), cluster_ids())) < EXACT
    assert cg.explain().startswith("route 'split': not 'grouped': the forward computes a gradient")


def test_losses_that_cannot_be_repeated_are_not_trusted() -> None:
    model, _, batch = case(Net(torch.tanh))
    seeds = iter(range(1000))  # an iterator is not rewound

    def noisy(x: Tensor) -> Tensor:
        hidden = torch.Generator().manual_seed(next(seeds))
        return (model(x) + torch.randn(x.shape, generator=hidden, dtype=x.dtype)).flatten(1).square().mean(1)

    cg = ClusterGradients(model, K)
    cg(noisy, batch, cluster_ids())
    assert cg.explain().startswith("route 'split': loss_fn gives different losses")


@pytest.mark.parametrize("make", LAYERS, ids=lambda m: m.__name__)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_sound_networks_pass(make: Callable[[], nn.Module]) -> None:
    model, loss_fn, batch = case(make())
    before = torch.get_rng_state()
    for route in ("grouped", "auto"):
        assert ClusterGradients(model, K, route).verify(loss_fn, batch, cluster_ids(shuffled=True)) < 1e-10
    assert torch.equal(before, torch.get_rng_state())
    cg = ClusterGradients(model, K)
    cg(loss_fn, batch, cluster_ids())
    assert cg.explain().startswith("route 'grouped': in 10 probes of 20 samples no sample reaches")


def test_checks_leave_everything_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(6, 6, 1), nn.InstanceNorm1d(6, affine=True, track_running_stats=True)).double()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    x = torch.randn(B, 6, 8, dtype=torch.float64)
    loss_fn = lambda x: model(x).flatten(1).square().mean(1)  # noqa: E731
    kept = {name: b.clone() for name, b in model.named_buffers()}
    ClusterGradients(model, K, "grouped").verify(loss_fn, (x,), cluster_ids())
    assert all(torch.equal(b, kept[name]) for name, b in model.named_buffers())
    assert model[0].weight.grad.eq(1).all()


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_dropout_draws_what_a_plain_step_draws(drop: float) -> None:
    torch.manual_seed(0)
    model, batch, cluster = DiT(drop=drop).double(), diffusion_batch(), cluster_ids()

    def loss_fn(x: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        return (model(x, t, y) - noise).flatten(1).square().mean(1)

    torch.manual_seed(3)
    want = by_hand(model, loss_fn(*batch), cluster)
    after = torch.rand(1)
    cg = ClusterGradients(model, K, "grouped")
    torch.manual_seed(3)
    assert worst(cg(loss_fn, batch, cluster).rows, want) < EXACT
    assert torch.equal(torch.rand(1), after)
    assert cg.verify(loss_fn, batch, cluster) < 1e-10


def test_the_batch_form() -> None:
    model, loss_fn, (x,) = case(Tied())
    cg = ClusterGradients(model, K)
    with cg.record(cluster_ids()) as recording:
        recording.backward(loss_fn(x))
        with pytest.raises(ValueError, match="must be called once, inside the with block"):
            recording.backward(loss_fn(x))
    with pytest.raises(ValueError, match="must be called once, inside the with block"):
        recording.backward(loss_fn(x))
    with pytest.raises(ValueError, match="one loss for each sample"), cg.record(cluster_ids()) as recording:
        recording.backward(loss_fn(x).mean())
    with (
        pytest.raises(ValueError, match="runs it slice by slice"),
        ClusterGradients(model, K, "split").record(cluster_ids()),
    ):
        pass
    model.a.weight.grad = torch.ones_like(model.a.weight)
    for route in ("grouped", "loop"):
        cg = ClusterGradients(model, K, route)
        cluster = cluster_ids(shuffled=True)
        with cg.record(cluster) as recording:
            jacobian = recording.backward(loss_fn(x))
        assert worst(jacobian.rows, by_hand(model, loss_fn(x), cluster)) < EXACT
        assert model.a.weight.grad.eq(1).all()
    with pytest.raises(KeyError), cg.record(cluster_ids()):
        raise KeyError
    model(x)  # the mode is no longer active
    assert worst(cg(loss_fn, (x,), cluster).rows, by_hand(model, loss_fn(x), cluster)) < EXACT


def test_a_wrapper_that_hides_the_gradients_is_refused() -> None:
    """DistributedDataParallel and FSDP2 are supported (tests/test_distributed.py). The first FSDP is not."""

    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    with pytest.raises(TypeError, match=r"which hides p\.grad"):
        ClusterGradients(FullyShardedDataParallel(), K)


def test_a_network_of_checkpoints_keeps_its_memory_low() -> None:
    """Recomputed forwards are recorded, and the tensors that taps save pass through the hooks of the checkpoint."""
    torch.manual_seed(0)
    saved = []
    model = Checkpointed(nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]), reentrant=False).double()
    x = torch.randn(B, 6, 8, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        ClusterGradients(model, K, "grouped", audit=None)(
            partial(lambda m, x: m(x).flatten(1).square().mean(1), model), (x,), cluster_ids()
        )
    assert sum(shape == x.shape for shape in saved) < 6


# ---- changes between calls, and unusual batches ------------------------------------------------------------------


def mean_square(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).abs().square().flatten(1).mean(1)


@pytest.mark.parametrize("route", ["grouped", "split", "loop"])
def test_a_parameter_that_replaces_another_gets_its_gradient(route: Any) -> None:
    torch.manual_seed(0)
    model, x = Net(torch.nn.Identity()).double(), torch.randn(B, 3, 8, dtype=torch.float64)
    cg = ClusterGradients(model, K, route)
    cg(mean_square(model), (x,), cluster_ids())
    model.b = nn.Linear(8, 5).double()
    J = cg(mean_square(model), (x,), cluster_ids()).rows
    assert [None if rows is None else rows.shape[1:] for rows in J] == [p.shape for p in model.parameters()]
    assert worst(J, by_hand(model, mean_square(model)(x), cluster_ids())) < EXACT
    assert all(p.grad is None for p in model.parameters())

    def replaced_within() -> None:
        with cg.accumulate() as total:
            total.add(mean_square(model), (x,), cluster_ids())
            model.b = nn.Linear(8, 5).double()
            total.add(mean_square(model), (x,), cluster_ids())

    with pytest.raises(ValueError, match="replaced between two micro-batches"):
        replaced_within()


class Spectral(nn.Module):
    """Products of complex numbers, such as Fourier coefficients. The weights are pairs of real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.v, self.w = nn.Linear(8, 8), nn.Parameter(torch.randn(5, 4, 2)), nn.Parameter(torch.randn(3, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        v, w = map(torch.view_as_complex, (self.v, self.w))
        return F.linear(torch.einsum("bnc,cd->bnd", torch.fft.rfft(self.a(x), dim=-1), v), w)


def test_complex_products_are_conjugated() -> None:
    torch.manual_seed(0)
    model, x = Spectral().double(), torch.randn(B, 3, 8, dtype=torch.float64)
    J = ClusterGradients(model, K, "grouped")(mean_square(model), (x,), cluster_ids()).rows
    assert worst(J, by_hand(model, mean_square(model)(x), cluster_ids())) < EXACT


def test_auto_is_not_misled_by_a_first_batch_of_one_cluster() -> None:
    torch.manual_seed(0)
    model, x = Net(torch.nn.Identity()).double(), torch.randn(B, 3, 8, dtype=torch.float64)

    def both(x: Tensor) -> Tensor:  # row r belongs to sample r mod B, not to sample r // 2
        first, second = mean_square(model)(torch.cat([x, 2 * x])).chunk(2)
        return first + second

    cg = ClusterGradients(model, K)
    cg(both, (x,), torch.full((B,), 2))
    assert "route 'split'" in cg.explain()
    assert worst(cg(both, (x,), cluster_ids()).rows, by_hand(model, both(x), cluster_ids())) < EXACT


class Listed(Net):
    """A table with one row per token, which torch does not find because it is in a list."""

    def __init__(self, tokens: int) -> None:
        super().__init__(torch.nn.Identity())
        self.tables = [torch.randn(tokens, 8, dtype=torch.float64)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.a(self.tables[0])


def test_tensors_in_lists_of_the_network_are_shared() -> None:
    torch.manual_seed(0)
    model, x = Listed(B).double(), torch.randn(B, B, 8, dtype=torch.float64)
    J = ClusterGradients(model, K, "grouped")(mean_square(model), (x,), cluster_ids()).rows
    assert worst(J, by_hand(model, mean_square(model)(x), cluster_ids())) < EXACT


def test_a_batch_without_backward_is_said() -> None:
    model = Net(torch.nn.Identity())
    with (
        pytest.raises(ValueError, match=r"must be followed by one recording\.backward"),
        ClusterGradients(model, K, "grouped").record(cluster_ids()),
    ):
        model(torch.randn(B, 3, 8))


@pytest.mark.parametrize("hold", ["jacobian", "gram"])
def test_nothing_waits_for_the_garbage_collector(hold: Any) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.PReLU(8)), torch.randn(B, 8)
    bias = nn.Parameter(torch.zeros(8))
    model.register_parameter("bias", bias)
    cg, modes = ClusterGradients(model, K, "grouped", hold=hold, audit=None), []

    def loss_fn(x: Tensor) -> Tensor:
        modes.extend(weakref.ref(m) for m in _get_current_function_mode_stack() if isinstance(m, GroupedMode))
        return (model(x) + bias.exp()).square().mean(1)

    gc.collect()
    gc.disable()
    try:
        cg(loss_fn, (x,), cluster_ids()).combine(torch.ones(K))
        assert len(modes) == 1
        assert modes[0]() is None, "a cycle keeps the rows of tensors computed from parameters"
    finally:
        gc.enable()


def test_counts_of_a_batch_that_is_not_sorted() -> None:
    model, x = Net(torch.nn.Identity()), torch.randn(3, 3, 8)
    with pytest.raises(ValueError, match=r"ascending order, .* got id 2 instead of 1 at row 1"):
        ClusterGradients(model, K, "grouped")(
            mean_square(model), (x,), torch.tensor([0, 2, 1]), counts=[1, 1, 1, *[0] * (K - 3)]
        )


@pytest.mark.parametrize(
    "samples", [iter(["a cat"] * 6), memoryview(b"a cat."), [np.zeros((6, 2))] * 6], ids=["iterator", "view", "list"]
)
@pytest.mark.parametrize("route", ["split", "grouped", "loop"])
def test_samples_that_would_not_be_sorted_are_refused(samples: Any, route: Any) -> None:
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    cg = ClusterGradients(model, 3, route)
    with pytest.raises(TypeError, match=r"batch\[1\]\['captions'\] must .* with B=6. .*, or mark it antdiff.shared"):
        cg(lambda x, _: model(x).square().mean(1), (x, {"captions": samples}), torch.arange(6) % 3)
    J = cg(lambda x, _: model(x).square().mean(1), (x, ["a cat"] * 5), torch.arange(6) % 3).rows
    assert all(rows is not None and rows.any() for rows in J)
