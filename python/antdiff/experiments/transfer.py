"""The negative transfer gap of a run: specialists of each of its clusters against a joint model, over seeds.

RUN/analysis/transfer/          transfer.npz  summary.json  transfer.png
RUN/analysis/transfer/seed<s>/  joint/  cluster<i>-iterations/  cluster<i>-samples/, and .json of what was measured

Each specialist is an ordinary run folder: an interrupted analysis goes on with the one it was at, from its checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antdiff import TimestepClusters
from antdiff._files import write_json, write_npz
from antdiff.analysis.transfer import BUDGETS, Budget, TransferGap
from antdiff.companions import ExpertBank
from antdiff.experiments._json import finite_or_none
from antdiff.experiments.quality import Judge, feature_net, held_out_losses
from antdiff.plotting.analysis import save_transfer
from antdiff.train.checkpoint import latest_checkpoint, load_checkpoint
from antdiff.train.config import TrainConfig
from antdiff.train.data import ImageData, load_data, to_uint8
from antdiff.train.devices import choose_device, sensible_threads
from antdiff.train.loop import train
from antdiff.train.models import draw_samples, noise_schedule
from antdiff.train.run import intervals, load_model, start_run


def analyze_transfer(
    run: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int | None = None,
    samples: int = 1000,
    device: str = "auto",
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Trains, for each seed, a joint model with the run's settings and two specialists a cluster, and measures them.

    Args:
        run: its settings and clusters are used; its network too, where its seed and number of steps are asked for.
        seeds: of training; a specialist has its joint model's seed, and so the same first weights and order of data.
        steps: of the joint models and of the specialists with equal iterations; default the run's, at most 400.
        samples: images a chain draws for its FD, from the same starting noise for joint and specialist.
        out: default RUN/analysis/transfer.

    Returns:
        What summary.json holds; None if a signal stopped a training (the same call goes on).

    Raises:
        ValueError: a run with companions, repeated seeds, steps or samples too few, or `out` with other settings.
    """
    base = TrainConfig.load(run / "config.json")
    steps = min(base.steps, 400) if steps is None else steps
    _check(base, seeds, steps, samples)
    where = choose_device(device)
    out = out or run / "analysis" / "transfer"
    data = load_data(base.data, image_size=base.image_size)
    clusters = TimestepClusters.load(run / "clusters.json")
    with sensible_threads(data.shape[1], where):
        base = replace(base, device=device, clusters=str(run / "clusters.json"))
        trial = _Trial(base, run, clusters, data, out, samples)
        cells = []
        for seed in seeds:
            cell = trial.seed(seed, steps, progress)
            if cell is None:
                return None
            cells.append(cell)
    return _report(run, base, data, clusters, list(seeds), steps, samples, cells, out)


