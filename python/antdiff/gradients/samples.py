"""What a sample is: the walk through the arguments of a loss function, and their sorting and cutting.

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

import copy
import dataclasses
import enum
import functools
import numbers
import types
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from collections.abc import Set as AbstractSet
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from antdiff._checks import describe

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
    """The place of the next leaf."""


class _Fixed:
    """A value that all samples share."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class _Tree(NamedTuple):
    """A container in which there are samples."""

    children: list[Any]
    build: Callable[[list[Any]], Any]


class _Parts(NamedTuple):
    """The entries of a container, how a path names each of them, and what puts other entries in their place."""

    steps: list[str]
    values: list[Any]
    build: Callable[[list[Any]], Any]


_LEAF = _Leaf()


class _Dims(NamedTuple):
    """A batch with the ``in_dims`` that came with it."""

    batch: Sequence[Any]
    in_dims: InDims


def with_dims(batch: Sequence[Any], in_dims: InDims) -> Sequence[Any]:
    """Attach ``in_dims`` to a batch, which is read once the number of its samples is known."""
    return batch if in_dims is None else _Dims(batch, in_dims)


class Samples(Sequence[Any]):
    """The arguments of a loss function, in which it is known what the samples are.

    ``loss_fn(*samples)`` receives the arguments in their own containers, without marks.
    """

    __slots__ = ("B", "_leaves", "_nodes", "_paths", "_refusal")

    def __init__(
        self, B: int, nodes: list[Any] | None, leaves: list[Any], paths: Sequence[Path], refusal: str | None
    ) -> None:
        self.B = B
        self._nodes = nodes  # one per argument; None if every argument is a leaf
        self._leaves = leaves  # tensors, arrays, lists and tensor dicts of B samples each
        self._paths = paths
        self._refusal = refusal

    @classmethod
    def of(cls, batch: Sequence[Any], B: int) -> Samples:
        """Read a batch of B samples.

        Raises:
            TypeError, ValueError: ``batch`` is no sequence of arguments, or ``in_dims`` does not fit it.
        """
        if type(batch) is tuple or type(batch) is list:
            for x in batch:
                if type(x) is not Tensor or x.dim() == 0 or x.size(0) != B:
                    break
            else:
                return cls(B, None, list(batch), range(len(batch)), None)
        elif isinstance(batch, Samples):
            if batch.B != B:
                raise ValueError(f"cluster must have one id per sample, B={batch.B}; got {B}. Give one id per sample.")
            return batch
        in_dims = None
        if isinstance(batch, _Dims):
            batch, in_dims = batch
        if isinstance(batch, (str, bytes, Mapping, Tensor, np.ndarray)) or not isinstance(batch, Sequence):
            raise TypeError(
                f"batch must be a tuple or list of the arguments of loss_fn; got {describe(batch)}. "
                "Write (x,) for a single argument x."
            )
        reader = _Reader(B)
        if in_dims is None:
            nodes = [reader.read(x, i, "inferred") for i, x in enumerate(batch)]
        else:
            nodes = reader.read_batch(batch, in_dims)
        return cls(B, nodes, reader.leaves, reader.paths, reader.refusal)

    def __iter__(self) -> Iterator[Any]:
        if self._nodes is None:
            return iter(self._leaves)
        leaves = iter(self._leaves)
        return iter([_fill(node, leaves) for node in self._nodes])

    def __len__(self) -> int:
        return len(self._leaves if self._nodes is None else self._nodes)

    def __getitem__(self, i: Any) -> Any:
        return list(self)[i]

    # ---- what is done with samples -------------------------------------------------------------------------------

    def detached(self) -> Samples:
        """Return the batch with samples that start graphs of their own."""
        for x in self._leaves:
            if not isinstance(x, Tensor) or x.requires_grad:
                return self._with(self.B, [_detached(x) for x in self._leaves])
        return self

    def select(self, order: Tensor) -> Samples:
        """Return the samples ``order``, int64 ``[n]``, in this order.

        Raises:
            TypeError: it is unknown what the samples of an argument are, or they cannot be selected.
        """
        self._require_known()
        if not self._leaves and self.B:
            raise TypeError(
                f"batch must hold the B={self.B} samples, which are sorted and cut by cluster; got no argument of B "
                "rows or entries. Pass the tensors [B, ...] as arguments of loss_fn instead of reading them inside it."
            )
        index, device = _Index(order), order.device
        leaves = [
            x.index_select(0, order)
            if type(x) is Tensor and x.device == device and _is_plain(x)
            else self._selected(j, index)
            for j, x in enumerate(self._leaves)
        ]
        return self._with(len(order), leaves)

    def cut(self, start: int, stop: int) -> Samples:
        """Return the samples ``[start, stop)``, as views where there are any. Raises as :meth:`select`."""
        if start == 0 and stop == self.B:
            return self
        self._require_known()
        leaves = []
        for j, x in enumerate(self._leaves):
            try:
                part = x[start:stop]
                leaves.append(part if type(x) is Tensor and not x.requires_grad else _detached(_remade(x, part)))
            except (RuntimeError, NotImplementedError, TypeError):  # a layout without slices
                leaves.append(self._selected(j, _Index(torch.arange(start, stop))))
        return self._with(stop - start, leaves)

    def map(self, f: Callable[[Tensor], Tensor]) -> Samples:
        """Apply ``f`` to every tensor, numeric array and tensor dict of samples, as dense tensors ``[B, ...]``."""
        return self._with(self.B, [_mapped(x, f) for x in self._leaves])

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor of samples, also those in lists."""
        for x in self._leaves:
            yield from _tensors(x)

    def with_nan(self, poisoned: Tensor) -> Samples:
        """Return a copy in which every floating-point number of the samples in ``poisoned``, bool ``[B]``, is NaN.

        Unlike :meth:`map` it also reaches the entries of lists. Numbers of the other samples become finite.
        """
        chosen = poisoned.tolist()

        def fill(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            values = x.detach().nan_to_num()
            values[poisoned.to(x.device)] = torch.nan
            return values.requires_grad_(x.requires_grad)

        leaves = [
            _filled(x, [_all_nan(e) if bad else e for e, bad in zip(x, chosen, strict=True)])
            if _is_list(x) or (isinstance(x, np.ndarray) and x.dtype == object)
            else _mapped(x, fill)
            for x in self._leaves
        ]
        return self._with(self.B, leaves)

    # ---- the parts -----------------------------------------------------------------------------------------------

    def _with(self, B: int, leaves: list[Any]) -> Samples:
        return Samples(B, self._nodes, leaves, self._paths, self._refusal)

    def _require_known(self) -> None:
        if self._refusal is not None:
            raise TypeError(self._refusal)

    def _selected(self, j: int, index: _Index) -> Any:
        x = self._leaves[j]
        try:
            if isinstance(x, Tensor):
                if x.is_nested:
                    parts = x.unbind()
                    return leaf(torch.nested.as_nested_tensor([parts[i] for i in index.ints], layout=x.layout))
                return leaf(x.index_select(0, index.on(x.device)))
            if isinstance(x, np.ndarray):
                return x[index.on(torch.device("cpu")).numpy()]
            if _is_list(x):
                return _detached(_remade(x, [x[i] for i in index.ints]))
            return _detached(x[index.on(getattr(x, "device", None) or index.order.device)])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, TypeError, IndexError, ValueError) as error:
            layout = f" with layout {x.layout}" if isinstance(x, Tensor) else ""
            raise TypeError(
                f"{_name(self._paths[j])} must hold samples that can be sorted and cut by cluster; got "
                f"{_describe(x)}{layout}, in which rows cannot be selected ({type(error).__name__}). Convert it to a "
                "dense tensor [B, ...], or mark it antdiff.shared(...) if all samples share it."
            ) from error


def each_row(value: Any, B: int, f: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``f`` to every tensor that holds the B samples of a batch; see :meth:`Samples.map`."""
    return Samples.of(value, B).map(f)


