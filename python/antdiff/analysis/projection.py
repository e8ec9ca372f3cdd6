"""Projection of gradients, one tensor ``[K, *shape]`` per parameter, to rows of numbers, exact or sketched.

The sketch is a CountSketch (Charikar, Chen and Farach-Colton, 2002) whose hash is cheap to apply: each parameter is cut
into pieces of at most d numbers. Each piece is multiplied by random signs, rotated by a random shift and added to the
same d numbers. Two numbers of the same piece never collide; any two numbers of different pieces collide with
probability 1/d. The signs s are independent. For any symmetric matrix M, the sketched estimate of <M, x y^T> therefore
has the error ``sum_{j<l, h(j)=h(l)} 2 s_j s_l M_jl``, with mean zero and variance

    Var <= (4/d) sum_{j<l} M_jl^2 <= (2/d) |M|_F^2,    so    Var <Sx, Sy> <= (|x|^2 |y|^2 + <x, y>^2) / d

for M = (x y^T + y x^T) / 2. The reason is that products of signs have mean zero unless they pair up, and that pairs
collide with probability at most 1/d. Each group of parameters has a sketch of d numbers of its own. The errors of
groups are independent, and the diagonal blocks of M have no larger norm than M, so the bound also holds for the whole.
The cost is one pass over J.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from antdiff._checks import as_module
from antdiff._files import digest


class Columns(NamedTuple):
    """The columns of a group of parameters in a row."""

    name: str
    start: int
    stop: int
    size: int  # size of the gradient; more than stop - start if the group is sketched


class Projection:
    """Projects the gradients J of a model to rows ``[K, columns]``.

    Args:
        model: model whose trainable parameters are those of J, in order.
        group_of: maps the name of a parameter to its group.
        dim: d. Groups of at most d numbers are kept exact and larger ones are sketched. None keeps all groups exact.
        generator: random numbers of the signs and shifts, on the CPU.

    Attributes:
        groups: the groups, in the order of their first parameter.
        columns: D, the length of a row.
        dim: d, or None if nothing is sketched.
    """

    def __init__(
        self, model: nn.Module, group_of: Callable[[str], str], dim: int | None, generator: torch.Generator
    ) -> None:
        sizes: dict[str, int] = {}
        places = []  # group of each parameter, and its offset in the group
        for name, p in model.named_parameters():
            owner = group_of(name)
            places.append((owner, sizes.get(owner, 0)))
            if p.requires_grad:
                sizes[owner] = sizes.get(owner, 0) + p.numel()
        self.groups = column_layout(sizes, dim)
        self.columns = self.groups[-1].stop
        by_name = {group.name: group for group in self.groups}
        self.dim = dim if dim is not None and any(size > dim for size in sizes.values()) else None
        self._parts: list[tuple[Columns, int, Tensor | None, list[int]]] = []
        for (name, offset), p in zip(places, model.parameters(), strict=True):
            group = by_name.get(name, Columns(name, 0, 0, 0))  # a group of frozen parameters has no columns
            width, signs, shifts = group.stop - group.start, None, []
            if p.requires_grad and group.size > width:
                signs = torch.randint(0, 2, (p.numel(),), generator=generator, dtype=torch.int8) * 2 - 1  # [m]
                shifts = torch.randint(width, (-(-p.numel() // width),), generator=generator).tolist()
            self._parts.append((group, offset, signs, shifts))

    def write(self, J: Sequence[Tensor | None], out: Tensor) -> None:
        """Fill ``out [k, columns]`` from the first k rows of J, which may be on another device."""
        k = len(out)
        if self.dim is not None:
            out.zero_()
        for x, (group, offset, signs, shifts) in zip(J, self._parts, strict=True):
            if x is None:
                continue
            x = x[:k].reshape(k, -1).to(out.device)  # [k, m]
            if signs is None:
                out[:, group.start + offset : group.start + offset + x.shape[1]] = x
            else:
                _fold(x, signs, shifts, out[:, group.start : group.stop])

    def digest(self) -> str:
        """Return a digest of the layout and the random numbers."""
        parts: list[str | Tensor] = [repr(self.groups)]
        for _, offset, signs, shifts in self._parts:
            parts += [f"{offset} {shifts}"] if signs is None else [f"{offset} {shifts}", signs]
        return digest(*parts)


def _fold(x: Tensor, signs: Tensor, shifts: Sequence[int], out: Tensor) -> None:
    """Add the pieces of x [k, m], multiplied by their signs and rotated by their shifts, to out [k, d]."""
    d = out.shape[1]
    for piece, shift in enumerate(shifts):
        part = x[:, piece * d : (piece + 1) * d] * signs[piece * d : (piece + 1) * d]  # [k, <= d]
        head = min(d - shift, part.shape[1])
        out[:, shift : shift + head] += part[:, :head]
        if head < part.shape[1]:
            out[:, : part.shape[1] - head] += part[:, head:]


def column_layout(sizes: dict[str, int], dim: int | None) -> list[Columns]:
    """Return the columns of each group, from the sizes of the groups."""
    groups, start = [], 0
    for name, size in sizes.items():
        stop = start + (size if dim is None else min(size, dim))
        groups.append(Columns(name, start, stop, size))
        start = stop
    return groups


def module_groups(model: nn.Module) -> Callable[[str], str]:
    """Group parameters by top-level module. Return a function from the name of a parameter to the name of its module.

    Wrappers around a single module are skipped. Each entry of a ModuleList or Sequential counts as one module
    (``down_blocks.0``, ``down_blocks.1``, ...).
    """
    top, prefix = as_module("model", model), ""
    while True:
        children = [(name, child) for name, child in top.named_children() if any(True for _ in child.parameters())]
        if len(children) != 1 or next(top.parameters(recurse=False), None) is not None:
            break
        prefix, top = f"{prefix}{children[0][0]}.", children[0][1]
    listed = {name for name, child in children if isinstance(child, (nn.ModuleList, nn.Sequential))}

    def group_of(name: str) -> str:
        parts = name.removeprefix(prefix).split(".")
        return ".".join(parts[: 2 if parts[0] in listed else 1])

    return group_of
