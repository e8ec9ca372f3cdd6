"""Cost of channel routing: a training step of a routed DiT relative to the unrouted step, eager and compiled.

The total cost of routing bounds the time that a fused kernel for its window could save. Everything runs in float32, on
the CPU with one thread.
``python benchmarks/bench_routing.py [--device cuda] [--seconds 20] [--out FILE.csv]``; compiling takes a minute or two.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from harness import measure, show, write_csv

from antdiff.companions import ChannelRouting

BATCH = {"cpu": 4, "cuda": 256}


def step(routed: bool, compiled: bool, device: str) -> Callable[[], None]:
    """Return a forward and backward pass of a DiT with four blocks of width 384 on 256 tokens."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=4, num_attention_heads=6, attention_head_dim=64,
        num_embeds_ada_norm=1000,
    ).to(device)  # fmt: skip
    if routed:
        ChannelRouting(model)
    call = torch.compile(model) if compiled else model
    B = BATCH[device]
    x = torch.randn(B, 4, 32, 32, device=device)
    t = torch.randint(1000, (B,), device=device)
    labels = torch.zeros(B, dtype=torch.int64, device=device)

    def run() -> None:
        call(x, timestep=t, class_labels=labels, return_dict=False)[0].square().mean().backward()
        for p in model.parameters():
            p.grad = None

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=tuple(BATCH))
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring time per candidate")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for mode in ("eager", "compiled"):
        candidates = {
            f"{mode} {'routed' if routed else 'plain'}": step(routed, mode == "compiled", options.device)
            for routed in (False, True)
        }
        found = measure(
            f"DiT step, B={BATCH[options.device]}", candidates, seconds=options.seconds, cuda=options.device == "cuda"
        )
        show(found, f"{mode} plain")
        results += found.values()
    if options.out:
        write_csv(options.out, results)


if __name__ == "__main__":
    main()
