"""Networks and steps for the tests of parameters, in one process and on several ranks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import antdiff
from antdiff import balancing

K = 4
IDS = torch.arange(K).repeat_interleave(4)
Loss = Callable[..., Tensor]
Step = Callable[[Loss, tuple[Tensor, ...], Tensor], Any]

WAYS = ("grouped", "split", "loop", "gram", "accumulate", "record")
BALANCED = ("balanced", "balanced gram", "balanced pieces", "between", "between pieces", "losses", "rows")


def stepper(way: str, model: nn.Module, k: int = K, route: Any = None, **options: Any) -> Step:
    """Return a function that leaves the combined gradient of a batch in ``p.grad``, by one of the ways."""
    if way in WAYS:
        chosen: Any = way if way in ("grouped", "split", "loop") else "grouped"
        cg = antdiff.ClusterGradients(model, k, chosen, hold="gram" if way == "gram" else "jacobian", **options)
        weights = torch.full((k,), 1 / k, dtype=torch.float64)

        def step(loss_fn: Loss, batch: tuple[Tensor, ...], ids: Tensor) -> Any:
            if way == "accumulate":
                with cg.accumulate() as total:
                    half = len(ids) // 2
                    for part in (slice(0, half), slice(half, None)):
                        total.add(loss_fn, tuple(x[part] for x in batch), ids[part])
                jacobian = total.jacobian
            elif way == "record":
                with cg.record(ids) as recording:
                    jacobian = recording.backward(loss_fn(*batch))
            else:
                jacobian = cg(loss_fn, batch, ids)
            jacobian.combine(weights)
            return jacobian

        return step
    name = {"losses": "uw", "rows": "graddrop"}.get(way, "pcgrad")
    between = way.startswith("between")
    balancer = balancing.get(name)(k) if name == "uw" else balancing.get(name)(**{"update_every": 2} if between else {})
    backward = antdiff.BalancedBackward(
        model, balancer, k, "grouped" if way == "balanced gram" else route,
        hold="gram" if way == "balanced gram" else "jacobian", micro_batch=5 if way.endswith("pieces") else None,
        **options,
    )  # fmt: skip

    def step(loss_fn: Loss, batch: tuple[Tensor, ...], ids: Tensor) -> Any:
        if between and balancer.due:
            with_hooks_off(model, lambda: backward(loss_fn, batch, ids))
        return backward(loss_fn, batch, ids)

    return step


def with_hooks_off(model: nn.Module, f: Callable[[], Any]) -> None:
    """Call ``f`` as if no parameter had gradient hooks: it is not the step that a test looks at."""
    saved = [(d, dict(d)) for p in model.parameters() for d in (p._backward_hooks, p._post_accumulate_grad_hooks) if d]  # type: ignore[attr-defined]
    for d, _ in saved:
        d.clear()
    f()
    for d, hooks in saved:
        d.update(hooks)


class Net(nn.Module):
    """Two used layers, a layer outside the forward, and one whose result meets the batch and is dropped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), weight_norm(nn.Linear(8, 6))
        self.never = nn.Linear(6, 6)
        self.dropped, self.plain = weight_norm(nn.Linear(6, 6)), nn.Linear(6, 6)
        self.sometimes = nn.Parameter(torch.ones(6))
        self.use = True

    def forward(self, x: Tensor) -> Tensor:
        self.dropped(x), self.plain(x)
        h = self.last(torch.tanh(self.first(x)))
        return h * self.sometimes if self.use else h  # type: ignore[no-any-return]

    def reached(self) -> dict[str, bool]:
        return {
            name: name.startswith(("first", "last")) or (name == "sometimes" and self.use)
            for name, _ in self.named_parameters()
        }


def loss_of(model: nn.Module) -> Loss:
    return lambda x: (model(x) - x).square().mean(1)


def batch_of(n: int = len(IDS)) -> tuple[Tensor, ...]:
    return (torch.randn(n, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float32),)


def shuffled(seed: int = 0) -> Tensor:
    order = list(range(len(IDS)))
    random.Random(seed).shuffle(order)
    return IDS[torch.tensor(order)]


# ---- on every rank ---------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # a way, and options of ClusterGradients or BalancedBackward
    "split, reduce_scatter": ("split", {"scheme": "reduce_scatter"}),
    "split, all_reduce": ("split", {"scheme": "all_reduce"}),
    "grouped, reduce_scatter": ("grouped", {"scheme": "reduce_scatter"}),
    "loop": ("loop", {}),
    "accumulate": ("accumulate", {}),
    "balanced": ("balanced", {}),
    "between": ("between", {}),
    "between pieces": ("between pieces", {}),
    "losses": ("losses", {}),
    "rows": ("rows", {}),
    "DDP, split": ("split", {}),
    "DDP, between": ("between", {}),
    "DDP, losses": ("losses", {}),
    "FSDP2": ("split", {}),
    "FSDP2, between": ("between", {}),
    "FSDP2, losses": ("losses", {}),
}


