"""What a sample is: the walk through the arguments of a loss function.

A batch of B samples is a sequence of arguments. The walk looks for their samples by these rules, through dicts and
other mappings, lists, tuples, named tuples, dataclasses and namespaces:

- A tensor or array ``[B, ...]`` holds one row per sample. Any other tensor is shared by all samples.
- A list or tuple of B numbers, strings, None, tuples, lists, images or other objects holds one entry per sample.
- Scalars, strings, functions and modules are shared.
- What :func:`shared` marks is shared, and ``in_dims`` decides for the arguments that it names.

Whatever these rules leave open is refused, with the remedy, as soon as samples have to change places. A batch of one
sample, or one that is neither sorted nor cut, is never refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, Sized, ValuesView
from collections.abc import Set as AbstractSet
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from antdiff._checks import describe
from antdiff.gradients.containers import (
    LISTS,
    Parts,
    attribute_values,
    can_rebuild,
    can_rebuild_list,
    entry_count,
    has_names,
    is_code,
    is_list,
    is_scalar,
    is_setting,
    path_step,
    row_count,
    take_apart,
)

T = TypeVar("T")
InDims = Any  # 0 or None, or a nested tuple, list or mapping of them

# "inferred" follows the rules above, "given" is below a 0 of in_dims, "shared" is below a None.
Mode = Literal["inferred", "given", "shared"]
Path = Any  # the position of an argument, or a pair of the path of the container and the step into it


class Shared(Generic[T]):
    """An argument that all samples share; see :func:`shared`."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"shared({self.value!r})"


def shared(value: T) -> Shared[T]:
    """Mark an argument of a loss function, or a part of one, that all samples share.

    It is neither sorted nor cut, whatever its shape, and ``loss_fn`` receives the bare ``value``::

        cluster_gradients(loss_fn, (x, t, antdiff.shared(table)), cluster)

    Without the mark, a table with as many rows as the batch has samples would be sorted and cut with the samples. The
    mark may stand anywhere in nested dicts, lists, tuples and dataclasses.
    """
    return Shared(value)


class _Leaf:
    """The place of the next leaf: a tensor, array, list or tensor dict with one row or entry per sample."""


