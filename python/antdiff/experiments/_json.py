"""Measured numbers as JSON."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def finite_or_none(values: Tensor) -> Any:
    """Return a number or nested lists of numbers; None stands for NaN and infinity, which JSON does not have."""
    numbers = values.numpy().astype(object)
    numbers[~values.isfinite().numpy()] = None
    return numbers.tolist()