def on_ranks(kind: str, net: nn.Module) -> Step:
    """Return a step of the ranks together. ``net`` is wrapped or sharded as ``kind`` says."""
    way, options = KINDS[kind]
    model = net
    if kind.startswith("DDP"):
        model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    if kind.startswith("FSDP2"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(net, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return stepper(way, model, **options)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[no-any-return]


def part_of(rank: int, world: int) -> tuple[tuple[Tensor, ...], Tensor]:
    mine = torch.arange(len(IDS)) % world == rank
    return (batch_of()[0][mine],), IDS[mine]


class Plain(nn.Module):
    """As :class:`Net` without tensors computed from parameters, which FSDP2 shards are not for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.never = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 6)
        self.sometimes = nn.Parameter(torch.ones(6))
        self.use = True

    forward = Net.forward

    def dropped(self, x: Tensor) -> None:
        """The network computes nothing that it does not use."""

    plain = dropped
    reached = Net.reached


def frozen_and_unreached(rank: int, world: int) -> dict[str, Any]:
    """Whether each parameter has a gradient, and whether it should have one."""
    found = {}
    for kind in KINDS:
        net = Plain()
        step = on_ranks(kind, net)
        batch, ids = part_of(rank, world)
        for use in (True, False):
            # Under FSDP2 the ranks reduce the same parameters; else only rank 1 reaches one.
            net.use = use if kind.startswith("FSDP2") else use and rank == 1
            step(loss_of(net), batch, ids)
            net.use = use
            found[f"{kind}, {use}"] = {n: p.grad is not None for n, p in net.named_parameters()}, net.reached()
        net.first.requires_grad_(False)
        step(loss_of(net), batch, ids)
        reached = {n: x and not n.startswith("first") for n, x in net.reached().items()}
        found[f"{kind}, frozen"] = {n: p.grad is not None for n, p in net.named_parameters()}, reached
    return found


def hooks(rank: int, world: int) -> dict[str, Any]:
    """The number of calls, the error of the gradient that a hook saw, and whether what it returned was used."""
    found = {}
    for kind in KINDS:
        want = Plain()
        for net in (want, Plain()):
            step = on_ranks(kind, net)
            batch, ids = part_of(rank, world)
            seen: list[Tensor] = []
            after: list[bool] = []
            if net is not want:
                net.first.weight.register_hook(lambda g, seen=seen: seen.append(whole(g).clone()) or g * 0.5)
                net.first.weight.register_post_accumulate_grad_hook(lambda p, after=after: after.append(True))
            step(loss_of(net), batch, ids)
        expected = whole(want.first.weight.grad)  # type: ignore[arg-type]
        error = max(float((g - expected).norm() / expected.norm()) for g in seen)
        used = torch.allclose(whole(net.first.weight.grad), 0.5 * expected, rtol=1e-4, atol=1e-7)  # type: ignore[arg-type]
        found[kind] = len(seen), error, used and after == [True]
    return found


class TwoTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 6).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x).bfloat16()).float()  # type: ignore[no-any-return]


def dtypes(rank: int, world: int) -> dict[str, Any]:
    """Errors of p.grad relative to one process, for each dtype of the rows."""
    found = {}
    for kind in (
        "split, reduce_scatter",
        "split, all_reduce",
        "grouped, reduce_scatter",
        "balanced",
        "between",
        "losses",
    ):
        for dtype in (None, torch.float32, torch.float64):
            way, options = KINDS[kind]
            nets = TwoTypes(), TwoTypes()
            batch, ids = part_of(rank, world)
            stepper(way, nets[0], dtype=dtype, group="local")(loss_of(nets[0]), batch_of(), IDS)
            stepper(way, nets[1], dtype=dtype, **options)(loss_of(nets[1]), batch, ids)
            a, b = (torch.cat([p.grad.flatten().double() for p in net.parameters()]) for net in nets)  # type: ignore[union-attr]
            same = all(p.grad.dtype == p.dtype for net in nets for p in net.parameters())  # type: ignore[union-attr]
            found[f"{kind}, {dtype}"] = float((a - b).norm() / a.norm()), same
    return found


def balancers(rank: int, world: int) -> dict[str, Any]:
    """Whether the gradient of a learned balancer is the same in every step, if nothing moves."""
    found = {}
    for name in ("uw", "imtl_l"):
        net, balancer = Plain(), balancing.get(name)(K)
        backward = antdiff.BalancedBackward(net, balancer, K)
        batch, ids = part_of(rank, world)
        grads = []
        for _ in range(3):
            backward(loss_of(net), batch, ids)
            grads.append(balancer.log_variance.grad.clone())
        found[name] = all(torch.equal(grads[0], g) for g in grads) and bool(grads[0].any())
    return found


def static_graph(rank: int, world: int) -> str:
    try:
        antdiff.ClusterGradients(nn.parallel.DistributedDataParallel(Plain(), static_graph=True), K)
    except ValueError as error:
        return str(error)
    return "accepted"


RANKED = [static_graph, frozen_and_unreached, hooks, dtypes, balancers]
