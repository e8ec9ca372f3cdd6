"""A model of the communication of a step: bytes and times, computed from bandwidths and latencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from antdiff._checks import as_count, as_counts, as_number, describe

_MOST = 2**20  # clusters or ranks


class Cost(NamedTuple):
    """The communication of one scheme per step.

    Attributes:
        bytes: bytes sent per rank, averaged over ranks.
        seconds: time of the communication alone, without overlap.
        exposed: the part of this time that no computation hides.
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
    """Compute the bytes and times that each scheme takes for the gradients of one step.

    The model assumes the following.

    - A collective takes ``latency`` plus its bytes divided by the bandwidth. Collectives do not overlap each other.
    - A ring (all-reduce, reduce-scatter, all-gather) over several nodes uses all network cards of a node at once, so
      its bandwidth is min(nvlink, node x network). An all-to-all sends the part for other nodes through the rank's own
      card.
    - Neighbouring ranks that share a cluster are on one node, if a node has as many ranks.
    - ``ddp`` hides all but its last bucket (a tenth) behind the backward, which is two thirds of ``step``.
      ``reduce_scatter`` hides every row but the last behind the slices that follow, each a K-th of ``step``. Nothing
      hides the all-gather of the direction.

    The defaults are nominal figures of eight GPUs on NVLink with one 400 Gb/s network card each, not measurements.

    Args:
        numel: P, the number of trainable parameters.
        k: the number of clusters.
        world_size: R, the number of ranks.
        itemsize: bytes per number.
        counts: samples of each cluster on each rank, R lists of k ints. None: those of contiguous chunks of a
            stratified batch.
        step: seconds per forward and backward on a rank.
        node: ranks per node.
        nvlink, network: bytes per second and rank within a node and between nodes, in each direction.
        latency: seconds per collective.

    Returns:
        A cost for each of ``ddp`` (the all-reduce of a plain step), ``all_reduce``, ``reduce_scatter``, ``cluster`` and
        ``fsdp`` (only the K x K numbers that are sent in addition to what fully_shard sends by itself).
    """
    numel, k, world_size = as_count("numel", numel, 0), as_count("k", k), as_count("world_size", world_size)
    itemsize, node = as_count("itemsize", itemsize), as_count("node", node)
    step, latency = as_number("step", step, least=0), as_number("latency", latency, least=0)
    nvlink, network = as_number("nvlink", nvlink, above=0), as_number("network", network, above=0)
    if k > _MOST or world_size > _MOST:
        raise ValueError(f"k and world_size must be at most {_MOST}; got k={k} and world_size={world_size}.")
    if counts is not None:
        if not isinstance(counts, (list, tuple)) or len(counts) != world_size:
            raise ValueError(f"counts must be world_size={world_size} lists of k={k} ints; got {describe(counts)}.")
        counts = [as_counts("counts", each) for each in counts]
        if any(len(each) != k for each in counts):
            raise ValueError(f"counts must be lists of k={k} ints; got lengths {[len(each) for each in counts][:8]}.")
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
        around = rows  # the direction returns on the same path
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
    """Return the number of clusters on each rank if a sorted batch of equal shares is cut into R equal chunks."""
    return [((r + 1) * k - 1) // R - r * k // R + 1 for r in range(R)]


def _all_to_all(
    size: float, members: int, apart: int, node: int, nvlink: float, network: float, latency: float
) -> float:
    """Return the time in which each rank sends ``size`` bytes in equal parts to ``members`` ranks.

    Neighbouring members are ``apart`` ranks from each other.
    """
    near = max(1, min(members, node // apart))
    return latency + max(size * (near - 1) / members / nvlink, size * (members - near) / members / network)
