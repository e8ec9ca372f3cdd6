"""Interval partition: time on one thread, next to all other packages that solve the same problem, in one run.

    taskset -c 0 python benchmarks/bench_interval.py [--slow] [--out benchmarks/results/interval.csv]

The problems are log-SNR curves of the linear schedule. Each row of the CSV has the problem, the package, the time
(quantiles over repeats; converting the result of another package to starts is not timed) and the total cost, which must
agree within a problem. ckwrap, kmeans1d and ruptures minimise only the unweighted squared error; none accepts an
arbitrary cost. --slow adds ruptures' Dynp, which takes half a minute.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import cpu_name

from antdiff import diffusion, ops
from antdiff.ops._extension import _C

Starts = list[int]


class Case(NamedTuple):
    problem: str
    T: int
    k: int
    package: str
    solve: Callable[[], Any]  # the timed call
    read: Callable[[Any], tuple[Starts, float]]  # converts its result to starts and total
    repeats: int


def quantiles(run: Callable[[], Any], repeats: int) -> tuple[float, float, float]:
    """Return the 10th, 50th and 90th percentile in ms. The check of the total has already warmed up the call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return tuple(np.quantile(times, (0.1, 0.5, 0.9)))  # type: ignore[return-value]


def numpy_partition(cost: np.ndarray[Any, Any], k: int) -> tuple[Starts, float]:
    """Solve the problem as a careful NumPy user would: one argmin per cell, O(k T^2)."""
    T = cost.shape[0]
    columns = np.ascontiguousarray(cost.T)  # [r, l]
    best, first = cost[0].copy(), np.zeros((k, T), dtype=np.int64)
    for j in range(1, k):
        layer = np.full(T, np.inf)
        for r in range(j, T):
            candidates = best[j - 1 : r] + columns[r, j : r + 1]
            l = candidates.argmin()
            layer[r], first[j, r] = candidates[l], l + j
        best = layer
    starts, r = [0] * k, T - 1
    for j in range(k - 1, 0, -1):
        starts[j] = int(first[j, r])
        r = starts[j] - 1
    return starts, float(best[-1])


def squared_total(x: np.ndarray[Any, Any], starts: Starts) -> float:
    return float(sum(((part - part.mean()) ** 2).sum() for part in np.split(x, starts[1:])))


def from_labels(labels: Any) -> Starts:
    labels = np.asarray(labels)
    return [0, *(np.flatnonzero(labels[1:] != labels[:-1]) + 1).tolist()]


def native(
    problem: str, package: str, repeats: int, function: Callable[..., Any], *arguments: Any, **options: Any
) -> Case:
    """Return the case of a function that takes (data, k) and returns (starts, total)."""
    T, k = len(arguments[0]), arguments[1]
    solve = partial(function, *arguments, **options)
    return Case(problem, T, k, package, solve, lambda result: (list(map(int, result[0])), result[1]), repeats)


def peers(x: np.ndarray[Any, Any], k: int, slow: bool) -> list[Case]:
    """Return the cases of exact packages for one-dimensional k-means or for squared-error change points."""
    import ckwrap
    import kmeans1d
    import ruptures

    def case(package: str, repeats: int, solve: Callable[[], Any], starts: Callable[[Any], Starts]) -> Case:
        def read(result: Any) -> tuple[Starts, float]:
            return starts(result), squared_total(x, starts(result))

        return Case("log-SNR, L2", len(x), k, package, solve, read, repeats)

    def kernel_cpd() -> Any:
        return ruptures.KernelCPD(kernel="linear", min_size=1).fit(x[:, None]).predict(n_bkps=k - 1)

    def dynp() -> Any:
        return ruptures.Dynp(model="l2", min_size=1, jump=1).fit(x[:, None]).predict(n_bkps=k - 1)

    found = [
        case("ckwrap", 20, lambda: ckwrap.ckmeans(x, k), lambda result: from_labels(result.labels)),
        case("kmeans1d", 20, lambda: kmeans1d.cluster(x, k), lambda result: from_labels(result.clusters)),
    ]
    if len(x) <= 1000:
        found.append(case("ruptures KernelCPD", 3, kernel_cpd, lambda ends: [0, *ends[:-1]]))
        if slow:
            found.append(case("ruptures Dynp", 1, dynp, lambda ends: [0, *ends[:-1]]))
    return found


def cases(slow: bool) -> list[Case]:
    k = 8
    x, long = diffusion.log_snr("linear", 1000), diffusion.log_snr("linear", 10_000)
    affinity = -(x[:, None] - x).abs()  # the L1 cost, written as an affinity
    l, r = torch.arange(1000)[:, None], torch.arange(1000)[None, :]
    sums = torch.nn.functional.pad(affinity.cumsum(1), (1, 0))
    centre = (l + r + 1) // 2
    cost = sums[centre, l] - sums[centre, r + 1]  # the same cost as a matrix [T, T]
    values = ops.interval_partition_values
    return [
        native("any cost matrix", "antdiff", 50, ops.interval_partition, cost, k),
        native("any cost matrix", "numpy", 5, numpy_partition, cost.numpy(), k),
        native("any cost matrix", "torch reference", 5, ops.reference.interval_partition, cost, k),
        native("affinity", "antdiff", 20, ops.interval_partition_affinity, affinity, k),
        native("log-SNR, L1", "antdiff", 100, values, x, k),
        native("log-SNR, L1 weighted", "antdiff", 20, values, x, k, weight=x.abs()),
        native("log-SNR, L2", "antdiff", 100, values, x, k, p=2),
        *peers(x.numpy(), k, slow),
        native("log-SNR, L1", "antdiff", 20, values, long, k),
        native("log-SNR, L2", "antdiff", 20, values, long, k, p=2),
        *peers(long.numpy(), k, slow),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="also time ruptures' Dynp")
    parser.add_argument("--out", type=Path, help="CSV file to write; by default results are only printed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = {
        "threads": 1,
        "isa": _C.build_info()["isa"],
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }

    rows: list[dict[str, Any]] = []
    totals: dict[tuple[str, int], float] = {}
    for case in cases(options.slow):
        starts, total = case.read(case.solve())
        best = totals.setdefault((case.problem, case.T), total)
        if abs(total - best) > 1e-9 * abs(best):
            sys.exit(
                f"The totals of {case.problem} at T={case.T} must agree; {case.package} found {total!r}, antdiff "
                f"{best!r}. They do not solve the same problem."
            )
        low, median, high = quantiles(case.solve, case.repeats)
        rows.append(
            {"problem": case.problem, "T": case.T, "k": case.k, "package": case.package, "ms_p10": f"{low:.3f}",
             "ms_median": f"{median:.3f}", "ms_p90": f"{high:.3f}", "total": f"{total:.6f}", **setting}
        )  # fmt: skip
        print(f"{case.problem:22} T={case.T:<6} k={case.k}  {case.package:20} {median:10.3f} ms   starts {starts}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.out.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(options.out)


if __name__ == "__main__":
    main()
