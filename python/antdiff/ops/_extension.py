"""Load ``antdiff._C`` and pass torch's tensor exchange API to it. Only this module does so.

Each op has two routes to the same kernel, and this module has the functions that choose between them:

* eager: one C call on plain tensors, wrapped in a ``torch.autograd.Function`` only if a gradient is needed. The
  dispatcher and ``register_autograd`` would add 15-50 us per call.
* compiled, fake or exported: the registration in the ``antdiff`` library (schema, fake kernel, autograd).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from antdiff._checks import as_count, as_device, overlaps_itself

try:
    from antdiff import _C
except ImportError as error:
    if "ANTDIFF_CPU_CAPABILITY" in str(error):  # a value that does not exist; the extension names the choices
        raise
    raise ImportError(
        f"antdiff's compiled extension could not be loaded ({error}). Run `pip install .` in the source tree to build "
        "it. `python -m antdiff.info` reports what is installed."
    ) from error

if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(
        f"antdiff needs torch >= 2.10, which has DLPack's C exchange API; this is torch {torch.__version__}. "
        'Run `pip install "torch>=2.10"`.'
    )

# Read once at import, so that a call costs nothing.
_CHECK = os.environ.get("ANTDIFF_CHECK") == "1"

__all__ = ["_C", "check_errors", "checked", "define", "dense", "differentiate", "traced"]

_C.attach(Tensor.__dlpack_c_exchange_api__, Tensor, torch.nn.Parameter)

LIBRARY = torch.library.Library("antdiff", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an op in the ``antdiff`` library: its schema, one kernel for CPU and CUDA, and its fake kernel."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"antdiff::{name}", fake, lib=LIBRARY)


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register the backward of an op in the ``antdiff`` library, for compiled graphs."""
    torch.library.register_autograd(f"antdiff::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def traced(*tensors: object) -> bool:
    """Return whether the op must use its registration: under torch.compile, or for fake tensors."""
    if _is_compiling():
        return True
    return any(type(tensor) not in _PLAIN and isinstance(tensor, torch._subclasses.FakeTensor) for tensor in tensors)


def dense(name: str, x: Any) -> Tensor:
    """Return ``x`` if it is contiguous, else one contiguous copy.

    Sparse tensors, and tensors that overlap themselves such as expanded ones, are refused: a copy would hide how large
    they become.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}.")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor; got {kind}. Call .to_dense().")
    tensor: Tensor = x
    if not _is_compiling() and x.is_neg():  # a view such as z.conj().imag, whose memory holds the negated numbers
        tensor = x.resolve_neg()
    if tensor.is_contiguous():
        return tensor
    if overlaps_itself(x):
        raise ValueError(
            f"{name} must not overlap itself; got {list(x.shape)} with strides {x.stride()}. Call .contiguous()."
        )
    return tensor.contiguous()


def checked(result: Tensor) -> Tensor:
    """Return ``result``. With ``ANTDIFF_CHECK=1``, first wait for the kernel and raise the errors it has recorded."""
    if _CHECK and result.is_cuda:
        check_errors(result.device)
    return result


def check_errors(device: torch.device | str | int | None = None) -> None:
    """Raise the errors that CUDA kernels have recorded since the last call, and clear them.

    A CUDA kernel cannot raise an exception for a cluster id out of range or a Gram matrix with NaN without a sync of
    host and device. Instead, it poisons its result with NaN and sets a sticky flag. This function reads the flag. It
    waits for the device, so call it once per epoch or when a loss becomes NaN, not in every step. On the CPU it does
    nothing, since ops raise these errors immediately.

    Args:
        device: a CUDA device. Default: the current CUDA device, if CUDA is available.

    Raises:
        ValueError: a kernel has received such an input since the last call.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if isinstance(device, int) and not isinstance(device, bool):
        device = f"cuda:{as_count('device', device, 0)}"
    device = as_device("device", device)
    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    errors = _C.take_errors(index)
    found = [text for bit, text in _ERRORS.items() if errors & bit]
    if found:
        raise ValueError(f"Errors on {device} since the last check: " + "; ".join(found) + ".")


_ERRORS = {
    1: "cluster must be int64 [B] with 0 <= id < k, but an id was out of range (the losses of that call are NaN)",
    2: "gram must be a finite, symmetric Gram matrix with a diagonal >= 0, but one was not (its weights are NaN)",
    4: "perms must list the k-1 other rows in each row i, but a row did not (the weights of that problem are NaN)",
}
