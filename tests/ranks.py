"""Run test cases in several processes on this machine at once, and return their results by rank.

The processes communicate on 127.0.0.1 only, and every wait has a time limit.
"""

from __future__ import annotations

import datetime
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 30.0  # seconds per collective on a busy machine; a whole set of cases may take 4 times as long

Case = Callable[[int, int], Any]


def _main(rank: int, world: int, cases: list[Case], folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    results: dict[str, Any] = {}
    for case in cases:  # stop at the first failure, since a case that fails on one rank may leave the others waiting
        try:
            results[case.__name__] = case(rank, world)
            torch.save(results, f"{folder}/{rank}.pt")
        except Exception:
            results[case.__name__] = traceback.format_exc()
            results["failed"] = case.__name__
            torch.save(results, f"{folder}/{rank}.pt")
            os._exit(1)
    with suppress(RuntimeError):  # the case of a lost rank has killed one
        dist.barrier()
        dist.destroy_process_group()


def run(world: int, cases: list[Case], folder: Path, *, lost: int | None = None) -> list[dict[str, Any]]:
    """Return the results of the cases, for each rank a dict by their names. Rank ``lost`` dies in the last case."""
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("spawn")
    processes = [context.Process(target=_main, args=(rank, world, cases, str(folder))) for rank in range(world)]
    deadline = time.monotonic() + 4 * TIMEOUT
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    results = []
    for rank in range(world):
        path = folder / f"{rank}.pt"
        results.append(torch.load(path, weights_only=False) if path.exists() else {})
    broken = [(rank, r["failed"], r[r["failed"]]) for rank, r in enumerate(results) if "failed" in r]
    if broken:
        raise AssertionError("\n".join(f"rank {rank}, {name}:\n{text}" for rank, name, text in broken))
    done = [set(r) for r in results]
    assert all(len(names) == len(cases) - (rank == lost) for rank, names in enumerate(done)), (
        f"a process died, or did not end in time, after {done}"
    )
    return results