def cut(batch: Sequence[Any], B: int, start: int, stop: int) -> Samples:
    """Return the samples ``[start, stop)`` of a batch."""
    return Samples.of(batch, B).cut(start, stop)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for entry in x:
            yield from _tensors(entry)
    elif isinstance(x, Mapping):
        for entry in x.values():
            yield from _tensors(entry)


def _is_plain(x: Tensor) -> bool:
    return x.layout is torch.strided and not (x.requires_grad or x.is_nested or x.is_quantized)


def leaf(x: Tensor) -> Tensor:
    """Return a tensor that starts a graph of its own.

    No gradient flows back into the batch, and the backward of one slice cannot free the graph of another.
    """
    return x.detach().requires_grad_() if x.requires_grad else x


class _Index:
    """Positions of samples, as tensors on the devices that need them and as Python ints."""

    def __init__(self, order: Tensor) -> None:
        self.order = order
        self._copies = {order.device: order}
        self._ints: list[int] | None = None

    def on(self, device: torch.device) -> Tensor:
        if device not in self._copies:
            self._copies[device] = self.order.to(device)
        return self._copies[device]

    @property
    def ints(self) -> list[int]:
        if self._ints is None:
            self._ints = self.order.tolist()
        return self._ints


# ---- the walk --------------------------------------------------------------------------------------------------------

