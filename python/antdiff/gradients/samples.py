"""The samples of a batch: sorted, cut and mapped, wherever they are in the arguments of a loss function."""

from __future__ import annotations

from collections import UserList, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from antdiff._checks import describe
from antdiff.gradients.containers import (
    has_names,
    is_list,
    is_scalar,
    rebuild_list,
)
from antdiff.gradients.walk import InDims, Path, Reader, describe_value, filled_in, path_name


class _Dims(NamedTuple):
    """A batch with the ``in_dims`` that came with it."""

    batch: Sequence[Any]
    in_dims: InDims


def with_dims(batch: Sequence[Any], in_dims: InDims) -> Sequence[Any]:
    """Check the kind of ``batch`` and attach ``in_dims``, which is read once the number of samples is known."""
    if not isinstance(batch, Sequence) or isinstance(batch, (str, bytes, bytearray)):
        raise TypeError(
            f"batch must be a tuple or list of the arguments of loss_fn; got {describe(batch)}. Pass (x,) for one."
        )
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
        reader = Reader(B)
        if in_dims is None:
            nodes = [reader.read(x, i, "inferred") for i, x in enumerate(batch)]
        else:
            nodes = reader.read_batch(batch, in_dims)
        return cls(B, nodes, reader.leaves, reader.paths, reader.refusal)

    def __iter__(self) -> Iterator[Any]:
        if self._nodes is None:
            return iter(self._leaves)
        leaves = iter(self._leaves)
        return iter([filled_in(node, leaves) for node in self._nodes])

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
                leaves.append(part if type(x) is Tensor and not x.requires_grad else _detached(rebuild_list(x, part)))
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
            if not (x.is_floating_point() or x.is_complex()):
                return x
            values = x.detach().nan_to_num()
            values[poisoned.to(x.device)] = _nan(x)
            return values.requires_grad_(x.requires_grad)

        leaves = [
            _filled(x, [_all_nan(e) if bad else e for e, bad in zip(x, chosen, strict=True)])
            if is_list(x) or (isinstance(x, np.ndarray) and x.dtype == object)
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
            if is_list(x):
                return _detached(rebuild_list(x, [x[i] for i in index.ints]))
            return _detached(x[index.on(getattr(x, "device", None) or index.order.device)])
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except (RuntimeError, NotImplementedError, TypeError, IndexError, ValueError) as error:
            layout = f" with layout {x.layout}" if isinstance(x, Tensor) else ""
            raise TypeError(
                f"{path_name(self._paths[j])} must hold samples that can be sorted and cut by cluster; got "
                f"{describe_value(x)}{layout}, in which rows cannot be selected ({type(error).__name__}). Convert it "
                "to a dense tensor [B, ...], or mark it antdiff.shared(...) if all samples share it."
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


# ---- single leaves ---------------------------------------------------------------------------------------------------


def _detached(x: Any) -> Any:
    if isinstance(x, Tensor):
        return leaf(x)
    if type(x) in (list, tuple, dict) or isinstance(x, (UserList, deque)) or has_names(x):
        entries = list(x.values()) if type(x) is dict else list(x)
        if all(map(is_scalar, entries)):
            return x
        new = [_detached(e) for e in entries]
        if all(a is b for a, b in zip(new, entries, strict=True)):
            return x
        return dict(zip(x, new, strict=True)) if type(x) is dict else rebuild_list(x, new)
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
    return x if is_list(x) else x.apply(f)


def _filled(x: Any, entries: list[Any]) -> Any:
    return np.fromiter(entries, dtype=object) if isinstance(x, np.ndarray) else rebuild_list(x, entries)


def _nan(x: Tensor) -> Any:
    return complex(torch.nan, torch.nan) if x.is_complex() else torch.nan


def _all_nan(x: Any) -> Any:
    """Return a sample of a list with NaN for every floating-point number in it."""
    if isinstance(x, Tensor):
        return torch.full_like(x, _nan(x)) if x.is_floating_point() or x.is_complex() else x
    if isinstance(x, np.ndarray):
        return np.full_like(x, np.nan) if x.dtype.kind == "f" else x
    if isinstance(x, float):
        return float("nan")
    if type(x) is dict:
        return {key: _all_nan(v) for key, v in x.items()}
    if type(x) in (list, tuple) or has_names(x):
        return rebuild_list(x, [_all_nan(v) for v in x])
    return x
