"""Rows of models that FSDP2 has sharded. This is the only module that handles DTensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from antdiff.distributed.exchange import Exchange, fill
from antdiff.distributed.ranks import Ranks
from antdiff.ops import _mixed as mixed


def sharded_parameters(model: nn.Module, ranks: Ranks, route: str) -> list[nn.Parameter] | None:
    """Return the trainable parameters of a ``fully_shard`` model, or None for any other model.

    Call it once, before training. Between a forward and its backward the model has gathered parameters in their place.

    Raises:
        TypeError, ValueError: the model is sharded in a way that is not supported.
    """
    if type(model).__name__ == "FullyShardedDataParallel":
        raise TypeError(
            "model must be sharded by fully_shard (FSDP2); got FullyShardedDataParallel, which hides p.grad. "
            "Use torch.distributed.fsdp.fully_shard."
        )
    everything = list(model.parameters())
    shards: list[Any] = [p for p in everything if hasattr(p, "to_local")]
    trained = [p for p in everything if p.requires_grad]
    if not shards:
        return None
    from torch.distributed.fsdp import FSDPModule

    if not all(hasattr(p, "to_local") for p in trained) or not isinstance(model, FSDPModule):
        raise ValueError(
            "model must have no unsharded trainable parameter; got one. Call fully_shard(model) on the network itself, "
            "after its parts."
        )
    p = shards[0]
    if sum(not x.is_replicate() for x in p.placements) != 1:
        raise ValueError(
            f"model must be sharded by fully_shard alone; got {p.placements}. Tensor parallelism is unsupported."
        )
    if p.device_mesh.size() != ranks.size:
        raise ValueError(
            f"group must be the {p.device_mesh.size()} ranks of model's mesh; got {ranks.size}. "
            "Pass a group of these ranks, or None for a mesh of one dimension."
        )
    if route != "split":
        raise ValueError(f"route must be 'split' under FSDP2; got {route!r}. Leave route out.")
    return shards


def mesh_group(model: nn.Module) -> dist.ProcessGroup | None:
    """Return the process group of a ``fully_shard`` model with a one-dimensional mesh, None for any other model.

    A mesh of two dimensions (hybrid sharding) has one group per dimension and none for all of its ranks. The default
    group is used for it, and :func:`sharded_parameters` checks that it has the size of the mesh.
    """
    mesh = next((p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")), None)
    return mesh.get_group() if mesh is not None and mesh.ndim == 1 else None


class Place(NamedTuple):
    """Where a shard lies in its parameter."""

    shape: torch.Size  # of the whole parameter
    slices: tuple[slice, ...]  # of this rank's shard in it


_ATTRIBUTE = "antdiff_place"


def place_of(rows: Tensor) -> Place | None:
    """Return the place of rows ``[k, *shard]`` of a parameter that FSDP2 has sharded, None for whole rows.

    Only the tensors of ``jacobian.rows`` have a place. The result of an operation on them does not.
    """
    place: Place | None = getattr(rows, _ATTRIBUTE, None)
    return place


def _place(p: Any) -> Place:
    """Return the place of a parameter's shard. FSDP2 cuts a dimension into pieces like torch.chunk."""
    slices = [slice(None)] * p.dim()
    for mesh_dim, placement in enumerate(p.placements):
        if placement.is_shard():
            size, ranks = p.shape[placement.dim], p.device_mesh.size(mesh_dim)
            start = min(p.device_mesh.get_local_rank(mesh_dim) * -(-size // ranks), size)
            slices[placement.dim] = slice(start, start + p.to_local().shape[placement.dim])
    return Place(p.shape, tuple(slices))


class Shards(Exchange):
    """The rows under FSDP2 (``fully_shard``).

    Each backward leaves this rank's shard of the row in ``p.grad``, already summed over the ranks by FSDP2. Only K x K
    numbers remain to be sent.
    """

    per_parameter, lockstep = True, True

    def __init__(self, ranks: Ranks, params: list[nn.Parameter], k: int, dtype: torch.dtype) -> None:
        super().__init__(ranks, params, k, dtype)
        p: Any = params[0]
        self.averaging = ranks.size
        # In hybrid sharding, groups of ranks hold copies of the same shards.
        self.replicas = math.prod(p.device_mesh.size(d) for d, x in enumerate(p.placements) if x.is_replicate())
        self.local: list[Tensor] = [p.to_local() for p in params]  # type: ignore[attr-defined]
        self.J = [torch.zeros((k, *x.shape), dtype=x.dtype, device=x.device) for x in self.local]
        for rows, parameter in zip(self.J, params, strict=True):
            setattr(rows, _ATTRIBUTE, _place(parameter))
        self.fresh = True

    def write(self, i: int, grads: Sequence[Tensor | None] | None, factor: Tensor | float = 1.0) -> None:
        assert grads is not None
        rows = [J[i] for J in self.J]
        shards = [None if g is None else g.to_local() for g in grads]  # type: ignore[attr-defined]
        if self.fresh:
            fill(rows, shards, factor)
            return
        torch._foreach_add_(
            [r for r, g in zip(rows, shards, strict=True) if g is not None], [g for g in shards if g is not None]
        )

    def finish(self) -> list[Tensor]:
        return self.J

    def combine(self, weights: Tensor) -> None:
        out = [torch.empty_like(x) for x in self.local]
        mixed.combine(weights, self.J, out)
        self.set_grads(out)

    def set_grads(self, direction: Sequence[Tensor]) -> None:
        from torch.distributed.tensor import DTensor

        for p, x in zip(self.params, direction, strict=True):
            assert isinstance(p, DTensor)
            p.grad = DTensor.from_local(
                x, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )

    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.J, *self.local))
