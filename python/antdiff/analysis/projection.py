"""From the gradients of a block, one tensor ``[K, *shape]`` a parameter, to rows of numbers: whole or sketched.

The sketch is a CountSketch (Charikar, Chen and Farach-Colton, 2002) whose hash is cheap to apply: each parameter is cut
into pieces of at most d numbers, and each piece is multiplied by random signs, rotated by a random shift and added to
the same d numbers. Two numbers of one piece never meet, two of different pieces with probability 1/d, whatever they
are. With signs s that are independent, for any symmetric matrix M the estimate of <M, x y^T> that the sketch gives is
off by ``sum_{j<l, h(j)=h(l)} 2 s_j s_l M_jl``: of mean zero, and of variance

    Var <= (4/d) sum_{j<l} M_jl^2 <= (2/d) |M|_F^2,    so    Var <Sx, Sy> <= (|x|^2 |y|^2 + <x, y>^2) / d

(M = (x y^T + y x^T) / 2), since products of signs have mean zero unless they pair up, and pairs meet with probability
1/d at most. Groups of parameters are sketched apart, d numbers each: their errors are independent, and the diagonal
blocks of M have no larger norm than M, so the bound holds for the whole as well. Cost: one pass over J.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from antdiff._files import digest


class Columns(NamedTuple):
    """Where a group of parameters lies in a row."""

    name: str
    start: int
    stop: int
    size: int  # numbers of the gradient; more than stop - start where sketched


class Projection:
    """How J of a model becomes rows ``[K, columns]``.

    Args:
        model: its trainable parameters are those of J, in order.
        group_of: the group of a parameter, by name.
        dim: d. Groups of at most d numbers are kept whole, larger ones sketched; None: all are kept whole.
        generator: of signs and shifts, on the CPU.

    Attributes:
        groups: in the order in which they first occur.
        columns: numbers in a row, D.
        dim: d, or None where nothing is sketched.
    """

    def __init__(
        self, model: nn.Module, group_of: Callable[[str], str], dim: int | None, generator: torch.Generator
    ) -> None:
        sizes: dict[str, int] = {}
        places = []  # of each parameter: its group and its offset in it
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
            group = by_name.get(name, Columns(name, 0, 0, 0))  # one whose parameters are all frozen has no columns
            width, signs, shifts = group.stop - group.start, None, []
            if p.requires_grad and group.size > width:
                signs = torch.randint(0, 2, (p.numel(),), generator=generator, dtype=torch.int8) * 2 - 1  # [m]
                shifts = torch.randint(width, (-(-p.numel() // width),), generator=generator).tolist()
            self._parts.append((group, offset, signs, shifts))

    def write(self, J: Sequence[Tensor | None], out: Tensor) -> None:
        """Fills ``out [k, columns]`` from the first k rows of J, which may lie on another device."""
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
        """Names the layout and the random numbers."""
        parts: list[str | Tensor] = [repr(self.groups)]
        for _, offset, signs, shifts in self._parts:
            parts += [f"{offset} {shifts}"] if signs is None else [f"{offset} {shifts}", signs]
        return digest(*parts)


def _fold(x: Tensor, signs: Tensor, shifts: Sequence[int], out: Tensor) -> None:
    """out [k, d] += the pieces of x [k, m], each times its signs and rotated by its shift."""
    d = out.shape[1]
    for piece, shift in enumerate(shifts):
        part = x[:, piece * d : (piece + 1) * d] * signs[piece * d : (piece + 1) * d]  # [k, <= d]
        head = min(d - shift, part.shape[1])
        out[:, shift : shift + head] += part[:, :head]
        if head < part.shape[1]:
            out[:, : part.shape[1] - head] += part[:, head:]


def column_layout(sizes: dict[str, int], dim: int | None) -> list[Columns]:
    """The columns of each group, from the numbers in each."""
    groups, start = [], 0
    for name, size in sizes.items():
        stop = start + (size if dim is None else min(size, dim))
        groups.append(Columns(name, start, stop, size))
        start = stop
    return groups


def module_groups(model: nn.Module) -> Callable[[str], str]:
    """Groups parameters by top-level module: from the names of a model's parameters to the name of their module.

    Wrappers around a single module are looked through, and the entries of a ModuleList or Sequential count as modules
    of their own (``down_blocks.0``, ``down_blocks.1``, ...).
    """
    top, prefix = model, ""
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
