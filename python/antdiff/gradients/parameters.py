"""What a step does to ``p.grad`` besides writing it: gradient hooks, and None for parameters without a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def without_hooks(params: Iterable[Tensor]) -> Iterator[None]:
    """Switch off the gradient hooks of parameters while the gradients of single clusters or micro-batches pass them.

    The dicts that autograd reads the hooks from are emptied and refilled in place, so that handles stay valid.

    Raises:
        ValueError: hooks that cannot be switched off.
    """
    dicts, refused = [], False
    for p in params:
        if hasattr(p, "_in_backward_optimizers"):
            refused = True
        for d in (p._backward_hooks, p._post_accumulate_grad_hooks):  # type: ignore[attr-defined]
            if d:
                dicts.append(d)
    if refused:
        raise ValueError(
            "model must not have hooks on the AccumulateGrad nodes of its parameters, which would see the gradient of "
            "every cluster; got those of torch.distributed.optim._apply_optimizer_in_backward. Step each optimizer in "
            "a hook of p.register_post_accumulate_grad_hook, which sees the combined gradient."
        )
    if not dicts:
        yield
        return
    saved = [dict(d) for d in dicts]
    for d in dicts:
        d.clear()
    try:
        yield
    finally:
        for d, hooks in zip(dicts, saved, strict=True):
            added = dict(d)  # by the loss function
            d.clear()
            d.update(hooks)
            d.update(added)


@contextmanager
def isolated(params: Sequence[Tensor]) -> Iterator[None]:
    """Hide the gradients of single clusters: switch off gradient hooks, and restore ``p.grad`` at the end."""
    grads = [p.grad for p in params]
    try:
        with without_hooks(params):
            yield
    finally:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad


def finish_grads(
    parameters: Iterable[Tensor], unreached: Iterable[Tensor] = (), params: Sequence[Tensor] | None = None
) -> None:
    """Complete a step that has written ``p.grad`` of the trainable parameters.

    As after a plain backward into empty gradients, ``p.grad`` is None for a frozen parameter and for one that no sample
    has reached. Then the gradient hooks see the others, each once.

    Args:
        parameters: those that the model shows, trainable or not.
        unreached: the parameters that no sample has reached.
        params: the trainable parameters, if they are not among ``parameters`` (FSDP2's shards).
    """
    trained = []
    for p in parameters:
        if p.requires_grad:
            trained.append(p)
        else:
            p.grad = None
    for x in unreached:
        x.grad = None
    run_hooks(trained if params is None else params)


def run_hooks(params: Iterable[Tensor]) -> None:
    """Let ``p.grad`` pass the gradient hooks of each parameter, as the end of a backward does.

    Autograd itself calls them, since some (``torch.autograd.graph.register_multi_grad_hook``) ask it which backward
    they are in.
    """
    hooked = [
        p
        for p in params
        if p.grad is not None and (p._backward_hooks or p._post_accumulate_grad_hooks)  # type: ignore[attr-defined]
    ]
    if hooked:
        grads = [p.grad for p in hooked]
        for p in hooked:
            p.grad = None
        torch.autograd.backward(hooked, grads)  # type: ignore[arg-type]


def dense_grads(params: Iterable[Tensor]) -> None:
    """Replace sparse gradients, which embeddings make with ``sparse=True``, by dense ones."""
    for p in params:
        if p.grad is not None and p.grad.layout is not torch.strided:
            p.grad = p.grad.to_dense()


def limit_norm(params: Iterable[Tensor], limit: Tensor | float) -> Tensor:
    """Scale all ``p.grad`` down to norm ``limit`` together if they are longer; return the factor, float64 ``[]``.

    The norm is that of whole gradients, also where ``p.grad`` is a shard, so every rank has to call this function.
    """
    grads = [p.grad for p in params if p.grad is not None]
    by_mesh: dict[Any, list[Tensor]] = {}  # None for plain tensors
    for grad in grads:
        by_mesh.setdefault(getattr(grad, "device_mesh", None), []).append(grad)
    norms: list[Tensor] = []
    for mesh, group in by_mesh.items():
        whole: Any = torch.nn.utils.get_total_norm([x.float() if x.itemsize < 4 else x for x in group])
        norms.append((whole if mesh is None else whole.full_tensor()).double())
    if not norms:
        return torch.ones((), dtype=torch.float64)
    factor: Tensor = (limit / torch.stack([x.to(norms[0].device) for x in norms]).norm()).clamp(max=1)
    for grad in grads:
        local: Any = getattr(grad, "_local_tensor", grad)
        local.mul_(factor.to(local.device))
    return factor
