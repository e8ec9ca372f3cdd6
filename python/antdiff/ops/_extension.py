"""The one door to ``antdiff._C``: loads it, hands it torch's tensor exchange, and holds what every op needs to choose
between the raw call and the ``torch.library`` registration.

Each op has two routes to the same kernel:

* eager: one C call on plain tensors, wrapped in a ``torch.autograd.Function`` only when a gradient is wanted. The
  dispatcher and ``register_autograd`` would add 15-50 us a call.
* compiled, fake or exported: the registration in the ``antdiff`` library (schema, fake kernel, autograd).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from antdiff import _C
except ImportError as error:  # pragma: no cover - needs a broken installation
    raise ImportError(
        f"antdiff's compiled extension could not be loaded ({error}). Run `pip install .` in the source tree to build "
        "it. `python -m antdiff.info` reports what is installed."
    ) from error

if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"antdiff needs torch >= 2.10 (DLPack's C exchange API); this is torch {torch.__version__}.")

# Read once: the choice is made where the program starts, and costs nothing a call.
_CHECK = os.environ.get("ANTDIFF_CHECK") == "1"

__all__ = ["_C", "check_errors", "checked", "define", "dense", "differentiate", "traced"]

_C.attach(Tensor.__dlpack_c_exchange_api__, Tensor, torch.nn.Parameter)

LIBRARY = torch.library.Library("antdiff", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Declares an op of the ``antdiff`` library: its schema, its kernel (CPU and CUDA alike) and its fake kernel."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"antdiff::{name}", fake, lib=LIBRARY)


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Gives an op of the ``antdiff`` library its backward, for compiled graphs."""
    torch.library.register_autograd(f"antdiff::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def traced(*tensors: object) -> bool:
    """True where the op must go through its registration: under torch.compile, or on fake tensors."""
    if _is_compiling():
        return True
    return any(type(tensor) not in _PLAIN and isinstance(tensor, torch._subclasses.FakeTensor) for tensor in tensors)


def dense(name: str, x: Any) -> Tensor:
    """``x`` as a contiguous tensor: itself, or one copy where it is strided. Sparse tensors and tensors that overlap
    themselves (expanded ones) are refused, for a copy would hide how large they get."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}.")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {x.layout}. Call .to_dense().")
    if x.is_contiguous():
        return x
    if _overlaps_itself(x):
        raise ValueError(
            f"{name} must not overlap itself; got {list(x.shape)} with strides {x.stride()}. Call .contiguous()."
        )
    return x.contiguous()


def _overlaps_itself(x: Tensor) -> bool:
    """Whether some dimension steps less far than those inside it reach."""
    reach = 1
    for step, size in sorted((step, size) for step, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if step < reach:
            return True
        reach += step * (size - 1)
    return False


def checked(result: Tensor) -> Tensor:
    """``result``; with ``ANTDIFF_CHECK=1`` after waiting for the kernel and raising what it noted."""
    if _CHECK and result.is_cuda:
        check_errors(result.device)
    return result


def check_errors(device: torch.device | str | int | None = None) -> None:
    """Raises what kernels on a CUDA device could only note, and forgets it.

    A cluster id out of range or a Gram matrix with NaN cannot raise inside a CUDA kernel without a synchronisation, so
    the kernel poisons its result with NaN and sets a sticky flag. This reads the flag: it waits for the device, so call
    it once an epoch or when a loss turns NaN, not every step. On the CPU errors were raised at once; nothing to read.

    Args:
        device: a CUDA device; default the current one where CUDA is present.

    Raises:
        ValueError: a kernel since the last call met such an input.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    errors = _C.take_errors(index)
    found = [text for bit, text in _ERRORS.items() if errors & bit]
    if found:
        raise ValueError(f"on {device}, since the last check: " + "; ".join(found))


_ERRORS = {
    1: "cluster must be int64 [B] with 0 <= id < k; some id was out of range (that call's losses are NaN)",
    2: "gram must be a finite, symmetric Gram matrix with a non-negative diagonal; some was not (its weights are NaN)",
    4: "perms must list, in row i, the k-1 other rows; some row did not (that problem's weights are NaN)",
}
