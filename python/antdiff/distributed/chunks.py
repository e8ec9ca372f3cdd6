"""How a batch that is sorted by cluster is cut into one contiguous chunk per rank."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from antdiff._checks import as_counts

Counts = Sequence[Sequence[int]]  # [R][K], samples of each cluster on each rank


def contiguous_counts(shares: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Return the number of samples of each cluster in each chunk of a batch that is sorted by cluster.

    Args:
        shares: samples of each cluster in the whole batch, K ints.
        sizes: samples in each chunk, R ints with the same sum.

    Returns:
        R lists of K ints.
    """
    shares, sizes = as_counts("shares", shares), as_counts("sizes", sizes)
    if sum(shares) != sum(sizes):
        raise ValueError(
            f"shares and sizes must have the same sum, the samples of the batch; got {sum(shares)} and {sum(sizes)}."
        )
    edges = [0, *itertools.accumulate(shares)]
    cuts = [0, *itertools.accumulate(sizes)]
    return [
        [max(0, min(stop, right) - max(start, left)) for left, right in itertools.pairwise(edges)]
        for start, stop in itertools.pairwise(cuts)
    ]
