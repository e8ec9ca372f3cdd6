"""The negative transfer gap of a run: specialists of each cluster compared with a joint model, over seeds.

RUN/analysis/transfer/          transfer.npz  summary.json  transfer.png
RUN/analysis/transfer/seed<s>/  joint/  cluster<i>-iterations/  cluster<i>-samples/  and one .json of results for each

Each specialist is an ordinary run folder. An interrupted analysis resumes from the checkpoint of its current model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antdiff import TimestepClusters
from antdiff._devices import choose_device, sensible_threads
from antdiff._files import read_json, write_json, write_npz
from antdiff._folders import output_folder
from antdiff.analysis.transfer import BUDGETS, Budget, TransferGap
from antdiff.companions import ExpertBank
from antdiff.data import ImageData, to_uint8
from antdiff.data.recorded import record
from antdiff.experiments._json import finite_or_none
from antdiff.experiments.quality import Judge, feature_net, held_out_losses
from antdiff.plotting.analysis import save_transfer
from antdiff.train.checkpoint import require_same_data
from antdiff.train.config import TrainConfig
from antdiff.train.loop import train
from antdiff.train.models import draw_samples, noise_schedule
from antdiff.train.run import intervals, last_state, load_model, load_run_data, start_run


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
    """Train and measure, for each seed, a joint model with the run's settings and two specialists per cluster.

    Args:
        run: run folder whose settings and clusters are used. Its network is used too if seed and steps are the run's.
        seeds: training seeds. A specialist has its joint model's seed, and so the same initial weights and data order.
        steps: steps of the joint models, and of specialists with equal iterations; None means the run's, at most 400.
        samples: images per FD, drawn from the same starting noise for the joint model and the specialist.
        out: folder of the results; None means RUN/analysis/transfer.

    Returns:
        The content of summary.json; None if a signal stopped a training. The same call then resumes it.

    Raises:
        ValueError: a run with companions, repeated seeds, too few steps or samples, or an `out` with other settings.
    """
    base = TrainConfig.load(run / "config.json")
    steps = min(base.steps, 400) if steps is None else steps
    _check(base, seeds, steps, samples)
    where = choose_device(device)
    out = out or run / "analysis" / "transfer"
    data = load_run_data(base, run)
    clusters = TimestepClusters.load(run / "clusters.json")
    names = ("transfer.npz", "summary.json", "transfer.png")
    with output_folder(out, "transfer analysis", names), sensible_threads(data.shape[1], where):
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
            "run must have one plain network, trained on all timesteps; got "
            f"{', '.join(base.companions) or 'a specialist'}. Train a run without it."
        )
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be distinct, and at least one; got {list(seeds)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    if samples < 10:
        raise ValueError(f"samples must be at least 10, since FD needs a covariance; got {samples}")


class _Trial:
    """Trains and measures the models of one seed after another."""

    def __init__(
        self, base: TrainConfig, run: Path, clusters: TimestepClusters, data: ImageData, out: Path, samples: int
    ) -> None:
        self.base, self.run, self.clusters, self.data, self.out = base, run, clusters, data, out
        self.sampling = (samples, base.sample_steps)
        self.device, self.schedule = choose_device(base.device), noise_schedule()
        self.judge = Judge(data, feature_net(data))

    def seed(self, seed: int, steps: int, progress: bool) -> dict[str, Any] | None:
        """Return the held-out losses [K] and FDs of one seed: of the joint model, and per budget of the specialists."""
        folder, spans = self.out / f"seed{seed}", intervals(self.clusters)
        config = with_average(replace(self.base, seed=seed, steps=steps))
        specialists = {(budget, i): self.specialist(config, i, budget) for budget in BUDGETS for i in range(len(spans))}
        place = self.run if self.fits(config, self.run) else folder / "joint"
        folders = {place: config} | {folder / f"cluster{i}-{b}": alone for (b, i), alone in specialists.items()}
        for taken, wanted in folders.items():  # check all folders before any training
            if (taken / "config.json").exists() and not self.fits(wanted, taken):
                raise ValueError(f"{taken} holds a run with other settings. Pass another --out, or delete that folder")
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
        """Return the settings of the specialist of a cluster, from those of the joint model."""
        steps = specialist_steps(joint, self.clusters, cluster, budget)
        return with_average(replace(joint, method="vanilla", timesteps="auto", specialist=cluster, steps=steps))

    def fits(self, config: TrainConfig, folder: Path) -> bool:
        """Return whether the run in `folder` has these settings, as far as its weights depend on them."""
        saved, clusters = TrainConfig.load(folder / "config.json"), TimestepClusters.load(folder / "clusters.json")
        return clusters == self.clusters and _decisive(saved) == _decisive(config)

    def model(self, config: TrainConfig, folder: Path, progress: bool) -> torch.nn.Module | None:
        """Train a run up to its last step. Return its averaged network, or None if a signal stopped the training."""
        if not (folder / "config.json").exists():
            start_run(config, folder)
        state = last_state(folder)
        if state is None or int(state["step"]) < config.steps:
            if progress:
                print(folder, flush=True)
            own = replace(TrainConfig.load(folder / "config.json"), device=config.device)  # may log at other steps
            if not train(own, self.data, folder, progress=progress):
                return None
        else:
            require_same_data(folder, record(self.data), state["origin"]["data"])
        return load_model(folder, config, self.data.shape, self.device)[0]

    def read(self, path: Path, config: TrainConfig) -> dict[str, Any] | None:
        """Return an earlier measurement of a run with the same settings, taken in the same way, or None."""
        found: dict[str, Any] = read_json(path) if path.exists() else {}
        return found if found.get("of") == self.measured(config) else None

    def write(self, path: Path, config: TrainConfig, found: dict[str, Any]) -> dict[str, Any]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**found, "of": self.measured(config)})
        return found

    def measured(self, config: TrainConfig) -> dict[str, Any]:
        """Return everything that the measurements of a run with these settings depend on."""
        samples, sample_steps = self.sampling
        own = {"starts": self.clusters.starts.tolist(), "samples": samples, "sample_steps": sample_steps}
        return _decisive(config) | own | {"digest": self.data.digest()}

    def loss(self, model: torch.nn.Module, span: tuple[int, int]) -> float:
        """Return the loss on held-out images and constant noise, both the same for every model."""
        return float(held_out_losses(model, self.data, self.schedule, [span], self.device)[0])

    def fd(self, model: torch.nn.Module, seed: int) -> float:
        """Return the FD of samples whose starting noise depends on the seed alone."""
        generator = torch.Generator(self.device).manual_seed(seed)
        n, steps = self.sampling
        images = draw_samples(model, self.schedule, n, self.data.shape, steps=steps, generator=generator)
        return self.judge.measure(to_uint8(images).cpu()).fd


def with_average(config: TrainConfig) -> TrainConfig:
    """Return the settings with a weight average that reaches back at most an eighth of the steps.

    A longer average of a short specialist would still contain the initial weights, and the gap would measure that lag.
    """
    return replace(config, ema=min(config.ema, max(0.0, 1 - 8 / config.steps)))


def specialist_steps(config: TrainConfig, clusters: TimestepClusters, cluster: int, budget: Budget) -> int:
    """Return the steps of a specialist: the joint model's, or those that give it as many samples of its interval."""
    if budget == "iterations":
        return config.steps
    share = int(clusters.sizes[cluster]) / clusters.T if config.timestep_sampling == "uniform" else 1 / clusters.k
    return max(1, round(config.steps * share))


