"""The clusters of a batch, and of the rows of every tensor that is computed from the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from antdiff._checks import as_counts, as_tensor, describe
from antdiff.gradients.samples import Samples
from antdiff.gradients.samples import cut as cut
from antdiff.gradients.samples import each_row as each_row


class GroupingError(RuntimeError):
    """The gradients of the clusters cannot be told apart. The message says where, why and what to do."""


class RowsError(GroupingError):
    """The rows of a tensor are not those of the samples in the order of its first dimension."""


class ClusteredBatch:
    """The clusters of a batch of B samples, and so of the rows of any tensor ``[R, ...]`` computed from the batch.

    R is a multiple of B, and row r belongs to sample ``r // (R / B)``. For a tensor with another layout, each row
    counts as a sample of its own.

    Attributes:
        cluster: int64 ``[B]``, on the device of the batch.
        sizes: samples of each cluster, K Python ints, so that no kernel launch waits for the device.
        order: int64 ``[B]``, the permutation that sorts the samples by cluster; None if they are sorted already.
        lead: how many leading dimensions count rows; more than 1 only for a layout with the batch further back.
    """

    def __init__(self, cluster: Tensor, sizes: list[int], order: Tensor | None, lead: int = 1) -> None:
        self.cluster, self.sizes, self.order, self.lead = cluster, sizes, order, lead
        self.k, self.B = len(sizes), sum(sizes)
        self._one_hot: dict[torch.dtype, Tensor] = {}
        self._orders: dict[int, Tensor] = {}
        self._starts: Tensor | None = None
        self._counts: Tensor | None = None
        equal = order is None and bool(sizes) and sizes.count(sizes[0]) == self.k and sizes[0] * self.k == len(cluster)
        self._equal_size = sizes[0] if equal else 0  # of all clusters of a sorted batch; 0 if they differ
        self._derived: dict[Any, ClusteredBatch] = {}

    @classmethod
    def of(cls, cluster: Tensor, k: int, counts: Sequence[int] | None = None) -> ClusteredBatch:
        """Check, sort and count the ids. With ``counts`` the ids must be sorted, and there is no host-device sync."""
        if not isinstance(cluster, Tensor) or cluster.dtype != torch.int64 or cluster.dim() != 1:
            raise TypeError(f"cluster must be an int64 tensor [B]; got {describe(cluster)}.")
        as_tensor("cluster", cluster, kind="int")
        B = cluster.numel()
        if counts is not None:
            sizes = as_counts("counts", counts, -(2**63))
            if len(sizes) != k or min(sizes) < 0 or sum(sizes) != B:
                raise ValueError(f"counts must be k={k} sizes >= 0 that add up to B={B}; got {sizes}.")
            if cluster.is_cpu:  # on CUDA a check would wait for the device
                repeats = torch.tensor(sizes, device="cpu")
                want = torch.arange(k, device="cpu").repeat_interleave(repeats, output_size=B)
                if not torch.equal(cluster, want):
                    row = int(torch.nonzero(cluster != want)[0])
                    raise ValueError(
                        f"cluster must be in ascending order, as counts says, if counts is given; got id "
                        f"{int(cluster[row])} instead of {int(want[row])} at row {row}. Leave counts out to sort it."
                    )
            return cls(cluster, sizes, None)
        order = torch.argsort(cluster, stable=True)
        edges = torch.arange(k + 1, device=cluster.device)
        stops = torch.searchsorted(cluster[order].contiguous(), edges)
        moved = (order[1:] < order[:-1]).any().to(stops.dtype)
        *bounds, unsorted = torch.cat([stops, moved[None]]).tolist()  # the only host-device sync
        if bounds[0] != 0 or bounds[-1] != B:
            row = int(torch.nonzero((cluster < 0) | (cluster >= k))[0])
            raise ValueError(
                f"cluster must be int64 [B] with 0 <= id < k; got id {int(cluster[row])} with k={k} at row {row}."
            )
        return cls(cluster, [stop - start for start, stop in itertools.pairwise(bounds)], order if unsorted else None)

    def sort(self, batch: Sequence[Any]) -> tuple[ClusteredBatch, Sequence[Any]]:
        """Return the batch with its samples sorted by cluster."""
        samples = Samples.of(batch, self.B)
        if self.order is None:
            return self, samples.detached()
        return ClusteredBatch(self.cluster[self.order], self.sizes, None), samples.select(self.order)

    def derived(self, key: Any, make: Callable[[ClusteredBatch], ClusteredBatch]) -> ClusteredBatch:
        """Return ``make(self)``, which is computed once per key."""
        if key not in self._derived:
            self._derived[key] = make(self)
        return self._derived[key]

    @property
    def counts(self) -> Tensor:
        """``sizes`` as int64 ``[k]`` on the device. Computed there, since a CUDA graph cannot copy it from the host."""
        if self._counts is None:
            on_cpu = self.cluster.is_cpu
            self._counts = torch.tensor(self.sizes, device="cpu") if on_cpu else self.one_hot(torch.bool).sum(1)
        return self._counts

    def slices(self) -> list[tuple[int, int]]:
        """Return ``[start, stop)`` of every cluster in a sorted batch."""
        stops = list(itertools.accumulate(self.sizes))
        return list(zip([0, *stops[:-1]], stops, strict=True))

    def flat(self, x: Tensor) -> Tensor:
        """Return ``x`` with its rows in the first dimension."""
        if self.lead == 1 or x.shape[0] % self.B == 0 or x.shape[: self.lead].numel() != self.B:
            return x
        return x.flatten(0, self.lead - 1)

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """Return ``values [k]`` in the rows of the clusters, to be multiplied with ``x``."""
        rows = self.flat(x)
        spread = values[self.row_cluster(self.repeats(rows))]
        lead = x.shape[: 1 + x.dim() - rows.dim()]
        return spread.view(*lead, *[1] * (rows.dim() - 1))

    def repeats(self, x: Tensor) -> int:
        """Return the number of rows per sample in ``x [R, ...]``."""
        R = x.shape[0] if x.dim() else 0
        m, left = divmod(R, self.B)
        if left or m == 0:
            raise RowsError(
                f"a tensor {list(x.shape)} computed from the batch meets a parameter, but its first dimension is no "
                f"multiple of the batch size {self.B}, so it does not have one or more rows per sample. {REMEDY}"
            )
        return m

    def pieces(self, grad: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield, for each cluster, its rows of every tensor ``[R, ...]``.

        The caller must compute something that is linear in the rows of ``grad``.
        """
        grouped = []
        for x in map(self.flat, (grad, *tensors)):
            m = self.repeats(x)
            if self.order is not None:
                x = x.index_select(0, self._row_order(m))
            grouped.append(x.split_with_sizes([m * size for size in self.sizes]))
        return zip(*grouped, strict=True)

    def row_cluster(self, m: int) -> Tensor:
        """Return the cluster of each row, int64 ``[m B]``, for m rows per sample."""
        return self.cluster if m == 1 else self.cluster.repeat_interleave(m, output_size=m * self.B)

    def sums(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the sum of each cluster's rows of ``x [R, ...]``, ``[k, numel / R]``, in at least float32.

        On the CPU they are written to ``out``, contiguous with k rows of as many elements, if it has their dtype. The
        result then shares its memory. Sorted clusters of equal size need a single launch.

        Each row is added only to the sum of its own cluster, so that a NaN stays there. A product with a one-hot matrix
        would spread it (0 * NaN). The order of the additions is fixed. On the CPU and on CUDA the number of kernel
        launches does not depend on K.
        """
        x = self.flat(x)
        m = self.repeats(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        n = x.numel() // x.shape[0]  # not -1, which is ambiguous for tensors without elements
        if self._equal_size and type(x) is Tensor:  # not a tensor of a compiler
            target = None if out is None or out.dtype != dtype else out.view(self.k, n)
            return torch.sum(x.reshape(self.k, m * self._equal_size, n), 1, dtype=dtype, out=target)
        per_sample = x.reshape(self.B, n).to(dtype) if m == 1 else x.reshape(self.B, m, n).sum(1, dtype=dtype)
        if type(per_sample) is Tensor and per_sample.is_cpu:  # not a tensor of a compiler, which needs the order
            if out is None or out.dtype != dtype:
                total = per_sample.new_zeros(self.k, n)
            else:
                total = out.view(self.k, n).zero_()
            return total.index_add_(0, self.cluster, per_sample)
        if type(per_sample) is Tensor and per_sample.is_cuda:
            ordered = per_sample if self.order is None else per_sample.index_select(0, self.order)
            return torch.segment_reduce(ordered, "sum", offsets=self._offsets(), axis=0, unsafe=True, initial=0)
        return torch.stack([rows.sum(0) for (rows,) in self.pieces(per_sample)])

    def _offsets(self) -> Tensor:
        """Where each cluster starts in a sorted batch, int64 ``[k + 1]`` on the device, made there."""
        if self._starts is None:
            self._starts = torch.nn.functional.pad(self.counts.cumsum(0), (1, 0))
        return self._starts

    def one_hot(self, dtype: torch.dtype) -> Tensor:
        """Return ``[k, B]``, 1 where sample b belongs to cluster i and 0 elsewhere."""
        if dtype not in self._one_hot:
            ids = torch.arange(self.k, device=self.cluster.device)
            self._one_hot[dtype] = (ids[:, None] == self.cluster[None]).to(dtype)
        return self._one_hot[dtype]

    def _row_order(self, m: int) -> Tensor:
        if m not in self._orders:
            assert self.order is not None
            steps = torch.arange(m, device=self.order.device)
            self._orders[m] = (self.order[:, None] * m + steps).flatten()
        return self._orders[m]


class PaddedBatch(ClusteredBatch):
    """A batch whose cluster sizes are known on the device alone. Each cluster is padded to ``room`` samples.

    Args:
        index: int64 ``[k room]``, the samples of each cluster in turn; padding may be any sample.
        there: bool ``[k room]``, False for padding.
    """

    def __init__(self, cluster: Tensor, k: int, index: Tensor, there: Tensor) -> None:
        super().__init__(cluster, [len(index) // k] * k, None)
        self.B = len(cluster)
        self.index, self.there = index, there

    @staticmethod
    def fill(clustered: ClusteredBatch, room: int) -> tuple[Tensor, Tensor]:
        """Return ``index`` and ``there`` for a sorted batch."""
        spans = [(range(start, stop), room - (stop - start)) for start, stop in clustered.slices()]
        index = [i for span, left in spans for i in (*span, *[0] * left)]
        there = [x for span, left in spans for x in (*[True] * len(span), *[False] * left)]
        return torch.tensor(index, device=clustered.cluster.device), torch.tensor(
            there, device=clustered.cluster.device
        )

    def pieces(self, grad: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield the padded rows of each cluster. The gradient of padding is zero."""
        first, *others = (
            x.unflatten(0, (self.B, self.repeats(x))).index_select(0, self.index) for x in (grad, *tensors)
        )
        first = torch.where(self.there.view(-1, *[1] * (first.dim() - 1)), first, 0)
        return zip(*(x.flatten(0, 1).split(x.shape[1] * self.sizes[0]) for x in (first, *others)), strict=True)


REMEDY = "Put the batch in the first dimension, or use route='split', which needs only independent samples."


def check_losses(per_sample: object, size: int) -> None:
    """Raise unless ``per_sample`` is a tensor ``[size]`` with a graph."""
    if not isinstance(per_sample, Tensor) or per_sample.shape != (size,):
        raise ValueError(
            f"loss_fn must return one loss for each sample, a tensor [{size}] for this slice; got "
            f"{list(per_sample.shape) if isinstance(per_sample, Tensor) else type(per_sample).__name__}. "
            "Average over the other dimensions, not over the samples, and pass one cluster id per sample."
        )
    if not per_sample.is_floating_point():
        raise ValueError(f"loss_fn must return real numbers; got {per_sample.dtype}. Take their squared magnitude.")
    if not per_sample.requires_grad:
        raise ValueError(
            "loss_fn must return losses that depend on model's parameters; got a tensor without a graph. "
            "Compute them with gradients enabled, and do not detach them."
        )