class Fixed:
    """A value that all samples share."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Tree(NamedTuple):
    """A container in which there are samples."""

    children: list[Any]
    build: Callable[[list[Any]], Any]


LEAF = _Leaf()


# How far an object of an unknown kind is searched for samples: levels, entries per level, and containers in all.
_DEPTH, _WIDTH, _BUDGET = 4, 64, 1000

# The rule that a refused argument breaks, and the remedy beside antdiff.shared.
_AMBIGUOUS = "must not be a list of B entries that may be one entry per sample or B arguments"
_REFUSALS = {
    "tensors": (
        _AMBIGUOUS,
        "Pass torch.stack(x), or np.fromiter(x, dtype=object) for unequal shapes, if its entries are the samples, or "
        "give in_dims=0 for it if each entry holds all samples",
    ),
    "lists": (
        _AMBIGUOUS,
        "Give in_dims for it: 0 if its entries are the samples, a list with 0 or None per entry if they are arguments",
    ),
    "second": (
        "must have its samples in the first dimension",
        "Move its second dimension first, x.movedim(1, 0), if that is the dimension of the samples",
    ),
    "parameter": (
        "must not be a parameter with one row per sample, since no gradient flows back into samples",
        "Pass x.detach() if its rows are samples",
    ),
    "packed": ("must keep the rows of a sample together", "Pass the padded tensor, and pack it inside loss_fn"),
    "numbered": (
        "must not have the numbers of the samples as keys, since their order changes",
        "Pass list(x.values())",
    ),
    "plain": ("must be a plain list or tuple if it has one entry per sample", "Pass list(x)"),
    "iterator": ("must not be an iterator, which can be read only once", "Pass list(x)"),
    "rebuilt": ("must be a container that can be rebuilt with other entries", "Pass a dict, list or dataclass"),
    "unknown": (
        "must be a tensor, array, list, dict or dataclass if it holds samples",
        "Pass its samples in one of these",
    ),
    "cycle": ("must not contain itself", "Pass its parts as arguments"),
}


class Reader:
    """Walks through arguments and collects the leaves.

    Attributes:
        refusal: the message about the first argument of which it is unknown what its samples are.
    """

    def __init__(self, B: int) -> None:
        self.B = B
        self.leaves: list[Any] = []
        self.paths: list[Path] = []
        self.refusal: str | None = None
        self._open: set[int] = set()  # the containers around the present value
        self._marks = 0

    def read_batch(self, batch: Sequence[Any], in_dims: InDims) -> list[Any]:
        """Return one node per argument."""
        remedy = "Write 0 for an argument that holds samples and None for one that all samples share."
        if type(in_dims) is int and in_dims == 0:
            return [self.read(x, i, "given") for i, x in enumerate(batch)]
        if not isinstance(in_dims, (list, tuple)):
            got = in_dims if isinstance(in_dims, int) else type(in_dims).__name__
            raise TypeError(
                f"in_dims must be 0, or a tuple with one entry per argument of loss_fn; got {got}. {remedy}"
            )
        if len(in_dims) != len(batch):
            raise ValueError(
                f"in_dims must have one entry for each of the {len(batch)} arguments in batch; got {len(in_dims)}. "
                f"{remedy}"
            )
        return [self.read_dims(x, i, dims) for i, (x, dims) in enumerate(zip(batch, in_dims, strict=True))]

    def read_dims(self, x: Any, path: Path, dims: InDims) -> Any:
        """Read a value for which ``in_dims`` has the entry ``dims``."""
        if dims is None:
            return self.read(x, path, "shared")
        if isinstance(dims, int) and not isinstance(dims, bool):
            if dims != 0:
                raise ValueError(
                    f"in_dims must be 0 or None for {path_name(path)}, since samples are the first dimension; got "
                    f"{dims}. Move the dimension first with x.movedim({dims}, 0), and write 0."
                )
            if isinstance(x, Shared):
                raise ValueError(
                    f"in_dims must be None for {path_name(path)}, which is marked antdiff.shared; got 0. Leave one "
                    "of the two out."
                )
            return self.read(x, path, "given")
        parts = take_apart(x)
        if isinstance(dims, (list, tuple)) and parts is not None and is_list(x):
            if len(dims) != len(parts.values):
                raise ValueError(
                    f"in_dims must have one entry for each of the {len(parts.values)} entries of {path_name(path)}; "
                    f"got {len(dims)}. Write 0 for an entry that holds samples and None for one that all samples share."
                )
            each = list(dims)
        elif isinstance(dims, Mapping) and parts is not None and not is_list(x):
            named = {path_step(x, key): d for key, d in dims.items()}
            if set(named) != set(parts.steps):
                raise ValueError(
                    f"in_dims must have the keys of {path_name(path)}, which are {', '.join(parts.steps)}; got "
                    f"{', '.join(named)}. Write None for an entry that all samples share."
                )
            each = [named[step] for step in parts.steps]
        else:
            raise TypeError(
                f"in_dims must be 0 or None for {path_name(path)}, or have its structure; got {type(dims).__name__} "
                f"for {describe_value(x)}. Write 0 if it holds samples and None if all samples share it."
            )
        return self._tree(x, parts, path, lambda v, p, i: self.read_dims(v, p, each[i]), "given")

    def read(self, x: Any, path: Path, mode: Mode) -> Any:
        """Return the node of a value: a leaf, a fixed value, or a tree."""
        if isinstance(x, Shared):
            while isinstance(x, Shared):
                x = x.value
            self._marks += 1
            return Fixed(x)
        if mode == "shared":
            return self._unmarked(x, path)
        if isinstance(x, (Tensor, np.ndarray)):
            return self._rows_of(x, path, mode)
        if is_scalar(x) or is_code(x):
            return self._no_samples(x, path, mode)
        if isinstance(x, torch.nn.utils.rnn.PackedSequence):
            return self._refuse("packed", x, path, mode)
        if isinstance(getattr(x, "batch_size", None), torch.Size):  # TensorDict and tensor classes
            if x.batch_size and x.batch_size[0] == self.B:
                return self._leaf(x, path)
            if mode == "given":
                self._mismatch(x, path)
        if isinstance(x, LISTS) and not has_names(x):
            node = self._list(x, path, mode)
            if node is not None:
                return node
        parts = take_apart(x)
        if parts is None:
            return self._opaque(x, path, mode)
        if isinstance(x, Mapping) and mode == "inferred" and self.B == len(x) > 1 and set(x) == set(range(self.B)):
            return self._refuse("numbered", x, path, mode)
        return self._tree(x, parts, path, lambda v, p, _: self.read(v, p, mode), mode)

    def _tree(self, x: Any, parts: Parts, path: Path, read: Callable[[Any, Path, int], Any], mode: Mode) -> Any:
        """Read the entries of a container."""
        if id(x) in self._open:
            return self._refuse("cycle", x, path, mode)
        self._open.add(id(x))
        n, marks = len(self.leaves), self._marks
        children = [read(v, (path, s), i) for i, (v, s) in enumerate(zip(parts.values, parts.steps, strict=True))]
        self._open.discard(id(x))
        if all(type(c) is Fixed and c.value is v for c, v in zip(children, parts.values, strict=True)):
            return Fixed(x)
        if type(x) not in (dict, list, tuple) and not can_rebuild(x, parts):
            if self._marks > marks:
                raise TypeError(self._message("rebuilt", x, path))
            del self.leaves[n:], self.paths[n:]
            return self._refuse("rebuilt", x, path, mode)
        return Tree(children, parts.build)

    def _rows_of(self, x: Any, path: Path, mode: Mode) -> Any:
        """Return the node of a tensor or array."""
        if row_count(x) == self.B:
            if mode == "inferred" and isinstance(x, nn.Parameter) and x.requires_grad:
                return self._refuse("parameter", x, path, mode)
            return self._leaf(x, path)
        if mode == "given":
            self._mismatch(x, path)
        nested = isinstance(x, Tensor) and x.is_nested
        if self.B > 1 and not nested and len(x.shape) > 1 and x.shape[1] == self.B:
            return self._refuse("second", x, path, mode)
        return Fixed(x)

    def _list(self, x: Any, path: Path, mode: Mode) -> Any:
        """Return the node of a list of samples, or None for a list that is walked through."""
        if isinstance(x, torch.Size):
            return self._no_samples(x, path, mode)
        if mode == "given":
            # Decided by the kind of the entries and not by their sizes, so that it cannot change with the batch.
            if not x or any(_holds_tensor(e) for e in x):
                return None
            if len(x) != self.B:
                self._mismatch(x, path)
            return self._leaf(x, path) if can_rebuild_list(x) else self._refuse("plain", x, path, mode)
        if len(x) != self.B or self.B <= 1:
            return None
        if all(map(is_scalar, x)):
            return self._leaf(x, path)
        code = sum(map(is_code, x))
        if code == len(x):
            return Fixed(x)
        found = {self._search(e, set()) for e in x}
        if "mark" in found:
            return None  # a list with a mark in it is a list of arguments
        if "samples" in found or code:
            tensors = any(isinstance(e, (Tensor, np.ndarray)) for e in x)
            return self._refuse("tensors" if tensors else "lists", x, path, mode)
        if not can_rebuild_list(x):
            return self._refuse("plain", x, path, mode)
        return self._leaf(x, path)

    def _opaque(self, x: Any, path: Path, mode: Mode) -> Any:
        if mode == "given":
            self._mismatch(x, path)
        if self.B > 1:
            if isinstance(x, Iterator):
                return self._refuse("iterator", x, path, mode)
            if self._search(x, set()) == "samples":
                return self._refuse("unknown", x, path, mode)
        return Fixed(x)

    def _unmarked(self, x: Any, path: Path) -> Any:
        """Return the node of a shared value, in which there may still be marks."""
        if type(x) in (dict, list, tuple) or has_names(x) or dataclasses.is_dataclass(x):
            parts = take_apart(x)
            if parts is not None and id(x) not in self._open:
                return self._tree(x, parts, path, lambda v, p, _: self.read(v, p, "shared"), "shared")
        return Fixed(x)

    def _no_samples(self, x: Any, path: Path, mode: Mode) -> Any:
        if mode == "given":
            self._mismatch(x, path)
        return Fixed(x)

    def _leaf(self, x: Any, path: Path) -> Any:
        self.leaves.append(x)
        self.paths.append(path)
        return LEAF

    def _search(self, x: Any, seen: set[int], depth: int = 0) -> str:
        """Return "mark" if there is a mark in a value, "samples" if something in it has B rows or entries, or "".

        Args:
            seen: the containers that have been searched.
            depth: the number of objects of unknown kinds around ``x``, which are not searched without end.
        """
        if isinstance(x, Shared):
            return "mark"
        if isinstance(x, (Tensor, np.ndarray)):
            return "samples" if row_count(x) == self.B else ""
        if is_scalar(x) or is_code(x) or isinstance(x, torch.Size) or id(x) in seen:
            return ""
        if depth and len(seen) > _BUDGET:
            return ""
        if type(x) in (list, tuple) and all(map(is_scalar, x)):
            return "samples" if len(x) == self.B else ""
        seen.add(id(x))
        parts = take_apart(x)
        found = ""
        if isinstance(x, LISTS) and not has_names(x):
            found = "samples" if len(x) == self.B and not all(map(is_code, x)) else ""
        elif parts is None and entry_count(x) == self.B:
            return "samples"
        if parts is not None:
            inner = parts.values if not depth else parts.values[:_WIDTH]
        elif isinstance(x, (AbstractSet, KeysView, ValuesView, ItemsView)):
            inner = list(x)
        else:  # settings such as a size (h, w) are no samples
            depth += 1
            inner = [v for v in attribute_values(x) if not is_setting(v)][:_WIDTH] if depth < _DEPTH else []
        for v in inner:
            below = self._search(v, seen, depth)
            if below == "mark":
                return below
            found = found or below
        return found

    # ---- refusals ------------------------------------------------------------------------------------------------

    def _message(self, reason: str, x: Any, path: Path) -> str:
        rule, remedy = _REFUSALS[reason]
        return (
            f"{path_name(path)} {rule}; got {describe_value(x)} with B={self.B}. {remedy}, or mark it "
            "antdiff.shared(...) if all samples share it."
        )

    def _refuse(self, reason: str, x: Any, path: Path, mode: Mode) -> Any:
        if mode == "given":
            raise TypeError(self._message(reason, x, path))
        if self.B > 1 and self.refusal is None:
            self.refusal = self._message(reason, x, path)
        return Fixed(x)

    def _mismatch(self, x: Any, path: Path) -> None:
        raise ValueError(
            f"{path_name(path)} must have one row or entry for each of the B={self.B} samples, since in_dims is 0 for "
            f"it; got {describe_value(x)}. Write None in in_dims if all samples share it."
        )


def filled_in(node: Any, leaves: Iterator[Any]) -> Any:
    if node is LEAF:
        return next(leaves)
    if type(node) is Fixed:
        return node.value
    return node.build([filled_in(child, leaves) for child in node.children])


def path_name(path: Path) -> str:
    return f"{path_name(path[0])}{path[1]}" if isinstance(path, tuple) else f"batch[{path}]"


def describe_value(x: Any) -> str:
    if isinstance(x, Tensor) and x.is_nested:
        return f"a nested tensor of {x.size(0)} tensors"
    if isinstance(x, np.ndarray):
        return f"a numpy array {x.dtype} {list(x.shape)}"
    if isinstance(x, Sized) and not isinstance(x, (Tensor, str, bytes)):
        inner = f" such as {describe(x[0])}" if isinstance(x, (list, tuple)) and x else ""
        n = entry_count(x)
        return f"{type(x).__name__}{'' if n is None else f' of {n} entries'}{inner}"
    return describe(x)


def _holds_tensor(x: Any, seen: set[int] | None = None) -> bool:
    seen = set() if seen is None else seen
    if isinstance(x, (Tensor, np.ndarray, Shared)):
        return True
    parts = None if is_scalar(x) or is_code(x) or id(x) in seen else take_apart(x)
    seen.add(id(x))
    return parts is not None and any(_holds_tensor(v, seen) for v in parts.values)
