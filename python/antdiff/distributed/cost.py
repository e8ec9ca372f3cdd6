"""What a step sends, and how long that takes: arithmetic, from bytes, bandwidths and latencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Cost(NamedTuple):
    """Of one scheme and step.

    Attributes:
        bytes: sent by a rank, on average over ranks.
        seconds: communication alone, without overlap.
        exposed: what of it no computation hides.
    """

    bytes: float
    seconds: float
    exposed: float


def cost_model(
    numel: int,
    k: int,
    world_size: int,
    *,
    itemsize: int = 4,
    counts: Sequence[Sequence[int]] | None = None,
    step: float = 0.0,
    node: int = 8,
    nvlink: float = 370e9,
    network: float = 45e9,
    latency: float = 20e-6,
) -> dict[str, Cost]:
    """Bytes and times of one step's gradients, for each scheme that serves.

    Assumptions. A collective takes ``latency`` plus its bytes over the bandwidth it finds; collectives do not run
    beside one another. A ring (all-reduce, reduce-scatter, all-gather) over several nodes leaves each node through all
    of its network cards at once, so it runs at min(nvlink, node x network); an all-to-all sends what is for other nodes
    through the rank's own card. Neighbours that share a cluster count as one node's, if they are not more than it has.
    ``ddp`` hides all but its last bucket (a tenth) in the backward, two thirds of ``step``; ``reduce_scatter`` every
    row but the last in the slices that follow, a K-th of ``step`` each; nothing hides the direction's gathering. The
    defaults are nominal figures of eight GPUs on NVLink with a 400 Gb/s card each, not measurements.

    Args:
        numel: P, trainable parameters.
        k: clusters.
        world_size: R.
        itemsize: bytes a number.
        counts: samples of each cluster on each rank, R lists of k; default what contiguous chunks of a stratified batch
            give.
        step: seconds of forward and backward on a rank.
        node: ranks in a node.
        nvlink, network: bytes a second and rank, inside and out of a node, each direction.
        latency: seconds a collective.

    Returns:
        ``ddp`` (a plain step's all-reduce), ``all_reduce``, ``reduce_scatter``, ``cluster`` and ``fsdp`` (beyond what
        fully_shard sends by itself: only the K x K numbers).
    """
    R, row = world_size, float(numel * itemsize)
    rho = (R - 1) / R
    ring = nvlink if node >= R else min(nvlink, node * network)
    small = latency + 2 * rho * 8 * (k * k + k + R) / ring
    held = _held(k, R) if counts is None else [sum(n > 0 for n in each) for each in counts]

    def over_ring(size: float) -> float:
        return latency + size / ring

    ddp = over_ring(2 * rho * row)
    bucket = over_ring(2 * rho * k * row)
    each, gather = over_ring(rho * row), over_ring(rho * row)
    slots = max(held)
    if R % k == 0 and slots == 1:  # summed among the c ranks of a cluster, then exchanged
        c = R // k
        inside = latency + (c - 1) / c * row / (nvlink if c <= node else ring)
        rows = (inside if c > 1 else 0.0) + _all_to_all(row / c, k, c, node, nvlink, network, latency)
        around = rows  # the same way back
    else:
        rows = slots * _all_to_all(row, R, 1, node, nvlink, network, latency)
        around = gather
    costs = {
        "ddp": Cost(2 * rho * row, ddp, max(0.1 * ddp, ddp - step * 2 / 3)),
        "all_reduce": Cost(2 * rho * k * row, bucket, bucket),
        "reduce_scatter": Cost(
            rho * (k + 1) * row,
            k * each + small + gather,
            each + max(0.0, (k - 1) * (each - step / k)) + small + gather,
        ),
        "cluster": Cost(rho * (sum(held) / R + 1) * row, rows + small + around, rows + small + around),
        "fsdp": Cost(2 * rho * 8 * (k * k + k + R), small, small),
    }
    return costs if R > 1 else {name: Cost(0.0, 0.0, 0.0) for name in costs}


def _held(k: int, R: int) -> list[int]:
    """Clusters of each rank where a batch of equal shares, sorted by cluster, is cut into R equal chunks."""
    return [((r + 1) * k - 1) // R - r * k // R + 1 for r in range(R)]


def _all_to_all(
    size: float, members: int, apart: int, node: int, nvlink: float, network: float, latency: float
) -> float:
    """``size`` bytes of each rank to ``members`` ranks, neighbours among which are ``apart`` ranks from one another."""
    near = max(1, min(members, node // apart))
    return latency + max(size * (near - 1) / members / nvlink, size * (members - near) / members / network)
