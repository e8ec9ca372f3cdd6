"""Argument checks that several packages share. They need only torch, NumPy and the standard library."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INT64 = 2**63 - 1  # the largest size that torch can count
# More timesteps or clusters than any schedule has. A table of this many numbers takes at most a few hundred megabytes.
MOST_TIMESTEPS = 2**24
_MOST_EXPANDED = 2**24  # elements of an expanded view that a function may read, and so copy


def as_count(name: str, value: Any, least: int = 1, most: int = _INT64) -> int:
    """Return ``value`` as an int from ``least`` to ``most``; the error names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        try:
            if isinstance(value, (Tensor, bool)):
                raise TypeError  # reading a tensor would wait for its device
            value = operator.index(value)  # NumPy integers
        except TypeError:
            raise TypeError(f"{name} must be an int; got {type(value).__name__}. Pass a Python int.") from None
    if isinstance(value, int) and value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}.")
    if isinstance(value, int) and value > most:
        raise ValueError(f"{name} must be at most {most}; got {value}. Pass a smaller number.")
    return value  # type: ignore[no-any-return]  # a SymInt behaves like an int from here on


def as_counts(name: str, values: Any, least: int = 0, most: int = _INT64) -> list[int]:
    """Return ``values``, a list or tuple of ints or an int tensor [n], as a list of ints in the given range."""
    if isinstance(values, Tensor) and values.dim() == 1:
        values = as_tensor(name, values, kind="int").tolist()
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list of ints; got {describe(values)}. Pass a list.")
    return [as_count(name, value, least, most) for value in values]


def as_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    rule: str = "",
    remedy: str = "",
) -> float:
    """Return ``value`` as a finite float in the given range; the error names the argument.

    ``rule`` states the range in the error's words; default: as in "in [0, 1)".
    Tensors are refused, because reading one would wait for its device.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number; got {describe(value)}. Pass a Python float.")
    inside = least <= value <= most and (value > above or above == -math.inf) and (value < below or below == math.inf)
    if not (inside and abs(value) <= _LARGEST_FLOAT):
        rule = rule or _range_in_words(least, above, most, below)
        raise ValueError(f"{name} must be {rule}; got {value}." + (f" {remedy}" if remedy else ""))
    return float(value)


def _range_in_words(least: float, above: float, most: float, below: float) -> str:
    low, high = max(least, above), min(most, below)
    if -math.inf < low and high < math.inf:
        return f"in {'(' if above == low else '['}{low:g}, {high:g}{')' if below == high else ']'}"
    if above == 0:
        return "positive"
    return "finite" if low == -math.inf else f"at least {low:g}" if least == low else f"above {low:g}"


_LARGEST_FLOAT = 1.7976931348623157e308


def as_flag(name: str, value: Any) -> bool:
    """Return ``value`` if it is True or False; the error names the argument."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False; got {describe(value)}.")
    return bool(value)


def as_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``choices``; the error names the argument."""
    if not isinstance(value, str) or value not in choices:
        got = repr(value) if isinstance(value, str) else describe(value)
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {got[:80]}.")
    return value


def as_tensor(
    name: str, x: Any, *, dims: int | None = None, kind: str = "float", shape: str = "", read: bool = True
) -> Tensor:
    """Return ``x`` if it is a dense tensor with values that can be read; the error names the argument.

    Args:
        name: the argument.
        x: the value.
        dims: number of dimensions. None: any.
        kind: ``"float"`` (float16, bfloat16, float32 or float64), ``"int"`` (any integer but bool) or ``"real"`` (any
            of these, and bool).
        shape: the shape in words, for messages.
        read: whether values are read, which meta and fake tensors do not have.
    """
    shape = shape or ("" if dims is None else "[" + ", ".join("NMKL"[:dims]) + "]")
    what = f"a tensor {shape}".rstrip()
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be {what}; got {type(x).__name__}. Convert it with torch.as_tensor.")
    if x.is_nested or x.layout is not torch.strided or x.is_quantized:
        kind_of = "a nested tensor" if x.is_nested else "a quantized tensor" if x.is_quantized else f"layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor; got {kind_of}. Convert it with .to_dense() or .dequantize().")
    if (
        read
        and (x.device.type == "meta" or isinstance(x, torch._subclasses.FakeTensor))
        and not torch.compiler.is_compiling()
    ):
        raise TypeError(f"{name} must have values; got {'a meta' if x.device.type == 'meta' else 'a fake'} tensor.")
    integer = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    allowed = {
        "float": x.dtype in _FLOATS,
        "int": integer,
        "real": x.dtype in _FLOATS or integer or x.dtype == torch.bool,
    }
    if not allowed[kind]:
        rule = {"float": "float32, float64, float16 or bfloat16", "int": "an integer tensor", "real": "a real tensor"}[
            kind
        ]
        raise TypeError(f"{name} must be {rule}; got {describe(x)}. Convert it with .to().")
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{name} must have shape {shape}; got {list(x.shape)}. Drop or add dimensions.")
    if x.dim() and isinstance(x.numel(), int) and x.numel() > _MOST_EXPANDED and overlaps_itself(x):
        raise ValueError(
            f"{name} must not be an expanded view of more than {_MOST_EXPANDED} elements, because it would be copied; "
            f"got {list(x.shape)} with strides {x.stride()}. Pass the tensor before .expand()."
        )
    return x


def overlaps_itself(x: Tensor) -> bool:
    """Return whether the stride of some dimension is smaller than the extent of the dimensions inside it."""
    reach = 1
    for step, size in sorted((step, size) for step, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if step < reach:
            return True
        reach += step * (size - 1)
    return False


def as_module(name: str, module: Any) -> torch.nn.Module:
    """Return ``module`` if it is a network; the error names the argument."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module; got {describe(module)}. Pass the network itself.")
    return module