_SCALARS = (
    str,
    bytes,
    numbers.Number,
    type(None),
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.Generator,
    np.generic,
)
# Objects that compute something. They are never samples.
_CODE = (nn.Module, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
_LISTS = (list, tuple, UserList, deque, range)
_DEPTH, _WIDTH = 4, 64  # how far an object is searched for samples


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


class _Reader:
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
        if in_dims == 0 and type(in_dims) is int:
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
                    f"in_dims must be 0 or None for {_name(path)}, since samples are the first dimension; got {dims}. "
                    f"Move the dimension first with x.movedim({dims}, 0), and write 0."
                )
            if isinstance(x, Shared):
                raise ValueError(
                    f"in_dims must be None for {_name(path)}, which is marked antdiff.shared; got 0. Leave one of the "
                    "two out."
                )
            return self.read(x, path, "given")
        parts = _parts(x)
        if isinstance(dims, (list, tuple)) and parts is not None and isinstance(x, (list, tuple, UserList, deque)):
            if len(dims) != len(parts.values):
                raise ValueError(
                    f"in_dims must have one entry for each of the {len(parts.values)} entries of {_name(path)}; got "
                    f"{len(dims)}. Write 0 for an entry that holds samples and None for one that all samples share."
                )
            each = list(dims)
        elif isinstance(dims, Mapping) and parts is not None and not isinstance(x, (list, tuple, UserList, deque)):
            named = {_step(x, key): d for key, d in dims.items()}
            if set(named) != set(parts.steps):
                raise ValueError(
                    f"in_dims must have the keys of {_name(path)}, which are {', '.join(parts.steps)}; got "
                    f"{', '.join(named)}. Write None for an entry that all samples share."
                )
            each = [named[step] for step in parts.steps]
        else:
            raise TypeError(
                f"in_dims must be 0 or None for {_name(path)}, or have its structure; got {type(dims).__name__} for "
                f"{_describe(x)}. Write 0 if it holds samples and None if all samples share it."
            )
        return self._tree(x, parts, path, lambda v, p, i: self.read_dims(v, p, each[i]), "given")

    def read(self, x: Any, path: Path, mode: Mode) -> Any:
        """Return the node of a value: a leaf, a fixed value, or a tree."""
        if isinstance(x, Shared):
            while isinstance(x, Shared):
                x = x.value
            self._marks += 1
            return _Fixed(x)
        if mode == "shared":
            return self._unmarked(x, path)
        if isinstance(x, (Tensor, np.ndarray)):
            return self._rows_of(x, path, mode)
        if _is_scalar(x) or _is_code(x):
            return self._no_samples(x, path, mode)
        if isinstance(x, torch.nn.utils.rnn.PackedSequence):
            return self._refuse("packed", x, path, mode)
        if isinstance(getattr(x, "batch_size", None), torch.Size):  # TensorDict and tensor classes
            if x.batch_size and x.batch_size[0] == self.B:
                return self._leaf(x, path)
            if mode == "given":
                self._mismatch(x, path)
        if isinstance(x, _LISTS) and not _has_names(x):
            node = self._list(x, path, mode)
            if node is not None:
                return node
        parts = _parts(x)
        if parts is None:
            return self._opaque(x, path, mode)
        if isinstance(x, Mapping) and mode == "inferred" and self.B == len(x) > 1 and set(x) == set(range(self.B)):
            return self._refuse("numbered", x, path, mode)
        return self._tree(x, parts, path, lambda v, p, _: self.read(v, p, mode), mode)

    def _tree(self, x: Any, parts: _Parts, path: Path, read: Callable[[Any, Path, int], Any], mode: Mode) -> Any:
        """Read the entries of a container."""
        if id(x) in self._open:
            return self._refuse("cycle", x, path, mode)
        self._open.add(id(x))
        n, marks = len(self.leaves), self._marks
        children = [read(v, (path, s), i) for i, (v, s) in enumerate(zip(parts.values, parts.steps, strict=True))]
        self._open.discard(id(x))
        if all(type(c) is _Fixed and c.value is v for c, v in zip(children, parts.values, strict=True)):
            return _Fixed(x)
        if type(x) not in (dict, list, tuple) and not _rebuilds(x, parts):
            if self._marks > marks:
                raise TypeError(self._message("rebuilt", x, path))
            del self.leaves[n:], self.paths[n:]
            return self._refuse("rebuilt", x, path, mode)
        return _Tree(children, parts.build)

    def _rows_of(self, x: Any, path: Path, mode: Mode) -> Any:
        """Return the node of a tensor or array."""
        if _rows(x) == self.B:
            if mode == "inferred" and isinstance(x, nn.Parameter) and x.requires_grad:
                return self._refuse("parameter", x, path, mode)
            return self._leaf(x, path)
        if mode == "given":
            self._mismatch(x, path)
        nested = isinstance(x, Tensor) and x.is_nested
        if self.B > 1 and not nested and len(x.shape) > 1 and x.shape[1] == self.B:
            return self._refuse("second", x, path, mode)
        return _Fixed(x)

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
            return self._leaf(x, path) if _is_remade(x) else self._refuse("plain", x, path, mode)
        if len(x) != self.B or self.B <= 1:
            return None
        if all(map(_is_scalar, x)):
            return self._leaf(x, path)
        code = sum(map(_is_code, x))
        if code == len(x):
            return _Fixed(x)
        found = {self._search(e, set()) for e in x}
        if "mark" in found:
            return None  # a list with a mark in it is a list of arguments
        if "samples" in found or code:
            tensors = any(isinstance(e, (Tensor, np.ndarray)) for e in x)
            return self._refuse("tensors" if tensors else "lists", x, path, mode)
        if not _is_remade(x):
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
        return _Fixed(x)

    def _unmarked(self, x: Any, path: Path) -> Any:
        """Return the node of a shared value, in which there may still be marks."""
        if type(x) in (dict, list, tuple) or _has_names(x) or dataclasses.is_dataclass(x):
            parts = _parts(x)
            if parts is not None and id(x) not in self._open:
                return self._tree(x, parts, path, lambda v, p, _: self.read(v, p, "shared"), "shared")
        return _Fixed(x)

    def _no_samples(self, x: Any, path: Path, mode: Mode) -> Any:
        if mode == "given":
            self._mismatch(x, path)
        return _Fixed(x)

    def _leaf(self, x: Any, path: Path) -> Any:
        self.leaves.append(x)
        self.paths.append(path)
        return _LEAF

    def _search(self, x: Any, seen: set[int], depth: int = 0) -> str:
        """Return "mark" if there is a mark in a value, "samples" if something in it has B rows or entries, or "".

        Args:
            seen: the containers that have been searched.
            depth: the number of objects of unknown kinds around ``x``, which are not searched without end.
        """
        if isinstance(x, Shared):
            return "mark"
        if isinstance(x, (Tensor, np.ndarray)):
            return "samples" if _rows(x) == self.B else ""
        if _is_scalar(x) or _is_code(x) or isinstance(x, torch.Size) or id(x) in seen:
            return ""
        seen.add(id(x))
        parts = _parts(x)
        found = ""
        if isinstance(x, _LISTS) and not _has_names(x):
            found = "samples" if len(x) == self.B and not all(map(_is_code, x)) else ""
        elif parts is None and _length(x) == self.B:
            return "samples"
        if parts is not None:
            inner = parts.values if not depth else parts.values[:_WIDTH]
        elif isinstance(x, AbstractSet):
            inner = list(x)
        else:  # settings such as a size (h, w) are no samples
            depth += 1
            inner = [v for v in _state(x) if not _is_setting(v)][:_WIDTH] if depth < _DEPTH else []
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
            f"{_name(path)} {rule}; got {_describe(x)} with B={self.B}. {remedy}, or mark it "
            "antdiff.shared(...) if all samples share it."
        )

    def _refuse(self, reason: str, x: Any, path: Path, mode: Mode) -> Any:
        if mode == "given":
            raise TypeError(self._message(reason, x, path))
        if self.B > 1 and self.refusal is None:
            self.refusal = self._message(reason, x, path)
        return _Fixed(x)

    def _mismatch(self, x: Any, path: Path) -> None:
        raise ValueError(
            f"{_name(path)} must have one row or entry for each of the B={self.B} samples, since in_dims is 0 for it; "
            f"got {_describe(x)}. Write None in in_dims if all samples share it."
        )


