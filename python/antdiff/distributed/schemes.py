"""The choice of the scheme that sums rows over ranks: as requested, or the one expected to be the fastest."""

from __future__ import annotations

from typing import Literal

import torch

from antdiff.distributed.chunks import Counts
from antdiff.distributed.cost import cost_model
from antdiff.distributed.exchange import AllReduce, Exchange, Held, OneEach, ReduceScatter
from antdiff.distributed.ranks import Ranks

Scheme = Literal["auto", "reduce_scatter", "cluster", "all_reduce"]


def choose(
    scheme: Scheme, ranks: Ranks, k: int, numel: int, dtype: torch.dtype, counts: Counts | None
) -> tuple[type[Exchange], str]:
    """Return the exchange of a scheme, and the reason for it. The result is the same on every rank.

    Raises:
        ValueError: scheme ``cluster`` without the counts of all ranks.
    """
    if scheme == "cluster" and counts is None:
        raise ValueError(
            "counts must be given for every rank, R lists of k ints, with scheme 'cluster'; got none for other ranks. "
            "Pass antdiff.StratifiedTimesteps.counts(B)."
        )
    costs = cost_model(numel, k, ranks.size, itemsize=dtype.itemsize, counts=counts)
    why = "asked for"
    if scheme == "auto":
        candidates: list[Scheme] = ["reduce_scatter", "all_reduce"]
        if counts is not None:
            candidates.append("cluster")
        scheme = min(candidates, key=lambda name: costs[name].seconds)
        others = ", ".join(f"{name} {costs[name].seconds * 1e3:.3g} ms" for name in candidates if name != scheme)
        why = f"{costs[scheme].seconds * 1e3:.3g} ms expected, against {others}"
    kinds: dict[str, type[Exchange]] = {"all_reduce": AllReduce, "reduce_scatter": ReduceScatter, "cluster": Held}
    kind = kinds[scheme]
    if kind is Held and counts is not None and ranks.spans_all_processes and _one_each(counts, k):
        # The groups of OneEach have to be made by every process of the job.
        kind = OneEach
    return kind, f"scheme {scheme!r} ({why}), which sends {costs[scheme].bytes / 1e6:.3g} MB per step and rank"


def _one_each(counts: Counts, k: int) -> bool:
    """Whether R = c k, and rank r holds the one cluster r // c."""
    c, left = divmod(len(counts), k)
    return not left and all((n > 0) == (i == r // c) for r, row in enumerate(counts) for i, n in enumerate(row))
