"""Cost of telemetry compared with a training step: kernels, time and share of a step. Also the cost of a sample grid.

    python benchmarks/bench_telemetry.py [--csv results.csv] [--device cuda] [--pairs 100]

The step is the default step of antdiff train: a 634k-parameter UNet on digits, B = 64, K = 5, PCGrad on cluster
gradients, AdamW, one thread. The difference of two noisy steps cannot resolve microseconds. The share of a step is
therefore the time of `add` alone (100 calls in a row) over that of a step. The paired ratio in CPU time is a check.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Result, measure, show, write_csv
from torch.utils._python_dispatch import TorchDispatchMode

from antdiff import ClusterGradients, StratifiedTimesteps, TimestepClusters, balancing, diffusion
from antdiff.analysis import Telemetry
from antdiff.data import load_data, to_unit
from antdiff.train.loop import sample_losses
from antdiff.train.models import build_model, noise_schedule
from antdiff.train.progress import save_progress_grid

K, B, CALLS, WINDOW = 5, 64, 100, 20


class Kernels(TorchDispatchMode):
    """Counts the operations that are not views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class Training:
    """The default training step, with the numbers that it passes to telemetry."""

    def __init__(self, device: str) -> None:
        self.data = load_data("digits")
        self.x0 = to_unit(self.data.train[:B]).to(device)
        self.schedule = noise_schedule()
        self.model = build_model("unet", *self.data.shape[:2], generator_seed=0).to(device)
        clusters = TimestepClusters.from_log_snr(diffusion.log_snr("cosine", T=1000), K)
        self.sampler = StratifiedTimesteps(clusters, importance=True)
        self.gradients = ClusterGradients(self.model, K)
        self.balancer = balancing.PCGrad()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0)
        self.telemetry = Telemetry(K, window=WINDOW, share=clusters.sizes / clusters.T, device=device)
        self.taken = 0

    def step(self, watched: bool = False) -> None:
        shares = self.sampler.shares(B)
        t, cluster, weight = self.sampler.sample(B, device=self.x0.device)
        noise = torch.randn_like(self.x0)
        batch = (self.schedule.add_noise(self.x0, noise, t), noise, t, weight)
        jacobian = self.gradients(partial(sample_losses, self.model), batch, cluster, counts=shares)
        G = jacobian.gram()
        self.numbers = (jacobian.losses, jacobian.counts, self.balancer.weights(G), G)
        jacobian.combine(self.numbers[2])
        self.optimizer.step()
        if watched:
            self.telemetry.add(*self.numbers)
            self.taken += 1
            if self.taken % WINDOW == 0:
                self.telemetry.read()

    def watch(self) -> None:
        for _ in range(CALLS):
            self.telemetry.add(*self.numbers)

    def read(self) -> None:
        self.telemetry.add(*self.numbers)
        self.telemetry.read()


def paired_ratio(training: Training, pairs: int) -> tuple[float, float, float]:
    """Return the quartiles of CPU time with telemetry over CPU time without, over pairs of steps in random order."""
    order, shuffle, ratios = [True, False], random.Random(0), []
    for _ in range(pairs):
        shuffle.shuffle(order)
        seconds = {}
        for watched in order:
            start = time.process_time()
            training.step(watched)
            seconds[watched] = time.process_time() - start
        ratios.append(seconds[True] / seconds[False])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return low, middle, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--pairs", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    training = Training(args.device)
    for _ in range(3):
        training.step()
    counts = []
    for call in (training.step, partial(training.telemetry.add, *training.numbers)):
        with Kernels() as kernels:
            call()
        counts.append(kernels.count)
    print(f"kernels: {counts[0]} per step, not counting those of the extension; {counts[1]} in add")
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device(args.device)
        grid = partial(save_progress_grid, training.model, training.schedule, training.data.shape, Path(folder))
        candidates: dict[str, Callable[[], object]] = {
            "step": training.step,
            f"add, {CALLS} calls": training.watch,
            "read": training.read,
            "grid of 16 samples": partial(grid, 0, 20, device),
        }
        found = measure("telemetry", candidates, seconds=args.seconds, cuda=args.device != "cpu")
    show(found, "step")
    step, add, read = (found[name].median for name in ("step", f"add, {CALLS} calls", "read"))
    share = (add / CALLS + read / WINDOW) / step
    print(f"telemetry, read every {WINDOW} steps: {share:.3%} of a step")
    low, middle, high = paired_ratio(training, args.pairs)
    print(f"CPU time of a step with / without, {args.pairs} pairs: {middle:.4f} (quartiles {low:.4f}, {high:.4f})")
    results: list[Result] = list(found.values())
    if args.csv:
        write_csv(args.csv, results)


if __name__ == "__main__":
    main()
