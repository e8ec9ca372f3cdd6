"""Confidence intervals of means over few repetitions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from antdiff._checks import as_number, as_tensor


class Interval(NamedTuple):
    """A mean over independent repetitions and its two-sided 95 % Student interval. All are float64 of one shape."""

    mean: Tensor
    low: Tensor  # NaN with fewer than two repetitions, whose spread is unknown
    high: Tensor

    @property
    def beyond_zero(self) -> Tensor:
        """Whether the interval excludes zero. False where the interval is unknown."""
        return (self.low > 0) | (self.high < 0)


def student_interval(values: Tensor, confidence: float = 0.95) -> Interval:
    """Return the mean and interval of ``values [S, ...]`` over the first dimension. NaN entries are ignored.

    Entries are assumed to be independent and approximately normal: training seeds, or independent draws of the data.
    The confidence holds for a single interval. Among twenty intervals, one is expected to miss the true value.
    """
    from scipy.stats import t as student

    as_tensor("values", values, shape="[S, ...]", kind="real")
    if values.dim() == 0:
        raise ValueError("values must have shape [S, ...], one row per repetition; got a 0-d tensor.")
    if values.dtype != torch.float64:
        values = values.double()
    values = values.detach().cpu()
    confidence = as_number("confidence", confidence, above=0, below=1)

    seen = values.isfinite()
    n = seen.sum(0)  # [...]
    mean = torch.where(seen, values, 0).sum(0) / n
    variance = torch.where(seen, values - mean, 0).square().sum(0) / (n - 1)
    quantile = torch.from_numpy(np.asarray(student.ppf((1 + confidence) / 2, (n - 1).clamp(min=1).numpy())))
    half = torch.where(n > 1, quantile * (variance / n).sqrt(), torch.nan)
    return Interval(mean, mean - half, mean + half)
