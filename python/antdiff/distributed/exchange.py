"""The schemes that sum K rows over the ranks.

The Gram matrix of a mean is not the mean of Gram matrices, so the rows are summed before their inner products are
taken. There are R ranks, and rho = (R - 1) / R. A row is the gradient of one cluster, P numbers. The table counts the
numbers sent per rank and step.

==================  ========================================================================  =================
scheme              how the rows are summed                                                   numbers sent
==================  ========================================================================  =================
``all_reduce``      every rank gets all K rows and computes the same K x K and direction      2 rho K P
``reduce_scatter``  every rank gets a piece of all K rows and later gathers the direction     rho K P + rho P
``cluster``         as ``reduce_scatter``, but a rank sends only the rows of its clusters     rho m P + rho P
==================  ========================================================================  =================

m is the number of clusters on a rank. It is 1 if the batch is cut into contiguous chunks by cluster and R is a multiple
of K; the rank then sends as many bytes as an ordinary all-reduce of one gradient. For other R it is
(R + K - gcd(R, K)) / R on average.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from antdiff import ops
from antdiff.distributed.chunks import Counts
from antdiff.distributed.ranks import Ranks, Work, wait


class Exchange:
    """Receives the rows of this rank one by one, and returns this rank's part of their sum over the ranks.

    Attributes:
        J: this rank's part of the K global rows, a list of ``[K, ...]``, complete after :meth:`finish`.
        sharded: whether the parts of the ranks are disjoint. The Gram matrix is then the sum over the ranks.
        per_parameter: whether J has one entry ``[K, *shape]`` per parameter; else it is one matrix ``[K, S]``.
        lockstep: whether every rank must run the network for every row, also for the rows of clusters it lacks.
        averaging: the factor by which a backward divides the sum over ranks.
        replicas: the number of ranks that hold the same part of J.
    """

    sharded, per_parameter, lockstep = True, False, False
    averaging = replicas = 1

    def __init__(self, ranks: Ranks, params: list[nn.Parameter], k: int, dtype: torch.dtype) -> None:
        self.ranks, self.params, self.k, self.dtype = ranks, params, k, dtype
        self.device = params[0].device
        self.numel = sum(p.numel() for p in params)
        self.gloo = ranks.size > 1 and ranks.over_gloo(self.device)
        self.J: list[Tensor] = []

    def begin(self, counts: Counts | None) -> None:
        """Prepare for the rows of a step. ``counts`` are those of all ranks, or None if they are not known."""

    def write(self, i: int, grads: Sequence[Tensor | None] | None, factor: Tensor | float = 1.0) -> None:
        """Send row i of this rank times ``factor``. None stands for a zero gradient or a zero row."""
        raise NotImplementedError

    def finish(self) -> list[Tensor]:
        """Wait until all rows have arrived, and return J."""
        raise NotImplementedError

    def combine(self, weights: Tensor) -> None:
        """Write ``weights^T J`` to ``p.grad``, whole on every rank."""
        raise NotImplementedError

    def set_grads(self, direction: Sequence[Tensor]) -> None:
        """Write ``direction``, one tensor per parameter of ``params``, to ``p.grad``. Needs ``per_parameter``."""
        _set_grads(self.params, direction)

    def nbytes(self) -> int:
        """Return the memory of rows, buffers and ``p.grad`` on this rank in bytes."""
        raise NotImplementedError


def views(flat: Tensor, params: list[nn.Parameter], k: int | None = None) -> list[Tensor]:
    """Return the parameters' consecutive pieces of a flat buffer, as views ``[*shape]`` or ``[k, *shape]``."""
    views, start = [], 0
    for p in params:
        n = p.numel() * (k or 1)
        views.append(flat[start : start + n].view(p.shape if k is None else (k, *p.shape)))
        start += n
    return views


def fill(views: list[Tensor], grads: Sequence[Tensor | None] | None, factor: Tensor | float) -> None:
    """Write ``factor * grads`` to ``views`` with fused kernels, and zero where a gradient is None."""
    grads = grads if grads is not None else [None] * len(views)
    targets = [v for v, g in zip(views, grads, strict=True) if g is not None]
    if targets:
        torch._foreach_copy_(targets, [g for g in grads if g is not None])
        if not (isinstance(factor, float) and factor == 1.0):
            torch._foreach_mul_(targets, factor)
    if missed := [v for v, g in zip(views, grads, strict=True) if g is None]:
        torch._foreach_zero_(missed)


def _set_grads(params: list[nn.Parameter], views: Sequence[Tensor]) -> None:
    for p, view in zip(params, views, strict=True):
        p.grad = view if view.dtype == p.dtype else view.to(p.dtype)


