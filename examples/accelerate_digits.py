"""An accelerate training loop with PCGrad over timestep clusters. antdiff adds the two marked lines.

    accelerate launch --num_processes 2 --cpu examples/accelerate_digits.py
    torchrun --nproc-per-node 2 examples/accelerate_digits.py

A small MLP denoises scikit-learn's digits. As in any accelerate script, ``accelerator.prepare`` wraps the model in
DistributedDataParallel, shards the data and moves everything to the devices.
"""

from __future__ import annotations

import argparse
import datetime

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import antdiff
from antdiff import balancing

T, K = 1000, 5


def main(steps: int, cpu: bool) -> None:
    limit = InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=2))  # then a lost rank is an error
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[limit])
    torch.manual_seed(0)  # the same weights on every rank
    model: nn.Module = nn.Sequential(nn.Linear(65, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images = torch.from_numpy(load_digits().data).float() / 8 - 1  # [1797, 64] in [-1, 1]
    loader = DataLoader(TensorDataset(images), batch_size=40, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    clusters = antdiff.TimestepClusters.from_log_snr(antdiff.diffusion.log_snr("cosine", T=T), k=K)
    sampler = antdiff.StratifiedTimesteps(clusters, importance=True, seed=0)
    alpha = torch.sigmoid(antdiff.diffusion.log_snr("cosine", T=T)).float().to(accelerator.device)  # [T], alpha_bar
    backward = antdiff.BalancedBackward(model, balancing.PCGrad(), k=K)  # <- added

    def denoising_losses(x0: Tensor, noise: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        a = alpha[t][:, None]
        noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
        with accelerator.autocast():
            estimate = model(torch.cat([noisy, t[:, None] / T], 1))
        return (estimate.float() - noise).square().mean(1) * weight  # [B]

    noise_of_rank = torch.Generator(accelerator.device).manual_seed(1 + accelerator.process_index)
    done = 0
    while done < steps:
        for (x0,) in loader:
            counts = sampler.counts(len(x0))
            t, cluster, weight = sampler.sample(len(x0), device=accelerator.device)
            noise = torch.randn(x0.shape, generator=noise_of_rank, device=accelerator.device)
            result = backward(denoising_losses, (x0, noise, t, weight), cluster, counts=counts)  # <- loss.backward()
            optimizer.step()
            done += 1
            if done % 20 == 0 or done == steps:
                accelerator.print(f"step {done} loss {result.losses.mean():.4f}  {backward.gradients.explain()}")
            if done == steps:
                break
    same = accelerator.gather(torch.stack([p.detach().double().sum() for p in model.parameters()]).sum()[None])
    accelerator.print(f"weights alike on {accelerator.num_processes} ranks: {bool((same == same[0]).all())}")
    # Free the objects that hold the process group before ending it, so that its threads do not outlive the interpreter.
    model, optimizer, loader, backward = accelerator.free_memory(model, optimizer, loader, backward)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    main(args.steps, args.cpu)
