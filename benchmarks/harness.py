"""The harness of all benchmarks: timing that is robust against a noisy machine, and one CSV format.

The candidates of a case are timed in rounds, each in a shuffled order, so that a slow phase of the machine affects all
of them equally. Ratios are taken between medians of the same run, never between runs. On CUDA both the GPU time (events
around the call) and the wall time (call and synchronisation) are recorded.
"""

from __future__ import annotations

import csv
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch

QUANTILES = (0.1, 0.5, 0.9)


@dataclass
class Result:
    """The times of one candidate in one case, in seconds."""

    case: str
    name: str
    wall: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    bytes: float = 0.0

    @property
    def median(self) -> float:
        """The median of the GPU time on CUDA, and of the wall time otherwise."""
        return statistics.median(self.gpu or self.wall)


def quantile(times: list[float], q: float) -> float:
    return sorted(times)[min(int(q * len(times)), len(times) - 1)]


def measure(
    case: str,
    candidates: dict[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    least: int = 5,
    bytes_moved: dict[str, float] | None = None,
    cuda: bool = False,
    slow: Collection[str] = (),
) -> dict[str, Result]:
    """Time ``candidates`` against one another.

    The number of rounds gives each candidate about ``seconds``, with at least ``least`` rounds. Candidates in ``slow``
    take part only in every second round.
    """
    results = {name: Result(case, name, bytes=(bytes_moved or {}).get(name, 0.0)) for name in candidates}
    order = list(candidates)
    start = time.perf_counter()
    for name in order:  # warm-up: touch pages, compile code, raise clocks
        candidates[name]()
        if name not in slow:
            candidates[name]()
    if cuda:
        torch.cuda.synchronize()
    round_ = max(time.perf_counter() - start, 1e-9) / 2
    shuffle = random.Random(0)
    for i in range(max(least, min(300, int(seconds * len(order) / round_)))):
        shuffle.shuffle(order)
        for name in order:
            if i % 2 and name in slow:
                continue
            results[name].rounds.append(i)
            wall, gpu = _once(candidates[name], cuda)
            results[name].wall.append(wall)
            if cuda:
                results[name].gpu.append(gpu)
    return results


def _once(f: Callable[[], object], cuda: bool) -> tuple[float, float]:
    if not cuda:
        start = time.perf_counter()
        f()
        return time.perf_counter() - start, 0.0
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    before.record()
    f()
    after.record()
    torch.cuda.synchronize()
    return time.perf_counter() - start, before.elapsed_time(after) * 1e-3


def show(results: dict[str, Result], base: str) -> None:
    """Print one line per candidate: median, spread, bandwidth, and the ratio to ``base``."""
    for r in results.values():
        rate = f"{r.bytes / r.median * 1e-9:7.1f} GB/s" if r.bytes else " " * 12
        wall = f"  wall {statistics.median(r.wall) * 1e3:9.3f} ms" if r.gpu else ""
        times = r.gpu or r.wall
        print(
            f"{r.case:36s} {r.name:26s} {r.median * 1e3:10.3f} ms  [{quantile(times, 0.1) * 1e3:.3f}, "
            f"{quantile(times, 0.9) * 1e3:.3f}] {rate}  {r.median / results[base].median:7.2f} x {base}{wall}",
            flush=True,
        )


def write_csv(path: Path, results: list[Result]) -> None:
    """Write one row per candidate and case, with the environment that is needed to interpret the numbers later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = environment()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        times = [f"{kind}_q{int(q * 100)}_s" for kind in ("wall", "gpu") for q in QUANTILES]
        writer.writerow(["case", "name", "repeats", *times, "bytes", *about])
        for r in results:
            columns = [f"{quantile(t, q):.3e}" if t else "" for t in (r.wall, r.gpu) for q in QUANTILES]
            writer.writerow([r.case, r.name, len(r.wall), *columns, f"{r.bytes:.0f}", *about.values()])
    print(f"wrote {path}")


def environment() -> dict[str, str]:
    return {
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "threads": str(torch.get_num_threads()),
        "commit": _commit(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
