"""The cases that every rank runs in ``test_distributed.py``. A case returns the values that the test checks."""

from __future__ import annotations

import functools
import os
import re
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import antdiff
from antdiff import balancing, distributed, ops

WIDTH = 12
Loss = Callable[[Tensor, Tensor], Tensor]
METHODS = [name for name in balancing.names() if balancing.get(name).needs in ("gram", "rows")]
LOSSES = [name for name in balancing.names() if balancing.get(name).needs == "losses"]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network with 12 * 16 + 16 + 16 * 5 + 5 = 293 parameters, which no world size divides."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.SiLU(), nn.Linear(16, 5)).to(dtype)


def samples(B: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(B, n, generator=generator, dtype=torch.float64) for n in (WIDTH, 5))
    return x.to(dtype), y.to(dtype)


def losses_of(model: nn.Module) -> Loss:
    return lambda x, y: (model(x) - y).square().mean(1)


def relative(got: list[Tensor], want: list[Tensor]) -> float:
    gap = sum(float((g.double() - w.double()).square().sum()) for g, w in zip(got, want, strict=True))
    return (gap / sum(float(w.double().square().sum()) for w in want)) ** 0.5


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]  # type: ignore


def method(name: str, K: int) -> Any:
    return balancing.get(name)(K) if name in LOSSES else balancing.get(name)()


def one_process(name: str, K: int, cluster: Tensor, dtype: torch.dtype, steps: int = 1) -> tuple[list[Tensor], Tensor]:
    """Return p.grad and losses of the whole batch, computed in one process."""
    model = network(dtype)
    balancer = method(name, K)
    x, y = samples(len(cluster), dtype)
    cg = antdiff.ClusterGradients(model, K, "loop", group="local")
    for _ in range(steps):
        if name in LOSSES:
            losses, counts = ops.cluster_mean(losses_of(model)(x, y), cluster, K)
            model.zero_grad()
            balancer.loss(losses, counts).backward()
            continue
        jacobian = cg(losses_of(model), (x, y), cluster)
        losses = jacobian.losses
        if name == "graddrop":
            jacobian.write(balancer.direction(jacobian.rows))
        else:
            jacobian.combine(balancer.weights(jacobian.gram()))
    return grads(model), losses.detach()


