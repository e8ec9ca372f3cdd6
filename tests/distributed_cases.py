"""What every rank runs in ``test_distributed.py``. A case returns what the test looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import antdiff
from antdiff import balancing, distributed, ops

WIDTH = 12
Loss = Callable[[Tensor, Tensor], Tensor]
METHODS = [name for name in balancing.names() if balancing.get(name).needs in ("gram", "J")]
LOSSES = [name for name in balancing.names() if balancing.get(name).needs == "losses"]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Its 12 * 16 + 16 + 16 * 5 + 5 = 293 parameters divide by none of the world sizes."""
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
    """p.grad and losses of the whole batch by the single-process code."""
    model = network(dtype)
    balancer = method(name, K)
    x, y = samples(len(cluster), dtype)
    cg = antdiff.ClusterGradients(model, K, "loop")
    for _ in range(steps):
        if name in LOSSES:
            losses, counts = ops.cluster_mean(losses_of(model)(x, y), cluster, K)
            model.zero_grad()
            balancer.loss(losses, counts).backward()
            continue
        J = cg.compute(losses_of(model), (x, y), cluster)
        losses = cg.losses
        if name == "graddrop":
            for p, g in zip(model.parameters(), balancer.direction(J), strict=True):
                p.grad = g / K
        else:
            w = balancer.weights(ops.gram(J)) / (K if balancer.scale == "sum" else 1)
            ops.combine(w, J, out=cg.grads())
    return grads(model), losses.detach()


def mixed(K: int, B: int) -> Tensor:
    """Ids of a batch in which, dealt out in turn, some ranks lack clusters."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(K, (B,), generator=generator)
    ids[-K:] = torch.arange(K)
    return ids


def stratified(K: int, B: int) -> list[int]:
    return [B // K + (i < B % K) for i in range(K)]


# ---- cases -------------------------------------------------------------------------------------------------------


def every_scheme_and_method(rank: int, world: int) -> dict[Any, Any]:
    """Mixed batches of uneven sizes, and contiguous chunks; errors of p.grad relative to one process's."""
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
                    got, cg = step(name, K, cluster, mine, dtype, scheme)
                    errors[name, K, scheme, str(dtype)] = relative(got, want), relative([cg.losses], [losses])
                if name == "graddrop":
                    continue
                B = 6 * world
                shares = stratified(K, B)
                cluster = torch.arange(K).repeat_interleave(torch.tensor(shares))
                counts = distributed.contiguous_counts(shares, [6] * world)
                want, losses = one_process(name, K, cluster, dtype)
                mine = torch.arange(B) // 6 == rank
                got, cg = step(name, K, cluster, mine, dtype, "cluster", counts)
                errors[name, K, "cluster", str(dtype)] = relative(got, want), relative([cg.losses], [losses])
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
) -> tuple[list[Tensor], distributed.ClusterGradients]:
    model = options.pop("model", None) or network(dtype)
    x, y = samples(len(cluster), dtype)
    cg = distributed.ClusterGradients(model, K, scheme=scheme, **options)
    balancer = method(name, K)
    J = cg.compute(losses_of(model), (x[mine], y[mine]), cluster[mine], counts=counts)
    G = cg.gram(J)
    if name == "graddrop":
        for p, g in zip(model.parameters(), balancer.direction(J), strict=True):
            p.grad = g / K
    else:
        cg.combine(balancer.weights(G) / (K if balancer.scale == "sum" else 1), J)
    return grads(cg.model), cg


CASES = [every_scheme_and_method]
