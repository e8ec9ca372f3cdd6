"""Analyses of a run folder: task affinity and conflict. Each writes arrays (npz), summary.json and figures.

RUN/analysis/affinity/  affinity.npz  summary.json  clusters.json  affinity.png  gaps.png  layers.png
RUN/analysis/conflict/  conflict.npz  summary.json  conflict.png
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from antdiff import TimestepClusters
from antdiff._command import command
from antdiff._devices import choose_device, sensible_threads
from antdiff._files import write_json, write_npz
from antdiff._folders import output_folder
from antdiff._progress import progress_bar
from antdiff.analysis import Conflict, TaskAffinity, cluster_conflict, module_groups, task_affinity
from antdiff.analysis.affinity import mean_within
from antdiff.data import ImageData, to_unit
from antdiff.diffusion import log_snr
from antdiff.experiments._json import finite_or_none
from antdiff.plotting.analysis import save_conflict, save_gaps, save_heat_map, save_layers
from antdiff.train.checkpoint import checkpoints, load_checkpoint
from antdiff.train.companions import Experts
from antdiff.train.config import TrainConfig
from antdiff.train.models import Denoiser, noise_schedule
from antdiff.train.prepare import make_model
from antdiff.train.run import load_run_data

LAYERS_SHOWN = 15  # only the largest


@dataclass(frozen=True)
class LoadedRun:
    """The parts of a run that an analysis needs. No checkpoint is loaded into the model yet."""

    config: TrainConfig
    data: ImageData
    model: Denoiser | Experts
    clusters: TimestepClusters
    log_snr: torch.Tensor  # float64 [T]
    checkpoints: list[Path]  # oldest first

    @property
    def steps(self) -> list[int]:
        """Training step of each checkpoint."""
        return [int(path.stem.removeprefix("step-")) for path in self.checkpoints]

    @property
    def images(self) -> torch.Tensor:
        """Train images, float [N, C, H, W] in [-1, 1]."""
        return to_unit(self.data.train)

    def title(self) -> str:
        """Return data, method and steps as text, for captions."""
        steps = self.steps
        counted = (
            f"checkpoints of steps {steps[0]} to {steps[-1]} ({len(steps)})" if len(steps) > 1 else f"step {steps[0]}"
        )
        return f"{self.data.name}, {self.config.model}, method {self.config.method}, seed {self.config.seed}, {counted}"


def open_run(run: Path, device: torch.device) -> LoadedRun:
    """Read a run folder.

    Raises:
        ValueError: the folder is not a run, or has no checkpoint yet.
    """
    config = TrainConfig.load(run / "config.json")
    paths = checkpoints(run / "checkpoints")
    if not paths:
        raise ValueError(f"{run} has no checkpoint yet: train it first with: {command('train', '--resume', run)}")
    data = load_run_data(config, run)
    model = make_model(config, data.shape, run, seed=0).to(device)
    clusters = TimestepClusters.load(run / "clusters.json")
    return LoadedRun(config, data, model, clusters, log_snr(noise_schedule()), paths)


def analyze_affinity(
    run: Path,
    *,
    timesteps: int = 100,
    images: int = 256,
    sketch: int | Literal["auto"] | None = "auto",
    memory: int = 2**30,
    k: int | None = None,
    seed: int = 0,
    device: str = "auto",
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the task affinity of a run, averaged over its checkpoints (the trained weights, not the EMA weights).

    A call with the same settings resumes an interrupted one. The arguments are those of
    :func:`antdiff.analysis.task_affinity`, and `images` is the number of train images drawn, with replacement.

    Args:
        k: number of clusters in the figures and in clusters.json; None means the run's.
        out: folder of the results; None means RUN/analysis/affinity.

    Returns:
        The content of summary.json.
    """
    if images < 2 or images % 2:
        raise ValueError(f"images must be even, for two halves; got {images}. Take {max(2, images + 1)}")
    began = time.process_time()
    where = choose_device(device)
    loaded = open_run(run, where)
    k = loaded.clusters.k if k is None else k
    clusterings = {  # first, so that an invalid k is refused before the computation
        "timestep": TimestepClusters.uniform(len(loaded.log_snr), k),
        "log-SNR": TimestepClusters.from_log_snr(loaded.log_snr, k),
    }
    out = out or run / "analysis" / "affinity"
    names = ("affinity.npz", "summary.json", "clusters.json", "state", "affinity.png", "gaps.png", "layers.png")
    with output_folder(out, "affinity analysis", names), sensible_threads(loaded.data.shape[1], where):
        generator = torch.Generator().manual_seed(seed)
        train = loaded.images
        x0 = train[torch.randint(len(train), (images,), generator=generator)]
        found = task_affinity(
            loaded.model, x0, timesteps, log_snr=loaded.log_snr, generator=generator,
            checkpoints=(load_checkpoint(path)["model"] for path in loaded.checkpoints),
            groups=module_groups(loaded.model), sketch=sketch, memory=memory, folder=out / "state", progress=progress,
        )  # fmt: skip
        found.save(out / "affinity.npz")
        full = found.full()
        clusterings["gradient affinity"] = TimestepClusters.from_affinity(full, k)
        clusterings["gradient affinity"].save(out / "clusters.json")
        correlations = found.gap_correlations(generator=generator)
        summary = {
            "run": str(run),
            "steps": loaded.steps,
            "seed": seed,
            "timesteps": timesteps,
            "images": images,
            "spearman": {name: value._asdict() for name, value in correlations.items()},
            "signal": {"min": float(found.signal.min()), "median": float(found.signal.median())},
            "clusters": {
                name: {"starts": c.starts.tolist(), "within": mean_within(full, c)} for name, c in clusterings.items()
            },
            "layers": _layer_summary(found, loaded.model),
            "cpu_seconds": round(time.process_time() - began, 1),
            **found.stats,
        }
        summary["captions"] = _draw(found, full, clusterings, correlations, loaded, out)
        write_json(out / "summary.json", summary)
        shutil.rmtree(out / "state")
        return summary