def _fill(node: Any, leaves: Iterator[Any]) -> Any:
    if node is _LEAF:
        return next(leaves)
    if type(node) is _Fixed:
        return node.value
    return node.build([_fill(child, leaves) for child in node.children])


def _name(path: Path) -> str:
    return f"{_name(path[0])}{path[1]}" if isinstance(path, tuple) else f"batch[{path}]"


def _describe(x: Any) -> str:
    if isinstance(x, Tensor) and x.is_nested:
        return f"a nested tensor of {x.size(0)} tensors"
    if isinstance(x, np.ndarray):
        return f"a numpy array {x.dtype} {list(x.shape)}"
    if isinstance(x, Sized) and not isinstance(x, (Tensor, str, bytes)):
        inner = f" such as {describe(x[0])}" if isinstance(x, (list, tuple)) and x else ""
        length = _length(x)
        return f"{type(x).__name__}{'' if length is None else f' of {length} entries'}{inner}"
    return describe(x)


# ---- kinds of values -------------------------------------------------------------------------------------------------


def _is_scalar(x: Any) -> bool:
    return isinstance(x, _SCALARS)


def _is_code(x: Any) -> bool:
    return isinstance(x, _CODE)


def _is_list(x: Any) -> bool:
    return isinstance(x, _LISTS)


