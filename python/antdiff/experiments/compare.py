"""Comparison of several methods on the same data over several seeds, with their spread.

Each cell (method, seed) is an ordinary run folder. Results of finished cells are read; an interrupted cell resumes
from its checkpoint.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from antdiff._files import folder_written_whole, read_json, write_atomically
from antdiff._folders import output_folder
from antdiff.data import ImageData
from antdiff.data.recorded import record
from antdiff.experiments.evaluate import execute
from antdiff.experiments.patch import start_patch
from antdiff.plotting.curves import save_comparison
from antdiff.train.checkpoint import require_same_data
from antdiff.train.config import PATCH_LR, Companion, Method, TrainConfig
from antdiff.train.run import last_state, load_run_data, require_unused, start_run

# Always included, to separate the effect of stratified sampling from that of balancing.
ANCHORS: tuple[Method, ...] = ("vanilla", "linear")
REFERENCE = {"patch": "longer"}  # the reference row of a row; vanilla for all others
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
    """Run every method with every seed in ``out/<method>-seed<seed>``. Return the results by method.

    vanilla (uniform t) and linear, the plain mean (stratified t, as drawn for the other methods), are always included.
    Each of `companions` is vanilla with that companion, at the same total number of steps (experts share them). A patch
    starts from the trained vanilla run and takes a quarter of its steps. A run called ``longer`` continues vanilla for
    as many steps without the patch, which separates the effect of the patch from that of the extra steps.

    Returns:
        The results by method, one per seed; None if a signal stopped the comparison.

    Raises:
        ValueError: no seeds or repeated seeds, experts or a patch for every run, a patch without a DiT, or a comparison
            with other settings in `out`.
    """
    if config.experts or config.patch:
        raise ValueError(
            "a comparison needs one plain network per run: leave out --experts and --patch (--companions adds rows)"
        )
    if "patch" in companions and config.model != "dit":
        raise ValueError(
            f"companion patch needs a DiT, since it adds prompts to tokens; got {config.model}. Pass --model dit"
        )
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be distinct, and at least one; got {list(seeds)}")
    data = load_run_data(config)
    with output_folder(out, "comparison", ("table.txt", "comparison.png")):
        cells = {seed: _cells(replace(config, seed=seed), methods, companions, out) for seed in seeds}
        for seed in seeds:  # check all folders before any training
            for name, cell in cells[seed].items():
                _require_fit(cell, data, out / f"{name}-seed{seed}")
        return _compare(config, cells, data, out, progress)


def _compare(
    config: TrainConfig, cells: Mapping[int, Mapping[str, TrainConfig]], data: ImageData, out: Path, progress: bool
) -> dict[str, list[dict[str, Any]]] | None:
    """Run the cells of every seed, and write the table and the figure. Return the results, or None after a signal."""
    results: dict[str, list[dict[str, Any]]] = {}
    for seed, of_seed in cells.items():  # seed by seed, so that an interrupted comparison has complete seeds
        for name, cell in of_seed.items():
            folder = out / f"{name}-seed{seed}"
            found = _finished(cell, folder)
            if found is None:
                if progress:
                    print(f"{name}, seed {seed}", flush=True)
                found = execute(cell, folder, data=data, progress=progress)
            if found is None:
                return None
            results.setdefault(name, []).append(found)
    seeds_text = f"{len(cells)} training seed{'s' if len(cells) > 1 else ''}"
    drawn = results["linear"][0]["timesteps"]
    title = f"{data.name}, {config.model}, {config.steps} steps, {seeds_text}, {drawn} timesteps (vanilla: uniform)"
    text = comparison_table(results, title)
    write_atomically(out / "table.txt", (text + "\n").encode(errors="replace"))
    save_comparison(results, results["vanilla"][0]["intervals"], title, out / "comparison.png")
    return results


def _cells(
    config: TrainConfig, methods: Sequence[Method], companions: Sequence[Companion], out: Path
) -> dict[str, TrainConfig]:
    """Return the settings of every row for the seed of `config`."""
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


def _require_fit(config: TrainConfig, data: ImageData, folder: Path) -> None:
    """Raise an error if `folder` holds something other than a run with these settings and these images."""
    if not (folder / "config.json").exists():
        require_unused(folder)
        return
    saved = TrainConfig.load(folder / "config.json")
    if replace(saved, device=config.device) != config:
        raise ValueError(f"{folder} holds a run with settings other than this comparison's. Pass another --out")
    if (state := last_state(folder)) is not None:
        require_same_data(folder, record(data), state["origin"]["data"])


def _finished(config: TrainConfig, folder: Path) -> dict[str, Any] | None:
    """Return the results in `folder`, or None if the run is not finished. A new folder gets its config.json here."""
    if not (folder / "config.json").exists():
        _start(config, folder)
        return None
    results = folder / "results.json"
    return read_json(results) if results.exists() else None


def _start(config: TrainConfig, folder: Path) -> None:
    if config.patch:
        start_patch(Path(config.patch), folder, steps=config.steps, lr=config.lr, device=config.device)
        return
    start_run(config, folder)
    if folder.name.startswith("longer"):  # its first steps are identical to those of vanilla: copy them
        vanilla = folder.with_name(f"vanilla-seed{config.seed}")
        with folder_written_whole(folder / "checkpoints") as copy:
            shutil.copytree(vanilla / "checkpoints", copy, dirs_exist_ok=True)
        write_atomically(folder / "metrics.csv", (vanilla / "metrics.csv").read_bytes())


@dataclass(frozen=True)
class Difference:
    """Difference between the means of a method and of its reference, and the half-width of the confidence interval."""

    mean: float
    noise: float

    @property
    def beyond_noise(self) -> bool:
        return abs(self.mean) > self.noise


def difference(values: Sequence[float], reference: Sequence[float], comparisons: int) -> Difference | None:
    """Return the difference of means over training seeds and its noise; None with fewer than two seeds each.

    ``noise`` is the half-width of the two-sided 95 % Student interval with pooled variance, with Bonferroni's
    correction for `comparisons` simultaneous differences: with more methods, the largest difference by chance grows.
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
    """Return the comparison as text: means and SDs over training seeds, and which differences exceed the noise."""
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
    """Return one line per row, with its differences from its reference, and the rule for reading them."""
    others = [name for name in fds if name != "vanilla"]
    comparisons = 2 * len(others)
    rows = [["difference", "FD", "noise", "", "held-out loss", "noise", ""]]
    for name in others:
        reference = REFERENCE.get(name, "vanilla")
        row = [f"{name} - {reference}"]
        for values in (fds, losses):
            found = difference(values[name], values[reference], comparisons)
            if found is None:
                return ["With one training seed the spread is unknown, so differences cannot be judged."]
            word = ("lower" if found.mean < 0 else "higher") if found.beyond_noise else "within noise"
            row += [f"{found.mean:+.3g}", f"{found.noise:.2g}", word]
        rows.append(row)
    rule = (
        f"Mean ± SD over training seeds. A difference counts if it exceeds its noise, the {CONFIDENCE:.0%} Student "
        f"interval of the pooled standard error, Bonferroni-corrected for the {comparisons} differences above."
    )
    return [*_aligned(rows), "", rule]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table. The first column is left-aligned; the others are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rights = [[f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join([f"{row[0]:<{widths[0]}}", *right[1:]]).rstrip() for row, right in zip(rows, rights, strict=True)]


def _mean_sd(values: Sequence[float] | np.ndarray) -> str:
    if len(values) == 1:
        return f"{float(values[0]):.3g}"
    return f"{float(np.mean(values)):.3g} ± {float(np.std(values, ddof=1)):.2g}"
