"""Time and memory of an optimizer step with K cluster gradients (forward, backward, balancing, AdamW) and a plain step.

    python benchmarks/bench_gradients.py [--device cpu|cuda] [--threads 1] [--least 4] [--seconds 1] [--case NAME]
                                         [--autocast] [--compile] [--no-peers] [--csv PATH]

The candidates:

* ``plain`` is one forward, one backward of the mean loss, and one AdamW step.
* ``auto`` is ``antdiff.ClusterGradients`` with the route that ``auto`` chooses, with PCGrad, and with NashMTL solved at
  every step.
* ``audited`` is ``auto`` with PCGrad, and with an audit at every call (``audit=1``). By default one call in 1,000 is
  audited, so the audit costs a thousandth of the difference from ``auto``.
* ``split`` uses PCGrad with the route ``split``, and ``without J`` uses PCGrad with ``hold="gram"``.
* ``P-space`` is the usual loop of K retained backwards with PCGrad on flattened gradients, as in the published code of
  ANT and LibMTL.
* ``autojac`` and ``autogram`` are the two engines of TorchJD. The first computes rows one by one (its fastest way
  here), the second the Gram matrix of the samples, which is summed over clusters.

The last three candidates are the peers, which are timed in every second round.

On a CPU all cases take about six minutes. Memory is the peak of the first step above the memory held before it:
activations, J, gradients and the state of AdamW. glibc is told to keep freed memory, as allocators made for training
do. By default it returns the end of the heap to the system after a step, if nothing happens to lie above it, and takes
it again page by page in the next step. This costs 0.1 of a step for one candidate and nothing for another.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Result, measure, show, write_csv
from torch import Tensor, nn

from antdiff import ClusterGradients, balancing, ops

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from gradient_cases import DiT, cluster_ids, diffusion_batch, spread

Step = Callable[[], object]


class UNet(nn.Module):
    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.net = UNet2DModel(
            sample_size=size,
            in_channels=4,
            out_channels=4,
            block_out_channels=(width, 2 * width),
            layers_per_block=2,
            norm_num_groups=16,
            num_class_embeds=11,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=16,
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.net(x, t, class_labels=y).sample
        return out


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "DiT 4M": (lambda: DiT(192, 6, 3, size=16), 16),
    "UNet 2M": (lambda: UNet(48, 16), 16),
    "DiT-S/2": (lambda: DiT(384, 12, 6, size=32), 32),
    "DiT-XL/2": (lambda: DiT(1152, 28, 16, size=32), 32),
}
CPU_CASES = [(net, K, B) for net in ("DiT 4M", "UNet 2M") for K in (5, 8) for B in (64, 20)]
PEERS = ("P-space PCGrad", "autojac PCGrad", "autogram PCGrad")
CUDA_CASES = [(net, 5, B) for net in ("DiT-S/2", "DiT-XL/2") for B in (256, 64)]


def steps(net: str, K: int, B: int, args: argparse.Namespace) -> dict[str, Callable[[], Step]]:
    """Return a builder per candidate, each with a model and an optimizer of its own."""
    make, size = NETWORKS[net]
    sizes = [B // K + (i < B % K) for i in range(K)]
    cluster = cluster_ids(sizes).to(args.device)
    batch = tuple(x.to(args.device) for x in diffusion_batch(B, size, torch.float32))

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, Callable[..., Tensor]]:
        torch.manual_seed(0)
        model = spread(make()).to(args.device)
        if args.compile:
            model = torch.compile(model)  # type: ignore[assignment]

        def loss_fn(x: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> Tensor:
            with torch.autocast(args.device, torch.bfloat16) if args.autocast else contextlib.nullcontext():
                pred = model(x, t, y)
            return (pred.float() - noise).flatten(1).square().mean(1)

        return model, torch.optim.AdamW(model.parameters(), lr=1e-5), loss_fn

    def means(per_sample: Tensor) -> Tensor:
        return torch.stack([part.mean() for part in per_sample.split(sizes)])

    def plain() -> Step:
        _, optimizer, loss_fn = fresh()

        def step() -> None:
            optimizer.zero_grad()
            loss_fn(*batch).mean().backward()
            optimizer.step()

        return step

    def cluster_step(route: Any, method: Any, audit: int = 1000) -> Callable[[], Step]:
        def build() -> Step:
            model, optimizer, loss_fn = fresh()
            cg, balancer = ClusterGradients(model, K, route, audit=audit), method()
            if route == "auto":  # choose the route now, so that the memory of the choice is not counted for a step
                for _ in range(2):  # the first two calls are audited
                    cg(loss_fn, batch, cluster, counts=sizes).rows.clear()
                print(f"{net} K={K} B={B}: {cg.explain()}")

            def step() -> None:
                jacobian = cg(loss_fn, batch, cluster, counts=sizes)
                jacobian.combine(balancer.weights(jacobian.gram()))
                optimizer.step()

            return step

        return build

    def without_j() -> Step:
        model, optimizer, loss_fn = fresh()
        cg, balancer = ClusterGradients(model, K, "grouped", hold="gram"), balancing.PCGrad()

        def step() -> None:
            jacobian = cg(loss_fn, batch, cluster, counts=sizes)
            jacobian.combine(balancer.weights(jacobian.gram()))
            optimizer.step()

        return step

    def p_space() -> Step:
        model, optimizer, loss_fn = fresh()
        parameters = list(model.parameters())

        def step() -> None:
            losses, rows = means(loss_fn(*batch)), []
            for i in range(K):
                grads = torch.autograd.grad(losses[i], parameters, retain_graph=i < K - 1)
                rows.append(torch.cat([g.flatten() for g in grads]))
            J = torch.stack(rows)  # [K, P]
            projected = J.clone()
            for i in range(K):
                for j in torch.randperm(K).tolist():
                    dot = projected[i] @ J[j]
                    if j != i and dot < 0:
                        projected[i] -= dot / J[j].square().sum() * J[j]
            direction = projected.sum(0) / K
            for p, g in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
                p.grad = g.view_as(p)
            optimizer.step()

        return step

    def autojac() -> Step:
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import backward, jac_to_grad

        model, optimizer, loss_fn = fresh()
        aggregator = PCGrad()

        def step() -> None:
            optimizer.zero_grad()
            backward(means(loss_fn(*batch)), parallel_chunk_size=1)
            jac_to_grad(model.parameters(), aggregator)
            optimizer.step()

        return step

    def autogram() -> Step:
        from torchjd.autogram import Engine

        model, optimizer, loss_fn = fresh()
        engine = Engine(model, batch_dim=0)
        share = torch.nn.functional.one_hot(cluster, K).T / torch.tensor(sizes, device=args.device)[:, None]  # [K, B]

        def step() -> None:
            optimizer.zero_grad()
            per_sample = loss_fn(*batch)
            G = share @ engine.compute_gramian(per_sample) @ share.T
            per_sample.backward(share.T @ ops.pcgrad_weights(G.double()).to(share.dtype))
            optimizer.step()

        return step

    return {
        "plain": plain,
        "auto PCGrad": cluster_step("auto", balancing.PCGrad),
        "auto NashMTL": cluster_step("auto", balancing.NashMTL),
        "audited PCGrad": cluster_step("auto", balancing.PCGrad, audit=1),
        "split PCGrad": cluster_step("split", balancing.PCGrad),
        **({} if args.compile else {"without J, PCGrad": without_j}),
        **({} if args.no_peers or args.compile else dict(zip(PEERS, (p_space, autojac, autogram), strict=True))),
    }


def peak(step: Step, device: str) -> float:
    """Return the peak memory of one step in bytes, above the memory that was held before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(key))


