"""Time per call of pcgrad_weights and nash_weights, against their twins, torch.compile, cvxpy and TorchJD.

    python benchmarks/bench_weights.py [--device cpu|cuda] [--K 5 8 16] [--seconds 1] [--no-compile] [--csv PATH]

The Gram matrices come from conflicting gradients. `nash hard` has two groups of rows that are nearly opposed, which
needs the most Newton steps. PCGrad draws its orders in all candidates except `given orders`. Short calls are timed in
bursts, because the cost of reading the clock would be visible otherwise. TorchJD's NashMTL takes J rather than G, so it
gets a square root of G.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Result, measure, write_csv
from torch import Tensor

from antdiff import ops
from antdiff.ops import reference

BURST = 100


def conflicting(K: int, spread: float, device: str) -> Tensor:
    """Return a Gram matrix [K, K].

    The rows are unit noise plus ``spread`` times a shared random vector, whose sign alternates between rows.
    """
    g = torch.Generator().manual_seed(K)
    sign = 1.0 - 2 * (torch.arange(K) % 2)[:, None]
    J = torch.randn(K, 200, generator=g, dtype=torch.float64)
    J += spread * sign * torch.randn(200, generator=g, dtype=torch.float64)
    return (J @ J.T).to(device)


def burst(f: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        for _ in range(BURST):
            f()

    return run


def case(K: int, args: argparse.Namespace) -> list[Result]:
    mild, hard = conflicting(K, 0.3, args.device), conflicting(K, 100.0, args.device)
    perms = reference.pcgrad_perms(torch.rand(K, K, device=args.device))
    short: dict[str, Callable[[], object]] = {
        "pcgrad_weights": lambda: ops.pcgrad_weights(mild),
        "pcgrad_weights given orders": lambda: ops.pcgrad_weights(mild, perms),
        "nash_weights": lambda: ops.nash_weights(mild),
        "nash_weights hard": lambda: ops.nash_weights(hard),
        "both": lambda: (ops.pcgrad_weights(mild), ops.nash_weights(mild)),
    }
    long: dict[str, Callable[[], object]] = {
        "pcgrad reference": lambda: reference.pcgrad_weights(mild),
        "nash reference": lambda: reference.nash_weights(mild),
    }
    if args.compile:
        # The twin's check of values cannot be part of a graph, so it is switched off. The Nash twin branches on values
        # and is therefore not compiled.
        torch.compiler.reset()  # compile a separate graph per K
        twin = torch.compile(lambda G: reference.pcgrad_weights(G, nonfinite="poison"), dynamic=False)
        long["pcgrad torch.compile"] = lambda: twin(mild)
    if args.device == "cpu":
        long["nash cvxpy"] = lambda: ops.nash_weights(mild, solver="cvxpy")
        if importlib.util.find_spec("torchjd"):
            long |= torchjd(mild)
    cuda = args.device == "cuda"
    found = measure(f"K={K}", {name: burst(f) for name, f in short.items()}, seconds=args.seconds, cuda=cuda)
    for r in found.values():
        r.wall, r.gpu = [t / BURST for t in r.wall], [t / BURST for t in r.gpu]
    found |= measure(f"K={K}", long, seconds=args.seconds, cuda=cuda)
    for r in found.values():
        own = found["pcgrad_weights" if r.name.startswith("pcgrad") else "nash_weights"]
        print(
            f"{r.case:6s} {r.name:28s} {r.median * 1e6:12.2f} us  {r.median / own.median:10.2f} x {own.name}",
            flush=True,
        )
    return list(found.values())


def torchjd(G: Tensor) -> dict[str, Callable[[], object]]:
    from torchjd.aggregation import PCGradWeighting

    weighting = PCGradWeighting()
    candidates: dict[str, Callable[[], object]] = {"pcgrad torchjd": lambda: weighting(G)}
    if importlib.util.find_spec("ecos"):
        from torchjd.aggregation import NashMTL

        aggregator, root = NashMTL(n_tasks=len(G)), torch.linalg.cholesky(G).float()
        candidates["nash torchjd"] = lambda: aggregator(root)
    return candidates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--K", type=int, nargs="*", default=[5, 8, 16])
    parser.add_argument("--seconds", type=float, default=1.0, help="time per candidate of a case")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="cvxpy|torchjd")
    results = [r for K in args.K for r in case(K, args)]
    write_csv(args.csv or Path(__file__).parent / "results" / f"weights_{args.device}.csv", results)


if __name__ == "__main__":
    main()
