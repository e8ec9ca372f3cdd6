"""Several methods on the same data over several seeds, side by side with their spread.

Each cell (method, seed) is an ordinary run folder: finished ones are read, a started one goes on from its checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from antdiff.train.checkpoint import write_atomically
from antdiff.train.config import Method, TrainConfig
from antdiff.train.data import load_data
from antdiff.train.plots import LABELS, save_comparison
from antdiff.train.run import execute, start_run

ANCHORS: tuple[Method, ...] = (
    "vanilla",
    "sum",
)  # never left out: what stratifying does, apart from what balancing does
CONFIDENCE = 0.95


def compare(
    config: TrainConfig, methods: Sequence[Method], seeds: Sequence[int], out: Path, *, progress: bool = True
) -> dict[str, list[dict[str, Any]]] | None:
    """Run every method with every seed into ``out/<method>-seed<seed>``; results by method, None if a signal came.

    vanilla (uniform t) and the plain sum (stratified t, as the other methods draw it) are always among the methods.

    Raises:
        ValueError: no seeds or a repeated one, or `out` holds a comparison with other settings.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be different numbers, at least one; got {list(seeds)}")
    ordered = [*ANCHORS, *(method for method in dict.fromkeys(methods) if method not in ANCHORS)]
    data = load_data(config.data, image_size=config.image_size)
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in ordered}
    for seed in seeds:  # seed by seed, so that an interrupted comparison has whole rows
        for method in ordered:
            cell = replace(
                config, method=method, seed=seed, timesteps="uniform" if method == "vanilla" else config.timesteps
            )
            folder = out / f"{method}-seed{seed}"
            found = _finished(cell, folder)
            if found is None:
                if progress:
                    print(f"{LABELS[method]}, seed {seed}", flush=True)
                found = execute(cell, folder, data=data, progress=progress)
            if found is None:
                return None
            results[method].append(found)
    seeds_text = f"{len(seeds)} training seed{'s' if len(seeds) > 1 else ''}"
    drawn = results["sum"][0]["timesteps"]
    title = f"{data.name}, {config.steps} steps, {seeds_text}, {drawn} timesteps (vanilla: uniform)"
    text = comparison_table(results, title)
    write_atomically(out / "table.txt", (text + "\n").encode())
    save_comparison(results, results["vanilla"][0]["intervals"], title, out / "comparison.png")
    return results


def _finished(config: TrainConfig, folder: Path) -> dict[str, Any] | None:
    """The results in `folder`, or None if it is yet to be run or finished. A new folder gets its config.json here."""
    if not (folder / "config.json").exists():
        start_run(config, folder)
        return None
    saved = TrainConfig.load(folder / "config.json")
    if replace(saved, device=config.device) != config:
        raise ValueError(f"{folder} holds a run with other settings than this comparison's; give another --out")
    results = folder / "results.json"
    if not results.exists():
        return None
    loaded: dict[str, Any] = json.loads(results.read_text())
    return loaded


@dataclass(frozen=True)
class Difference:
    """A method's mean minus the reference's, and the half-width of the interval chance alone would fill."""

    mean: float
    noise: float

    @property
    def beyond_noise(self) -> bool:
        return abs(self.mean) > self.noise


def difference(values: Sequence[float], reference: Sequence[float], comparisons: int) -> Difference | None:
    """Difference of means over training seeds against its pooled standard error; None with fewer than two seeds each.

    ``noise`` is the half-width of the two-sided 95 % Student interval with pooled variance, with Bonferroni's
    correction for `comparisons` made at once: the more methods are tried, the larger the luckiest difference.
    """
    from scipy.stats import t as student

    n, m = len(values), len(reference)
    if n < 2 or m < 2:
        return None
    pooled = ((n - 1) * np.var(values, ddof=1) + (m - 1) * np.var(reference, ddof=1)) / (n + m - 2)
    error = math.sqrt(pooled * (1 / n + 1 / m))
    quantile = float(student.ppf(1 - (1 - CONFIDENCE) / (2 * comparisons), n + m - 2))
    return Difference(float(np.mean(values) - np.mean(reference)), quantile * error)


def comparison_table(results: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> str:
    """The comparison as text: means and standard deviations over training seeds, and what may be said about them."""
    data, spans = results["vanilla"][0]["data"], results["vanilla"][0]["intervals"]
    shares = np.array([stop - start for start, stop in spans])
    heads = [
        f"FD ({data}-CNN)",
        "precision",
        "recall",
        "held-out loss",
        *(f"t {start}..{stop - 1}" for start, stop in spans),
    ]
    lines = [title, "", f"{'':<9}" + "".join(f"{head:>18}" for head in heads)]
    fds, losses = {}, {}
    for method, cells in results.items():
        by_cluster = np.array([cell["held_out_losses"] for cell in cells])  # [seeds, K]
        fds[method] = [cell["fd"]["mean"] for cell in cells]
        losses[method] = list(by_cluster @ shares / shares.sum())
        columns = [fds[method], *([cell[name]["mean"] for cell in cells] for name in ("precision", "recall"))]
        columns += [losses[method], *by_cluster.T]
        lines.append(f"{LABELS[method]:<9}" + "".join(f"{_mean_sd(column):>18}" for column in columns))
    floor = results["vanilla"][0]["anchors"]["held-out images (floor)"]
    floors = [f"{floor[name]:.3g}" for name in ("fd", "precision", "recall")]
    lines += [f"{'floor':<9}" + "".join(f"{text:>18}" for text in floors), "", *_verdicts(fds, losses)]
    return "\n".join(lines)


def _verdicts(fds: Mapping[str, Sequence[float]], losses: Mapping[str, Sequence[float]]) -> list[str]:
    """One line a method and metric against vanilla, and the rule."""
    others = [method for method in fds if method != "vanilla"]
    comparisons = 2 * len(others)
    lines = []
    for name, values in (("FD", fds), ("held-out loss", losses)):
        for method in others:
            found = difference(values[method], values["vanilla"], comparisons)
            if found is None:
                return ["One training seed: the spread is not known, so nothing is said about differences."]
            word = ("lower" if found.mean < 0 else "higher") if found.beyond_noise else "no difference beyond noise"
            lines.append(f"{name}: {LABELS[method]} - vanilla = {found.mean:+.3g} (noise {found.noise:.2g}): {word}")
    rule = (
        f"Mean ± SD over training seeds. A difference counts when it exceeds the {CONFIDENCE:.0%} Student interval "
        f"of its pooled standard error, Bonferroni-corrected for the {comparisons} differences above."
    )
    return [*lines, rule]


def _mean_sd(values: Sequence[float] | np.ndarray) -> str:
    if len(values) == 1:
        return f"{float(values[0]):.3g}"
    return f"{float(np.mean(values)):.3g} ± {float(np.std(values, ddof=1)):.2g}"
