"""Several methods on the same data over several seeds, side by side with their spread.

Each cell (method, seed) is an ordinary run folder: finished ones are read, a started one goes on from its checkpoint.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from antdiff._files import write_atomically
from antdiff.experiments.evaluate import execute
from antdiff.plotting.curves import save_comparison
from antdiff.train.config import PATCH_LR, Companion, Method, TrainConfig
from antdiff.train.data import load_data
from antdiff.train.run import start_patch, start_run

ANCHORS: tuple[Method, ...] = ("vanilla", "linear")  # always: what stratifying does, apart from what balancing does
REFERENCE = {"patch": "longer"}  # what a row is held against; the others against vanilla
CONFIDENCE = 0.95


def compare(
    config: TrainConfig,
    methods: Sequence[Method],
    seeds: Sequence[int],
    out: Path,
    *,
    companions: Sequence[Companion] = (),
    progress: bool = True,
) -> dict[str, list[dict[str, Any]]] | None:
    """Run every method with every seed into ``out/<method>-seed<seed>``; results by method, None if a signal came.

    vanilla (uniform t) and the plain mean (stratified t, as the other methods draw it) are always among the methods.
    Each of `companions` is vanilla with that companion, at the same number of steps in all (experts share them). A
    patch starts from the trained vanilla and takes a quarter of its steps, and so does a run ``longer`` that simply
    goes on with vanilla: it tells what the patch brought from what the steps did.

    Raises:
        ValueError: no seeds or a repeated one, experts or a patch for every run, a patch without a DiT, or `out` holds
            a comparison with other settings.
    """
    if config.experts or config.patch:
        raise ValueError("a comparison needs one network a run: leave out --experts (--companions experts adds a row)")
    if "patch" in companions and config.model != "dit":
        raise ValueError(f"a patch adds prompts to tokens: companions patch needs --model dit; got {config.model}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be different numbers, at least one; got {list(seeds)}")
    data = load_data(config.data, image_size=config.image_size)
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:  # seed by seed, so that an interrupted comparison has whole rows
        for name, cell in _cells(replace(config, seed=seed), methods, companions, out).items():
            folder = out / f"{name}-seed{seed}"
            found = _finished(cell, folder)
            if found is None:
                if progress:
                    print(f"{name}, seed {seed}", flush=True)
                found = execute(cell, folder, data=data, progress=progress)
            if found is None:
                return None
            results.setdefault(name, []).append(found)
    seeds_text = f"{len(seeds)} training seed{'s' if len(seeds) > 1 else ''}"
    drawn = results["linear"][0]["timesteps"]
    title = f"{data.name}, {config.model}, {config.steps} steps, {seeds_text}, {drawn} timesteps (vanilla: uniform)"
    text = comparison_table(results, title)
    write_atomically(out / "table.txt", (text + "\n").encode())
    save_comparison(results, results["vanilla"][0]["intervals"], title, out / "comparison.png")
    return results


def _cells(
    config: TrainConfig, methods: Sequence[Method], companions: Sequence[Companion], out: Path
) -> dict[str, TrainConfig]:
    """The settings of every row for the seed of `config`."""
    cells: dict[str, TrainConfig] = {
        method: replace(config, method=method, timesteps="uniform" if method == "vanilla" else config.timesteps)
        for method in (*ANCHORS, *methods)
    }
    vanilla, more = cells["vanilla"], max(1, config.steps // 4)
    for companion in companions:
        if companion == "patch":
            cells["longer"] = replace(vanilla, steps=config.steps + more)
            cells["patch"] = replace(
                vanilla, patch=str(out / f"vanilla-seed{config.seed}"), steps=more, lr=PATCH_LR, curriculum=False
            )
        else:
            on: dict[str, Any] = {companion: 4 if companion == "experts" else True}
            cells[companion] = replace(vanilla, **on)
    return cells


def _finished(config: TrainConfig, folder: Path) -> dict[str, Any] | None:
    """The results in `folder`, or None if it is yet to be run or finished. A new folder gets its config.json here."""
    if not (folder / "config.json").exists():
        _start(config, folder)
        return None
    saved = TrainConfig.load(folder / "config.json")
    if replace(saved, device=config.device) != config:
        raise ValueError(f"{folder} holds a run with other settings than this comparison's; give another --out")
    results = folder / "results.json"
    if not results.exists():
        return None
    loaded: dict[str, Any] = json.loads(results.read_text())
    return loaded


def _start(config: TrainConfig, folder: Path) -> None:
    if config.patch:
        start_patch(Path(config.patch), folder, steps=config.steps, lr=config.lr, device=config.device)
        return
    start_run(config, folder)
    vanilla = folder.with_name(f"vanilla-seed{config.seed}")
    if folder.name.startswith("longer"):  # its first steps are vanilla's, bit for bit: take them over
        shutil.copytree(vanilla / "checkpoints", folder / "checkpoints")
        shutil.copy(vanilla / "metrics.csv", folder)


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
    spans_text = [f"t {start}..{stop - 1}" for start, stop in spans]
    rows = [["", f"FD ({data}-CNN)", "precision", "recall", "held-out loss", *spans_text]]
    fds, losses = {}, {}
    for name, cells in results.items():
        by_cluster = np.array([cell["held_out_losses"] for cell in cells])  # [seeds, K]
        fds[name] = [cell["fd"]["mean"] for cell in cells]
        losses[name] = list(by_cluster @ shares / shares.sum())
        columns = [fds[name], *([cell[metric]["mean"] for cell in cells] for metric in ("precision", "recall"))]
        rows.append([name, *map(_mean_sd, [*columns, losses[name], *by_cluster.T])])
    floor = results["vanilla"][0]["anchors"]["held-out images (floor)"]
    known = [f"{floor[metric]:.3g}" for metric in ("fd", "precision", "recall")]
    rows.append(["floor", *known, *[""] * (1 + len(spans))])
    return "\n".join([title, "", *_aligned(rows), "", *_verdicts(fds, losses)])


def _verdicts(fds: Mapping[str, Sequence[float]], losses: Mapping[str, Sequence[float]]) -> list[str]:
    """One line a row against what it is held against, and the rule."""
    others = [name for name in fds if name != "vanilla"]
    comparisons = 2 * len(others)
    rows = [["difference", "FD", "noise", "", "held-out loss", "noise", ""]]
    for name in others:
        reference = REFERENCE.get(name, "vanilla")
        row = [f"{name} - {reference}"]
        for values in (fds, losses):
            found = difference(values[name], values[reference], comparisons)
            if found is None:
                return ["One training seed: the spread is not known, so nothing is said about differences."]
            word = ("lower" if found.mean < 0 else "higher") if found.beyond_noise else "within noise"
            row += [f"{found.mean:+.3g}", f"{found.noise:.2g}", word]
        rows.append(row)
    rule = (
        f"Mean ± SD over training seeds. A difference counts when it exceeds its noise, the {CONFIDENCE:.0%} Student "
        f"interval of the pooled standard error, Bonferroni-corrected for the {comparisons} differences above."
    )
    return [*_aligned(rows), "", rule]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rights = [[f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join([f"{row[0]:<{widths[0]}}", *right[1:]]).rstrip() for row, right in zip(rows, rights, strict=True)]


def _mean_sd(values: Sequence[float] | np.ndarray) -> str:
    if len(values) == 1:
        return f"{float(values[0]):.3g}"
    return f"{float(np.mean(values)):.3g} ± {float(np.std(values, ddof=1)):.2g}"