def switched(joint: torch.nn.Module, specialist: torch.nn.Module, span: tuple[int, int], T: int) -> ExpertBank:
    """Return a network that is the specialist inside [start, stop) and the joint model outside."""
    start, stop = span
    parts = [(0, start, joint), (start, stop, specialist), (stop, T, joint)]
    kept = [(low, model) for low, high, model in parts if low < high]
    return ExpertBank([model for _, model in kept], T, clusters=TimestepClusters(T, [low for low, _ in kept]))


def _decisive(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that the weights depend on.

    The location of a run and what it logs do not matter. Clusters are compared by content, not by path.
    """
    free = ("device", "clusters", "k", "log_every", "checkpoint_every", "keep_checkpoints", "grid_every",
            "eval_samples", "eval_seeds", "sample_steps")  # fmt: skip
    return {name: value for name, value in asdict(config).items() if name not in free}


def _report(
    run: Path, base: TrainConfig, data: ImageData, clusters: TimestepClusters, seeds: list[int], steps: int,
    samples: int, cells: list[dict[str, Any]], out: Path,
) -> dict[str, Any]:  # fmt: skip
    """Write the arrays, the figure and summary.json."""

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
    made = f"{data.name}, {base.model}, joint model trained with {base.method}, {steps} steps, {seeds_text}"
    text = (
        f"NTG is specialist minus joint model; below zero the specialist is better. {made}. Large markers: mean and "
        "95 % Student interval over seeds. Small markers: single seeds. Equal iterations: as many steps as the joint "
        f"model, and so more samples of the interval. Equal samples: {fewer} steps."
    )
    summary["captions"] = {"transfer.png": text}
    save_transfer(losses, quality, spans, f"FD ({data.name}-CNN)", text, out / "transfer.png")
    write_json(out / "summary.json", summary)
    return summary


def _gap_summary(gap: TransferGap) -> dict[str, Any]:
    """Return one row of numbers per interval, None where unknown, and the verdicts in words."""
    names = ("mean", "low", "high", "relative_mean", "relative_low", "relative_high")
    columns = [finite_or_none(values) for values in (*gap.gap, *gap.relative)]  # each [K]
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return {"intervals": rows, "verdicts": gap.verdicts()}


def transfer_table(summary: dict[str, Any]) -> str:
    """Return the summary as text."""
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