class AllReduce(Exchange):
    """One message of K P numbers. It is the fastest scheme for small networks, and the reference for the others."""

    sharded, per_parameter = False, True

    def __init__(self, ranks: Ranks, params: list[nn.Parameter], k: int, dtype: torch.dtype) -> None:
        super().__init__(ranks, params, k, dtype)
        self.bucket = torch.empty(k * self.numel, dtype=dtype, device=self.device)
        self.grads = torch.empty(self.numel, dtype=dtype, device=self.device)
        self.J = views(self.bucket, params, k)

    def write(self, i: int, grads: Sequence[Tensor | None] | None, factor: Tensor | float = 1.0) -> None:
        fill([J[i] for J in self.J], grads, factor)

    def finish(self) -> list[Tensor]:
        wait(self.ranks.all_reduce(self.bucket), "all_reduce")
        return self.J

    def combine(self, weights: Tensor) -> None:
        pieces = views(self.grads, self.params)
        ops.combine(weights, self.J, out=pieces)
        _set_grads(self.params, pieces)

    def nbytes(self) -> int:
        return self.bucket.nbytes + self.grads.nbytes


class ReduceScatter(Exchange):
    """Each row is sent while the next one is computed. Each rank holds S columns of the rows as J.

    At most two rows are in flight, so a rank holds K P / R numbers of J instead of K P. The direction is gathered into
    the buffer of the first row, and ``p.grad`` are views of it, which the next call overwrites.
    """

    in_flight = 2

    def __init__(self, ranks: Ranks, params: list[nn.Parameter], k: int, dtype: torch.dtype) -> None:
        super().__init__(ranks, params, k, dtype)
        R = ranks.size
        self.S = -(-self.numel // R)
        self.flats = [torch.zeros(R * self.S, dtype=dtype, device=self.device) for _ in range(self.in_flight)]
        self.grads = self.flats[0]
        self.rows = [views(x, params) for x in self.flats]
        self.columns = torch.empty(k, self.S, dtype=dtype, device=self.device)
        self.J = [self.columns]
        self.received: dict[int, Tensor] = {}
        self.pending: list[tuple[Work, int, int] | None] = [None, None]  # work, cluster, buffer
        self.next = 0

    def begin(self, counts: Counts | None) -> None:
        self._drain()  # rows may be in flight if an error ended the last call

    def write(self, i: int, grads: Sequence[Tensor | None] | None, factor: Tensor | float = 1.0) -> None:
        b, self.next = self.next, 1 - self.next
        self._settle(b)
        fill(self.rows[b], grads, factor)
        self.pending[b] = (self._send(i, b), i, b)

    def finish(self) -> list[Tensor]:
        self._drain()
        return self.J

    def combine(self, weights: Tensor) -> None:
        ops.combine(weights, self.columns, out=self._piece())
        self._gather()
        self.grads[self.numel :].zero_()  # padding: NaN weights make it NaN, and writing a row does not reset it
        _set_grads(self.params, views(self.grads, self.params))

    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.flats, self.columns, *self.received.values()))

    def _send(self, i: int, b: int) -> Work:
        if not self.gloo:
            return self.ranks.reduce_scatter(self.columns[i], self.flats[b])
        return self.ranks.all_to_all(self._buffer(b, self.ranks.size * self.S), self.flats[b])

    def _drain(self) -> None:
        for b in (self.next, 1 - self.next):
            self._settle(b)

    def _settle(self, b: int) -> None:
        if (pending := self.pending[b]) is None:
            return
        self.pending[b] = None
        wait(pending[0], "the exchange of rows")
        self._arrived(pending[1], b)

    def _arrived(self, i: int, b: int) -> None:
        if self.gloo:
            torch.sum(self.received[b].view(self.ranks.size, self.S), 0, out=self.columns[i])

    def _piece(self) -> Tensor:
        return self.grads[self.ranks.rank * self.S :][: self.S]

    def _gather(self) -> None:
        wait(self.ranks.all_gather(self.grads, self._piece()), "all_gather")

    def _buffer(self, b: int, numel: int) -> Tensor:
        """Return the receive buffer of row b, ``[numel]``. It is allocated once."""
        if b not in self.received or self.received[b].numel() < numel:
            self.received[b] = torch.empty(numel, dtype=self.dtype, device=self.device)
        return self.received[b][:numel]


