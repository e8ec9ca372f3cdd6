"""Draws docs/overview.png, the data flow of one training step. Every panel is computed.

    python docs/overview.py

Left: the clusters. Middle: the cosines between the K cluster gradients of a small UNet after 200 plain steps on digits,
averaged over 20 batches. Right: the weights that balancing methods compute from the Gram matrices of these batches.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import antdiff
from antdiff import balancing, diffusion
from antdiff.data import load_data, to_unit
from antdiff.plotting import plot_clusters
from antdiff.plotting.palette import CATEGORICAL, SEQUENTIAL
from antdiff.train.models import build_model, noise_schedule

K = 5


def main() -> None:
    torch.manual_seed(0)
    log_snr = diffusion.log_snr("cosine", T=1000)
    clusters = antdiff.TimestepClusters.from_log_snr(log_snr, k=K)
    sampler = antdiff.StratifiedTimesteps(clusters)
    data, schedule = load_data("digits"), noise_schedule()
    model = build_model("unet", *data.shape[:2], generator_seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    cluster_gradients = antdiff.ClusterGradients(model, K)

    def losses(x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(x0)
        return (model(schedule.add_noise(x0, noise, t), t) - noise).square().flatten(1).mean(1)

    grams = []
    for step in range(220):
        x0 = to_unit(data.train[torch.randint(len(data.train), (100,))])
        t, cluster, _ = sampler.sample(len(x0))
        jacobian = cluster_gradients(losses, (x0, t), cluster)
        G = jacobian.gram()
        if step >= 200:
            grams.append(G)
        else:
            jacobian.combine(torch.full((K,), 1 / K, dtype=torch.float64))
            optimizer.step()
    cosines = torch.stack([G / G.diagonal().sqrt().outer(G.diagonal().sqrt()) for G in grams]).mean(0)

    figure = Figure(figsize=(11, 3.1), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.25, 1, 1.35])
    plot_clusters(clusters, log_snr, ax=left)
    left.set_title("1  cluster the timesteps", fontsize=10)
    low = min(0.0, float(cosines.min()))
    middle.imshow(cosines, cmap=SEQUENTIAL, vmin=low, vmax=1)
    for i in range(K):
        for j in range(K):
            dark = float(cosines[i, j]) - low < 0.5 * (1 - low)
            middle.text(j, i, f"{cosines[i, j]:.2f}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
    middle.set(xticks=range(K), yticks=range(K), xlabel="cluster", ylabel="cluster")
    middle.set_title("2  one gradient per cluster: their cosines", fontsize=10)
    methods = {"sum": torch.ones(K, dtype=torch.float64)}
    for name in ("pcgrad", "nash"):
        methods[name] = torch.stack([balancing.get(name)().weights(G) for G in grams]).mean(0)
    for offset, (name, weights) in enumerate(methods.items()):
        right.bar(
            np.arange(K) + 0.27 * (offset - 1), weights / weights.sum(), width=0.25, label=name,
            color=CATEGORICAL[offset], hatch=["", "//", ".."][offset], edgecolor="white",
        )  # fmt: skip
    right.set(xlabel="cluster", ylabel="share of the weights", xticks=range(K))
    right.legend(frameon=False, fontsize=8)
    right.set_title("3  weights from their Gram matrix", fontsize=10)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=140)


if __name__ == "__main__":
    main()
