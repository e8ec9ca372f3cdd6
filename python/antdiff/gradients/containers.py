"""Containers of samples: how they are taken apart, and rebuilt with other entries."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import numbers
import types
from collections import UserDict, UserList, deque
from collections.abc import Callable, Mapping, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

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
LISTS = (list, tuple, UserList, deque, range)


class Parts(NamedTuple):
    """The entries of a container, how a path names each of them, and what puts other entries in their place."""

    steps: list[str]
    values: list[Any]
    build: Callable[[list[Any]], Any]


def is_scalar(x: Any) -> bool:
    return isinstance(x, _SCALARS)


def is_code(x: Any) -> bool:
    return isinstance(x, _CODE)


def is_list(x: Any) -> bool:
    return isinstance(x, LISTS)


def has_names(x: Any) -> bool:
    """Whether a tuple has fields with names, which are arguments and never samples."""
    return isinstance(x, tuple) and (hasattr(x, "_fields") or hasattr(x, "n_sequence_fields"))


def is_setting(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(e, numbers.Number) for e in x)


def attribute_values(x: Any) -> list[Any]:
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


def row_count(x: Any) -> int | None:
    """The first dimension of a tensor or array."""
    if isinstance(x, Tensor):
        return x.size(0) if x.dim() else None
    return x.shape[0] if x.ndim else None


def entry_count(x: Any) -> int | None:
    """The number of rows or entries of an object of an unknown kind, None if it has none."""
    shape = getattr(x, "shape", None)
    if isinstance(shape, tuple):  # arrays and tables of other libraries
        return shape[0] if shape and isinstance(shape[0], int) else None
    try:
        return len(x) if isinstance(x, Sized) else None
    except (TypeError, NotImplementedError):
        return None


def path_step(x: Any, key: Any) -> str:
    return f"[{key!r}]" if isinstance(x, Mapping) else f".{key}"


def take_apart(x: Any) -> Parts | None:
    """Take a container apart; None if it is of an unknown kind."""
    if type(x) is dict:
        keys = list(x)
        return Parts([f"[{k!r}]" for k in keys], list(x.values()), lambda values: dict(zip(keys, values, strict=True)))
    if isinstance(x, (list, tuple, UserList, deque)):
        steps = [f"[{i}]" for i in range(len(x))]
        names = [] if type(x) in (list, tuple) else _attributes(x)
        values = [*x, *(getattr(x, name) for name in names)]
        return Parts([*steps, *(f".{n}" for n in names)], values, lambda values: _new_list(x, values, names))
    if isinstance(x, Mapping):
        keys = list(x)
        names = [n for n in _attributes(x) if not (n in x and x[n] is getattr(x, n))]
        values = [*(x[k] for k in keys), *(getattr(x, n) for n in names)]
        steps = [*(f"[{k!r}]" for k in keys), *(f".{n}" for n in names)]
        return Parts(steps, values, lambda values: _new_mapping(x, keys, values, names))
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
    return Parts([f".{n}" for n in names], [getattr(x, n) for n in names], lambda values: _new_object(x, names, values))


def _attributes(x: Any) -> list[str]:
    """The attributes of a container beside its entries. Mappings of an unknown kind keep their entries there too."""
    if isinstance(x, Mapping) and not isinstance(x, (dict, UserDict)):
        return []
    return [n for n in getattr(x, "__dict__", {}) if not (n == "data" and isinstance(x, (UserDict, UserList)))]


def _new_list(x: Any, values: list[Any], names: list[str]) -> Any:
    n = len(values) - len(names)
    new = rebuild_list(x, values[:n])
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


def rebuild_list(x: Any, entries: Any) -> Any:
    """Return a list of the kind of ``x`` with other entries; anything else as it is."""
    if not is_list(x) or type(entries) is type(x):
        return entries
    if type(x) is list or type(x) is range:
        return list(entries)
    return x._make(entries) if hasattr(x, "_make") else type(x)(entries)


def can_rebuild_list(x: Any) -> bool:
    """Whether a list of samples can be made again with some of its entries."""
    if type(x) in (list, tuple, range):
        return True
    parts = take_apart(x)
    return parts is not None and not _attributes(x) and can_rebuild(x, parts)


def can_rebuild(x: Any, parts: Parts) -> bool:
    """Whether a container made again has the same entries."""
    try:
        new = parts.build(parts.values)
        again = None if new is x or type(new) is not type(x) else take_apart(new)
    except Exception:  # whatever a foreign constructor raises
        return False
    return (
        again is not None
        and again.steps == parts.steps
        and all(a is b for a, b in zip(again.values, parts.values, strict=True))
        and getattr(new, "__dict__", {}).keys() == getattr(x, "__dict__", {}).keys()
    )