class Held(ReduceScatter):
    """Scheme ``cluster``: a rank sends only the rows of its clusters, and all ranks know these in advance.

    In slot j each rank sends its j-th row, cut into one piece per rank. The receiving rank adds up the pieces of a
    cluster.
    """

    def __init__(self, ranks: Ranks, params: list[nn.Parameter], k: int, dtype: torch.dtype) -> None:
        super().__init__(ranks, params, k, dtype)
        self.senders_clusters: list[list[int]] = [[], []]  # for each buffer, the clusters whose rows it receives

    def begin(self, counts: Counts | None) -> None:
        super().begin(counts)
        assert counts is not None
        held = [[i for i, n in enumerate(row) if n] for row in counts]  # clusters of each rank
        self.clusters = held[self.ranks.rank]
        slots = max(map(len, held))
        self.slots = [[(q, row[j]) for q, row in enumerate(held) if len(row) > j] for j in range(slots)]
        self.slot = 0
        self.columns.zero_()

    def write(self, i: int, grads: Sequence[Tensor | None] | None, factor: Tensor | float = 1.0) -> None:
        if i in self.clusters:
            super().write(i, grads, factor)

    def finish(self) -> list[Tensor]:
        for _ in range(self.slot, len(self.slots)):  # slots in which only other ranks send
            b, self.next = self.next, 1 - self.next
            self._settle(b)
            self.pending[b] = (self._send(-1, b), -1, b)
        return super().finish()

    def _send(self, i: int, b: int) -> Work:
        R, S, senders = self.ranks.size, self.S, dict(self.slots[self.slot])
        self.slot += 1
        self.senders_clusters[b] = list(senders.values())
        received = [S if q in senders else 0 for q in range(R)]
        sends = self.ranks.rank in senders
        return self.ranks.all_to_all(
            self._buffer(b, S * len(senders)),
            self.flats[b] if sends else self.flats[b][:0],
            received,
            [S if sends else 0] * R,
        )

    def _arrived(self, i: int, b: int) -> None:
        clusters = self.senders_clusters[b]
        pieces = self.received[b][: self.S * len(clusters)].view(-1, self.S)
        start = 0
        for n, c in _runs(clusters):  # the clusters ascend with the ranks, so the pieces of a cluster are neighbours
            self.columns[c] += pieces[start : start + n].sum(0)
            start += n


def _runs(values: list[int]) -> list[tuple[int, int]]:
    """Return the length and the value of each run of equal values."""
    return [(len(list(run)), value) for value, run in itertools.groupby(values)]


class OneEach(ReduceScatter):
    """Scheme ``cluster`` for R = c K, where c neighbouring ranks hold one cluster.

    Neighbours sum their rows first, then exchange the sums with the ranks of the other clusters. This sends as many
    bytes as :class:`Held`, but only a c-th of them, P / c numbers, leaves the group of neighbours. This is faster if
    neighbours share a node.
    """

    in_flight = 1

    def __init__(self, ranks: Ranks, params: list[nn.Parameter], k: int, dtype: torch.dtype) -> None:
        super().__init__(ranks, params, k, dtype)
        c = ranks.size // k
        self.cluster = ranks.rank // c
        self.inside = ranks.own_subgroup([[m * c + x for x in range(c)] for m in range(k)])
        self.across = ranks.own_subgroup([[m * c + x for m in range(k)] for x in range(c)])
        self.chunk = torch.empty(k * self.S if c > 1 else 0, dtype=dtype, device=self.device)

    def write(self, i: int, grads: Sequence[Tensor | None] | None, factor: Tensor | float = 1.0) -> None:
        if i == self.cluster:
            fill(self.rows[0], grads, factor)

    def finish(self) -> list[Tensor]:
        chunk = self.flats[0]
        c = self.inside.size
        if c > 1:
            chunk = self.chunk
            if self.gloo:
                received = self._buffer(0, self.flats[0].numel())
                wait(self.inside.all_to_all(received, self.flats[0]), "the sum of a cluster's rows")
                torch.sum(received.view(c, -1), 0, out=chunk)
            else:
                wait(self.inside.reduce_scatter(chunk, self.flats[0]), "the sum of a cluster's rows")
        wait(self.across.all_to_all(self.columns.view(-1), chunk), "the exchange of rows")
        return self.J

    def nbytes(self) -> int:
        return super().nbytes() + self.chunk.nbytes

    # Rank j of the group of cluster m holds piece j K + m of each row, so the pieces of chunk j are spread over the
    # groups of all clusters.

    def _chunk(self) -> Tensor:
        return self.grads[self.inside.rank * self.k * self.S :][: self.k * self.S]

    def _piece(self) -> Tensor:
        return self._chunk()[self.across.rank * self.S :][: self.S]

    def _gather(self) -> None:
        wait(self.across.all_gather(self._chunk(), self._piece()), "all_gather")
        if self.inside.size > 1:
            wait(self.inside.all_gather(self.grads, self._chunk()), "all_gather")
