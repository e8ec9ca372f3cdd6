"""The grouped route under torch.compile, where the rules of eager mode are traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._inductor.config
from gradient_cases import (
    LAYERS,
    Attention,
    B,
    Convolutions,
    DiT,
    Images,
    K,
    Products,
    Tables,
    Tied,
    WeightNorm,
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

from antdiff import BalancedBackward, ClusterGradients, balancing
from antdiff.gradients import GroupingError

pytestmark = [  # Dynamo itself triggers these warnings for tensors between two graphs and for autograd Functions
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script"),  # imported by Inductor
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),
]
EXACT = 1e-11  # as in test_gradients_grouped
TRACED = {"backend": "aot_eager", "fullgraph": True}


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def double(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return spread(make().double())


def squares(model: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).flatten(1).square().mean(1)


def sequences() -> Tensor:
    return torch.randn(B, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("make", LAYERS, ids=lambda m: m.__name__)
def test_layers(make: Callable[[], nn.Module]) -> None:
    model, x, cluster = double(make), sequences(), cluster_ids(shuffled=True)
    cg = ClusterGradients(model, K, "grouped", compile=TRACED)
    assert worst(cg(squares(model), (x,), cluster).rows, by_hand(model, squares(model)(x), cluster)) < EXACT
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_dit(reentrant: bool | None) -> None:
    model, (x, *rest), cluster = double(lambda: DiT(reentrant=reentrant)), diffusion_batch(), cluster_ids(shuffled=True)
    batch = (x.requires_grad_(reentrant is True), *rest)
    cg = ClusterGradients(model, K, "grouped", compile=TRACED)
    J = cg(denoising(model), batch, cluster).rows
    model.reentrant = None
    assert worst(J, by_hand(model, denoising(model)(*batch), cluster)) < EXACT


@pytest.mark.parametrize("make", [lambda: unet(16), transformer], ids=["unet", "transformer"])
def test_networks_of_diffusers(make: Callable[[], nn.Module]) -> None:
    pytest.importorskip("diffusers")
    model = double(make).eval()  # the transformer drops labels at random in training
    x, t, y, noise = diffusion_batch()
    batch, cluster = (x, t.long(), y % 10, noise), cluster_ids()
    loss_fn = denoising(lambda x, t, y: model(x, t, class_labels=y).sample)
    cg = ClusterGradients(model, K, "grouped", compile={"backend": "aot_eager"})
    assert worst(cg(loss_fn, batch, cluster).rows, by_hand(model, loss_fn(*batch), cluster)) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("eager_random", [False, True])
@torch._inductor.config.patch(fallback_random=False)
def test_inductor_with_random_numbers_in_the_loss(eager_random: bool) -> None:
    """Inductor has random numbers of its own, which no plain backward can repeat, unless it is told to use eager's."""
    torch._inductor.config.fallback_random = eager_random
    model = nn.Linear(8, 8)
    batch = (torch.randn(B, 8, generator=torch.Generator().manual_seed(0)),)

    def loss(x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        return (model(x + noise) - noise).square().mean(1)

    auto = ClusterGradients(model, K, compile={"backend": "inductor"})
    auto(loss, batch, cluster_ids())
    if eager_random:
        assert auto.explain().startswith("route 'grouped'")
        return
    assert "random numbers of eager PyTorch" in auto.explain()
    assert auto.explain().startswith("route 'split'")
    grouped = ClusterGradients(model, K, "grouped", compile={"backend": "inductor"})
    with pytest.raises(GroupingError, match="Draw noise and timesteps before loss_fn"):
        grouped(loss, batch, cluster_ids())


@pytest.mark.slow
def test_inductor() -> None:
    model, x, cluster = double(Images), sequences(), cluster_ids()
    cg = ClusterGradients(model, K, "grouped", compile={"fullgraph": True})
    for _ in range(2):
        assert worst(cg(squares(model), (x,), cluster).rows, by_hand(model, squares(model)(x), cluster)) < EXACT
    assert cg._local.network.compiled.programs == 1


class Small(nn.Module):
    def __init__(self, middle: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.a, self.b, self.middle = nn.Linear(8, 8), nn.Linear(8, 8), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self.a(x)))


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, **TRACED)  # type: ignore[return-value]


def in_place(model: nn.Module) -> nn.Module:
    model.compile(**TRACED)
    return model


def a_part(model: nn.Module) -> nn.Module:
    model.a = torch.compile(model.a, **TRACED)
    return model


def loss_alone(model: nn.Module) -> nn.Module:
    return model


