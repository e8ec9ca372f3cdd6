"""Time of gram_weights and the other Gram methods, next to TorchJD's weighting for the same method.

    python benchmarks/bench_balancing.py [--csv results.csv] [--device cuda]
    python benchmarks/bench_balancing.py --costs    # writes results/balancing_costs_cpu.csv

Everything runs on one thread. G is the float64 [K, K] Gram matrix of conflicting gradients, the same for both. The
time of TorchJD is that of its weighting (G -> w), without its Gram matrix and without the combination. Methods that
TorchJD does not have, or whose solver is not installed, are timed alone.

The costs, which docs/balancing.md shows, are the minimum CPU time of the process over many repeats. Other work on the
machine hardly changes it.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Result, environment, measure, show, write_csv

from antdiff import balancing, ops

CALLS = 20
COSTS = Path(__file__).with_name("results") / "balancing_costs_cpu.csv"
PEERS: dict[str, tuple[str | None, dict[str, float]]] = {
    "pcgrad": ("PCGradWeighting", {}),
    "nash": (None, {}),  # TorchJD's takes J rather than G; see bench_weights.py
    "upgrad": ("UPGradWeighting", {}),
    "dualproj": ("DualProjWeighting", {}),
    "aligned_mtl": ("AlignedMTLWeighting", {}),
    "mgda": ("MGDAWeighting", {}),
    "cagrad": ("CAGradWeighting", {"c": 0.5}),
    "imtl_g": ("IMTLGWeighting", {}),
    "gradvac": ("GradVacWeighting", {"beta": 0.01}),
    "fairgrad": ("FairGradWeighting", {"alpha": 2.0}),
}


def peer(name: str) -> Any | None:
    try:
        from torchjd import aggregation

        weighting, options = PEERS.get(name, (None, {}))
        return getattr(aggregation, weighting)(**options) if weighting else None
    except ImportError:
        return None


def repeated(weights: Callable[[torch.Tensor], object], G: torch.Tensor) -> Callable[[], None]:
    """Make CALLS calls in a row. A single call after milliseconds of TorchJD would measure cold caches."""

    def run() -> None:
        for _ in range(CALLS):
            weights(G)

    return run


def conflicting(k: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(k, 1000, generator=generator, dtype=torch.float64)
    J += torch.randn(1000, generator=generator, dtype=torch.float64) * (1 - 2 * (torch.arange(k) % 2))[:, None]
    return ops.gram(J).to(device)


def costs(k: int = 5, repeats: int = 400) -> None:
    """Measure the CPU seconds per call of each method, and write them to ``COSTS``.

    A call is ``weights(G)``, or ``loss(losses)`` with the graph that it builds.
    """
    G, losses = conflicting(k, "cpu"), torch.rand(k, generator=torch.Generator().manual_seed(0)) + 0.1
    rows = []
    for name in balancing.names():
        method = balancing.get(name)
        if method.needs == "rows":
            continue  # its cost grows with P
        run = repeated(
            *((method().weights, G) if method.needs == "gram" else (method(k).loss, losses.requires_grad_()))
        )
        seconds = []
        for _ in range(repeats):
            start = time.process_time()
            run()
            seconds.append((time.process_time() - start) / CALLS)
        rows.append([name, k, repeats, f"{min(seconds):.2e}", *environment().values()])
        print(f"{name:12s} {min(seconds) * 1e6:6.1f} us")
    with COSTS.open("w", newline="") as file:
        csv.writer(file).writerows([["method", "k", "repeats", "cpu_s", *environment()], *rows])
    print(f"Wrote {COSTS}. Now run python docs/balancing_table.py.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--costs", action="store_true", help="write the costs that docs/balancing.md shows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.costs:
        costs()
        return
    results: list[Result] = []
    for k in (5, 8, 16):
        G = conflicting(k, args.device)
        for name in balancing.names():
            method = balancing.get(name)
            if method.needs != "gram":
                continue
            balancer = method()
            candidates: dict[str, Callable[[], object]] = {"antdiff": repeated(balancer.weights, G)}
            if other := peer(name):
                candidates["torchjd"] = repeated(other, G)
            found = measure(f"{name} K={k}, {CALLS} calls", candidates, seconds=args.seconds, cuda=args.device != "cpu")
            show(found, "antdiff")
            results += found.values()
    if args.csv:
        write_csv(args.csv, results)


if __name__ == "__main__":
    main()