def _has_names(x: Any) -> bool:
    """Whether a tuple has fields with names, which are arguments and never samples."""
    return isinstance(x, tuple) and (hasattr(x, "_fields") or hasattr(x, "n_sequence_fields"))


def _is_setting(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(e, numbers.Number) for e in x)


def _state(x: Any) -> list[Any]:
    """The values that an object of an unknown kind holds."""
    if isinstance(x, functools.partial):
        return [*x.args, *x.keywords.values()]
    slots = (s for c in type(x).__mro__ for s in _as_tuple(c.__dict__.get("__slots__", ())))
    attributes = getattr(x, "__dict__", None)
    return [
        *(attributes.values() if isinstance(attributes, dict) else ()),
        *(getattr(x, s) for s in slots if s != "__dict__" and hasattr(x, s)),
    ]


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _holds_tensor(x: Any, seen: set[int] | None = None) -> bool:
    seen = set() if seen is None else seen
    if isinstance(x, (Tensor, np.ndarray, Shared)):
        return True
    parts = None if _is_scalar(x) or _is_code(x) or id(x) in seen else _parts(x)
    seen.add(id(x))
    return parts is not None and any(_holds_tensor(v, seen) for v in parts.values)


def _rows(x: Any) -> int | None:
    """The first dimension of a tensor or array."""
    if isinstance(x, Tensor):
        return x.size(0) if x.dim() else None
    return x.shape[0] if x.ndim else None


