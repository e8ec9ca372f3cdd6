"""The sections of a run's report. Each figure has one sentence on what it shows and one on what it does not show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from html import escape
from typing import Any

import numpy as np

from antdiff._command import command
from antdiff.experiments.report import svg
from antdiff.experiments.report.folder import CLOSING, Run, caption_of
from antdiff.experiments.report.page import figure, grid, image, table
from antdiff.experiments.report.svg import Line, number
from antdiff.plotting.curves import smooth
from antdiff.train.config import TrainConfig

GRIDS = 12  # maximum number of grids of samples over time
TIME_BINS, MOST_PAIRS = 48, 21  # maximum columns and rows of the figure of cosines over time
MOST_ROWS = 1000  # maximum points of a curve; longer runs are averaged over neighbouring rows
KINDS = ("fd", "precision", "recall")


def headline(run: Run) -> str:
    """Return the most important numbers, each beside its reference."""
    shown: list[tuple[str, str, str, str]] = []
    if run.results is not None:
        anchors = run.results["anchors"]
        floor, noise = anchors["held-out images (floor)"], anchors["noise"]
        for kind, name in zip(KINDS, (f"FD ({run.results['data']}-CNN)", "precision", "recall"), strict=True):
            better = "lower is better" if kind == "fd" else "higher is better"
            aside = f"held-out images {number(floor[kind])}, noise {number(noise[kind])}; {better}"
            mean, _, spread = _spread(run.results[kind]).partition(" ")
            shown.append((name, mean, spread, aside))
        shares = [stop - start for start, stop in run.results["intervals"]]
        held_out = float(np.average(run.results["held_out_losses"], weights=shares))
        shown.append(("held-out loss", number(held_out), "", "squared error of the noise estimate, mean over t"))
    elif np.isfinite(run.closing("loss")):
        aside = "squared error of the noise estimate, at the end"
        shown.append(("training loss", number(run.closing("loss")), "", aside))
    if np.isfinite(conflict := run.closing("conflict_rate")):
        shown.append(("pairs in conflict", f"{conflict:.0%}", "", "of all cluster pairs, at the end of training"))
    items = (
        f"<div><dt>{escape(name)}</dt><dd class='big'>{value} <span class='spread'>{spread}</span></dd>"
        f"<dd class='aside'>{escape(aside)}</dd></div>"
        for name, value, spread, aside in shown
    )
    return f"<dl class='numbers'>{''.join(items)}</dl>" if shown else "<p>Nothing has been measured yet.</p>"


def _spread(found: Mapping[str, float]) -> str:
    return svg.with_spread(found["mean"], found["sd"])


def quality(run: Run) -> list[str]:
    """Return the section on sample quality, beside the floor of the data and two baselines."""
    results = run.results
    if results is None:
        state = "diverged" if run.diverged else "is not finished"
        remedy = f"<code>{escape(command('train', '--resume', run.folder))}</code> resumes it."
        if run.diverged:
            remedy = "A new run with a smaller --lr may help."
        return [f"<p>Not measured: the run {state}. {remedy}</p>"]
    name, seeds = f"FD ({results['data']}-CNN)", run.config.eval_seeds
    rows: list[tuple[str, float, float, int | None]] = [("this run", results["fd"]["mean"], results["fd"]["sd"], None)]
    rows += [(anchor.replace(" (floor)", ""), found["fd"], 0.0, None) for anchor, found in results["anchors"].items()]
    sampled = f"{seeds} sampling seed{'s' if seeds > 1 else ''} of {results['eval_samples']:,} images"
    losses = zip(run.labels, results["held_out_losses"], strict=True)
    figures = [
        figure(
            "Distance to the data",
            svg.dot_plot(rows, title="Distance to the data", x_label=f"{name}, log scale"),
            f"Fréchet distance (mean ± SD) of {sampled} to the train images, in the features of a small CNN. The "
            "held-out images of the same data are the floor.",
            "FID, or any number comparable with published ones. Differences within ± are sampling noise, and another "
            "training seed changes the distance by more.",
        ),
        figure(
            "Held-out loss of each cluster",
            svg.dot_plot(
                [(label, loss, 0.0, i) for i, (label, loss) in enumerate(losses)],
                title="Held-out loss of each cluster",
                x_label="mean squared error, log scale",
            ),
            "Error of the averaged network's noise estimate on held-out images, at fixed timesteps and noise. This is "
            "the least noisy number for comparing runs.",
            "which run has the better images, or which cluster is learnt best, since each has a floor of its own.",
        ),
    ]
    if (run.folder / "samples.png").exists():
        picture = image(run.folder / "samples.png", "Grid of images drawn from the finished run")
        means = "Images from the averaged network, not selected, from the first sampling seed."
        figures.append(
            figure("Samples", picture, means, "how often a kind of image occurs, or whether one was memorised.")
        )
    measures = [(f"this run, {sampled}", *(_spread(results[kind]) for kind in KINDS))]
    measures += [(anchor, *(number(found[kind]) for kind in KINDS)) for anchor, found in results["anchors"].items()]
    late = results["step"] != run.step
    note = [f"<p>Measured at step {results['step']:,}; the run has continued since.</p>"] if late else []
    return [*note, grid(figures), table("Beside the reference values of the data", ("", name, *KINDS[1:]), measures)]


def samples(run: Run) -> list[str]:
    """Return the section of sample grids: at most twelve, including the first and the last."""
    found = sorted((run.folder / "samples").glob("step-*.png"))
    if not found:
        return ["<p>No grids were drawn. <code>--grid-every</code> sets how often they are drawn.</p>"]
    pictures = []
    for place in np.linspace(0, len(found) - 1, min(GRIDS, len(found))).round().astype(int):
        step = int(found[place].stem.removeprefix("step-"))
        pictures.append(figure(f"step {step:,}", image(found[place], f"Grid of samples after {step:,} steps")))
    note = (
        "Every grid starts from the same noise, so that each image can be followed. The grids use the averaged "
        "weights, which lag behind early in a run. They do not show variety, since sixteen images are too few."
    )
    return [f"<p>{note}</p>", grid(pictures)]


def clusters(run: Run) -> list[str]:
    """Return the section on the clusters: the intervals, and the numbers of each cluster at the end."""
    held_out = run.results["held_out_losses"] if run.results is not None else [float("nan")] * len(run.intervals)
    columns = {"loss": "loss", "loss / first loss": "loss_ratio", "gradient norm": "grad_norm", "weight": "weight"}
    rows = []
    for i, (start, stop) in enumerate(run.intervals):
        values = [number(run.closing(f"{column}_{i}")) for column in columns.values()]
        rows.append((run.labels[i], str(stop - start), *values, number(held_out[i])))
    bar = svg.interval_bar(run.intervals, title="The intervals of the clusters")
    key = "The interval of timesteps of each cluster, and its colour and dashes in all curves below."
    heads = ("timesteps", "size", *columns, "held-out loss")
    title = f"Each cluster at the end: mean over the last {CLOSING:.0%} of the rows"
    return [grid([figure("Key", bar, key, kind="key"), table(title, heads, rows)])]


def losses_and_weights(run: Run) -> list[str]:
    """Return the section on the losses and the weights of the clusters."""
    if run.no_curves:
        return [run.no_curves]
    plain = {"vanilla": "they are the clusters' shares of the batches", "linear": "they are all 1/K"}
    constant = plain.get(run.config.method)
    fixed = f" This method does not choose them: {constant}." if constant else ""
    figures = [
        figure(
            "Training loss",
            svg.line_chart(
                [*_per_cluster(run, "loss"), _line(run, "mean", "loss")],
                title="Training loss of each cluster",
                y_label="mean squared error, log scale",
                log=True,
            ),
            "Error of the noise estimate on the batches, per cluster and (plain, solid) averaged over uniformly drawn "
            "t. Thin lines are the logged values, thick lines a moving mean over 5 % of the run.",
            "image quality, or which cluster is learnt best: little noise is harder to estimate than much.",
        ),
        figure(
            "Learning speed",
            svg.line_chart(
                _per_cluster(run, "loss_ratio"),
                title="Loss of each cluster relative to its first",
                y_label="loss / loss of the first row, log scale",
                log=True,
            ),
            "Loss of each cluster relative to its first loss (GradNorm's loss ratio). The cluster with the lowest "
            "curve has learnt fastest.",
            "how much is left to learn: each cluster has a floor of its own above zero.",
        ),
        figure(
            "Weights",
            svg.line_chart(_per_cluster(run, "weight"), title="Weight of each cluster", y_label="weight"),
            "Factor of each cluster's gradient (or loss) in the update." + fixed,
            "the contribution of a cluster to the update, which also depends on the length of its gradient.",
        ),
    ]
    if np.isfinite(run.column("stage")).any():
        chart = svg.line_chart([_line(run, "stage", "stage")], title="Stage of the curriculum", y_label="stage")
        means = "Each stage adds one more cluster, with less noise."
        figures.append(
            figure("Curriculum", chart, means, "that a stage was learnt: a stage ends when the loss stalls.")
        )
    return [grid(figures)]


def gradients(run: Run) -> list[str]:
    """Return the section on gradients: lengths, conflicts and cosines, if the method takes cluster gradients."""
    if run.no_curves:
        return [run.no_curves]
    if not any(np.isfinite(run.column(f"grad_norm_{i}")).any() for i in range(len(run.intervals))):
        remedy = "so their lengths, cosines and conflicts are unknown. <code>antdiff analyze</code> measures them."
        return [f"<p>The method of this run, {escape(run.method)}, takes no cluster gradients, {remedy}</p>"]
    figures = [
        figure(
            "Gradient norm",
            svg.line_chart(
                _per_cluster(run, "grad_norm"),
                title="Length of each cluster's gradient",
                y_label="length, log scale",
                log=True,
            ),
            "Length of each cluster's gradient as seen by the balancing method, including importance weights. Long "
            "gradients dominate a plain sum.",
            "the length of the true gradient: it includes mini-batch noise, more so for clusters with few samples.",
        ),
        figure(
            "Length of the update",
            svg.line_chart(
                [_line(run, "update", "update_norm")],
                title="Length of the combined direction",
                y_label="length, log scale",
                log=True,
            ),
            "Length of the combined direction before the optimizer.",
            "how far the weights move, since Adam rescales every coordinate.",
        ),
        figure(
            "Pairs in conflict",
            svg.line_chart(
                [_line(run, "share", "conflict_rate")],
                title="Share of pairs in conflict",
                y_label="share with a negative inner product",
                y_range=(0, 1),
            ),
            "Share of all pairs of clusters whose gradients have a negative inner product in a step.",
            "whether a conflict does harm: gradients that are pure noise conflict half of the time.",
        ),
    ]
    return [grid([*figures, *_cosines(run)])]


def _cosines(run: Run) -> list[str]:
    k, steps = len(run.intervals), run.column("step")
    pairs = sorted(((i, j) for i in range(k) for j in range(i + 1, k)), key=lambda pair: (pair[1] - pair[0], pair))
    columns = [run.column(f"cosine_{i}_{j}") for i, j in pairs]  # each [rows]
    over_time = np.array([svg.thinned(steps, column, TIME_BINS)[1] for column in columns])  # [pairs, bins]
    names, how = [f"{i} and {j}" for i, j in pairs], "for each pair over the steps, with neighbours on top"
    if not np.isfinite(over_time).any():
        return []
    mean = np.full((k, k), np.nan)  # [K, K]
    for (i, j), column in zip(pairs, columns, strict=True):
        mean[i, j] = mean[j, i] = _mean(column)
    if len(pairs) > MOST_PAIRS:
        gaps = np.array([j - i for i, j in pairs])
        over_time = np.array([_mean(over_time[gaps == gap]) for gap in range(1, k)])  # [K - 1, bins]
        names, how = [f"{gap} apart" for gap in range(1, k)], "over the steps, averaged over pairs equally far apart"
    shown = np.concatenate([mean.ravel(), over_time.ravel()])
    low, high = np.nanmin(shown), np.nanmax(shown)
    limits = (min(0.0, float(np.floor(low * 5)) / 5), max(0.2, float(np.ceil(high * 5)) / 5))
    return [
        figure(
            "Cosines of the gradients",
            svg.heat_map(
                mean,
                run.labels,
                run.labels,
                title="Mean cosine between the gradients of each pair of clusters",
                limits=limits,
                numbers=k <= 6,
                row_height=min(32.0, 240 / k),
            ),
            "Cosine between the gradients of two clusters in a step, mean over the run. The diagonal, which is 1, is "
            "left out. Neighbours usually agree most.",
            "the cosine of the true gradients: noise pulls it towards 0. antdiff analyze affinity corrects for this.",
        ),
        figure(
            "Cosines over time",
            svg.heat_map(
                over_time,
                names,
                [],
                title="Cosines between clusters over the run",
                limits=limits,
                numbers=False,
                row_height=max(2.0, min(15.0, 240 / len(names))),
                x_axis=("step", float(steps[0]), float(steps[-1])),
            ),
            f"The same {how}. Clusters are counted from the least noise. Negative cosines are hatched.",
            "a trend where only single columns differ: each is a mean over a few steps.",
        ),
    ]


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the first dimension, ignoring NaN."""
    known = np.isfinite(values)
    mean: np.ndarray = np.where(known, values, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)
    return mean


