"""The device of a run and its number of CPU threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def choose_device(name: str) -> torch.device:
    """Return the torch device that a setting names. Raise ValueError if this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<n>; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<n>; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must be one that torch can use; got {name!r}, and torch sees {torch.cuda.device_count()} CUDA "
            "devices. Pass --device cpu, or see antdiff info"
        )
    return device


@contextmanager
def sensible_threads(image_size: int, device: torch.device) -> Iterator[None]:
    """Use one CPU thread for small images inside the block, unless OMP_NUM_THREADS is set.

    A step on 8x8 images consists of hundreds of operations of some ten microseconds each. A second thread gains next to
    nothing, and on a busy machine its spinning barriers make a run ten times slower. Larger images (above 16 pixels)
    use torch's own number of threads.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" and image_size <= 16 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
