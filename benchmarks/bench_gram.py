"""gram and combine against copying J, eager PyTorch, torch.compile and TorchJD.

    python benchmarks/bench_gram.py [--device cpu|cuda] [--threads 1] [--seconds 1] [--csv PATH] [--no-compile]

Any method that balances K gradients needs at least two reads of J and one write of P numbers. This floor is measured as
two ``sum`` passes over J and one ``zero_`` of the result. ``copy_`` writes into a buffer whose pages are already
touched.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Result, measure, show, write_csv
from torch import Tensor

from antdiff import ops

# ---- what a user would write without antdiff ------------------------------------------------------------------------


def eager_float32(J: Tensor) -> Tensor:
    return ops.pcgrad_weights((J @ J.T).double()).to(J.dtype) @ J


def eager_float64(J: Tensor) -> Tensor:
    rows = J.double()
    return ops.pcgrad_weights(rows @ rows.T).to(J.dtype) @ J


def compiled(J: Tensor) -> Callable[[], object]:
    """Compile the Gram matrix as a fused reduction, the form that a compiler can turn into one pass."""
    gram = torch.compile(lambda x: (x[:, None] * x[None]).sum(-1, dtype=torch.float64))
    combine = torch.compile(lambda w, x: (w[:, None].to(x.dtype) * x).sum(0))
    return lambda: combine(ops.pcgrad_weights(gram(J)), J)


# ---- CPU -------------------------------------------------------------------------------------------------------------


def cpu(args: argparse.Namespace) -> list[Result]:
    torch.set_num_threads(args.threads)
    results: list[Result] = []
    for P in args.P or [10**5, 10**6, 10**7]:
        for K in args.K or [5, 8, 16]:
            results += matrix_case(f"cpu f32 K={K} P={P:.0e}", torch.randn(K, P), args)
    return results


def matrix_case(case: str, J: Tensor, args: argparse.Namespace) -> list[Result]:
    K, P = J.shape
    size, cuda = J.element_size(), J.is_cuda
    copy = torch.zeros_like(J)
    out = torch.zeros(P, dtype=J.dtype, device=J.device)
    w = torch.randn(K, dtype=torch.float64, device=J.device)

    def floor() -> None:
        J.sum(), J.sum()
        out.zero_()

    candidates: dict[str, Callable[[], object]] = {
        "copy_": lambda: copy.copy_(J),
        "floor": floor,
        "gram": lambda: ops.gram(J),
        "combine": lambda: ops.combine(w, J, out),
        "gram+weights+combine": lambda: ops.combine(ops.pcgrad_weights(ops.gram(J)), J, out),
        "eager float32": lambda: eager_float32(J),
    }
    if K * P * 8 < 2**31:
        candidates["eager float64"] = lambda: eager_float64(J)
    if args.compile:
        candidates["torch.compile"] = compiled(J)
    if not cuda and J.dtype == torch.float32 and importlib.util.find_spec("torchjd"):
        from torchjd.aggregation import PCGrad

        aggregator = PCGrad()
        candidates["torchjd PCGrad"] = lambda: aggregator(J)
    moved = {
        "copy_": 2.0 * K * P * size,
        "floor": (2.0 * K + 1) * P * size,
        "gram": 1.0 * K * P * size,
        "combine": (1.0 * K + 1) * P * size,
        "gram+weights+combine": (2.0 * K + 1) * P * size,
    }
    found = measure(case, candidates, seconds=args.seconds, bytes_moved=moved, cuda=cuda)
    show(found, "copy_")
    return list(found.values())


# ---- CUDA: matrices and the parameter shapes of models ---------------------------------------------------------------


def dit_shapes(depth: int, width: int, patch: int = 2, channels: int = 4, classes: int = 1000) -> list[tuple[int, ...]]:
    """Return the parameter shapes of DiT (Peebles and Xie, 2023) with adaLN-Zero blocks and learned variance."""
    d = width
    block = [(3 * d, d), (3 * d,), (d, d), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,), (6 * d, d), (6 * d,)]
    embed = [(d, channels, patch, patch), (d,), (d, 256), (d,), (d, d), (d,), (classes + 1, d)]
    last = [(patch * patch * 2 * channels, d), (patch * patch * 2 * channels,), (2 * d, d), (2 * d,)]
    return embed + depth * block + last


def unet_shapes(base: int = 128) -> list[tuple[int, ...]]:
    """Return the shapes of a DDPM U-Net (Ho et al., 2020): 1, 2, 2, 2 times ``base`` channels, two blocks per level."""
    shapes: list[tuple[int, ...]] = [(base, 3, 3, 3), (base,), (4 * base, base), (4 * base,), (4 * base, 4 * base)]
    levels = [base, 2 * base, 2 * base, 2 * base]
    down = [(a, b) for i, b in enumerate(levels) for a in (levels[max(i - 1, 0)], b)]
    up = [(b + a, a) for a, b in reversed(down)] + [(2 * a, a) for a in reversed(levels)]
    for a, b in down + 2 * [(levels[-1], levels[-1])] + up:
        shapes += [(a,), (a,), (b, a, 3, 3), (b,), (b, 4 * base), (b,), (b,), (b,), (b, b, 3, 3), (b,)]
        shapes += [(b, a, 1, 1), (b,)] if a != b else []
    return [*shapes, (base,), (base,), (3, base, 3, 3), (3,)]


MODELS = {"DiT-S/2": dit_shapes(12, 384), "DiT-XL/2": dit_shapes(28, 1152), "UNet-128": unet_shapes()}


def list_case(
    case: str, shapes: list[tuple[int, ...]], K: int, dtype: torch.dtype, args: argparse.Namespace
) -> list[Result]:
    J = [torch.randn(K, *s, dtype=dtype, device="cuda") for s in shapes]
    P, size = sum(x[0].numel() for x in J), J[0].element_size()
    out = [torch.zeros(s, dtype=dtype, device="cuda") for s in shapes]
    flat, copy = torch.zeros(K * P, dtype=dtype, device="cuda"), torch.zeros(K * P, dtype=dtype, device="cuda")
    w = torch.randn(K, dtype=torch.float64, device="cuda")

    def eager() -> list[Tensor]:
        rows = [x.flatten(1) for x in J]
        v = ops.pcgrad_weights(sum((x @ x.T).double() for x in rows)).to(dtype)  # type: ignore[arg-type]
        return [v @ x for x in rows]

    candidates: dict[str, Callable[[], object]] = {
        "copy_": lambda: copy.copy_(flat),
        "gram": lambda: ops.gram(J),
        "combine": lambda: ops.combine(w, J, out),
        "eager": eager,
    }
    moved = {"copy_": 2.0 * K * P * size, "gram": 1.0 * K * P * size, "combine": (K + 1.0) * P * size}
    found = measure(case, candidates, seconds=args.seconds, bytes_moved=moved, cuda=True)
    show(found, "copy_")
    return list(found.values())


def cuda(args: argparse.Namespace) -> list[Result]:
    results: list[Result] = []
    for dtype, name in ((torch.float32, "f32"), (torch.bfloat16, "bf16")):
        for K in args.K or [5, 8]:
            for P in args.P or [10**7, 10**8]:
                J = torch.randn(K, P, dtype=dtype, device="cuda")
                results += matrix_case(f"cuda {name} K={K} P={P:.0e}", J, args)
            for model, shapes in MODELS.items():
                results += list_case(f"cuda {name} K={K} {model}", shapes, K, dtype, args)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per candidate of a case")
    parser.add_argument("--K", type=int, nargs="*")
    parser.add_argument("--P", type=int, nargs="*")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    results = cuda(args) if args.device == "cuda" else cpu(args)
    path = args.csv or Path(__file__).parent / "results" / f"gram_{args.device}.csv"
    write_csv(path, results)


if __name__ == "__main__":
    main()
