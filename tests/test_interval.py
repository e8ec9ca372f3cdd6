"""interval_partition and related ops: golden values, enumeration, the reference twins, and misuse."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import prefix_summed
from torch import Tensor

from antdiff import diffusion, ops

GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_clusters.json").read_text())
NAMES = [name for name in GOLDEN if not name.startswith("_")]
INF = float("inf")

fast = settings(max_examples=60, deadline=None)


def enumerate_partitions(cost: Tensor, k: int, least: int, most: int) -> tuple[list[int] | None, float]:
    """Return the best of all partitions.

    Ties go to the partition with the smallest last start, then the smallest second last start, and so on.
    """
    T = cost.shape[0]
    best, found = INF, None
    for inner in combinations(range(1, T), k - 1):
        bounds = [0, *inner, T]
        if not all(least <= b - a <= most for a, b in pairwise(bounds)):
            continue
        total = sum(cost[a, b - 1].item() for a, b in pairwise(bounds))
        starts = bounds[:-1]
        if total < best or (total == best < INF and starts[::-1] < found[::-1]):
            best, found = total, starts
    return found, best


def random_costs(T: int, seed: int) -> Tensor:
    """Return positive and negative integers, a few +inf, and NaN below the diagonal, which must not be read."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randint(-4, 5, (T, T), generator=generator).double()
    cost[torch.rand(T, T, generator=generator) < 0.1] = INF
    cost[torch.ones(T, T).tril(-1) > 0] = math.nan
    return cost


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", ["2", "3", "5", "8", "20"])
def test_golden_log_snr(name: str, k: str) -> None:
    want = GOLDEN[name]["median"][k]
    starts, total = ops.interval_partition_values(diffusion.log_snr(name), int(k))
    assert abs(total - want["total"]) < 0.6e-6  # printed to six decimals
    if name != "flow":  # its log-SNR is symmetric, so mirrored optima tie and rounding decides
        assert starts.tolist() == want["starts"]


def half_even_centre_cost(x: Tensor) -> Tensor:
    """Return the costs for the centre of the published script, round((l + r + 1) / 2) with ties to even.

    This centre is not always the median.
    """
    T = x.shape[0]
    l, r = torch.arange(T)[:, None], torch.arange(T)[None, :]
    centre = torch.round((l + r + 1).double() / 2).long().clamp(max=T - 1)
    sums = torch.nn.functional.pad((x[:, None] - x).abs().cumsum(dim=1), (1, 0))  # [centre, t]
    return sums[centre, r + 1] - sums[centre, l]


@pytest.mark.parametrize("name", ["linear", "cosine", "sd"])
def test_golden_of_the_published_centre(name: str) -> None:
    cost = half_even_centre_cost(diffusion.log_snr(name))
    for k, (starts, total) in enumerate(ops.interval_partition_all(cost, 20), start=1):
        if want := GOLDEN[name]["published"].get(str(k)):
            assert starts.tolist() == want["starts"]
            assert abs(total - want["total"]) < 0.6e-6


def test_golden_squared() -> None:
    starts, total = ops.interval_partition_values(diffusion.log_snr("linear"), 5, p=2)
    assert starts.tolist() == [0, 92, 338, 602, 817]
    assert abs(total - 921.0198) < 0.6e-4