def _layer_summary(found: TaskAffinity, model: torch.nn.Module) -> dict[str, dict[str, float | None]]:
    """Return the size of each group and its mean affinity between different timesteps: how much of it is shared."""
    sizes = layer_sizes(model)
    off = ~torch.eye(len(found.timesteps), dtype=torch.bool)
    return {
        name: {"parameters": sizes[name], "mean_affinity": finite_or_none(layer[off].nanmean())}
        for name, layer in zip(found.layer_names, found.layers, strict=True)
    }


def layer_sizes(model: torch.nn.Module) -> dict[str, int]:
    """Return the number of trainable parameters of each top-level module."""
    group_of, sizes = module_groups(model), dict[str, int]()
    for name, p in model.named_parameters():
        if p.requires_grad:
            sizes[group_of(name)] = sizes.get(group_of(name), 0) + p.numel()
    return sizes


def _draw(
    found: TaskAffinity, full: torch.Tensor, clusterings: dict[str, TimestepClusters], correlations: Any,
    loaded: LoadedRun, out: Path,
) -> dict[str, str]:  # fmt: skip
    """Draw the figures. Return their captions by file name."""
    n = len(found.timesteps)
    how = "exact" if found.stats["sketch_dim"] is None else f"sketched to {found.stats['sketch_dim']} numbers per layer"
    made = f"{loaded.title()}; {n} timesteps, {found.stats['samples']} images per timestep in two halves, {how}."
    captions = {
        "affinity.png": f"Noise-corrected cosine of the gradients of the losses at timesteps s and t. {made} The "
        f"{next(iter(clusterings.values())).k} squares are the clusters of each clustering. Gradients conflict inside "
        "the dashed zero contour. t = 0 is the least noise.",
        "gaps.png": "Each grey point is a pair of different timesteps. The lines are medians over bins with equal "
        f"numbers of pairs. The brackets hold the 95 % interval of a bootstrap over timesteps. {made}",
        "layers.png": f"Affinity of the gradients of each part of the network alone. Grey means no estimate. {made}",
    }
    save_heat_map(full, loaded.log_snr, clusterings, captions["affinity.png"], out / "affinity.png")
    save_gaps(found, correlations, captions["gaps.png"], out / "gaps.png")
    sizes = layer_sizes(loaded.model)
    shown = sorted(range(len(found.layer_names)), key=lambda i: -sizes[found.layer_names[i]])[:LAYERS_SHOWN]
    shown.sort()  # in the order of the network
    save_layers(
        [found.layer_names[i] for i in shown], found.layers[shown], [sizes[found.layer_names[i]] for i in shown],
        found.timesteps, captions["layers.png"], out / "layers.png",
    )  # fmt: skip
    return captions