def mixed(K: int, B: int) -> Tensor:
    """Return ids of a batch. If its samples are dealt out in turn, some ranks lack clusters."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(K, (B,), generator=generator)
    ids[-K:] = torch.arange(K)
    return ids


def stratified(K: int, B: int) -> list[int]:
    return [B // K + (i < B % K) for i in range(K)]


# ---- cases -------------------------------------------------------------------------------------------------------


def every_scheme_and_method(rank: int, world: int) -> dict[Any, Any]:
    """Mixed batches of uneven sizes, and contiguous chunks. Returns errors of p.grad relative to one process."""
    errors: dict[Any, Any] = {}
    for K in (5, world, world // 2):
        for name in METHODS if K == 5 else ["nash"]:
            for dtype in (torch.float64, torch.float32) if name == "pcgrad" else (torch.float64,):
                cluster = mixed(K, 23)
                want, losses = one_process(name, K, cluster, dtype)
                mine = torch.arange(23) % world == rank
                for scheme in ("all_reduce", "reduce_scatter"):
                    if name == "graddrop" and scheme != "all_reduce":
                        continue
                    got, jacobian = step(name, K, cluster, mine, dtype, scheme)
                    errors[name, K, scheme, str(dtype)] = relative(got, want), relative([jacobian.losses], [losses])
                if name == "graddrop":
                    continue
                B = 6 * world
                shares = stratified(K, B)
                cluster = torch.arange(K).repeat_interleave(torch.tensor(shares))
                counts = distributed.contiguous_counts(shares, [6] * world)
                want, losses = one_process(name, K, cluster, dtype)
                mine = torch.arange(B) // 6 == rank
                got, jacobian = step(name, K, cluster, mine, dtype, "cluster", counts)
                errors[name, K, "cluster", str(dtype)] = relative(got, want), relative([jacobian.losses], [losses])
    return errors


def step(
    name: str,
    K: int,
    cluster: Tensor,
    mine: Tensor,
    dtype: torch.dtype,
    scheme: Any,
    counts: Any = None,
    **options: Any,
) -> tuple[list[Tensor], antdiff.gradients.ClusterJacobian]:
    model = options.pop("model", None) or network(dtype)
    x, y = samples(len(cluster), dtype)
    cg = antdiff.ClusterGradients(model, K, scheme=scheme, **options)
    balancer = method(name, K)
    jacobian = cg(losses_of(model), (x[mine], y[mine]), cluster[mine], counts=counts)
    if name == "graddrop":
        jacobian.write(balancer.direction(jacobian.rows))
    else:
        jacobian.combine(balancer.weights(jacobian.gram()))
    return grads(cg.model), jacobian


def other_routes(rank: int, world: int) -> dict[Any, Any]:
    """Routes that hold all of J on a rank, uneven micro-batches, a rank without samples, a group of some ranks."""
    K, B = 5, 23
    cluster = mixed(K, B)
    want, losses = one_process("pcgrad", K, cluster, torch.float64)
    x, y = samples(B)
    errors: dict[Any, Any] = {}
    dealt = torch.arange(B) % world == rank
    without_rank_3 = torch.arange(B) % (world - 1) == rank
    for route in ("split", "grouped", "loop", "auto"):
        for deal, mine in (("dealt", dealt), ("rank 3 has none", without_rank_3)):
            got, jacobian = step("pcgrad", K, cluster, mine, torch.float64, "reduce_scatter", route=route)
            errors[route, deal] = relative(got, want), relative([jacobian.losses], [losses])
            if jacobian.counts.tolist() != cluster.bincount(minlength=K).tolist():
                errors[route, deal] = jacobian.counts
    early = antdiff.ClusterGradients(network(), K)
    early.ranks.size = 1  # as if it were made before init_process_group
    try:
        early(losses_of(early.model), (x, y), cluster)
    except RuntimeError as error:
        assert "must be made after" in str(error)  # noqa: PT017
    else:
        errors["made too early"] = (1.0,)
    for route in ("split", "grouped"):
        model = network()
        cg = antdiff.ClusterGradients(model, K, route, scheme="reduce_scatter")
        mine = dealt.nonzero().flatten()
        with cg.accumulate() as total:
            for rows in mine.split(1 + rank):  # ranks cut their samples into different numbers of pieces
                total.add(losses_of(model), (x[rows], y[rows]), cluster[rows])
        jacobian = total.jacobian
        jacobian.combine(balancing.PCGrad().weights(jacobian.gram()))
        errors[route, "accumulated"] = relative(grads(model), want), relative([jacobian.losses], [losses])
    pair = dist.new_group([1, 3])
    if rank in (1, 3):
        got, jacobian = step(
            "pcgrad", K, cluster, torch.arange(B) % 2 == rank // 2, torch.float64, "reduce_scatter", group=pair
        )
        errors["a group of two"] = relative(got, want), relative([jacobian.losses], [losses])
    return errors


def wrapped(rank: int, world: int) -> dict[Any, Any]:
    """DistributedDataParallel, with a loss function that calls the wrapper or the network inside it, and FSDP2."""
    K, B = 5, 23
    cluster = mixed(K, B)
    want, losses = one_process("nash", K, cluster, torch.float64)
    mine = torch.arange(B) % world == rank
    errors: dict[Any, Any] = {}
    x, y = samples(B)
    for name in ("through", "past", "lacking clusters"):
        inner = network()
        inner.register_buffer("table", torch.ones(3))  # which DDP would broadcast in a forward
        ddp = nn.parallel.DistributedDataParallel(inner)
        if name == "lacking clusters":
            mine = cluster % world == rank
        cg = antdiff.ClusterGradients(ddp, K, scheme="reduce_scatter")
        jacobian = cg(losses_of(ddp.module if name == "past" else ddp), (x[mine], y[mine]), cluster[mine])
        jacobian.combine(balancing.NashMTL().weights(jacobian.gram()))
        errors[f"DDP {name}"] = relative(grads(ddp.module), want), relative([jacobian.losses], [losses])
    for pieces in (None, "lacking clusters", 3):
        model = sharded()
        mine = cluster % world == rank if pieces == "lacking clusters" else torch.arange(B) % world == rank
        backward = antdiff.BalancedBackward(model, balancing.NashMTL(), K, micro_batch=3 if pieces == 3 else None)
        rows = mine.nonzero().flatten()
        if pieces == 3:
            rows = rows[: B // world]  # the same number on every rank, since FSDP2 gathers weights in lockstep
            short = torch.cat([(torch.arange(B) % world == r).nonzero().flatten()[: B // world] for r in range(world)])
            want_, losses_ = one_process_of(short, "nash", K, cluster)
        else:
            want_, losses_ = want, losses
        got_losses = backward(losses_of(model), (x[rows], y[rows]), cluster[rows]).losses
        errors["FSDP2", pieces] = relative(grads(model), want_), relative([got_losses], [losses_])
    return errors


def sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)  # type: ignore[index]
    fully_shard(model, mesh=mesh)
    return model


def a_choice_per_parameter_of_shards(rank: int, world: int) -> dict[Any, Any]:
    """GradDrop under FSDP2, which sees one shard of each parameter: two steps, the second by a resumed method.

    Returns errors relative to one process, and how far the generators of the ranks have gone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    cluster = mixed(5, 23)
    x, y = samples(23)
    mine = torch.arange(23) % world == rank
    hybrid = network()
    fully_shard(hybrid, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replica", "shard")))
    results: dict[Any, Any] = {}
    for kind, model in (("one dimension", sharded()), ("hybrid", hybrid)):
        cg, balancer = antdiff.ClusterGradients(model, 5), balancing.GradDrop()
        for step in (1, 2):
            jacobian = cg(losses_of(model), (x[mine], y[mine]), cluster[mine])
            jacobian.write(balancer.direction(jacobian.rows))
            want, _ = one_process("graddrop", 5, cluster, torch.float64, steps=step)
            results[kind, step] = relative(grads(model), want)
            state = balancer.state_dict()
            balancer = balancing.GradDrop(seed=9)
            balancer.load_state_dict(state)
        results[kind, "generator"] = state["generator"]
    return results


def one_process_of(rows: Tensor, name: str, K: int, cluster: Tensor) -> tuple[list[Tensor], Tensor]:
    model = network()
    x, y = samples(len(cluster))
    cg = antdiff.ClusterGradients(model, K, "loop", group="local")
    jacobian = cg(losses_of(model), (x[rows], y[rows]), cluster[rows])
    jacobian.combine(method(name, K).weights(jacobian.gram()))
    return grads(model), jacobian.losses


def pairs(world: int) -> tuple[dist.ProcessGroup, list[int]]:
    """Make two groups of ranks, even and odd, and return that of this rank and its members."""
    members = [[r for r in range(world) if r % 2 == parity] for parity in (0, 1)]
    groups = [dist.new_group(ranks) for ranks in members]
    parity = dist.get_rank() % 2
    return groups[parity], members[parity]


def groups_of_some_ranks(rank: int, world: int) -> dict[Any, Any]:
    """group="local" in an initialised process group, wrappers of a subgroup and of one rank, and a 2-D mesh.

    Returns errors relative to one process with the samples of the group.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    K, B = 5, 23
    cluster = mixed(K, B)
    x, y = samples(B)
    mine = (torch.arange(B) % world == rank).nonzero().flatten()
    errors: dict[Any, Any] = {}

    # If the ranks communicated, they would wait for each other, since they make different numbers of calls.
    want, losses = one_process_of(mine, "pcgrad", K, cluster)
    for _ in range(rank + 1):
        for route in ("auto", "split", "grouped"):
            cg = antdiff.ClusterGradients(network(), K, route, scheme="all_reduce", group="local")  # type: ignore[arg-type]
            jacobian = cg(losses_of(cg.model), (x[mine], y[mine]), cluster[mine])
            jacobian.combine(balancing.PCGrad().weights(jacobian.gram()))
            errors["local", route] = relative(grads(cg.model), want), relative([jacobian.losses], [losses])
        for balancer in (balancing.PCGrad(update_every=2), balancing.UncertaintyWeighting(K)):
            backward = antdiff.BalancedBackward(network(), balancer, K, group="local")
            for _ in range(2):
                result = backward(losses_of(backward.gradients.model), (x[mine], y[mine]), cluster[mine])
            errors["local", balancer.name] = (relative([result.losses], [losses]),)
        sampler = antdiff.StratifiedTimesteps(antdiff.TimestepClusters.uniform(1000, K), group="local")
        assert len(sampler.sample(7).t) == 7

    pair, members = pairs(world)
    of_pair = torch.cat([(torch.arange(B) % world == r).nonzero().flatten() for r in members])
    want_pair, losses_pair = one_process_of(of_pair, "pcgrad", K, cluster)
    for route in (None, "grouped"):
        ddp = nn.parallel.DistributedDataParallel(network(), process_group=pair)
        cg = antdiff.ClusterGradients(ddp, K, route, scheme="reduce_scatter")  # type: ignore[arg-type]
        jacobian = cg(losses_of(ddp), (x[mine], y[mine]), cluster[mine])
        jacobian.combine(balancing.PCGrad().weights(jacobian.gram()))
        errors["DDP of a pair", route] = (
            relative(grads(ddp.module), want_pair),
            relative([jacobian.losses], [losses_pair]),
        )
        assert cg.ranks.size == 2
        assert cg.verify(losses_of(ddp), (x[mine], y[mine]), cluster[mine]) < 1e-12
    for balancer in (balancing.PCGrad(update_every=2), balancing.UncertaintyWeighting(K)):
        ddp = nn.parallel.DistributedDataParallel(network(), process_group=pair)
        backward = antdiff.BalancedBackward(ddp, balancer, K)
        for _ in range(2):
            result = backward(losses_of(ddp), (x[mine], y[mine]), cluster[mine])
        errors["DDP of a pair", balancer.name] = (relative([result.losses], [losses_pair]),)

    alone = [dist.new_group([r]) for r in range(world)][rank]
    reductions: list[int] = []

    def count(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        reductions.append(1)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp = nn.parallel.DistributedDataParallel(network(), process_group=alone)
    ddp.register_comm_hook(None, count)
    cg = antdiff.ClusterGradients(ddp, K, "grouped")
    with cg.accumulate() as total:
        total.add(losses_of(ddp), (x[mine], y[mine]), cluster[mine])
    jacobians = {"accumulate": total.jacobian}
    jacobians["accumulate"].combine(balancing.PCGrad().weights(jacobians["accumulate"].gram()))
    errors["DDP of one rank", "accumulate"] = (relative(grads(ddp.module), want),)
    with cg.record(cluster[mine]) as recording:
        jacobian_ = recording.backward(losses_of(ddp)(x[mine], y[mine]))
    jacobian_.combine(balancing.PCGrad().weights(jacobian_.gram()))
    errors["DDP of one rank", "record"] = (relative(grads(ddp.module), want),)
    assert cg.verify(losses_of(ddp), (x[mine], y[mine]), cluster[mine]) < 1e-12
    assert not reductions
    assert ddp.require_forward_param_sync
    losses_of(ddp)(x[mine], y[mine]).sum().backward()
    assert reductions  # afterwards the wrapper reduces as before

    want, losses = one_process("pcgrad", K, cluster, torch.float64)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    model = network()
    fully_shard(model[0], mesh=mesh)  # type: ignore[index]
    fully_shard(model, mesh=mesh)
    backward = antdiff.BalancedBackward(model, balancing.PCGrad(update_every=2), K)
    for step_ in range(2):  # one step with cluster gradients, one between two solutions
        result = backward(losses_of(model), (x[mine], y[mine]), cluster[mine])
        errors["mesh of two dimensions", step_] = relative(grads(model), want), relative([result.losses], [losses])
    cg = backward.gradients
    with cg.accumulate() as total:
        for part in mine[:4].split(2):
            total.add(losses_of(model), (x[part], y[part]), cluster[part])
    first = torch.cat([(torch.arange(B) % world == r).nonzero().flatten()[:4] for r in range(world)])
    want, losses = one_process_of(first, "pcgrad", K, cluster)
    total.jacobian.combine(balancing.PCGrad().weights(total.jacobian.gram()))
    errors["mesh of two dimensions", "accumulate"] = (
        relative(grads(model), want),
        relative([total.jacobian.losses], [losses]),
    )
    return errors


def stale_jacobians(rank: int, world: int) -> dict[str, list[str]]:
    """Return the errors of a jacobian after each kind of later use of its buffers. Its losses and counts must stay."""
    K, B = 5, 20
    cluster = torch.arange(B) % K
    x, y = samples(B)
    mine = torch.arange(B) // K == rank
    batch = (x[mine], y[mine])
    counts = torch.full((K,), B // K)

    def failing(*batch: Tensor) -> Tensor:
        raise KeyError("an error of the user on every rank")

    errors: dict[str, list[str]] = {}
    for name, make, options in (
        ("all_reduce", network, {"scheme": "all_reduce"}),
        ("reduce_scatter", network, {"scheme": "reduce_scatter"}),
        ("grouped", network, {"scheme": "all_reduce", "route": "grouped"}),
        ("fsdp", sharded, {}),
    ):
        model = make()
        cg = antdiff.ClusterGradients(model, K, **options)  # type: ignore[arg-type]
        fn = losses_of(model)

        def call(cg: Any = cg, fn: Loss = fn) -> None:
            cg(fn, batch, cluster[mine])

        def fail(cg: Any = cg) -> None:
            with suppress(KeyError):
                cg(failing, batch, cluster[mine])

        def add(cg: Any = cg, fn: Loss = fn) -> None:
            with suppress(KeyError), cg.accumulate() as total:
                total.add(fn, batch, cluster[mine])
                raise KeyError("before the rows are exchanged")

        for later in (call, fail, add):
            jacobian = cg(fn, batch, cluster[mine])
            losses = jacobian.losses.clone()
            later()
            answers = errors.setdefault(f"{name} {later.__name__}", [])
            for use in (jacobian.gram, partial(jacobian.combine, torch.ones(K)), partial(jacobian.write, []),
                        partial(getattr, jacobian, "rows"), partial(getattr, jacobian, "nbytes")):  # fmt: skip
                try:
                    use()
                    answers.append("nothing")
                except RuntimeError as error:
                    answers.append(str(error))
            assert torch.equal(jacobian.losses, losses)
            assert torch.equal(jacobian.counts, counts)
    return errors


def refused_on_ranks(rank: int, world: int) -> dict[str, str]:
    """Return the error messages of mistakes that need several ranks."""
    K, B = 5, 20
    cluster = torch.arange(B) % K
    x, y = samples(B)
    mine = torch.arange(B) // K == rank
    batch = (x[mine], y[mine])
    model, shards = network(), sharded()
    bad = x[mine] * torch.nan
    pair = dist.new_group([1, 3])
    of_cluster = antdiff.ClusterGradients(model, K, scheme="cluster")
    accumulating = antdiff.ClusterGradients(model, K)
    clusters = antdiff.TimestepClusters.uniform(1000, K)
    totals: list[Any] = []

    def add_nan() -> None:
        with accumulating.accumulate() as total:
            totals.append(total)
            total.add(losses_of(model), (bad, y[mine]), cluster[mine])

    def accumulate_by_cluster() -> None:
        with of_cluster.accumulate():
            raise AssertionError

    between = antdiff.BalancedBackward(sharded(), balancing.PCGrad(update_every=2), K)
    inner = losses_of(between.gradients.model)
    between(inner, batch, cluster[mine])
    messages: dict[str, str] = {}
    for name, run in {
        "not a member": lambda: antdiff.ClusterGradients(model, K, group=pair) if rank in (0, 2) else None,
        "nested": lambda: antdiff.ClusterGradients(nn.Sequential(nn.parallel.DistributedDataParallel(network())), K),
        "verify": lambda: antdiff.ClusterGradients(shards, K).verify(losses_of(shards), batch, cluster[mine]),
        "local shards": lambda: antdiff.ClusterGradients(shards, K, group="local"),
        "cluster": accumulate_by_cluster,
        "nan": add_nan,
        "the jacobian of nan": lambda: totals[0].jacobian,
        "gram": lambda: antdiff.ClusterGradients(model, K, hold="gram"),
        "ragged": lambda: accumulating(losses_of(model), batch, cluster[mine], counts=[[1] * K] * (world - 1) + [[1]]),
        "sizes": lambda: antdiff.StratifiedTimesteps(clusters).sample([5, 5, 5, -1]),
        "empty": lambda: between(inner, (x[:0], y[:0]), cluster[:0]),
    }.items():
        try:
            run()
            messages[name] = "nothing"
        except (TypeError, ValueError, RuntimeError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    grouped = antdiff.ClusterGradients(model, K, "grouped", scheme="all_reduce")
    assert grouped.nbytes() == 0
    grouped(losses_of(model), batch, cluster[mine])
    P = sum(p.numel() for p in model.parameters())
    assert grouped.nbytes() == (2 * K + 1) * P * 8, "rows of this rank, rows of all ranks, and p.grad"
    messages["explain"] = grouped.explain()
    return messages


def balanced_backward(rank: int, world: int) -> dict[Any, Any]:
    """All kinds of steps for plain, DDP and FSDP2 models, compared with one process over three steps."""
    K, B = 5, 23
    cluster = mixed(K, B)
    mine = torch.arange(B) % world == rank
    x, y = samples(B)
    errors: dict[Any, Any] = {}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("pcgrad", {"update_every": 2}),
        ("nash", {"update_every": 3, "max_norm": 1e-2}),  # shorter than the gradients of the steps between
        *((name, {}) for name in LOSSES),
    ]
    for name, options in cases:

        def make(name: str = name, options: dict[str, Any] = options) -> Any:
            return balancing.get(name)(K) if name in LOSSES else balancing.get(name)(**options)

        alone, balancer = network(), make()
        whole = antdiff.BalancedBackward(alone, balancer, K, route="split", group="local")
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
        want = []
        for _ in range(3):
            losses = whole(losses_of(alone), (x, y), cluster).losses
            want.append(([g.clone() for g in grads(alone)], losses))
            if "max_norm" in options:
                length = torch.cat([g.flatten() for g in grads(alone)]).norm()
                assert abs(float(length) / options["max_norm"] - 1) < 1e-12
            optimizer.step()
        kinds = ("plain", "ddp", "fsdp") if name in ("pcgrad", "nash", "uw") else ("plain",)
        for kind in kinds:
            model = sharded() if kind == "fsdp" else network()
            called = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
            mine_balancer = make()
            backward = antdiff.BalancedBackward(called, mine_balancer, K)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step_, (gradients, losses) in enumerate(want):
                got = backward(losses_of(called), (x[mine], y[mine]), cluster[mine]).losses
                errors[name, kind, step_] = relative(grads(model), gradients), relative([got], [losses])
                optimizer.step()
    return errors


def the_same_everywhere(rank: int, world: int) -> dict[str, Any]:
    """Return weights, p.grad, timesteps and the balancer's state after three steps, to be compared between ranks."""
    K, B = 5, 8
    clusters = antdiff.TimestepClusters.uniform(1000, K)
    sampler = antdiff.StratifiedTimesteps(clusters, importance=True)
    alone = antdiff.StratifiedTimesteps(clusters, importance=True, group="local")
    generator = torch.Generator().manual_seed(0)
    model, balancer = network(), balancing.PCGrad()
    x, y = samples(B * world)
    chunks, whole, gathered = [], [], []
    for step_ in range(3):
        sizes = [B, B, B, B - 1] if step_ == 1 else [B] * world
        counts = sampler.counts(sizes)
        drawn = sampler.sample(sizes)
        assert drawn.cluster.bincount(minlength=K).tolist() == counts[rank]
        chunks.append(tuple(drawn))
        whole.append(tuple(alone.sample(sum(sizes), generator=generator)))
        cg = antdiff.ClusterGradients(model, K)
        a = sum(sizes[:rank])
        rows = slice(a, a + sizes[rank])
        jacobian = cg(losses_of(model), (x[rows], y[rows]), drawn.cluster, counts=counts)
        w = balancer.weights(jacobian.gram())
        jacobian.combine(w)
        gathered.append((w, [g.clone() for g in grads(model)]))
    return {
        "chunks": chunks,
        "whole": whole,
        "steps": gathered,
        "state": balancer.state_dict(),
        "explain": cg.explain(),
    }


def out_of_step(rank: int, world: int) -> dict[str, Any]:
    """Clusters that a rank lacks, buffers that DistributedDataParallel broadcasts in a forward, micro-batches, and a
    step that ended with an error. All of them make ranks run different numbers of forwards.

    Returns errors of G relative to one process.
    """
    K, B = 5, 23
    cluster = mixed(K, B).sort().values
    mine = (
        torch.arange(B) * (world - 1) // B == rank
    )  # contiguous, so most ranks lack most clusters, and the last has none
    x, y = samples(B)
    rows = (x[mine], y[mine])
    alone = antdiff.ClusterGradients(model := network(), K, "loop", group="local")
    G = alone(losses_of(model), (x, y), cluster).gram()
    errors = {}

    def buffered() -> nn.Module:
        model = network()
        model.register_buffer("scale", torch.ones(1))
        return nn.parallel.DistributedDataParallel(model)

    for route in ("split", "grouped", "loop"):
        for step_ in range(2):
            cg = antdiff.ClusterGradients(ddp := buffered(), K, route, scheme="reduce_scatter")  # type: ignore
            jacobian = cg(losses_of(ddp), rows, cluster[mine])
            errors[f"DDP {route} {step_}"] = relative([jacobian.gram()], [G])
    cg = antdiff.ClusterGradients(ddp := buffered(), K, scheme="reduce_scatter")
    with cg.accumulate() as total:
        for part in range(rank + 1):
            piece = torch.arange(int(mine.sum())) % (rank + 1) == part
            total.add(losses_of(ddp), (rows[0][piece], rows[1][piece]), cluster[mine][piece])
    errors["DDP accumulate"] = relative([total.jacobian.gram()], [G])

    backward = antdiff.BalancedBackward(network(), balancing.PCGrad(), K, micro_batch=2)
    result = backward(losses_of(backward.gradients.model), rows, cluster[mine])
    assert result.gram is not None
    errors["micro_batch"] = relative([result.gram], [G])

    model, calls = network(), iter(range(99))
    cg = antdiff.ClusterGradients(model, K, scheme="cluster")
    shares, x, y = stratified(K, 10 * world), *samples(10 * world)
    cluster = torch.arange(K).repeat_interleave(torch.tensor(shares))
    counts = distributed.contiguous_counts(shares, [10] * world)
    G = antdiff.ClusterGradients(model, K, "loop", group="local")(losses_of(model), (x, y), cluster).gram()
    chunk = slice(10 * rank, 10 * rank + 10)

    def fails(*rows: Tensor) -> Tensor:
        if next(calls) == 1:
            raise KeyError("of the user")
        return losses_of(model)(*rows)

    with suppress(KeyError):  # by then every rank has sent its first row, and none has waited for it
        cg(fails, (x[chunk], y[chunk]), cluster[chunk], counts=counts)
    jacobian = cg(losses_of(model), (x[chunk], y[chunk]), cluster[chunk], counts=counts)
    errors["after an error"] = relative([jacobian.gram()], [G])
    return errors


def fsdp_after_a_forward_without_backward(rank: int, world: int) -> dict[Any, Any]:
    """A validation leaves gathered parameters in place of the shards. Returns errors relative to steps without it."""
    K, B = 5, 20
    x, y = samples(B)
    mine = torch.arange(B) // K == rank
    cluster = torch.arange(B) % K
    errors: dict[Any, Any] = {}
    for name, make in (("solved", balancing.PCGrad), ("between", partial(balancing.NashMTL, update_every=3)),
                       ("losses", partial(balancing.get("uw"), K))):  # fmt: skip
        got = []
        for validate in (False, True):
            model = sharded()
            params = list(model.parameters())
            backward = antdiff.BalancedBackward(model, make(), K)
            for _ in range(2):
                backward(losses_of(model), (x[mine], y[mine]), cluster[mine])
                if validate:
                    with torch.no_grad():
                        model(x[mine])
            got.append([p.grad.full_tensor() for p in params])  # type: ignore[union-attr]
        errors[name] = relative(*got)
    return errors


def a_nan_on_rank_2(rank: int, world: int) -> dict[str, Any]:
    K, B = 5, 20
    cluster = torch.arange(B) % K
    x, y = samples(B)
    mine = torch.arange(B) // K == rank
    bad = x.clone()
    bad[11] = torch.nan  # a sample of rank 2
    messages: dict[str, Any] = {}

    def attempt(name: str, run: Callable[[], Any]) -> None:
        try:
            run()
            messages[name] = "nothing"
        except distributed.NonFiniteError as error:
            messages[name] = str(error), error.ranks

    for scheme in ("reduce_scatter", "all_reduce"):
        attempt(scheme, lambda scheme=scheme: step_of(bad, y, mine, cluster, scheme))  # type: ignore[misc]
    for name in ("pcgrad", "uw"):
        model = network()
        backward = antdiff.BalancedBackward(model, method(name, K), K)
        run = functools.partial(backward, losses_of(model), (bad[mine], y[mine]), cluster[mine])
        attempt(name, run)
    plain = antdiff.BalancedBackward(network(), balancing.PCGrad(update_every=2), K)
    plain(losses_of(plain.gradients.model), (x[mine], y[mine]), cluster[mine])
    attempt("between", lambda: plain(losses_of(plain.gradients.model), (bad[mine], y[mine]), cluster[mine]))

    def infinite_slope(model: nn.Module) -> Loss:
        return lambda x, y: (model(x) - y).square().mean(1) + (0 * model(x).sum(1)).sqrt()

    model = network()
    cg = antdiff.ClusterGradients(model, K)
    fn = infinite_slope(model) if rank == 1 else losses_of(model)
    attempt("slope", lambda: cg(fn, (x[mine], y[mine]), cluster[mine]))
    # with a scaler no rank raises, and all ranks skip the step
    for name, balancer in (("nash", balancing.NashMTL(nonfinite="poison")), ("linear", balancing.get("linear")(K))):
        model = network(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scaled = antdiff.BalancedBackward(model, balancer, K, scaler=scaler)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        history = []
        for batch in (x, bad, x):
            losses = scaled(losses_of(model), (batch[mine].float(), y[mine].float()), cluster[mine]).losses
            scaler.step(optimizer)
            scaler.update()
            history.append(([p.detach().clone() for p in model.parameters()], losses, scaler.get_scale()))
        messages["history", name] = history
    return messages


def step_of(x: Tensor, y: Tensor, mine: Tensor, cluster: Tensor, scheme: Any) -> None:
    model = network()
    cg = antdiff.ClusterGradients(model, 5, scheme=scheme)
    cg(losses_of(model), (x[mine], y[mine]), cluster[mine])


def half_precision(rank: int, world: int) -> dict[str, Any]:
    """bfloat16 weights, whose rows are summed over ranks in bfloat16, or in float32 with dtype=torch.float32."""
    K, B = 5, 23
    cluster = mixed(K, B)
    want, _ = one_process("linear", K, cluster, torch.float64)
    mine = torch.arange(B) % world == rank
    x, y = samples(B, torch.bfloat16)
    errors: dict[str, Any] = {}
    for dtype in (None, torch.float32):
        for scheme in ("all_reduce", "reduce_scatter"):
            model = network(torch.bfloat16)
            cg = antdiff.ClusterGradients(model, K, scheme=scheme, dtype=dtype)  # type: ignore[arg-type]
            jacobian = cg(losses_of(model), (x[mine], y[mine]), cluster[mine])
            jacobian.combine(torch.full((K,), 1 / K, dtype=torch.float64))
            held = str(cg._ranked.current_exchange().J[0].dtype)
            errors[f"{scheme} {dtype}"] = relative(grads(model), want), held, str(grads(model)[0].dtype)
    return errors


def bytes_on_the_wire(rank: int, world: int) -> dict[Any, Any]:
    """Return the bytes that the sockets sent per rank in a step, by the kernel's own count, and by the formula."""
    from antdiff.distributed.ranks import Ranks

    torch.manual_seed(0)
    model = nn.Linear(256, 255)  # 65,535 parameters
    P = sum(p.numel() for p in model.parameters())
    sent: dict[Any, Any] = {}
    for K in (5, world, world // 2):
        B = 2 * K * world
        shares = stratified(K, B)
        counts = distributed.contiguous_counts(shares, [2 * K] * world)
        cluster = torch.arange(K).repeat_interleave(torch.tensor(shares))
        x = torch.randn(B, 256, generator=torch.Generator().manual_seed(0))
        for scheme in ("all_reduce", "reduce_scatter", "cluster"):
            whole = scheme == "cluster"
            mine = torch.arange(B) // (2 * K) == rank if whole else torch.arange(B) % world == rank
            cg = antdiff.ClusterGradients(model, K, scheme=scheme)  # type: ignore[arg-type]
            for _ in range(2):  # the first step makes connections
                dist.barrier()
                before = socket_bytes()
                jacobian = cg(
                    lambda x: model(x).square().mean(1), (x[mine],), cluster[mine], counts=counts if whole else None
                )
                jacobian.combine(torch.ones(K, dtype=torch.float64) * (1 + 0 * jacobian.gram()[0]))
                after = socket_bytes()
            cost = distributed.cost_model(P, K, world, counts=counts)[scheme]
            total = torch.tensor(float(after - before))
            Ranks().all_reduce(total).wait()
            sent[K, scheme] = float(total) / world, cost.bytes
    return sent


def socket_bytes() -> int:
    """Return the bytes that this process has written to its TCP sockets.

    On a busy machine some of these bytes still wait in the socket, and others are sent twice. So bytes in the queue
    (tcpi_notsent_bytes of TCP_INFO) are added to tcpi_bytes_sent, and tcpi_bytes_retrans is subtracted.
    """
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(fd))) as s:
                if s.family in (socket.AF_INET, socket.AF_INET6) and s.type == socket.SOCK_STREAM:
                    info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    (waiting,) = struct.unpack_from("I", info, 144)
                    sent, again = struct.unpack_from("QQ", info, 200)
                    total += sent - again + waiting
        except OSError:  # the descriptor has been closed in the meantime, or is not a socket of this process
            continue
    return total


def sharded_checkpoint_save(rank: int, world: int) -> Any:
    """Train a sharded network, save it three times, and return its weights and the state of its optimizer."""
    model, optimizer = trained(sharded())
    for step_ in (1, 2, 3):
        distributed.save_checkpoint(FOLDER, step_, checkpoint_of(model, optimizer, step_))
    return full(model), full_state(optimizer)


def sharded_checkpoint_load(rank: int, world: int) -> Any:
    """Load the checkpoint into other weights on another number of ranks, and return them."""
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    trained(model, optimizer)  # makes the optimizer state that is then overwritten
    state = checkpoint_of(model, optimizer, 0)
    step_ = distributed.load_checkpoint(FOLDER, state)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return full(model), full_state(optimizer), step_, state["note"], distributed.load_checkpoint(FOLDER / "none", {})


FOLDER = Path(os.environ.get("ANTDIFF_TEST_CHECKPOINTS", "checkpoints"))


def checkpoint_of(model: nn.Module, optimizer: torch.optim.Optimizer, note: int) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "note": note}