def case(net: str, K: int, B: int, args: argparse.Namespace) -> list[Result]:
    name = f"{net} K={K} B={B}"
    candidates, memory = {}, {}
    for key, build in steps(net, K, B, args).items():
        try:
            step = build()
            if args.compile:
                step()  # compile first, since compilers need memory of their own
            memory[key] = peak(step, args.device)
            candidates[key] = step
        except Exception as error:  # a peer may not support the network
            print(f"{name}: {key} does not run: {type(error).__name__}: {str(error)[:200]}")
    cuda = args.device == "cuda"
    results = measure(name, candidates, seconds=args.seconds, least=args.least, cuda=cuda, slow=PEERS)
    show(results, "plain")
    base = results["plain"]
    for key, result in results.items():
        of_plain = dict(zip(base.rounds, base.gpu or base.wall, strict=True))
        pairs = [a / of_plain[i] for i, a in zip(result.rounds, result.gpu or result.wall, strict=True)]
        best = min(result.gpu or result.wall) / min(base.gpu or base.wall)
        result.case += f" peak={memory[key] / 2**20:.0f}MiB"
        print(
            f"{name:24s} {key:18s} x plain: pairs of one round {statistics.median(pairs):.2f}, best of all {best:.2f}; "
            f"peak {memory[key] / 2**20:.0f} MiB, {memory[key] / memory['plain']:.2f} x"
        )
    return list(results.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of timing per candidate")
    parser.add_argument("--least", type=int, default=4, help="minimum number of rounds")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--autocast", action="store_true", help="run in bfloat16")
    parser.add_argument("--no-peers", action="store_true", help="only the plain step and antdiff")
    parser.add_argument("--compile", action="store_true", help="only the plain step and antdiff, under torch.compile")
    parser.add_argument("--csv", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # names as in malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 32 * 2**20)
    results: list[Result] = []
    for net, K, B in CUDA_CASES if args.device == "cuda" else CPU_CASES:
        if args.case in f"{net} K={K} B={B}":
            results += case(net, K, B, args)
    if args.csv:
        write_csv(args.csv, results)


if __name__ == "__main__":
    main()