def _length(x: Any) -> int | None:
    """The number of rows or entries of an object of an unknown kind, None if it has none."""
    shape = getattr(x, "shape", None)
    if isinstance(shape, tuple):  # arrays and tables of other libraries
        return shape[0] if shape and isinstance(shape[0], int) else None
    try:
        return len(x) if isinstance(x, Sized) else None
    except (TypeError, NotImplementedError):
        return None


def _step(x: Any, key: Any) -> str:
    return f"[{key!r}]" if isinstance(x, Mapping) else f".{key}"


def _parts(x: Any) -> _Parts | None:
    """Take a container apart; None if it is of an unknown kind."""
    if type(x) is dict:
        keys = list(x)
        return _Parts([f"[{k!r}]" for k in keys], list(x.values()), lambda values: dict(zip(keys, values, strict=True)))
    if isinstance(x, (list, tuple, UserList, deque)):
        steps = [f"[{i}]" for i in range(len(x))]
        names = [] if type(x) in (list, tuple) else _attributes(x)
        values = [*x, *(getattr(x, name) for name in names)]
        return _Parts([*steps, *(f".{n}" for n in names)], values, lambda values: _new_list(x, values, names))
    if isinstance(x, Mapping):
        keys = list(x)
        names = [n for n in _attributes(x) if not (n in x and x[n] is getattr(x, n))]
        values = [*(x[k] for k in keys), *(getattr(x, n) for n in names)]
        steps = [*(f"[{k!r}]" for k in keys), *(f".{n}" for n in names)]
        return _Parts(steps, values, lambda values: _new_mapping(x, keys, values, names))
    if isinstance(x, (type, nn.Module)):
        return None
    if dataclasses.is_dataclass(x):
        names = [f.name for f in dataclasses.fields(x) if hasattr(x, f.name)]
    elif hasattr(type(x), "__attrs_attrs__"):
        names = [a.name for a in type(x).__attrs_attrs__ if hasattr(x, a.name)]
    elif isinstance(x, types.SimpleNamespace):
        names = []
    else:
        return None
    names += [n for n in getattr(x, "__dict__", {}) if n not in names]
    return _Parts(
        [f".{n}" for n in names], [getattr(x, n) for n in names], lambda values: _new_object(x, names, values)
    )


def _attributes(x: Any) -> list[str]:
    """The attributes of a container beside its entries. Mappings of an unknown kind keep their entries there too."""
    if isinstance(x, Mapping) and not isinstance(x, (dict, UserDict)):
        return []
    return [n for n in getattr(x, "__dict__", {}) if not (n == "data" and isinstance(x, (UserDict, UserList)))]


def _new_list(x: Any, values: list[Any], names: list[str]) -> Any:
    n = len(values) - len(names)
    new = _remade(x, values[:n])
    for name, value in zip(names, values[n:], strict=True):
        object.__setattr__(new, name, value)
    return new