def analyze_conflict(
    run: Path,
    *,
    batch_size: int | None = None,
    batches: int = 32,
    repeats: int = 5,
    clusters: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the conflict between the clusters of a run at each of its checkpoints.

    The arguments are those of :func:`antdiff.analysis.cluster_conflict`. By default `batch_size` and `clusters` are the
    run's, and `out` is RUN/analysis/conflict.

    Returns:
        The content of summary.json.
    """
    where = choose_device(device)
    loaded = open_run(run, where)
    chosen = loaded.clusters if clusters is None else TimestepClusters.load(clusters)
    out = out or run / "analysis" / "conflict"
    names = ("conflict.npz", "summary.json", "conflict.png")
    with output_folder(out, "conflict analysis", names), sensible_threads(loaded.data.shape[1], where):
        B, images = loaded.config.batch_size if batch_size is None else batch_size, loaded.images
        found: dict[int, Conflict] = {}
        bar = progress_bar(len(loaded.steps), unit="checkpoint", active=progress)
        for step, path in zip(loaded.steps, loaded.checkpoints, strict=True):
            loaded.model.load_state_dict(load_checkpoint(path)["model"])
            # Images, noise and timesteps are the same at every checkpoint, so that only the network changes.
            generator = torch.Generator().manual_seed(seed)
            found[step] = cluster_conflict(
                loaded.model, images, chosen, log_snr=loaded.log_snr, batch_size=B, batches=batches, repeats=repeats,
                generator=generator,
            )  # fmt: skip
            bar.update()
        bar.close()
        arrays = {
            name: np.stack([getattr(conflict, name).numpy() for conflict in found.values()])
            for name in ("cosine", "batch_cosine", "rate")
        }
        write_npz(out / "conflict.npz", {"steps": np.array(list(found)), "starts": chosen.starts.numpy(), **arrays})
        summary = {
            "run": str(run), "seed": seed, "starts": chosen.starts.tolist(), "batch_size": B, "batches": batches,
            "repeats": repeats,
            "checkpoints": {str(step): _conflict_summary(conflict) for step, conflict in found.items()},
        }  # fmt: skip
        text = (
            f"{loaded.title()}; batches of {B}, {repeats} repetitions of {batches} batches. Left: noise-corrected "
            "cosines, from products of gradients of different batches. Right: circles count conflicts in single "
            "batches, with 95 % Student intervals over repetitions (new images, noise and timesteps, the same "
            "network). Squares count pairs of expected gradients whose interval is entirely below zero. The dotted "
            "line is what noise alone gives."
        )
        summary["captions"] = {"conflict.png": text}
        save_conflict(found, chosen, text, out / "conflict.png")
        write_json(out / "summary.json", summary)
        return summary


def _conflict_summary(conflict: Conflict) -> dict[str, Any]:
    share, expected = conflict.share(), conflict.expected()
    return {
        "batch_share": {name: finite_or_none(value) for name, value in share._asdict().items()},
        "expected_pairs": conflict.conflicting_pairs(),
        "cosine": {name: finite_or_none(value) for name, value in expected._asdict().items()},
        "batch_cosine": finite_or_none(conflict.batch_cosine.mean(0)),
    }


def affinity_table(summary: dict[str, Any]) -> str:
    """Return the summary as text."""
    spearman, signal = summary["spearman"], summary["signal"]
    lines = [
        f"{len(summary['steps'])} checkpoints, {summary['timesteps']} timesteps, {summary['images']} images, "
        f"{summary['cpu_seconds']} s of CPU",
        *(
            f"Spearman of affinity with the gap in {name}: {spearman[key]['value']:+.2f}, 95 % over timesteps "
            f"[{spearman[key]['low']:+.2f}, {spearman[key]['high']:+.2f}]"
            for key, name in (("t", "t"), ("log_snr", "log-SNR"))
        ),
        f"signal in the gradients of one half: median {signal['median']:.2f}, minimum {signal['min']:.2f}",
    ]
    if summary["sketch_dim"] is not None:
        lines.append(f"sketch: first-order standard deviation of at most {summary['sketch_sd_median']:.3f} for the "
                     f"median pair and {summary['sketch_sd_max']:.3f} for the worst")  # fmt: skip
    for name, found in summary["clusters"].items():
        lines.append(f"{name:>18}: {found['starts']}, mean affinity within clusters {found['within']:.3f}")
    return "\n".join(lines)


def conflict_table(summary: dict[str, Any]) -> str:
    """Return the summary as text."""
    k = len(summary["starts"])
    lines = [f"{'step':>8} {'conflicting pairs in a batch':>30} {'in expectation':>23}"]
    for step, found in summary["checkpoints"].items():
        share = found["batch_share"]
        half = "" if share["low"] is None else f" ± {(share['high'] - share['low']) / 2:.1%}"
        text = f"{share['mean']:.1%}{half}"
        lines.append(f"{step:>8} {text:>30} {found['expected_pairs']:>14} of {k * (k - 1) // 2:>2}")
    return "\n".join(lines)
