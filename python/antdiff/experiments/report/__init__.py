"""The report of a run or of a comparison, as one HTML file that needs only a browser.

It shows whatever the run folder holds, so that it also works for a run that has just begun, one that diverged, and a
method without cluster gradients.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

from antdiff._files import write_atomically
from antdiff.experiments.report import sections
from antdiff.experiments.report.folder import Run
from antdiff.experiments.report.page import document, figure, grid, image, section, table, wide
from antdiff.experiments.report.svg import number


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run folder or of a comparison folder. Return the path of the file.

    Args:
        out: file to write; None means ``<folder>/report.html``.

    Raises:
        ValueError: the folder holds neither a run nor a comparison, or `out` is a folder.
    """
    if (folder / "config.json").exists():
        page = run_page(Run.load(folder))
    elif cells := sorted(path.parent for path in folder.glob("*/config.json")):
        page = comparison_page(folder, cells)
    else:
        raise ValueError(
            f"{folder} must be the folder of a run (antdiff train) or of a comparison (antdiff compare); it has no "
            "config.json, and neither has a folder inside it"
        )
    out = out or folder / "report.html"
    if out.is_dir():
        raise ValueError(
            f"out must be the path of a file; {out} is a folder. Pass --out {shlex.quote(str(out / 'report.html'))}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page.encode(errors="xmlcharrefreplace"))
    return out


def run_page(run: Run) -> str:
    """Return the HTML document of a run."""
    config = run.config
    lead = f"{config.data_name}, {run.method}, {config.timestep_sampling} timesteps, seed {config.seed}"
    status, bad = run.status
    head = (
        f"<h1>{escape(run.folder.resolve().name)}</h1><p class='lead'>{escape(lead)}</p>"
        f"<p class='status{' bad' if bad else ''}'>{escape(status)}</p>{sections.headline(run)}"
    )
    parts = [
        section("quality", "Quality", sections.quality(run)),
        section("samples", "Samples over time", sections.samples(run)),
        section("clusters", "Clusters", sections.clusters(run)),
        section("losses", "Losses and weights", sections.losses_and_weights(run)),
        section("gradients", "Gradients", sections.gradients(run)),
        section("analysis", "Analysis", sections.analysis(run)),
        section("configuration", "Configuration", sections.configuration(config)),
        section("environment", "Environment", sections.environment(run.environment)),
    ]
    source = (
        "The numbers are in metrics.csv and results.json of the run folder. This file contains everything it shows."
    )
    return document(f"{run.folder.resolve().name}: antdiff report", head, parts, len(run.intervals), source)


def comparison_page(folder: Path, cells: Sequence[Path]) -> str:
    """Return the HTML document of a comparison: its table, its figures, and one row per run."""
    runs = [Run.load(cell) for cell in cells]
    rows = []
    for run in runs:
        fd = number(run.results["fd"]["mean"]) if run.results is not None else "-"
        config, (status, _) = run.config, run.status
        method = run.method, config.timestep_sampling, str(config.seed)
        rows.append((run.folder.name, *method, status, fd))
    done = sum(run.results is not None for run in runs)
    name = folder.resolve().name
    head = f"<h1>{escape(name)}</h1><p class='lead'>A comparison of {len(runs)} runs, {done} of them measured</p>"
    parts = []
    if (folder / "table.txt").exists():
        text = (folder / "table.txt").read_text(encoding="utf-8")
        parts.append(wide("", f"<pre>{escape(text)}</pre>", "Comparison"))
    else:
        parts.append(
            "<p>Not all runs are done. Repeat the same <code>antdiff compare</code> command to resume them.</p>"
        )
    means = "The table as a figure, with every training seed and the spread."
    means_not = "a winner where the spreads overlap, or the result on other data or with longer training."
    for path in sorted(folder.glob("*.png")):
        title = path.stem.replace("_", " ")
        picture = image(path, f"{title}: the methods of the table with their spread over training seeds")
        parts.append(grid([figure(title, picture, means, means_not, kind="wide")]))
    heads = ("run", "method", "timesteps", "seed", "state", "FD")
    shown = [
        section("comparison", "Comparison", parts),
        section("runs", "Runs", [table("", heads, rows, text=True)]),
        section("configuration", "Configuration of the first run", sections.configuration(runs[0].config)),
        section("environment", "Environment", sections.environment(runs[0].environment)),
    ]
    source = "Run antdiff report on the folder of a single run to see its curves and gradients."
    return document(f"{name}: antdiff comparison", head, shown, 1, source)