def as_function(name: str, function: Any) -> Any:
    """Return ``function`` if it can be called; the error names the argument."""
    if not callable(function):
        raise TypeError(f"{name} must be a function; got {describe(function)}.")
    return function


def as_path(name: str, path: Any) -> Path:
    """Return ``path`` as a Path; the error names the argument."""
    if not isinstance(path, (str, os.PathLike)) or "\0" in str(path) or not Path(path).name:
        got = repr(path)[:80] if isinstance(path, str) else describe(path)
        raise TypeError(f"{name} must be the path of a file or folder; got {got}. Pass a str or a pathlib.Path.")
    return Path(path)


def as_device(name: str, device: Any, *, present: bool = True) -> torch.device:
    """Return ``device`` as a device, by default one that exists on this machine; the error names the argument."""
    if isinstance(device, bool) or not isinstance(device, (str, torch.device)):
        raise TypeError(f"{name} must be a device such as 'cpu' or 'cuda:0'; got {describe(device)}.")
    try:
        if not present:
            return torch.device(device)
        found = torch.empty(0, device=device).device  # turns "cuda" into "cuda:0", like the device of a tensor
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"{name} must be a device of this machine, such as 'cpu'; got {str(device)[:40]!r}. torch says: {reason}"
        ) from None
    if found.type == "meta":
        raise ValueError(f"{name} must be a device with memory, such as 'cpu'; got 'meta'.")
    return found


def as_seed(name: str, seed: Any) -> int:
    """Return ``seed`` as an int that a generator accepts; the error names the argument."""
    return as_count(name, seed, least=-(2**63), most=2**64 - 1)


def as_state(state: Any, *keys: str) -> Mapping[str, Any]:
    """Return ``state`` if it is a mapping with these keys, as ``state_dict`` returns it."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a dict that state_dict() returned; got {describe(state)}.")
    absent = [key for key in keys if key not in state]
    if absent:
        raise ValueError(
            f"state must have the entries that state_dict() returned; {', '.join(absent)} is missing, and it has "
            f"{sorted(map(str, state))[:20]}. Pass the state of an object of the same class."
        )
    return state


def state_tensor(key: str, value: Any, like: tuple[int, ...] | None = None, *, kind: str = "real") -> Tensor:
    """Return the entry ``key`` of a state if it is a tensor of the shape ``like`` (None: any)."""
    x = as_tensor(f"state[{key!r}]", value, kind=kind)
    if like is not None and tuple(x.shape) != tuple(like):
        raise ValueError(
            f"state[{key!r}] must have shape {list(like)}; got {list(x.shape)}. Make the object as the saved one was."
        )
    return x


def generator_state(key: str, value: Any, device: torch.device | str = "cpu") -> Tensor | None:
    """Return the entry ``key`` of a state if a generator on ``device`` accepts it."""
    if value is None:
        return None
    x = as_tensor(f"state[{key!r}]", value, kind="int")
    try:
        torch.Generator(device).set_state(x)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"state[{key!r}] must be the state of a generator; torch says: {error}") from None
    return x


def describe(x: object) -> str:
    """Return dtype and shape of a tensor, or the name of another object's type, for error messages."""
    if isinstance(x, Tensor) and x.is_nested:
        return f"{x.dtype} nested tensor"
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def same_device(a: torch.device, b: torch.device) -> bool:
    """Whether two device objects can mean the same device.

    ``torch.Generator("cuda").device`` has no index, while a tensor's device always has one (``cuda:0``). Indices are
    therefore compared only where both devices have one.
    """
    return a == b or (a.type == b.type and (a.index is None or b.index is None))


def as_generator(name: str, generator: object) -> torch.Generator | None:
    """Return ``generator`` if it is a ``torch.Generator`` or None; the error names the argument."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator or None; got {describe(generator)}.")
    return generator


def check_draws(generator: object, device: torch.device) -> None:
    """Raise unless ``generator`` is None or a ``torch.Generator`` on ``device``, the device of the result."""
    generator = as_generator("generator", generator)
    if generator is not None and not same_device(generator.device, device):
        raise ValueError(
            f"generator must live on the device of the result ({device}); got one on {generator.device}. "
            f"Create it with torch.Generator({str(device)!r})."
        )


def check_generator(generator: object, device: torch.device) -> None:
    """Raise unless ``generator`` is a ``torch.Generator`` that draws on ``device``, the device of gram."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}.")
    if not same_device(generator.device, device):
        raise ValueError(
            f"generator must live on the device of gram ({device}); got one on {generator.device}. "
            f"Create it with torch.Generator({str(device)!r})."
        )
