"""The memory plan of task affinity: how many gradients are held at once, and whether they are sketched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import nn

from antdiff.analysis.projection import column_layout

_LARGEST_SKETCH = 2**14  # standard deviation below 0.8 %, less than the noise of the data
_SMALLEST_SKETCH = 2**8
_LARGEST_BLOCK = 16  # larger blocks save nothing, since the split route handles their rows one by one


class Plan(NamedTuple):
    """The decisions of :func:`make_plan`."""

    dim: int | None  # d, the size of the sketch; None if nothing is sketched
    block: int  # K: timesteps whose gradients are held at once
    slab: int  # columns per step of the Gram matrix
    bytes: int  # upper bound on the memory held at once
    dtype: torch.dtype  # of gradients and rows


def make_plan(
    named: list[tuple[str, nn.Parameter]],
    group_of: Callable[[str], str],
    n: int,
    *,
    sketch: int | Literal["auto"] | None,
    memory: int,
    on_disk: bool,
) -> Plan:
    """Return the plan with the largest block that fits into ``memory`` bytes for ``n`` timesteps.

    The memory counts the gradients of the block and one more, the rows (2 n D numbers, unless they are on the disk),
    the signs of the sketch (one byte per parameter), one slab of the Gram matrix in float64, and the n x n arrays of
    the estimates.

    Raises:
        TypeError, ValueError: an invalid sketch or memory, no trainable parameters, or too little memory.
    """
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise TypeError(f"memory must be an int, in bytes; got {type(memory).__name__}. Pass a Python int.")
    if sketch is not None and sketch != "auto" and (isinstance(sketch, bool) or not isinstance(sketch, int)):
        raise TypeError(f"sketch must be an int, 'auto' or None; got {sketch!r}.")
    if isinstance(sketch, int) and sketch < 1:
        raise ValueError(f"sketch must be at least 1; got {sketch}.")
    if not named:
        raise ValueError("model must have a parameter that requires grad; it has none. Unfreeze one.")
    dtype = torch.float64 if any(p.dtype == torch.float64 for _, p in named) else torch.float32
    sizes: dict[str, int] = {}
    for name, p in named:
        sizes[group_of(name)] = sizes.get(group_of(name), 0) + p.numel()
    P, item = sum(sizes.values()), dtype.itemsize

    def held(dim: int | None, block: int, in_memory: bool) -> tuple[int, int]:
        """Return the bytes held, and the columns of a slab, which takes at most an eighth of the memory."""
        columns = column_layout(sizes, dim)[-1].stop
        slab = max(1, min(columns, 2**16, memory // 8 // (2 * n * 8)))
        signs = sum(size for size in sizes.values() if dim is not None and size > dim)
        # The estimates hold three [2n, 2n] arrays (the Gram matrix of a group, their sum and a temporary), about 16
        # temporaries [n, n], and one result [n, n] per group, twice while they are stacked.
        square = (3 * 4 + 16 + 2 * len(sizes)) * n * n * 8
        rows = 2 * n * columns * item if in_memory else 0
        return (block + 1) * P * item + rows + signs + 2 * 2 * n * slab * 8 + square, slab

    dim = sketch if isinstance(sketch, int) else None
    if sketch == "auto" and held(None, 1, True)[0] > memory:
        dim = _LARGEST_SKETCH
        while dim > _SMALLEST_SKETCH and held(dim, min(4, n), not on_disk)[0] > memory:
            dim //= 2
    if dim is not None and all(size <= dim for size in sizes.values()):
        dim = None  # nothing to sketch
    least, _ = held(dim, 1, not on_disk)
    if least > memory:
        remedy = "Give more memory, fewer timesteps" + ("" if dim is not None else ", sketch='auto'")
        remedy += "." if on_disk else ", or a folder, which then holds the rows."
        raise ValueError(
            f"memory must be at least {least} bytes for {n} timesteps of {P} parameters; got {memory}. {remedy}"
        )
    block = min(n, _LARGEST_BLOCK, 1 + (memory - least) // (P * item))
    total, slab = held(dim, block, not on_disk)
    return Plan(dim, block, slab, total, dtype)