def _check(base: TrainConfig, seeds: Sequence[int], steps: int, samples: int) -> None:
    if base.companions or base.specialist is not None:
        raise ValueError(
            "run must be of one plain network on all timesteps; got "
            f"{', '.join(base.companions) or 'a specialist'}. Train one without."
        )
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be different numbers, at least one; got {list(seeds)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    if samples < 10:
        raise ValueError(f"samples must be at least 10, or their statistics mean nothing; got {samples}")


class _Trial:
    """Trains and measures the models of one seed after the other."""

    def __init__(
        self, base: TrainConfig, run: Path, clusters: TimestepClusters, data: ImageData, out: Path, samples: int
    ) -> None:
        self.base, self.run, self.clusters, self.data, self.out = base, run, clusters, data, out
        self.sampling = (samples, base.sample_steps)
        self.device, self.schedule = choose_device(base.device), noise_schedule()
        self.judge = Judge(data, feature_net(data))

    def seed(self, seed: int, steps: int, progress: bool) -> dict[str, Any] | None:
        """Held-out losses [K] and FDs of one seed: joint, and for each budget of the specialists."""
        folder, spans = self.out / f"seed{seed}", intervals(self.clusters)
        config = with_average(replace(self.base, seed=seed, steps=steps))
        specialists = {(budget, i): self.specialist(config, i, budget) for budget in BUDGETS for i in range(len(spans))}
        place = self.run if self.fits(config, self.run) else folder / "joint"
        folders = {place: config} | {folder / f"cluster{i}-{b}": alone for (b, i), alone in specialists.items()}
        for taken, wanted in folders.items():  # before anything is trained
            if (taken / "config.json").exists() and not self.fits(wanted, taken):
                raise ValueError(f"{taken} holds a run with other settings: give another --out, or delete it")
        joint = self.model(config, place, progress)
        if joint is None:
            return None
        cell: dict[str, Any] = {"joint": self.read(folder / "joint.json", config)}
        if cell["joint"] is None:
            found = {"losses": [self.loss(joint, span) for span in spans], "fd": self.fd(joint, seed)}
            cell["joint"] = self.write(folder / "joint.json", config, found)
        for (budget, i), alone in specialists.items():
            name = f"cluster{i}-{budget}"
            measured = self.read(folder / f"{name}.json", alone)
            if measured is None:
                model = self.model(alone, folder / name, progress)
                if model is None:
                    return None
                hybrid = switched(joint, model, spans[i], self.clusters.T)
                found = {"loss": self.loss(model, spans[i]), "fd": self.fd(hybrid, seed), "steps": alone.steps}
                measured = self.write(folder / f"{name}.json", alone, found)
            cell.setdefault(budget, []).append(measured)
        return cell

    def specialist(self, joint: TrainConfig, cluster: int, budget: Budget) -> TrainConfig:
        """The settings of the specialist of a cluster, from those of the joint model."""
        steps = specialist_steps(joint, self.clusters, cluster, budget)
        return with_average(replace(joint, method="vanilla", timesteps="auto", specialist=cluster, steps=steps))

    def fits(self, config: TrainConfig, folder: Path) -> bool:
        """Whether the run in `folder` has these settings, as far as its weights depend on them."""
        saved, clusters = TrainConfig.load(folder / "config.json"), TimestepClusters.load(folder / "clusters.json")
        return clusters == self.clusters and _decisive(saved) == _decisive(config)

    def model(self, config: TrainConfig, folder: Path, progress: bool) -> torch.nn.Module | None:
        """The averaged network of a run, trained as far as it is not; None if a signal stopped it."""
        if not (folder / "config.json").exists():
            start_run(config, folder)
        path = latest_checkpoint(folder / "checkpoints")
        if path is None or int(load_checkpoint(path)["step"]) < config.steps:
            if progress:
                print(folder, flush=True)
            if not train(config, self.data, folder, progress=progress):
                return None
        return load_model(folder, config, self.data.shape, self.device)[0]

    def read(self, path: Path, config: TrainConfig) -> dict[str, Any] | None:
        """What was measured before, of a run with the same settings and in the same way."""
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("of") == self.measured(config) else None

    def write(self, path: Path, config: TrainConfig, found: dict[str, Any]) -> dict[str, Any]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**found, "of": self.measured(config)})
        return found

    def measured(self, config: TrainConfig) -> dict[str, Any]:
        """All that the numbers of a run with these settings depend on."""
        samples, sample_steps = self.sampling
        own = {"starts": self.clusters.starts.tolist(), "samples": samples, "sample_steps": sample_steps}
        return _decisive(config) | own

    def loss(self, model: torch.nn.Module, span: tuple[int, int]) -> float:
        """On held-out images and constant noise, the same for every model."""
        return float(held_out_losses(model, self.data, self.schedule, [span], self.device)[0])

    def fd(self, model: torch.nn.Module, seed: int) -> float:
        """Of samples from a starting noise that depends on the seed alone."""
        generator = torch.Generator(self.device).manual_seed(seed)
        n, steps = self.sampling
        images = draw_samples(model, self.schedule, n, self.data.shape, steps=steps, generator=generator)
        return self.judge.measure(to_uint8(images).cpu()).fd


def with_average(config: TrainConfig) -> TrainConfig:
    """The settings with an average of the weights that reaches back an eighth of the steps at most.

    A longer one still remembers the first weights when a specialist of few steps is measured: the gap would be the
    average's lag.
    """
    return replace(config, ema=min(config.ema, max(0.0, 1 - 8 / config.steps)))


def specialist_steps(config: TrainConfig, clusters: TimestepClusters, cluster: int, budget: Budget) -> int:
    """Steps of a specialist: the joint model's, or as many as show it as many samples of its interval."""
    if budget == "iterations":
        return config.steps
    share = int(clusters.sizes[cluster]) / clusters.T if config.timestep_sampling == "uniform" else 1 / clusters.k
    return max(1, round(config.steps * share))


def switched(joint: torch.nn.Module, specialist: torch.nn.Module, span: tuple[int, int], T: int) -> ExpertBank:
    """The joint model outside of [start, stop), the specialist inside: a chain changes hands at the edges."""
    start, stop = span
    parts = [(0, start, joint), (start, stop, specialist), (stop, T, joint)]
    kept = [(low, model) for low, high, model in parts if low < high]
    return ExpertBank([model for _, model in kept], T, clusters=TimestepClusters(T, [low for low, _ in kept]))


