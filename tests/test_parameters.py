"""Parameters are what the user says: frozen, unreached, hooked, of any dtype; and a NaN stays where it belongs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import DEVICES
from gradient_cases import by_hand, worst
from parameter_cases import BALANCED, IDS, RANKED, WAYS, K, Net, batch_of, loss_of, shuffled, stepper
from ranks import run
from torch import Tensor, nn

from antdiff import BalancedBackward, ClusterGradients, balancing, ops
from antdiff.diffusion import NoiseLevelUncertainty
from antdiff.gradients.batch import ClusteredBatch

EVERY = WAYS + BALANCED
every_way = pytest.mark.parametrize("way", EVERY)
Hook = Callable[..., Any]


# ---- frozen and unreached parameters ---------------------------------------------------------------------------------


@every_way
def test_a_parameter_that_is_frozen_in_mid_training_does_not_move(way: str) -> None:
    net = Net()
    step, optimizer = stepper(way, net), torch.optim.SGD(net.parameters(), 0.1)
    step(loss_of(net), batch_of(), IDS)
    optimizer.step()
    assert net.first.weight.grad is not None
    net.first.requires_grad_(False)
    before = net.first.weight.clone(), net.last.bias.clone()
    for _ in range(2):
        step(loss_of(net), batch_of(), IDS)
        optimizer.step()
    assert net.first.weight.grad is None
    assert torch.equal(net.first.weight, before[0])
    assert not torch.equal(net.last.bias, before[1])
    net.first.requires_grad_(True)
    step(loss_of(net), batch_of(), IDS)
    assert net.first.weight.grad is not None


@every_way
def test_a_parameter_that_no_sample_reaches_has_no_gradient(way: str) -> None:
    net = Net()
    step, optimizer = stepper(way, net), torch.optim.AdamW(net.parameters(), 0.1, weight_decay=0.5)
    never = net.never.weight.clone(), net.plain.weight.clone()
    for use in (True, False, True, False):
        net.use = use
        sometimes = net.sometimes.clone()
        junk = [torch.full((K, 6, 6), 7.0) for _ in range(16)]  # what uninitialised memory would show
        del junk
        result = step(loss_of(net), batch_of(), IDS)
        assert {name: p.grad is not None for name, p in net.named_parameters()} == net.reached()
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
        if way in ("grouped", "split", "loop", "accumulate", "record"):
            rows = {name: r for (name, _), r in zip(net.named_parameters(), result.rows, strict=True)}
            assert all(rows[name].any() == reached for name, reached in net.reached().items())
        optimizer.step()
        if not use:
            assert torch.equal(net.sometimes, sometimes)  # not decayed
    assert torch.equal(net.never.weight, never[0])
    assert torch.equal(net.plain.weight, never[1])


def test_a_micro_batch_that_does_not_reach_a_parameter_leaves_its_gradient() -> None:
    net = Net()
    cg = ClusterGradients(net, K, "split")
    (x,) = batch_of()
    for first in (True, False):
        with cg.accumulate() as total:
            for use in (first, not first):
                net.use = use
                total.add(loss_of(net), (x,), IDS)
        total.jacobian.combine(torch.ones(K))
        assert net.sometimes.grad is not None
        assert net.sometimes.grad.any()
        assert net.never.weight.grad is None


def test_a_compiled_loss_leaves_unreached_parameters_without_a_gradient() -> None:
    net = Net()
    cg = ClusterGradients(net, K, "grouped", compile={"backend": "eager"})
    cg(loss_of(net), batch_of(), IDS).combine(torch.ones(K))
    assert net.never.weight.grad is None
    assert net.first.weight.grad is not None


@pytest.mark.parametrize("way", [w for w in EVERY if w not in ("record", "losses", "accumulate")])
def test_a_batch_without_samples_gives_zeros(way: str) -> None:
    net = Net()
    step = stepper(way, net)
    if way.startswith("between"):
        step(loss_of(net), batch_of(), IDS)
        step(loss_of(net), batch_of(), IDS)
    step(loss_of(net), batch_of(0), IDS[:0])
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


# ---- gradient hooks --------------------------------------------------------------------------------------------------


def combined(way: str) -> list[Tensor | None]:
    net = Net()
    stepper(way, net)(loss_of(net), batch_of(), IDS)
    return [p.grad for p in net.parameters()]


@every_way
def test_hooks_see_the_combined_gradient_once(way: str) -> None:
    plain, net = combined(way), Net()
    step = stepper(way, net)
    seen: dict[str, list[Tensor]] = {}
    later: dict[str, list[Tensor]] = {}
    for name, p in net.named_parameters():

        def hook(g: Tensor, name: str = name) -> Tensor:
            seen.setdefault(name, []).append(g.clone())
            return g * 0.5

        def after(p: Tensor, name: str = name) -> None:
            assert p.grad is not None
            later.setdefault(name, []).append(p.grad.clone())
            p.grad.add_(1)

        p.register_hook(hook)
        p.register_post_accumulate_grad_hook(after)
    for call in range(1, 3):
        step(loss_of(net), batch_of(), IDS)
        for (name, p), want in zip(net.named_parameters(), plain, strict=True):
            if want is None:
                assert p.grad is None
                assert name not in seen
                assert name not in later
                continue
            assert len(seen[name]) == len(later[name]) == call
            if way in ("rows", "losses") and call > 1:  # other signs are drawn, and nothing else differs
                continue
            assert torch.allclose(seen[name][-1], want, rtol=1e-4, atol=1e-6)
            assert torch.allclose(later[name][-1], 0.5 * seen[name][-1])
            assert torch.allclose(p.grad, 0.5 * seen[name][-1] + 1)  # type: ignore[arg-type]


@every_way
def test_an_optimizer_in_the_backward_does_what_it_does_after_it(way: str) -> None:
    nets = [Net(), Net()]
    steps = [stepper(way, net) for net in nets]
    one_by_one = {p: torch.optim.SGD([p], 0.1, momentum=0.9) for p in nets[1].parameters()}

    def update(p: Tensor) -> None:
        one_by_one[p].step()  # type: ignore[index]
        one_by_one[p].zero_grad()  # type: ignore[index]

    for p in nets[1].parameters():
        p.register_post_accumulate_grad_hook(update)
    optimizer = torch.optim.SGD(nets[0].parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        for net, step in zip(nets, steps, strict=True):
            step(loss_of(net), batch_of(), IDS)
        optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        assert b.grad is None


@every_way
def test_a_hook_of_several_parameters_is_called_once_with_all_of_them(way: str) -> None:
    net, calls = Net(), []
    step = stepper(way, net)
    params = [net.first.weight, net.never.weight, net.last.bias]
    handle = torch.autograd.graph.register_multi_grad_hook(
        params, lambda grads: calls.append([g is None for g in grads])
    )
    step(loss_of(net), batch_of(), IDS)
    # A plain backward through first and last calls it with None for a parameter outside the graph.
    assert calls == [[False, True, False]]
    handle.remove()
    step(loss_of(net), batch_of(), IDS)
    assert len(calls) == 1


def test_neither_the_choice_of_a_route_nor_a_check_of_it_calls_hooks() -> None:
    net, calls = Net(), []
    net.first.weight.register_hook(calls.append)
    handle = net.last.bias.register_post_accumulate_grad_hook(calls.append)
    cg = ClusterGradients(net, K)
    cg.verify(loss_of(net), batch_of(), IDS)
    jacobian = cg(loss_of(net), batch_of(), IDS)
    assert not calls
    with pytest.raises(ValueError, match="stop"):
        cg(lambda x: (_ for _ in ()).throw(ValueError("stop")), batch_of(), IDS)
    jacobian = cg(loss_of(net), batch_of(), IDS)
    jacobian.combine(torch.ones(K))
    assert len(calls) == 2
    handle.remove()
    jacobian.combine(torch.ones(K))
    assert len(calls) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.distributed.optim uses torch.jit
@every_way
def test_an_optimizer_on_autograd_nodes_is_refused_before_anything_is_computed(way: str) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    net = Net()
    step = stepper(way, net)
    _apply_optimizer_in_backward(torch.optim.SGD, net.first.parameters(), {"lr": 0.1})
    before = net.first.weight.clone()
    with pytest.raises(ValueError, match=r"_apply_optimizer_in_backward.*register_post_accumulate_grad_hook"):
        step(loss_of(net), batch_of(), IDS)
    assert torch.equal(net.first.weight, before)


def test_hooks_of_a_compiled_loss_see_the_combined_gradient_once() -> None:
    net, seen = Net(), []
    cg = ClusterGradients(net, K, "grouped", compile={"backend": "eager"})
    net.first.weight.register_hook(lambda g: seen.append(g.clone()) or g * 0)
    for call in range(1, 3):
        cg(loss_of(net), batch_of(), IDS).combine(torch.ones(K))
        assert len(seen) == call
        assert seen[-1].any()
        assert not net.first.weight.grad.any()


# ---- dtypes ----------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Norms in float32, a network in bfloat16, a head in float64."""

    def __init__(self, low: torch.dtype = torch.bfloat16, high: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.body, self.head = nn.LayerNorm(6), nn.Linear(6, 6).to(low), nn.Linear(6, 6).to(high)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(self.norm(x).to(self.body.weight.dtype)))
        return self.head(h.to(self.head.weight.dtype)).float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_way
