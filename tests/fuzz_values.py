"""Random values of a given meaning, and the ways in which the fuzzer spoils them."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HUGE = 2**33  # elements of an expanded view, which has the memory of one
SMALL = 4096  # tensors up to this size are compared before and after a call
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPES = (
    *FLOATS,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
)
NUMBERS: tuple[Any, ...] = (
    -1, 0, 1, 2, 3, 7, 64, 1000, -(2**31), 2**31, 2**33, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
    0.5, 2.5, -0.0, 1e-300, 1e300, -3.0, math.nan, math.inf, -math.inf,
    True, False, 1j, np.int64(3), np.int32(-2), np.float64(0.5), np.float32(math.nan), np.bool_(True), np.uint8(200),
)  # fmt: skip
TEXTS: tuple[Any, ...] = ("", "mse", "sum", "mean", "auto", "cosine", "\0", "grün", "x" * 5000, b"mean", "cuda", "meta")


class Odd:
    """An object that no function knows."""

    def __repr__(self) -> str:
        return "Odd()"


class Loud:
    """An object whose length, comparison and truth raise an error, as those of lazy objects can."""

    def __len__(self) -> int:
        raise CallbackError("len")

    def __bool__(self) -> bool:
        raise CallbackError("bool")

    def __repr__(self) -> str:
        return "Loud()"


class CallbackError(Exception):
    """An error of the caller's own code, which every function may pass on."""


class Layer(nn.Linear):
    """A network of the caller, whose errors are the caller's."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().forward(*args, **kwargs)
        except Exception as error:
            raise CallbackError(str(error)) from error


class Subclass(Tensor):
    """A tensor of another class."""


def anything(rng: Random) -> Any:
    """Return a value of a random type."""
    kind = rng.randrange(12)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind == 4:
        return rng.choice(TEXTS)
    if kind == 5:
        return None
    if kind < 8:
        return some_tensor(rng)
    if kind == 8:
        return [anything(rng) for _ in range(rng.randrange(4))]
    if kind == 9:
        return {rng.choice(["k", "stage", 0, None]): anything(rng) for _ in range(rng.randrange(3))}
    makers: tuple[Callable[[], Any], ...] = (
        object, Odd, Loud, torch.Generator, Layer,
        lambda: torch.float16, lambda: torch.device("meta"), lambda: np.zeros(3), lambda: np.array(["a"]),
        lambda: np.array([None, 1], dtype=object), lambda: (x for x in [1, 2]), lambda: {1, 2}, lambda: range(3),
        lambda: slice(3), lambda: torch.Size([2]), lambda: (), lambda: [[]], lambda: bytearray(b"ab"),
    )  # fmt: skip
    return rng.choice(makers)()


def some_tensor(rng: Random) -> Tensor:
    shape = [rng.choice([0, 1, 1, 2, 3, 5, 17]) for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 4]))]
    return torch.randn(shape).mul(3).to(rng.choice(DTYPES))


def spoil(rng: Random, value: Any, others: list[Any]) -> Any:
    """Return ``value`` with one fault, or another value in its place. ``others`` are the call's other arguments."""
    chance = rng.random()
    if chance < 0.12:
        return anything(rng)
    if isinstance(value, Tensor):
        if chance < 0.16 and any(isinstance(x, Tensor) for x in others):
            return rng.choice([x for x in others if isinstance(x, Tensor)])  # shares memory with another argument
        return spoil_tensor(rng, value)
    if isinstance(value, bool):
        return rng.choice([not value, *NUMBERS])
    if isinstance(value, (int, float, np.number)):
        return rng.choice(NUMBERS)
    if isinstance(value, str):
        return rng.choice(TEXTS)
    if isinstance(value, (list, tuple)):
        return spoil_list(rng, value, others)
    if isinstance(value, dict):
        return spoil_dict(rng, value, others)
    if isinstance(value, np.ndarray):
        return spoil_array(rng, value)
    if isinstance(value, torch.dtype):
        return rng.choice(DTYPES)
    if value is None:
        return some_tensor(rng) if rng.random() < 0.5 else anything(rng)
    return anything(rng)


def spoil_list(rng: Random, value: Any, others: list[Any]) -> Any:
    items = list(value)
    what = rng.randrange(8)
    if what == 0:
        items = items[:-1]
    elif what == 1:
        items = [*items, anything(rng)]
    elif what == 2:
        items = [*items, *items]
    elif what == 3:
        items = []
    elif what == 4:
        items = items[::-1]
    elif items:
        i = rng.randrange(len(items))
        items[i] = None if what == 5 else spoil(rng, items[i], others)
    return tuple(items) if isinstance(value, tuple) and type(value) is tuple else items


def spoil_dict(rng: Random, value: dict[Any, Any], others: list[Any]) -> Any:
    result = dict(value)
    if not result:
        return {"extra": anything(rng)}
    key = rng.choice(list(result))
    if rng.random() < 0.3:
        del result[key]
    else:
        result[key] = spoil(rng, result[key], others)
    return result


def spoil_array(rng: Random, value: np.ndarray[Any, Any]) -> Any:
    what = rng.randrange(9)
    if what == 0:
        return value.astype(rng.choice([np.float32, np.float16, np.int64, np.complex128, bool]))
    if what == 1:
        return value[..., ::-1]
    if what == 2:
        return value.astype(object)
    if what == 3:
        frozen = value.copy()
        frozen.flags.writeable = False
        return frozen
    if what == 4:
        return np.broadcast_to(np.zeros(1, value.dtype), (HUGE, *value.shape[1:]))
    if what == 5 and value.size:
        bad = value.astype(np.float64)
        bad.flat[rng.randrange(bad.size)] = rng.choice([math.nan, math.inf, -math.inf, 1e308])
        return bad
    if what == 6:
        return value.astype(value.dtype.newbyteorder())
    if what == 7:
        return np.ma.masked_array(value, mask=np.ones(value.shape, bool))
    return value[None]


