"""Ops that fail on NaN, made to pass it on while the probe runs.

On CUDA most of them fail with a device-side assertion, after which the process can use the device no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

Op = Callable[..., Any]


def _spellings(*names: str) -> set[Op]:
    homes = (torch, Tensor, torch.linalg)
    return {getattr(home, name) for home in homes for name in names if hasattr(home, name)}


# Turn floats into integers, which index tables: the integer of NaN is out of every range.
_ROUNDING = _spellings(
    "long", "int", "short", "char", "byte", "to", "type", "type_as", "bucketize", "searchsorted", "as_tensor"
)
# Refuse NaN. A half is a valid probability, and a valid entry of a symmetric matrix.
_REFUSING = {F.binary_cross_entropy} | _spellings(
    "bernoulli", "bernoulli_", "multinomial", "binomial", "poisson", "eigh", "eigvalsh", "svd", "svdvals"
)


class ToleranceMode(TorchFunctionMode):
    """Turns NaN into 0 where it becomes an integer, and runs ops that refuse NaN on other numbers."""

    def __torch_function__(self, func: Op, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _REFUSING:
            return _without_nan(func, args, kwargs)
        out = func(*args, **kwargs)
        if func in _ROUNDING and isinstance(out, Tensor) and not (out.is_floating_point() or out.is_complex()):
            for x in (*args, *kwargs.values()):
                if isinstance(x, Tensor) and x.is_floating_point() and x.shape == out.shape:
                    out = out.masked_fill(torch.isnan(x), 0)
        return out


def _without_nan(func: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``func`` on finite numbers, and make those rows of its result NaN that had one in an argument."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
    bad = [torch.isnan(x) for x in tensors]
    args = tuple(_finite(x) for x in args)
    out = func(*args, **{name: _finite(x) for name, x in kwargs.items()})
    for result in out if isinstance(out, tuple) else (out,):
        if isinstance(result, Tensor) and result.is_floating_point():
            values = result.detach()
            for where in bad:
                if where.dim() and values.dim() and where.shape[0] == values.shape[0]:
                    values[where.flatten(1).any(1) if where.dim() > 1 else where] = torch.nan
                else:
                    values.masked_fill_(where.any(), torch.nan)
    return out


def _finite(x: Any) -> Any:
    return torch.nan_to_num(x, nan=0.5) if isinstance(x, Tensor) and x.is_floating_point() else x


@contextmanager
def tolerating_nan() -> Iterator[None]:
    validates = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        with ToleranceMode():
            yield
    finally:
        Distribution.set_default_validate_args(validates)