def test_parameters_of_several_dtypes(way: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and way in ("gram", "balanced gram"):
        with pytest.raises(ValueError, match="dtype"):  # of rows that are not held
            stepper(way, Mixed(), dtype=dtype)
        return
    net = Mixed()
    step = stepper(way, net, dtype=dtype)
    step(loss_of(net), batch_of(), IDS)
    assert [p.grad.dtype for p in net.parameters()] == [p.dtype for p in net.parameters()]  # type: ignore[union-attr]
    if way in WAYS:
        got = [p.grad for p in net.parameters()]
        net.zero_grad()
        loss_of(net)(*batch_of()).mean().backward()
        for g, p in zip(got, net.parameters(), strict=True):
            # A product in bfloat16 is rounded several times, each time by up to 2^-8 of its terms.
            assert float((g - p.grad).norm() / p.grad.norm()) < 2.0**-5  # type: ignore[operator, union-attr]


def test_rows_are_as_exact_as_their_dtype_says() -> None:
    net = Mixed(torch.float32)
    want = by_hand(net, loss_of(net)(*batch_of()), IDS, K)
    for way in ("grouped", "split", "loop"):
        for dtype in (None, torch.float64):
            rows = stepper(way, net, dtype=dtype)(loss_of(net), batch_of(), IDS).rows
            assert [r.dtype for r in rows] == [dtype or p.dtype for p in net.parameters()]
            assert worst(rows, want) < 1e-5
    gram = ClusterGradients(net, K, "split")(loss_of(net), batch_of(), IDS).gram()
    exact = sum(r.double().reshape(K, -1) @ r.double().reshape(K, -1).T for r in want if r is not None)
    assert torch.allclose(gram, exact, rtol=1e-5)


@pytest.mark.parametrize("way", [*WAYS, "balanced", "between", "losses", "rows"])
def test_sparse_gradients_of_embeddings_become_dense(way: str) -> None:
    class Table(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.out = nn.Embedding(9, 6, sparse=sparse), nn.Linear(6, 6)

        def forward(self, i: Tensor) -> Tensor:
            return self.out(self.table(i))  # type: ignore[no-any-return]

    grads = []
    for sparse in (False, True):
        net = Table(sparse)
        step = stepper(way, net)
        step(lambda i, net=net: net(i).square().mean(1), (torch.arange(16) % 9,), IDS)
        assert net.table.weight.grad is not None
        assert net.table.weight.grad.layout is torch.strided
        grads.append(net.table.weight.grad)
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-7)


def test_complex_parameters_are_refused_by_name() -> None:
    net = Net()
    net.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"model must have real parameters; got complex phase.*view_as_complex"):
        ClusterGradients(net, K)
    net.phase.requires_grad_(False)
    ClusterGradients(net, K)


