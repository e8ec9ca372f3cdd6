"""Argument checks that several packages share. They need only torch and the standard library."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor


def as_count(name: str, value: Any, least: int = 1) -> int:
    """Return ``value`` as an int that is at least ``least``; the error names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        try:
            if isinstance(value, Tensor):
                raise TypeError  # reading it would wait for its device
            value = operator.index(value)  # NumPy integers
        except TypeError:
            raise TypeError(f"{name} must be an int; got {type(value).__name__}. Pass a Python int.") from None
    if isinstance(value, int) and value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}.")
    return value  # type: ignore[no-any-return]  # a SymInt behaves like an int from here on


def as_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``choices``; the error names the argument."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")
    return value  # type: ignore[return-value]


def describe(x: object) -> str:
    """Return dtype and shape of a tensor, or the name of another object's type, for error messages."""
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def same_device(a: torch.device, b: torch.device) -> bool:
    """Whether two device objects can mean the same device.

    ``torch.Generator("cuda").device`` has no index, while a tensor's device always has one (``cuda:0``). Indices are
    therefore compared only where both devices have one.
    """
    return a == b or (a.type == b.type and (a.index is None or b.index is None))


def check_generator(generator: object, device: torch.device) -> None:
    """Raise unless ``generator`` is a ``torch.Generator`` that draws on ``device``, the device of gram."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}.")
    if not same_device(generator.device, device):
        raise ValueError(
            f"generator must live on the device of gram ({device}); got one on {generator.device}. "
            f"Create it with torch.Generator({str(device)!r})."
        )