def _new_mapping(x: Any, keys: list[Any], values: list[Any], names: list[str]) -> Any:
    n = len(keys)
    if isinstance(x, (dict, UserDict)):
        new: Any = copy.copy(x)
        for key, value in zip(keys, values[:n], strict=True):
            new[key] = value
    else:
        new = type(x)(dict(zip(keys, values[:n], strict=True)))  # type: ignore[call-arg]
    for name, value in zip(names, values[n:], strict=True):
        object.__setattr__(new, name, value)
    return new


def _new_object(x: Any, names: list[str], values: list[Any]) -> Any:
    new = copy.copy(x)  # without __init__ and __post_init__, which would compute something from the entries again
    for name, value in zip(names, values, strict=True):
        object.__setattr__(new, name, value)
    return new


def _remade(x: Any, entries: Any) -> Any:
    """Return a list of the kind of ``x`` with other entries; anything else as it is."""
    if not _is_list(x) or type(entries) is type(x):
        return entries
    if type(x) is list or type(x) is range:
        return list(entries)
    return x._make(entries) if hasattr(x, "_make") else type(x)(entries)


def _is_remade(x: Any) -> bool:
    """Whether a list of samples can be made again with some of its entries."""
    if type(x) in (list, tuple, range):
        return True
    parts = _parts(x)
    return parts is not None and not _attributes(x) and _rebuilds(x, parts)


def _rebuilds(x: Any, parts: _Parts) -> bool:
    """Whether a container made again has the same entries."""
    try:
        new = parts.build(parts.values)
        again = None if new is x or type(new) is not type(x) else _parts(new)
    except Exception:  # whatever a foreign constructor raises
        return False
    return (
        again is not None
        and again.steps == parts.steps
        and all(a is b for a, b in zip(again.values, parts.values, strict=True))
        and getattr(new, "__dict__", {}).keys() == getattr(x, "__dict__", {}).keys()
    )


# ---- single leaves ---------------------------------------------------------------------------------------------------


def _detached(x: Any) -> Any:
    if isinstance(x, Tensor):
        return leaf(x)
    if type(x) in (list, tuple, dict) or isinstance(x, (UserList, deque)) or _has_names(x):
        entries = list(x.values()) if type(x) is dict else list(x)
        if all(map(_is_scalar, entries)):
            return x
        new = [_detached(e) for e in entries]
        if all(a is b for a, b in zip(new, entries, strict=True)):
            return x
        return dict(zip(x, new, strict=True)) if type(x) is dict else _remade(x, new)
    if callable(getattr(x, "apply", None)) and hasattr(x, "batch_size"):
        return x.apply(leaf)
    return x


def _mapped(x: Any, f: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(x, Tensor):
        if x.layout in (torch.sparse_coo, torch.sparse_csr):
            return f(x.to_dense()).to_sparse(layout=x.layout)
        return x if x.layout is torch._mkldnn else f(x)  # type: ignore[attr-defined]
    if isinstance(x, np.ndarray):
        return f(torch.from_numpy(np.array(x))).numpy() if x.dtype.kind in "fiub" and x.dtype.isnative else x
    return x if _is_list(x) else x.apply(f)


def _filled(x: Any, entries: list[Any]) -> Any:
    return np.fromiter(entries, dtype=object) if isinstance(x, np.ndarray) else _remade(x, entries)


def _all_nan(x: Any) -> Any:
    """Return a sample of a list with NaN for every floating-point number in it."""
    if isinstance(x, Tensor):
        return torch.full_like(x, torch.nan) if x.is_floating_point() else x
    if isinstance(x, np.ndarray):
        return np.full_like(x, np.nan) if x.dtype.kind == "f" else x
    if isinstance(x, float):
        return float("nan")
    if type(x) is dict:
        return {key: _all_nan(v) for key, v in x.items()}
    if type(x) in (list, tuple) or _has_names(x):
        return _remade(x, [_all_nan(v) for v in x])
    return x