# ---- parameters of a balancer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uw", "imtl_l"])
def test_gradients_of_a_learned_balancer_do_not_pile_up(name: str) -> None:
    net = Net()
    balancer = balancing.get(name)(K)
    backward = BalancedBackward(net, balancer, K)
    grads = []
    for _ in range(3):
        backward(loss_of(net), batch_of(), IDS)
        grads.append(balancer.log_variance.grad.clone())
    assert grads[0].any()
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


# ---- NaN, and losses out of a method's domain ------------------------------------------------------------------------


class Every(nn.Module):
    """Each kind of op whose gradients are sums over the rows of a cluster."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.scale = nn.Parameter(torch.randn(1, 3, 8)), nn.Parameter(torch.ones(8))
        self.linear, self.norm, self.rms = nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8)
        self.conv, self.group = nn.Conv1d(3, 4, 1), nn.GroupNorm(2, 4)
        self.last = weight_norm_linear()

    def forward(self, x: Tensor) -> Tensor:
        h = self.rms(self.norm(self.linear(x[:, None] + self.token)) * self.scale)
        return self.last(self.group(self.conv(h)).mean(1))  # type: ignore[no-any-return]


def weight_norm_linear() -> nn.Module:
    from torch.nn.utils.parametrizations import weight_norm

    return weight_norm(nn.Linear(8, 8))  # type: ignore[no-any-return]


def poisoned(ids: Tensor, cluster: int = 2) -> Tensor:
    x = torch.randn(len(ids), 8, generator=torch.Generator().manual_seed(1))
    x[int(torch.nonzero(ids == cluster)[1])] = torch.nan
    return x


@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "shuffled"])
@pytest.mark.parametrize("way", ["grouped", "split", "accumulate", "record"])
def test_a_nan_stays_in_the_row_of_its_cluster(way: str, sort: bool) -> None:
    net, ids = Every(), IDS if sort else shuffled()
    clean = poisoned(ids).nan_to_num(0.5)
    want = stepper(way, net)(loss_of(net), (clean,), ids)
    want_rows = [r.clone() for r in want.rows]
    jacobian = stepper(way, net)(loss_of(net), (poisoned(ids),), ids)
    sound = torch.tensor([0, 1, 3])
    assert jacobian.losses.isfinite().tolist() == [True, True, False, True]
    for row, clean_row in zip(jacobian.rows, want_rows, strict=True):
        assert torch.allclose(row[sound], clean_row[sound], rtol=1e-5, atol=1e-6)
    assert any(row[2].isnan().any() for row in jacobian.rows)
    with pytest.raises(ValueError, match=r"gram must be finite; got nan at \[2, 2\].*clusters \[2\]"):
        balancing.PCGrad().weights(jacobian.gram())


def test_a_nan_stays_in_the_gram_matrix_entries_of_its_cluster() -> None:
    net = Every()
    gram = stepper("gram", net)(loss_of(net), (poisoned(IDS),), IDS).gram()
    bad = torch.zeros(K, K, dtype=torch.bool)
    bad[2] = bad[:, 2] = True
    assert torch.equal(gram.isnan(), bad)


@pytest.mark.parametrize("way", BALANCED)
def test_a_balanced_backward_names_the_cluster_of_a_nan(way: str) -> None:
    for route in ("grouped", "split", "loop"):
        net = Every()
        step = stepper(way, net, route=None if way == "balanced gram" else route)
        if way.startswith("between"):
            step(loss_of(net), (poisoned(IDS).nan_to_num(),), IDS)
            step(loss_of(net), (poisoned(IDS).nan_to_num(),), IDS)
        with pytest.raises(ValueError, match=r"losses must be finite; got nan for cluster 2\."):
            step(loss_of(net), (poisoned(IDS),), IDS)
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", [n for n in balancing.names() if balancing.get(n).needs == "losses"])
def test_methods_of_losses_raise_on_a_nan_unless_there_is_a_scaler(name: str) -> None:
    net = Every()
    with pytest.raises(ValueError, match=r"losses must be finite; got nan for cluster 2\."):
        BalancedBackward(net, balancing.get(name)(K), K)(loss_of(net), (poisoned(IDS),), IDS)
    scaler = torch.amp.GradScaler("cpu")
    for options in ({"scaler": scaler}, {"nonfinite": "poison"}):
        net.zero_grad()
        BalancedBackward(net, balancing.get(name)(K), K, **options)(loss_of(net), (poisoned(IDS),), IDS)
    assert any(p.grad is not None and p.grad.isnan().any() for p in net.parameters())


@pytest.mark.parametrize("name", ["gls", "famo", "stch", "dwa"])
def test_negative_losses_are_refused_where_a_method_needs_positive_ones(name: str) -> None:
    balancer = balancing.get(name)(3)
    losses = torch.tensor([0.5, -0.25, 0.0])
    for call in (balancer.weights, balancer.loss):
        with pytest.raises(ValueError, match=rf"losses must be positive for '{name}'; got -0.25 for cluster 1.*pcgrad"):
            call(losses)
    assert balancer.loss(losses.abs()).isfinite()
    for other in ("uw", "imtl_l", "linear", "rlw"):
        assert balancing.get(other)(3).loss(losses).isfinite()


def test_losses_that_turn_negative_by_nature_end_in_an_error_or_in_a_sound_network() -> None:
    for name in ("gls", "famo", "stch", "dwa", "pcgrad"):
        torch.manual_seed(0)
        weigher, net = NoiseLevelUncertainty(32), nn.Linear(4, 4)
        model = nn.ModuleList([weigher, net])
        optimizer = torch.optim.Adam(model.parameters(), 5e-2)
        batch = torch.randn(30, 4), torch.linspace(-2, 2, 30)
        method = balancing.get(name)
        backward = BalancedBackward(model, method(3) if method.needs == "losses" else method(), 3)
        loss_fn = lambda x, s: weigher((net(x) - x).square().mean(1), s)  # noqa: B023, E731
        raised = False
        try:
            for _ in range(60):
                backward(loss_fn, batch, torch.arange(3).repeat_interleave(10))
                optimizer.step()
        except ValueError as error:
            raised = "losses must be positive" in str(error)
        assert raised == (name != "pcgrad")
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "shuffled"])
@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [3, 3, 3]], ids=["empty", "equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sums_over_clusters(dtype: torch.dtype, sizes: list[int], sort: bool, device: str) -> None:
    k = len(sizes)
    ids = torch.arange(k).repeat_interleave(torch.tensor(sizes))
    if not sort:
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    clustered = ClusteredBatch.of(ids.to(device), k)
    assert clustered.counts.tolist() == sizes
    x = torch.randn(18, 7, generator=torch.Generator().manual_seed(0)).to(dtype)  # two rows per sample
    got = clustered.sums(x.to(device)).cpu()
    want = torch.stack([x.double()[ids.repeat_interleave(2) == i].sum(0) for i in range(k)])
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(got.double(), want, rtol=1e-6, atol=1e-6)
    out = torch.full((k, 7), math.nan, dtype=got.dtype, device=device)
    assert torch.equal(clustered.sums(x.to(device), out).cpu(), got)
    x[0] = math.nan
    sums = clustered.sums(x.to(device)).cpu()
    assert sums.isnan().any(1).tolist() == [i == int(ids[0]) for i in range(k)]
    ordered = x.unflatten(0, (9, 2)).sum(1, dtype=torch.float64)[ids.argsort(stable=True)]
    offsets = clustered._offsets().cpu()  # what CUDA sums by, whose op runs on the CPU as well
    by_offsets = torch.segment_reduce(ordered, "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
    assert torch.allclose(by_offsets, sums.double(), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_gram_and_combination_of_lists_of_several_dtypes() -> None:
    from antdiff.ops import _mixed as mixed

    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    J = [torch.randn(3, 5, generator=generator).to(d) for d in dtypes for _ in range(2)]
    assert torch.allclose(mixed.gram([*J, None]), sum(ops.gram([x.double()]) for x in J), rtol=1e-5)
    weights = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    for target in dtypes:
        out = [torch.empty(5, dtype=target) for _ in J]
        mixed.combine(weights, [*J, None], [*out, None])
        for x, y in zip(J, out, strict=True):
            assert torch.allclose(y.double(), weights @ x.double(), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="at least one tensor"):
        mixed.gram([None])


# ---- two ranks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(2, RANKED, tmp_path_factory.mktemp("parameters") / "ranks")


def test_ranks_agree_on_frozen_and_unreached_parameters(two: list[dict[str, Any]]) -> None:
    for results in two:
        for case, (has_gradient, reached) in results["frozen_and_unreached"].items():
            assert has_gradient == reached, case


def test_hooks_on_ranks_see_the_gradient_of_the_whole_batch_once(two: list[dict[str, Any]]) -> None:
    for results in two:
        for case, (calls, error, after) in results["hooks"].items():
            assert calls == 1, case
            assert error < 1e-5, case
            assert after, case


def test_ranks_and_one_process_agree_for_several_dtypes(two: list[dict[str, Any]]) -> None:
    for results in two:
        for case, (error, dtypes) in results["dtypes"].items():
            assert error < 2.0**-6, case  # the gradients of a network in bfloat16, summed in another order
            assert dtypes, case


def test_ranks_clear_the_gradients_of_learned_balancers(two: list[dict[str, Any]]) -> None:
    for results in two:
        for case, same in results["balancers"].items():
            assert same, case


def test_a_static_graph_is_refused(two: list[dict[str, Any]]) -> None:
    for results in two:
        assert "model must not be wrapped with static_graph=True" in results["static_graph"]