@pytest.mark.parametrize("compiled", [whole, a_part, loss_alone, in_place], ids=lambda f: f.__name__)
def test_auto_traces_what_is_compiled(compiled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Any part of the network may be compiled. The user's own backend is used where torch reveals it."""
    eager = double(Small)
    model, x, cluster = compiled(double(Small)), sequences(), cluster_ids()
    loss_fn = squares(model)
    if compiled is loss_alone:
        loss_fn = torch.compile(loss_fn, **TRACED)
    if compiled in (loss_alone, in_place):  # torch does not reveal the backend, so the default would be used
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    cg = ClusterGradients(model, K)
    for _ in range(2):
        assert worst(cg(loss_fn, (x,), cluster).rows, by_hand(eager, squares(eager)(x), cluster)) < EXACT
    assert cg.explain().startswith("route 'grouped': in 10 probes of 20 samples no sample reaches")
    assert "compiled" in cg.explain()
    assert cg._local.network.compiled.programs == 1
    assert cg.verify(loss_fn, (x,), cluster) < 1e-10


def test_equal_counts_compile_once() -> None:
    """Other samples, other values of the parameters or a new loss function in every step need no new program."""
    model = double(Small)
    cg = ClusterGradients(model, 2, compile=TRACED, route="grouped")
    compiled = cg._local.network.compiled
    for step in range(3):
        x = torch.randn(8, 6, 8, dtype=torch.float64)
        cluster = torch.arange(8) // 4
        cluster = cluster.flip(0) if step == 1 else cluster
        J = cg(squares(model), (x,), cluster).rows
        assert worst(J, by_hand(model, squares(model)(x), cluster, 2)) < EXACT
        with torch.no_grad():
            model.a.weight.add_(0.1)
    assert compiled.programs == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    cluster[0] = 1 - cluster[0]  # other sizes need a second program for the same graph
    J = cg(squares(model), (x,), cluster).rows
    assert worst(J, by_hand(model, squares(model)(x), cluster, 2)) < EXACT
    assert compiled.programs == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    cg(squares(model), (x,), torch.arange(8) // 4)
    assert compiled.programs == 2


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    "make", [Tied, WeightNorm, Convolutions, Products, Tables, Attention], ids=lambda m: m.__name__
)
def test_counts_that_keep_changing_share_a_program(make: Callable[[], nn.Module]) -> None:
    """After k = 2 exact programs, one program serves any sizes. The backend "eager" runs the traced rules unchanged."""
    model, x = double(make), sequences()
    cg = ClusterGradients(model, 2, "grouped", compile={"backend": "eager"})
    for size in (10, 9, 12, 10, 11, 8):
        cluster = (torch.arange(B) >= size).long()
        J = cg(squares(model), (x,), cluster).rows
        assert worst(J, by_hand(model, squares(model)(x), cluster, 2)) < EXACT
    assert cg._local.network.compiled.programs == 3
    cluster = (torch.arange(B) >= 3).long()  # a larger room
    cg(squares(model), (x,), cluster)
    cg(squares(model), (x,), 1 - cluster)
    assert cg._local.network.compiled.programs == 4


def test_frozen_parameters_and_another_batch_are_seen() -> None:
    model, x = double(Small), sequences()
    cg = ClusterGradients(model, K, "grouped", compile=TRACED)
    cg(squares(model), (x,), cluster_ids())
    model.a.bias.requires_grad_(False)
    J = cg(squares(model), (x,), cluster_ids()).rows
    assert J[1] is None
    assert worst(J, by_hand(model, squares(model)(x), cluster_ids())) < EXACT
    x, cluster = x[:9], cluster_ids()[:9]
    assert worst(cg(squares(model), (x,), cluster).rows, by_hand(model, squares(model)(x), cluster)) < EXACT


def test_micro_batches_and_the_dtype_of_j() -> None:
    model, x, cluster = double(Small), sequences(), cluster_ids()
    want = by_hand(model, squares(model)(x), cluster)
    cg = ClusterGradients(model, K, "grouped", compile=TRACED)
    for _ in range(2):
        with cg.accumulate() as total:
            for piece in (slice(0, 3), slice(3, 15), slice(15, 20)):
                total.add(squares(model), (x[piece],), cluster[piece])
        assert worst(total.jacobian.rows, want) < EXACT
    half = ClusterGradients(model, K, "grouped", compile=TRACED, dtype=torch.bfloat16)
    rows = half(squares(model), (x,), cluster).rows
    assert worst(rows, want) < 2.0**-8
    assert {j.dtype for j in rows} == {torch.bfloat16}


def test_autocast_and_a_scaler() -> None:
    model, x, cluster = double(Small).float(), sequences().float(), cluster_ids()

    def loss_fn(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return squares(model)(x)

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    cg = ClusterGradients(model, K, "grouped", compile=TRACED)
    eager = ClusterGradients(model, K, "grouped")(loss_fn, (x,), cluster, scaler=scaler).rows
    # The products and their bfloat16 operands are the same. Compilers may omit the rounding between two ops.
    jacobian = cg(loss_fn, (x,), cluster, scaler=scaler)
    assert worst(jacobian.rows, eager) < 2.0**-7
    assert float(jacobian.loss_scale) == 8


def test_balanced_backward() -> None:
    model, x, cluster = double(Small), sequences(), cluster_ids()
    got = BalancedBackward(whole(model), balancing.PCGrad(update_every=2), K)
    for _ in range(2):  # first a traced call that solves, then one plain backward of the user's compiled model
        losses = got(squares(got.gradients.model), (x,), cluster).losses
        grads = [p.grad for p in model.parameters()]
        want = BalancedBackward(model, balancing.PCGrad(), K, route="loop")
        torch.testing.assert_close(losses, want(squares(model), (x,), cluster).losses)
        for a, p in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-12)


# ---- guards ----------------------------------------------------------------------------------------------------------


def test_graph_breaks_are_sound() -> None:
    """The result is either correct or an error: a parameter that is used between two graphs is a leak."""

    def breaks(h: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return h.tanh()

    model, x, cluster = double(lambda: Small(breaks)), sequences(), cluster_ids()
    cg = ClusterGradients(model, K, "grouped", compile={"backend": "aot_eager"})
    assert worst(cg(squares(model), (x,), cluster).rows, by_hand(model, squares(model)(x), cluster)) < EXACT

    @torch.compiler.disable
    def eager(h: Tensor) -> Tensor:
        return h * model.a.bias

    model.middle = eager
    with pytest.raises(GroupingError, match=r"a\.bias received a gradient that is not split by cluster"):
        cg(squares(model), (x,), cluster)
    auto = ClusterGradients(model, K, compile={"backend": "aot_eager"})
    assert worst(auto(squares(model), (x,), cluster).rows, by_hand(model, squares(model)(x), cluster)) < EXACT
    assert auto.explain().startswith("route 'split': 'grouped' does not compile: GroupingError: a.bias received")


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).flatten(0, 1).sum(0)


class Hazard(Small):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.kind == "hidden":
            return Twice.apply(h, self.b.bias)
        if self.kind == "no rule":
            return torch.cosine_similarity(h[..., None, :], self.b.weight, dim=-1)
        if self.kind == "batch norm":
            return nn.functional.batch_norm(h, None, None, training=True)
        return h.transpose(0, 1).contiguous() * self.b.bias.expand(6, 1, 8)  # sequence first


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hidden", r"b\.bias"),
        ("no rule", r"cosine_similarity applies b\.weight to the batch .* no grouped rule"),
        ("batch norm", "BatchNorm in training mode mixes"),
        ("sequence first", r"no multiple of the batch size|in a way that has no grouped rule"),
    ],
)
def test_hazards_are_found_while_tracing(kind: str, message: str) -> None:
    model, x = double(lambda: Hazard(kind)), sequences()
    cg = ClusterGradients(model, K, "grouped", compile={"backend": "aot_eager"})
    with pytest.raises(GroupingError, match=message):
        cg(squares(model), (x,), cluster_ids())
    assert all(p.grad is None for p in model.parameters())