def spoil_tensor(rng: Random, x: Tensor) -> Any:
    """Return a variant of the tensor that is hard to handle: another layout, dtype, device, size or content."""
    what = rng.randrange(34)
    shape = list(x.shape)
    try:
        if what == 0 and x.dim() >= 2:
            return x.transpose(-1, -2)
        if what == 1:
            return x.to("meta")
        if what == 2 and x.dim():
            return torch.zeros((), dtype=x.dtype).expand(HUGE, *shape[1:])
        if what == 3 and x.dim():
            return torch.zeros((), dtype=x.dtype).expand(*shape[:-1], HUGE)
        if what == 4 and x.dim():
            return x[:1].expand(rng.choice([3, *shape[:1]]), *shape[1:])
        if what == 5 and x.dim():
            return x.to_sparse()
        if what == 6 and x.dim() == 2:
            return x.to_sparse_csr()
        if what == 7 and x.is_floating_point():
            return x.detach().requires_grad_()
        if what in (8, 9, 10, 11) and x.numel():
            return with_value(rng, x)
        if what == 12:
            return x.to(rng.choice(DTYPES))
        if what == 13 and x.dim():
            return x[:-1]
        if what == 14:
            return x[None]
        if what == 15 and x.dim():
            return x.repeat_interleave(2, -1)[..., ::2]
        if what == 16:
            return torch.conj(x.to(torch.complex64))
        if what == 17:
            return torch.quantize_per_tensor(x.detach().float(), 0.1, 0, torch.qint8)
        if what == 18:
            return x.detach().numpy()
        if what == 19:
            return x.tolist()
        if what == 20:
            return x.detach().as_subclass(Subclass)
        if what == 21 and x.is_floating_point():
            return nn.Parameter(x.detach().clone())
        if what == 22:
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
                return torch.zeros(shape, dtype=x.dtype)
        if what == 23:
            return x.new_empty([0, *shape[1:]])
        if what == 24:
            return x.new_empty([*shape[:-1], 0] if shape else [0])
        if what == 25:
            return x.sum() if x.dtype != torch.bool else x.any()
        if what == 26 and x.dim():
            return x[torch.randint(0, max(1, len(x)), (len(x) + 1,))] if len(x) else x
        if what == 27 and x.dim():
            return torch.as_strided(x.clone().contiguous(), shape, [0] * x.dim())
        if what == 28:
            with torch.inference_mode():
                return x.clone()
        if what == 29 and x.dim() >= 2:
            return torch.nested.nested_tensor([y.detach() for y in x]) if len(x) else x
        if what == 30:
            return x.imag if x.is_complex() else torch._neg_view(x) if x.dtype != torch.bool else x.logical_not()
        if what == 31 and x.dim():
            return torch.cat([x, x])
        if what == 32 and x.dim():
            return x.expand(2, *shape)
        if what == 33:
            return x.unsqueeze(-1)
    except (RuntimeError, TypeError, NotImplementedError, ValueError):  # this variant does not exist for this tensor
        pass
    return x.to(rng.choice(DTYPES))


def with_value(rng: Random, x: Tensor) -> Tensor:
    """Return a copy in which some elements are NaN, infinite, huge, tiny, negative or out of range."""
    x = x.detach().clone().contiguous()
    if x.is_floating_point():
        bad: list[Any] = [math.nan, math.inf, -math.inf, 1e308, -1e30, -1.0, 0.0, 5e-324]
    elif x.is_complex():
        bad = [complex(math.nan, 1)]
    elif x.dtype == torch.bool:
        bad = [True, False]
    else:
        top = torch.iinfo(x.dtype)
        bad = [top.max, top.min, -1 if top.min else top.max, 0, 5]
    flat, value = x.view(-1), rng.choice(bad)
    if rng.random() < 0.3:
        flat.fill_(value)
    else:
        flat[rng.randrange(len(flat))] = value
    return x


def describe(value: Any, depth: int = 0) -> str:
    """Return a short text of an argument, from which a person can rebuild it."""
    if isinstance(value, Tensor):
        try:
            text = f"{type(value).__name__}({str(value.dtype)[6:]} {list(value.shape)}"
            if value.layout is not torch.strided:
                return f"{text} {value.layout})"
            if not value.is_nested:
                text += f" strides {list(value.stride())}"
            text += f" on {value.device}" * (value.device.type != "cpu") + " requires grad" * value.requires_grad
            if value.device.type == "cpu" and 0 < value.numel() <= 16 and not value.is_nested:
                text += f" {value.tolist()}"
            return text + ")"
        except Exception as error:  # a tensor that cannot even be described
            return f"<tensor: {type(error).__name__}>"
    if isinstance(value, np.ndarray):
        return f"array({value.dtype} {list(value.shape)} strides {value.strides})"
    if isinstance(value, (list, tuple)) and depth < 3:
        return "[" + ", ".join(describe(x, depth + 1) for x in value[:8]) + (", ..." * (len(value) > 8)) + "]"
    if isinstance(value, dict) and depth < 3:
        return "{" + ", ".join(f"{k!r}: {describe(x, depth + 1)}" for k, x in value.items()) + "}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    return repr(value)[:80]