def analysis(run: Run) -> list[str]:
    """Return the section of figures made by `antdiff analyze`, with their captions."""
    figures, folder = [], run.folder / "analysis"
    for path in sorted(folder.rglob("*.png")):
        *above, name = path.relative_to(folder).with_suffix("").parts
        title = ": ".join([*above, name] if above[-1:] != [name] else above).replace("_", " ").replace("-", " ")
        caption = caption_of(path)
        figures.append(
            figure(title, image(path, caption or f"Figure of antdiff analyze: {title}"), caption, kind="wide")
        )
    if not figures:
        note = "measures task affinity, transfer and conflict on the checkpoints of a run. Its figures appear here."
        return [f"<p>No analysis yet. <code>antdiff analyze</code> {note}</p>"]
    return [grid(figures)]


def configuration(config: TrainConfig) -> list[str]:
    """Return the section of all settings, with the default where it differs."""
    defaults, rows = TrainConfig(), []
    for field in fields(TrainConfig):
        value, usual = getattr(config, field.name), getattr(defaults, field.name)
        rows.append((field.name, _setting(value), "" if value == usual else _setting(usual)))
    half = (len(rows) + 1) // 2
    heads = ("setting", "value", "default, if different")
    tables = [table("", heads, part, text=True) for part in (rows[:half], rows[half:])]
    return [f"<div class='columns'>{''.join(tables)}</div>"]


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value == "" else str(value)


def environment(facts: Mapping[str, str]) -> list[str]:
    """Return the section with the output of `antdiff info`, except for the path of the extension file."""
    rows = [(name, text) for name, text in facts.items() if name != "extension file"]
    return [table("", ("item", "antdiff info at the last start of the training"), rows, text=True)]


# ---- curves ------------------------------------------------------------------------------------------------------


def _per_cluster(run: Run, column: str) -> list[Line]:
    return [_line(run, label, f"{column}_{i}", i) for i, label in enumerate(run.labels)]


def _line(run: Run, label: str, column: str, cluster: int | None = None) -> Line:
    steps, raw = svg.thinned(run.column("step"), run.column(column), MOST_ROWS)
    return Line(label, steps, smooth(raw), cluster, raw)