def test_gradients_inside_the_forward() -> None:
    model, x = double(Tied), sequences()

    def penalty(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.flatten(1).square().mean(1)

    cg = ClusterGradients(model, K, "grouped", compile={"backend": "aot_eager"})
    # Dynamo breaks the graph at the gradient, and AOTAutograd has no second derivatives of the part before it.
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        cg(penalty, (x,), cluster_ids())


def test_the_batch_form_is_refused() -> None:
    cg = ClusterGradients(double(Small), K, "grouped", compile=TRACED)
    with pytest.raises(ValueError, match="cannot record a compiled forward"), cg.record(cluster_ids()):
        pass


def test_dropout_and_another_network_in_the_loss() -> None:
    """The values of a frozen teacher count as batch data. A trained teacher gets its plain gradient."""
    model, teacher, x, cluster = double(lambda: Small(nn.Dropout(0.5))), double(Small), sequences(), cluster_ids()
    loss_fn = lambda x: (model(x) - teacher(x)).flatten(1).square().mean(1)  # noqa: E731
    torch.manual_seed(3)
    per_sample = loss_fn(x)
    want = by_hand(model, per_sample, cluster)
    total = sum(per_sample[cluster == i].mean() for i in set(cluster.tolist()))
    (plain,) = torch.autograd.grad(total, teacher.b.bias)
    cg = ClusterGradients(model, K, "grouped", compile=TRACED)
    torch.manual_seed(3)
    assert worst(cg(loss_fn, (x,), cluster).rows, want) < EXACT
    torch.testing.assert_close(teacher.b.bias.grad, plain)
    teacher.requires_grad_(False)
    torch.manual_seed(3)
    assert worst(cg(loss_fn, (x,), cluster).rows, want) < EXACT


def test_declared_operators_are_traced() -> None:
    class Distances(Small):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cosine_similarity(self.a(x)[..., None, :], self.b.weight, dim=-1)

    model, x, cluster = double(Distances), sequences(), cluster_ids(shuffled=True)
    cg = ClusterGradients(model, K, "grouped", separable=[torch.cosine_similarity], compile=TRACED)
    assert worst(cg(squares(model), (x,), cluster).rows, by_hand(model, squares(model)(x), cluster)) < EXACT


def test_a_batch_of_no_samples() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    cg = ClusterGradients(model, 3, "grouped", compile={"backend": "aot_eager"})
    for n in (6, 0):
        J = cg(lambda x: model(x).square().mean(1), (x[:n],), torch.arange(n) % 3).rows
    assert [rows.shape[1:] for rows in J if rows is not None] == [p.shape for p in model.parameters()]
    assert all(rows.eq(0).all() for rows in J if rows is not None)