def _decisive(config: TrainConfig) -> dict[str, Any]:
    """The settings that weights depend on: where a run is and what it writes down do not matter, and clusters are
    compared themselves."""
    free = ("device", "clusters", "k", "log_every", "checkpoint_every", "keep_checkpoints", "grid_every",
            "eval_samples", "eval_seeds", "sample_steps")  # fmt: skip
    return {name: value for name, value in asdict(config).items() if name not in free}


def _report(
    run: Path, base: TrainConfig, data: ImageData, clusters: TimestepClusters, seeds: list[int], steps: int,
    samples: int, cells: list[dict[str, Any]], out: Path,
) -> dict[str, Any]:  # fmt: skip
    """Arrays, figure and summary.json."""

    def of(budget: Budget, name: str) -> torch.Tensor:  # [S, K]
        return torch.tensor([[found[name] for found in cell[budget]] for cell in cells], dtype=torch.float64)

    joint_loss = torch.tensor([cell["joint"]["losses"] for cell in cells], dtype=torch.float64)  # [S, K]
    joint_fd = torch.tensor([[cell["joint"]["fd"]] * clusters.k for cell in cells], dtype=torch.float64)
    losses = [TransferGap(joint_loss, of(budget, "loss"), budget) for budget in BUDGETS]
    quality = [TransferGap(joint_fd, of(budget, "fd"), budget) for budget in BUDGETS]
    arrays = {"joint_loss": joint_loss, "joint_fd": joint_fd[:, 0]}
    arrays |= {f"loss_{gap.budget}": gap.specialist for gap in losses}
    arrays |= {f"fd_{gap.budget}": gap.specialist for gap in quality}
    spans = intervals(clusters)
    write_npz(out / "transfer.npz", {
        "seeds": np.array(seeds), "starts": clusters.starts.numpy(), **{k: v.numpy() for k, v in arrays.items()},
    })  # fmt: skip
    summary: dict[str, Any] = {
        "run": str(run), "method": base.method, "steps": steps, "seeds": seeds, "samples": samples, "intervals": spans,
        "specialist_steps": {budget: [found["steps"] for found in cells[0][budget]] for budget in BUDGETS},
        "ntg_loss": {gap.budget: _gap_summary(gap) for gap in losses},
        "ntg_fd": {gap.budget: _gap_summary(gap) for gap in quality},
        "joint_fd": joint_fd[:, 0].tolist(),
    }  # fmt: skip
    few = summary["specialist_steps"]["samples"]
    fewer = " to ".join(map(str, sorted({min(few), max(few)})))
    seeds_text = f"{len(seeds)} training seed{'s' if len(seeds) > 1 else ''}"
    made = f"{data.name}, {base.model}, joint model by {base.method}, {steps} steps, {seeds_text}"
    text = (
        f"NTG = specialist minus joint model; below zero the specialist is better. {made}. Large: mean and 95 % "
        "Student interval over seeds; small: each seed. Equal iterations: as many steps as the joint model, so more "
        f"samples of the interval; equal samples: {fewer} steps."
    )
    summary["captions"] = {"transfer.png": text}
    save_transfer(losses, quality, spans, f"FD ({data.name}-CNN)", text, out / "transfer.png")
    write_json(out / "summary.json", summary)
    return summary


def _gap_summary(gap: TransferGap) -> dict[str, Any]:
    """One row of numbers per interval, None where they are not known, and the verdicts in words."""
    names = ("mean", "low", "high", "relative_mean", "relative_low", "relative_high")
    columns = [finite_or_none(values) for values in (*gap.gap, *gap.relative)]  # each [K]
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return {"intervals": rows, "verdicts": gap.verdicts()}


def transfer_table(summary: dict[str, Any]) -> str:
    """The summary as text."""
    lines = [f"{'timesteps':>12} {'equal':>11} {'steps':>6} {'NTG loss':>22} {'NTG FD':>22}  by held-out loss"]
    for i, (start, stop) in enumerate(summary["intervals"]):
        for budget in BUDGETS:
            loss, fd = (summary[name][budget]["intervals"][i] for name in ("ntg_loss", "ntg_fd"))
            columns = [_span(loss, "relative_", 100, " %"), _span(fd, "", 1, "")]
            steps = summary["specialist_steps"][budget][i]
            lines.append(
                f"{f'{start}..{stop - 1}':>12} {budget:>11} {steps:>6} {columns[0]:>22} {columns[1]:>22}  "
                f"{summary['ntg_loss'][budget]['verdicts'][i]}"
            )
    return "\n".join(lines)


def _span(row: dict[str, Any], prefix: str, scale: float, unit: str) -> str:
    mean, low, high = (row[prefix + name] for name in ("mean", "low", "high"))
    half = "" if low is None else f" ± {(high - low) / 2 * scale:.2g}"
    return f"{mean * scale:+.3g}{half}{unit}"