@fast
@given(T=st.integers(1, 8), data=st.data())
def test_any_cost_against_enumeration(T: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, T))
    least = data.draw(st.integers(1, T // k))
    most = data.draw(st.integers(-(-T // k), T))
    cost = random_costs(T, data.draw(st.integers(0, 2**32)))
    want, best = enumerate_partitions(cost, k, least, most)
    if want is None:
        with pytest.raises(ValueError, match="forbid every partition"):
            ops.interval_partition(cost, k, min_size=least, max_size=most)
        return
    for run in (ops.interval_partition, ops.reference.interval_partition):
        starts, total = run(cost, k, min_size=least, max_size=most)
        assert starts.dtype == torch.int64
        assert starts.tolist() == want
        assert total == best


@fast
@given(T=st.integers(2, 40), seed=st.integers(0, 2**32), data=st.data())
def test_values_against_the_reference(T: int, seed: int, data: st.DataObject) -> None:
    """For real numbers, the totals agree up to rounding, and the returned starts have the returned total cost."""
    k, p, weighted = data.draw(st.integers(1, T)), data.draw(st.sampled_from([1, 2])), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, dtype=torch.float64, generator=generator)
    if (p == 1 and weighted) or data.draw(st.booleans()):
        x = x.sort(descending=data.draw(st.booleans())).values
    weight = torch.rand(T, dtype=torch.float64, generator=generator) if weighted else None
    starts, total = ops.interval_partition_values(x, k, p=p, weight=weight)
    want, want_total = ops.reference.interval_partition_values(x, k, p=p, weight=weight)
    slack = prefix_summed(T) * (x.abs() ** p * (1 if weight is None else weight)).sum().item() * 2**p
    assert abs(total - want_total) <= slack
    if (starts != want).any():  # allowed only if both are optimal up to rounding
        again = sum(
            ops.reference.interval_partition_values(x[a:b], 1, p=p, weight=weight if weight is None else weight[a:b])[1]
            for a, b in zip(starts.tolist(), [*starts.tolist()[1:], T], strict=True)
        )
        assert abs(again - want_total) <= slack


@fast
@given(T=st.integers(2, 60), seed=st.integers(0, 2**32), data=st.data())
def test_divide_and_conquer_equals_the_scan_of_every_start(T: int, seed: int, data: st.DataObject) -> None:
    """Starts and totals agree, including ties, for absolute distance on any monotone values and weights."""
    k = data.draw(st.integers(1, T))
    sizes = data.draw(st.integers(1, T // k)), data.draw(st.integers(-(-T // k), T))
    x = torch.randn(T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).sort().values
    if data.draw(st.booleans()):
        x = torch.arange(T, dtype=torch.float64) * 0.1  # evenly spaced values give many ties, and 0.1 is inexact
    weight = torch.rand(T, dtype=torch.float64).add(1e-3) if data.draw(st.booleans()) else None
    results = []
    for scan in (False, True):
        starts, total = torch.empty(k, dtype=torch.int64), torch.empty(1, dtype=torch.float64)
        ops.interval._C.interval_values(x, weight, 1, scan, k, *sizes, starts, total)
        results.append((starts.tolist(), total.item()))
    assert results[0] == results[1]


@fast
@given(T=st.integers(1, 30), seed=st.integers(0, 2**32), data=st.data())
def test_affinity_against_the_reference(T: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, T))
    affinity = torch.randint(-8, 9, (T, T), generator=torch.Generator().manual_seed(seed)).double() / 8  # exact sums
    sizes = {"min_size": data.draw(st.integers(1, T // k)), "max_size": data.draw(st.integers(-(-T // k), T))}
    starts, total = ops.interval_partition_affinity(affinity, k, **sizes)
    want, want_total = ops.reference.interval_partition_affinity(affinity, k, **sizes)
    assert starts.tolist() == want.tolist()
    assert total == want_total


def test_real_affinities_at_full_length() -> None:
    position = torch.linspace(0, 1, 400, dtype=torch.float64).sqrt()
    affinity = torch.exp(-8 * (position[:, None] - position).abs())
    starts, total = ops.interval_partition_affinity(affinity, 6)
    want, want_total = ops.reference.interval_partition_affinity(affinity, 6)
    assert starts.tolist() == want.tolist()
    assert abs(total - want_total) <= prefix_summed(400) * 400


def test_every_number_of_intervals_at_once() -> None:
    cost = random_costs(14, 3)
    results = ops.interval_partition_all(cost, 14, min_size=2)
    assert len(results) == 14
    twins = ops.reference.interval_partition_all(cost, 14, min_size=2)
    for k, ((starts, total), (twin_starts, twin_total)) in enumerate(zip(results, twins, strict=True), start=1):
        assert (starts.tolist(), total) == (twin_starts.tolist(), twin_total)
        if k > 7:
            assert starts.shape == (0,)
            assert total == INF
        elif total < INF:
            one, one_total = ops.interval_partition(cost, k, min_size=2)
            assert (one.tolist(), one_total) == (starts.tolist(), total)
    assert any(total < INF for _, total in results[:7])


def test_weights_count_as_repetitions() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, dtype=torch.float64, generator=generator).sort().values
    counts = torch.randint(1, 4, (30,), generator=generator)
    for p in (1, 2):
        _, weighted = ops.interval_partition_values(x, 4, p=p, weight=counts.double())
        _, repeated = ops.interval_partition_values(x.repeat_interleave(counts), 4, p=p)
        # Repeated points may be split between intervals, weighted points may not. For k-medians and k-means, a split
        # never lowers the cost.
        assert abs(weighted - repeated) <= prefix_summed(90) * 4 * (x.abs() ** p * counts).sum().item()


@pytest.mark.parametrize("p", [1, 2])
def test_scale_and_shift(p: int) -> None:
    """Scaling and shifting x does not change the starts."""
    x = diffusion.log_snr("linear", 200)
    starts, total = ops.interval_partition_values(x, 5, p=p)
    for scale in (2.0**-500, 2.0**-60, 2.0**80, -1.0):
        scaled, scaled_total = ops.interval_partition_values(x * scale, 5, p=p)
        assert scaled.tolist() == starts.tolist()
        if scale != 2.0**-500:  # its square underflows in float64
            assert scaled_total == pytest.approx(total * abs(scale) ** p, rel=prefix_summed(200))


def test_arrays_and_strides() -> None:
    cost = random_costs(9, 5)
    want = ops.interval_partition(cost, 3)
    read_only = cost.numpy().copy()
    read_only.flags.writeable = False
    for same in (
        cost.numpy(),
        read_only,
        np.asfortranarray(cost.numpy()),
        cost.T.contiguous().T,
        cost.flip(0).numpy()[::-1],
    ):
        starts, total = ops.interval_partition(same, 3)
        assert (starts.tolist(), total) == (want[0].tolist(), want[1])


def test_any_cost_gives_the_same_bits_on_every_level() -> None:
    """The dense dynamic program only adds and compares, so a plain loop over its cells has the same bits."""
    cost = torch.rand(301, 301, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    K, T = 7, len(cost)
    best, choices = cost[0].numpy(), []  # best[r]: the least cost of 0..r
    for _ in range(K - 1):
        totals = best[:-1, None] + cost[1:].numpy()  # [l - 1, r]: the last interval is l..r
        totals[np.arange(T - 1)[:, None] >= np.arange(T)] = np.inf  # it is empty if r < l
        choices.append(totals.argmin(0) + 1)
        best = totals.min(0)
    want = [T]
    for choice in reversed(choices):
        want.insert(0, int(choice[want[0] - 1]))
    starts, total = ops.interval_partition(cost, K)
    assert (starts.tolist(), total) == ([0, *want[:-1]], best[-1])


# ---- errors of the published script ----------------------------------------------------------------------------------


def test_boundaries_are_not_off_by_one() -> None:
    """For blocks of perfect affinity, boundaries are where the blocks meet. The published script's are lower by one."""
    block = torch.bucketize(torch.arange(60), torch.tensor([18, 34, 47]), right=True)
    affinity = (block[:, None] == block).double()
    starts, total = ops.interval_partition_affinity(affinity, 4)
    assert starts.tolist() == [0, 18, 34, 47]
    assert total == -60


def test_the_last_interval_ends_where_the_points_do() -> None:
    """The published script ends the last interval at 1000 for any T."""
    for T in (7, 60, 1001, 2300):
        x = torch.zeros(T, dtype=torch.float64)
        x[-2:] = 1.0
        starts, total = ops.interval_partition_values(x, 2)
        assert starts.tolist() == [0, T - 2]
        assert total == 0


def test_intervals_of_no_cost_are_taken() -> None:
    """The published script treats a cost of 0 as infinite."""
    x = torch.tensor([5.0, 5, 5, 2, 2, 0, 0, 0, 0], dtype=torch.float64)
    assert ops.interval_partition_values(x, 3)[0].tolist() == [0, 3, 5]
    assert ops.interval_partition_values(x, 3)[1] == 0
    cost = torch.where((x[:, None] - x) == 0, 0.0, 1.0).double()
    assert ops.interval_partition(cost, 3)[0].tolist() == [0, 3, 5]


def test_the_first_interval_may_be_a_single_point() -> None:
    """The loop of the published script starts one step too late to find such an interval."""
    x = torch.tensor([100.0, 1, 1, 1, 1, 0], dtype=torch.float64)
    assert ops.interval_partition_values(x, 2)[0].tolist() == [0, 1]
    affinity = torch.ones(6, 6, dtype=torch.float64)
    affinity[0, 1:] = affinity[1:, 0] = -1
    assert ops.interval_partition_affinity(affinity, 2)[0].tolist() == [0, 1]


# ---- misuse ----------------------------------------------------------------------------------------------------------

GOOD = torch.ones(6, 6, dtype=torch.float64)
LINE = torch.arange(6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("cost", "error", "text"),
    [
        (GOOD.float(), TypeError, "cost must be float64; got torch.float32"),
        (GOOD.numpy().astype(np.float32), TypeError, "cost must be float64; got a float32 array"),
        (GOOD.long(), TypeError, "float64"),
        (GOOD.tolist(), TypeError, "tensor or NumPy array"),
        (GOOD[0], ValueError, r"\[T, T\]"),
        (GOOD[:5], ValueError, r"\[T, T\]"),
        (GOOD[None], ValueError, r"\[T, T\]"),
        (GOOD[:0, :0], ValueError, "T >= 1"),
        (GOOD.clone().requires_grad_(), ValueError, "must not require grad"),
        (GOOD.to_sparse(), TypeError, "dense"),
        (GOOD.to("meta"), ValueError, "must be on the CPU"),
    ],
)
def test_a_bad_matrix(cost: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.interval_partition(cost, 2)
    with pytest.raises(error, match=text):
        ops.interval_partition_all(cost, 2)
    with pytest.raises(error, match=text.replace("cost", "affinity")):
        ops.interval_partition_affinity(cost, 2)


@pytest.mark.parametrize(("value", "text"), [(math.nan, "NaN"), (-INF, "-inf")])
def test_a_bad_entry(value: float, text: str) -> None:
    cost = GOOD.clone()
    cost[2, 4] = value
    for k in (1, 2, 6):
        with pytest.raises(ValueError, match=rf"cost must be finite.*got {text} at \[l, r\] = \[2, 4\]"):
            ops.interval_partition(cost, k)
    with pytest.raises(ValueError, match=r"affinity must be finite.*at \[2, 4\]"):
        ops.interval_partition_affinity(cost, 2)
    with pytest.raises(ValueError, match=r"x must be finite.*at \[4\]"):
        ops.interval_partition_values(cost[2], 2)
    cost = GOOD.clone()
    cost[4, 2] = value  # r < l: ignored
    assert ops.interval_partition(cost, 2)[1] == 2


@pytest.mark.parametrize(
    ("sizes", "error", "text"),
    [
        ({"k": 0}, ValueError, "k must be at least 1; got 0"),
        ({"k": -3}, ValueError, "k must be at least 1"),
        ({"k": 7}, ValueError, "k must be at most T.*k=7 with T=6"),
        ({"k": 2.0}, TypeError, "k must be an int; got float"),
        ({"k": 2, "min_size": 0}, ValueError, "min_size must be at least 1"),
        ({"k": 2, "max_size": 0}, ValueError, "max_size must be at least 1"),
        ({"k": 2, "min_size": 4}, ValueError, "k \\* min_size <= T <= k \\* max_size"),
        ({"k": 2, "max_size": 2}, ValueError, "k \\* min_size <= T <= k \\* max_size"),
        ({"k": 2, "min_size": 3, "max_size": 2}, ValueError, "min_size must be at most max_size"),
        ({"k": 2, "min_size": 1.5}, TypeError, "min_size must be an int"),
    ],
)
def test_bad_sizes(sizes: dict[str, int], error: type[Exception], text: str) -> None:
    for run, data in (
        (ops.interval_partition, GOOD),
        (ops.interval_partition_affinity, GOOD),
        (ops.interval_partition_values, LINE),
    ):
        with pytest.raises(error, match=text):
            run(data, **sizes)


def test_no_feasible_partition() -> None:
    cost = GOOD.clone()
    cost[:, -1] = INF
    with pytest.raises(ValueError, match="T=6 points into k=3 intervals of 1 to 6 points"):
        ops.interval_partition(cost, 3)
    with pytest.raises(ValueError, match="overflow"):
        ops.interval_partition(torch.full((6, 6), -1e308, dtype=torch.float64), 3)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"p": 3}, ValueError, "p must be 1"),
        ({"p": 1.0}, TypeError, "p must be an int"),
        ({"weight": LINE[:5]}, ValueError, r"weight must have shape \[T\]"),
        ({"weight": LINE.float()}, TypeError, "weight must be float64"),
        ({"weight": LINE - 2}, ValueError, "weight must not be negative; got -2.0 at 0"),
        ({"weight": LINE * 0}, ValueError, "positive sum"),
        ({"weight": LINE / 0}, ValueError, "weight must be finite"),
    ],
)
def test_bad_values(arguments: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.interval_partition_values(LINE, 2, **arguments)


def test_values_that_turn_have_no_weighted_median() -> None:
    with pytest.raises(ValueError, match="rises after index 0 and falls after index 1"):
        ops.interval_partition_values(LINE[[0, 2, 1, 3]], 2, weight=LINE[:4] + 1)


def test_ctrl_c_stops_a_long_run() -> None:
    """SIGINT ends a call that would take minutes. It is sent by a thread, which can run only if the GIL is released."""
    x = torch.rand(60_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        ops.interval_partition_values(x, 40, p=2)
    timer.join()
