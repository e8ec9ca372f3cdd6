"""The bytes that a step sends and holds on several ranks, counted and compared with the formulas.

    python benchmarks/bench_distributed.py [--ranks 2 4 8] [--k 5 8] [--csv PATH]

Each rank is a process on this machine. The ranks communicate over gloo on 127.0.0.1. The kernel counts the bytes twice:
those that the TCP sockets of the processes have sent (tcpi_bytes_sent of TCP_INFO, summed over ranks), and those of the
loopback interface (/proc/net/dev). The second count contains TCP/IP headers and the traffic of all processes, so it is
right only while nothing else uses the interface. The formula is that of ``antdiff.distributed.cost_model``. Batches are
stratified. They are cut into contiguous chunks for ``cluster``, and dealt out in turn for the other schemes.

``ddp`` is an ordinary step of DistributedDataParallel, ``fsdp`` an ordinary step of ``fully_shard``, and
``fsdp, K rows`` a step of BalancedBackward on the latter (gloo's reduce_scatter sends as much as an all_reduce). The
memory is that of J, buffers and p.grad, including the buffers into which gloo's all-to-all receives. The processes
share cores and a loopback interface, so their times can be compared with each other only.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import environment
from torch import Tensor, nn

import antdiff
from antdiff import balancing, distributed

WIDTH, DEPTH, STEPS = 512, 4, 3
COLUMNS = ["ranks", "k", "parameters", "scheme", "bytes_formula", "bytes_sockets", "bytes_loopback",
           "rows_and_buffers_bytes", "step_s"]  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layers += [nn.Linear(WIDTH, WIDTH), nn.SiLU()]
    return nn.Sequential(*layers)


def sockets_sent() -> int:
    """Return the bytes that the TCP sockets of this process have sent so far."""
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(fd))) as s:
                if s.family in (socket.AF_INET, socket.AF_INET6) and s.type == socket.SOCK_STREAM:
                    total += struct.unpack_from("Q", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 200)[0]
        except OSError:  # the descriptor has been closed in the meantime
            continue
    return total


def loopback_sent() -> int:
    """Return the bytes that the loopback interface has sent so far."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def count(step: Callable[[], object], ranks: int) -> tuple[float, float, float]:
    """Return the bytes per rank and step by the sockets and by the loopback interface, and the median time."""
    step()
    step()
    seconds = []
    dist.barrier()
    time.sleep(0.1)
    sockets_before, loopback_before = sockets_sent(), loopback_sent()
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    own = sockets_sent() - sockets_before
    time.sleep(0.1)
    dist.barrier()
    loopback = loopback_sent() - loopback_before
    total = torch.tensor(float(own))
    dist.all_reduce(total)
    return float(total) / ranks / STEPS, loopback / ranks / STEPS, statistics.median(seconds)


def candidates(K: int, rank: int, R: int) -> list[tuple[str, str | None, Callable[[], object], Any]]:
    """Return name, scheme of the formula, a step, and the object that holds the rows, for each kind of step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    each = 2 * K
    B = each * R
    shares = [B // K] * K
    counts = distributed.contiguous_counts(shares, [each] * R)
    cluster = torch.arange(K).repeat_interleave(B // K)
    x = torch.randn(B, WIDTH, generator=torch.Generator().manual_seed(0))
    dealt, chunk = torch.arange(B) % R == rank, torch.arange(B) // each == rank

    def losses_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: (model(x) - x).square().mean(1)

    def balanced(scheme: Any) -> tuple[Callable[[], object], Any]:
        model = network()
        backward = antdiff.BalancedBackward(model, balancing.PCGrad(), K, scheme=scheme)
        rows = chunk if scheme == "cluster" else dealt
        known = counts if scheme == "cluster" else None
        return lambda: backward(losses_of(model), (x[rows],), cluster[rows], counts=known), backward.gradients

    found: list[tuple[str, str | None, Callable[[], object], Any]] = []
    ddp = nn.parallel.DistributedDataParallel(network())
    found.append(("ddp", "ddp", lambda: losses_of(ddp)(x[dealt]).mean().backward(), None))
    for scheme in ("all_reduce", "reduce_scatter", "cluster"):
        step, cg = balanced(scheme)
        found.append((scheme, scheme, step, cg))
    mesh = init_device_mesh("cpu", (R,))
    for name in ("fsdp", "fsdp, K rows"):
        model: Any = network()
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if name == "fsdp":
            found.append((name, None, lambda model=model: losses_of(model)(x[dealt]).mean().backward(), None))
        else:
            backward = antdiff.BalancedBackward(model, balancing.PCGrad(), K)
            step = lambda b=backward, m=model: b(losses_of(m), (x[dealt],), cluster[dealt])  # noqa: E731
            found.append((name, None, step, backward.gradients))
    return found


def main(rank: int, R: int, ks: list[int], folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=R, timeout=datetime.timedelta(seconds=120)
    )
    rows = []
    for K in ks:
        P = sum(p.numel() for p in network().parameters())
        for name, formula, step, cg in candidates(K, rank, R):
            sent, loopback, seconds = count(step, R)
            expected = distributed.cost_model(P, K, R)[formula].bytes if formula else float("nan")
            held = cg.nbytes() if cg is not None else 4 * P // (R if "fsdp" in name else 1)
            rows.append([R, K, P, name, f"{expected:.0f}", f"{sent:.0f}", f"{loopback:.0f}", held, f"{seconds:.3e}"])
            if rank == 0:
                print(
                    f"R={R} K={K} {name:14s} formula {expected / 1e6:8.3f} MB  sockets {sent / 1e6:8.3f}  loopback "
                    f"{loopback / 1e6:8.3f}  held {held / 2**20:6.1f} MiB  {seconds * 1e3:7.1f} ms",
                    flush=True,
                )
    if rank == 0:
        torch.save(rows, f"{folder}/rows.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--k", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for R in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(main, (R, args.k, folder), nprocs=R)
            table += torch.load(f"{folder}/rows.pt")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            about = environment()
            writer.writerow([*COLUMNS, *about])
            writer.writerows([*row, *about.values()] for row in table)
        print(f"wrote {args.csv}")
