"""cluster_loss against eager PyTorch and torch.compile: forward plus backward, and the fused call for both.

    python benchmarks/bench_cluster_loss.py [--device cpu|cuda] [--threads 1] [--seconds 1] [--csv PATH] [--no-compile]

Every candidate computes the K losses of one weighted batch and d(sum of losses)/d pred. ``eager`` and ``compile`` are
the reference twin, which is what a user would write (per-sample mean, index_add). ``eager mse`` is one ungrouped
``mse_loss``, the minimum that any training step pays. The bytes are those of reading pred and target twice (once in the
fused call) and of writing grad once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Result, measure, show, write_csv

from antdiff import ops
from antdiff.ops import reference

K = 5
CPU_SHAPES = [
    (4, (8,)),
    (64, (4, 32, 32)),
    (256, (4, 32, 32)),
    (1024, (4, 32, 32)),
    (64, (3, 64, 64)),
    (1024, (3, 64, 64)),
]
CUDA_SHAPES = [(4, (8,)), (256, (4, 32, 32)), (256, (3, 64, 64)), (1024, (3, 256, 256))]


def case(B: int, shape: tuple[int, ...], dtype: torch.dtype, args: argparse.Namespace) -> list[Result]:
    device = args.device
    pred = torch.randn(B, *shape, device=device, dtype=dtype, requires_grad=True)
    target = torch.randn_like(pred, requires_grad=False)
    cluster = torch.randint(0, K, (B,), device=device)
    weight = torch.rand(B, device=device)
    copy = torch.zeros_like(target)

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            pred.grad = None
            loss().backward()  # type: ignore[no-untyped-call]

        return run

    plain = lambda: reference.cluster_loss(pred, target, cluster, K, weight)[0].sum()  # noqa: E731
    candidates: dict[str, Callable[[], object]] = {
        "copy_": lambda: copy.copy_(target),
        "antdiff": step(lambda: ops.cluster_loss(pred, target, cluster, K, weight)[0].sum()),
        "antdiff fused": lambda: ops.cluster_loss_and_grad(pred, target, cluster, K, weight),
        "eager": step(plain),
        "eager mse": step(lambda: torch.nn.functional.mse_loss(pred, target)),
    }
    if args.compile:
        compiled = torch.compile(plain)
        candidates["compile"] = step(compiled)
    once = pred.numel() * pred.element_size()
    found = measure(
        f"{device} {str(dtype).removeprefix('torch.')} B={B} {'x'.join(map(str, shape))}",
        candidates,
        seconds=args.seconds,
        bytes_moved={"copy_": 2 * once, "antdiff": 5 * once, "antdiff fused": 3 * once},
        cuda=device == "cuda",
    )
    show(found, "eager")
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per candidate of a case")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: list[Result] = []
    for dtype in (torch.float32, torch.bfloat16):
        for B, shape in CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES:
            results += case(B, shape, dtype, args)
    write_csv(args.csv or Path(__file__).parent / "results" / f"cluster_loss_{args.device}.csv", results)


if __name__ == "__main__":
    main()