def trained(model: nn.Module, optimizer: Any = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    optimizer = optimizer or torch.optim.AdamW(model.parameters())
    backward = antdiff.BalancedBackward(model, balancing.PCGrad(), 5)
    x, y = samples(10)
    backward(losses_of(model), (x, y), torch.arange(10) % 5)
    optimizer.step()
    return model, optimizer


def full(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]


def full_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = optimizer.state_dict()["state"].values()
    return [value.full_tensor() if hasattr(value, "full_tensor") else value for s in states for value in s.values()]


def the_documented_loops(rank: int, world: int) -> dict[str, Any]:
    """Run each block of code of docs/distributed.md. Returns the weights at the end, and whether they have changed."""
    from torch.distributed.fsdp import fully_shard

    clusters = antdiff.TimestepClusters.uniform(1000, 5)
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    ends: dict[str, Any] = {}
    for name in ("ddp", "fsdp2", "own", "losses", "cluster"):
        code = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", page, re.DOTALL)
        assert code
        model = network(torch.float32)
        start = [p.detach().clone() for p in model.parameters()]
        generator = torch.Generator().manual_seed(rank)
        loader = [torch.randn(10, WIDTH, generator=generator) for _ in range(3)]
        sampler = antdiff.StratifiedTimesteps(clusters)
        t, cluster, weight = sampler.sample(10)
        names: dict[str, Any] = {
            "DistributedDataParallel": nn.parallel.DistributedDataParallel,
            "fully_shard": fully_shard, "antdiff": antdiff,
            "distributed": distributed, "balancing": balancing, "ops": ops, "model": model, "blocks": [model[0]],  # type: ignore[index]
            "loader": loader, "sampler": sampler, "clusters": clusters, "K": 5, "x0": loader[0],
            "t": t, "cluster": cluster, "weight": weight, "balancer": balancing.PCGrad(),
        }  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def denoising_losses(x0: Tensor, t: Tensor, weight: Tensor, names: dict[str, Any] = names) -> Tensor:
            return (names["model"](x0) - t[:, None] / 1000).square().mean(1) * weight

        if name == "losses":
            names |= {"balancer": balancing.UncertaintyWeighting(5), "noise": torch.zeros(10, 5), "xt": loader[0]}
            names["model"] = Unconditional(model)
        if name == "cluster":
            names["backward"] = antdiff.BalancedBackward(model, balancing.PCGrad(), 5)
        if name == "fsdp2":  # the optimizer is made after sharding

            class Optimizer:
                def step(self, names: dict[str, Any] = names) -> None:
                    torch.optim.SGD(names["model"].parameters(), lr=0.1).step()

            names["optimizer"] = Optimizer()
        else:
            names["optimizer"] = optimizer
        names["denoising_losses"] = denoising_losses
        exec(code.group(1), names)
        if name not in ("ddp", "fsdp2"):
            optimizer.step()
        end = full(model) if name == "fsdp2" else [p.detach() for p in model.parameters()]
        ends[name] = end, all(not torch.equal(a, b) for a, b in zip(start, end, strict=True))
    return ends


class Unconditional(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def loop_settings() -> dict[str, Any]:
    """Return settings of antdiff train that together run every branch of its loop."""
    from antdiff.train.config import TrainConfig

    tiny = TrainConfig(steps=4, batch_size=9, log_every=2, checkpoint_every=4, grid_every=0, device="cpu")
    return {
        "pcgrad": tiny,
        "uniform": replace(tiny, method="nash", timesteps="uniform"),
        "uw": replace(tiny, method="uw"),
        "curriculum": replace(tiny, method="vanilla", curriculum=True, patience=1),
        "experts": replace(tiny, experts=2),
        "routing": replace(tiny, routing=True),
        "graddrop": replace(tiny, method="graddrop"),
    }


def train_into(folder: Path) -> None:
    from antdiff.data import load_data
    from antdiff.train.loop import train
    from antdiff.train.run import start_run

    data = load_data("digits")
    for name, config in loop_settings().items():
        run = folder / name
        if not dist.is_initialized() or dist.get_rank() == 0:
            start_run(config, run)
        if dist.is_initialized():
            dist.barrier()
        with loop_dtype(config):
            assert train(config, data, run, progress=False)


@contextmanager
def loop_dtype(config: Any) -> Iterator[None]:
    """Make the loop compute in float64 for GradDrop, and in float32 for the other methods.

    GradDrop compares a quotient per parameter with a random number, 2.5 million times in this run. In float32 the sums
    of two ranks and of one process differ by about 1e-6, so a few signs may be drawn differently, and later steps
    multiply them. Which CPUs show this is luck. In float64 the errors are about 1e-15, and the probability of a
    different sign is below 1e-6.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if config.method == "graddrop" else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def the_training_loop(rank: int, world: int) -> None:
    train_into(FOLDER.parent / "runs of two")


def a_rank_that_dies(rank: int, world: int) -> tuple[str, str]:
    """Rank 1 is killed in the middle of a step. The others raise at once; return their error."""
    x, y = samples(20)
    model = network()
    backward = antdiff.BalancedBackward(model, balancing.PCGrad(), 5, scheme="reduce_scatter")
    backward(losses_of(model), (x, y), torch.arange(20) % 5)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        backward(losses_of(model), (x, y), torch.arange(20) % 5)
    except distributed.LostRankError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


FOUR = [
    every_scheme_and_method,
    other_routes,
    wrapped,
    balanced_backward,
    the_same_everywhere,
    out_of_step,
    fsdp_after_a_forward_without_backward,
    a_nan_on_rank_2,
    half_precision,
    bytes_on_the_wire,
    groups_of_some_ranks,
    a_choice_per_parameter_of_shards,
    stale_jacobians,
    refused_on_ranks,
    sharded_checkpoint_save,
]
TWO = [sharded_checkpoint_load, the_documented_loops, the_training_loop, a_rank_that_dies]
