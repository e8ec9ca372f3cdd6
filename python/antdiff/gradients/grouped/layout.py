"""Where the rows of each sample are, wherever the batch meets a parameter.

In most networks a tensor ``[m B, ...]`` has m rows per sample, in the order of the samples. Other networks put the
sequence first, append a second batch to the first one, or embed one sample after the other. A probe shows which rows
become NaN with a sample, so the sample of every row is known and need not be guessed. A :class:`Layout` holds it. It is
used for the batch that was probed and for no other one, since the values of a batch may decide where its rows are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from antdiff.gradients.batch import ClusteredBatch

_DEEPEST = 3  # rows are entries of at most the first three dimensions, as in [sequence, batch, heads, channels]


class Layout:
    """The sample of each row of a tensor.

    Attributes:
        owners: int64 ``[n_1, ..., n_d]`` on the host. Row ``x[i_1, ..., i_d]`` belongs to sample
            ``owners[i_1, ..., i_d]``.
    """

    def __init__(self, owners: Tensor) -> None:
        self.owners = owners.cpu()
        self._on_device: Tensor | None = None

    @property
    def lead(self) -> torch.Size:
        """The leading dimensions that count rows."""
        return self.owners.shape

    def rows(self, samples: ClusteredBatch) -> ClusteredBatch:
        """Return the clusters of the rows, given those of the samples, which are sorted by cluster."""
        return samples.derived(self, self._clusters)

    def _clusters(self, samples: ClusteredBatch) -> ClusteredBatch:
        owners = self.owners.flatten()
        ids = torch.arange(samples.k).repeat_interleave(torch.tensor(samples.sizes))[owners]  # no host-device sync
        sizes = torch.bincount(ids, minlength=samples.k).tolist()
        device = samples.cluster.device
        if self._on_device is None or self._on_device.device != device:
            self._on_device = owners.to(device)
        cluster = samples.cluster[self._on_device]
        is_sorted = bool((ids[1:] >= ids[:-1]).all())
        order = None if is_sorted else torch.argsort(cluster, stable=True)
        return ClusteredBatch(cluster, sizes, order, len(self.lead))


@dataclass
class Survey:
    """What a forward shows while the values of some samples are NaN.

    A *place* is where a tensor that was computed from the batch meets a parameter, given by the structure up to there.

    Args:
        poisoned: bool ``[B]``, the samples whose values are NaN.
        asked: places where the NaN of every row is wanted.

    Attributes:
        odd: places where the first dimension is not that of the batch, and what was seen there.
        masks: at the places that were asked for, the rows that are NaN, bool ``[n_1, ..., n_d]`` for d = 1, 2, 3.
    """

    poisoned: Tensor
    asked: frozenset[int] = frozenset()
    odd: dict[int, str] = field(default_factory=dict)
    masks: dict[int, list[Tensor]] = field(default_factory=dict)

    def see(self, place: int, x: Tensor, names: str) -> None:
        """Look at a floating-point tensor that meets the parameters ``names``."""
        if x.dim() and not x.shape[0]:
            return
        bad = torch.isnan(x)
        if place in self.asked:
            depths = range(1, max(2, min(x.dim(), _DEEPEST + 1)))
            self.masks[place] = [bad.flatten(d).any(-1) if d < x.dim() else bad for d in depths]
            return
        m, left = divmod(x.shape[0], len(self.poisoned)) if x.dim() else (0, 1)
        if left or not m:
            self.odd[place] = f"a tensor {list(x.shape)} computed from the batch meets {names}"
            return
        rows = bad.flatten(1).any(1) if x.dim() > 1 else bad
        others = int((rows != self.poisoned.repeat_interleave(m)).sum())  # a constant row may belong to any sample
        if others:
            self.odd[place] = (
                f"where {names} meets the batch, {others} rows depend on other samples than the first dimension says"
            )


def decode(masks: Sequence[Sequence[Tensor]], codes: Sequence[Tensor]) -> Layout | None:
    """Return the layout of a place, or None if some row depends on several samples, or on none.

    Args:
        masks: for each code, the rows that are NaN at each depth (``Survey.masks``).
        codes: the poisoned samples of each forward, bool ``[B]``. They tell any two samples apart.
    """
    poisoned = torch.stack(list(codes)).float()  # [C, B]
    for seen in zip(*masks, strict=True):
        if any(x.shape != seen[0].shape for x in seen):
            return None
        nan = torch.stack([x.flatten() for x in seen]).float()  # [C, R]
        agreements = nan.T @ poisoned + (1 - nan).T @ (1 - poisoned)  # [R, B]
        most, owners = agreements.max(1)
        if bool((most == len(codes)).all()):
            return Layout(owners.view(seen[0].shape))
    return None


class Located(NamedTuple):
    """Where the rows of one batch are.

    Attributes:
        structure: that of the forward (see :class:`antdiff.gradients.grouped.mode.GroupedMode`).
        layouts: by place, where the first dimension is not the batch.
    """

    structure: int
    layouts: dict[int, Layout]


def shared_layouts(found: Iterable[tuple[int, Layout]]) -> dict[int, Layout]:
    """Return the layouts by place. Places with the same owners share one, whose clusters are computed once."""
    known: dict[Any, Layout] = {}
    return {place: known.setdefault((x.lead, x.owners.numpy().tobytes()), x) for place, x in found}
