"""Tests of the report of a run: complete, self-contained and readable, whatever the state of the run."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from antdiff import TimestepClusters
from antdiff.analysis import Telemetry
from antdiff.cli import main
from antdiff.experiments.report import page, svg, write_report
from antdiff.plotting.images import save_grid
from antdiff.plotting.palette import cluster_colours, sequential
from antdiff.train.config import TrainConfig
from antdiff.train.log import CsvLogger

SECTIONS = ["quality", "samples", "clusters", "losses", "gradients", "analysis", "configuration", "environment"]
VOID = {"meta", "img", "br", "hr", "link", "input"}
LEAVES = {"path", "rect", "line", "circle"}  # self-closing elements of SVG
STYLE = (Path(page.__file__).parent / "style.css").read_text()


class Page(HTMLParser):
    """Parses a report, and fails on tags that do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert not self.open
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in LEAVES, f"<{tag}/> is not closed in HTML"
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data + " "

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.tags if "id" in attrs]


def check(page: Page) -> None:
    """Check what holds for every report: it refers to nothing outside, and screen readers can read all of it."""
    assert page.source.startswith("<!doctype html>")
    assert page.all("html") == [{"lang": "en"}]
    assert not re.search(r"https?:|url\((?!#)|@import|<script|<link", page.source)
    for _, attrs in page.tags:
        for name in ("src", "href"):
            assert attrs.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert len(page.ids) == len(set(page.ids))
    assert all(link["href"].removeprefix("#") in page.ids for link in page.all("a"))
    used = set(re.findall(r"url\(#([\w-]+)\)", page.source))
    assert used <= set(page.ids)
    for picture in page.all("img"):
        assert picture["alt"]
        assert int(picture["width"]) * int(picture["height"]) > 0
    for chart in page.all("svg"):
        assert chart.get("aria-hidden") == "true" or (chart["role"] == "img" and len(chart["aria-label"]) > 15)
    assert all("scope" in head for head in page.all("th"))
    assert "nan" not in re.sub(r"data:image/png;base64,[^']*", "", page.source).lower().replace("finance", "")


# ---- runs of every kind ------------------------------------------------------------------------------------------

CONFIG = TrainConfig(steps=60, log_every=2, eval_samples=12, eval_seeds=2)
RESULTS: dict[str, Any] = {
    "data": "digits", "method": "pcgrad", "companions": [], "timesteps": "stratified-weighted", "seed": 0, "step": 60,
    "eval_samples": 12, "feature_accuracy": 0.99,
    "fd": {"mean": 2.283, "sd": 0.491}, "precision": {"mean": 0.7071, "sd": 0.0064},
    "recall": {"mean": 0.9876, "sd": 0.0007},
    "anchors": {
        "held-out images (floor)": {"fd": 0.6061, "precision": 0.904, "recall": 0.984},
        "per-pixel Gaussian": {"fd": 42.8, "precision": 0.123, "recall": 0.837},
        "noise": {"fd": 74.1, "precision": 0.0393, "recall": 0.336},
    },
    "held_out_losses": [0.4, 0.2, 0.1, 0.04, 0.004],
}  # fmt: skip


def make_run(
    folder: Path, config: TrainConfig = CONFIG, *, steps: int = 60, gram: bool = True, measured: bool = True
) -> Path:
    """Make a run folder like that of a training, with made-up numbers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13", "extension file": "/home/somebody/_C.so"}))
    clusters = TimestepClusters.uniform(1000, config.k)
    clusters.save(folder / "clusters.json")
    log = CsvLogger(folder / "metrics.csv", start=0)
    generator = torch.Generator().manual_seed(0)
    telemetry = Telemetry(config.k, window=config.log_every, share=clusters.sizes / 1000)
    for step in range(1, steps + 1):
        J = torch.randn(config.k, 30, generator=generator, dtype=torch.float64) + 0.2
        losses = (1 + torch.rand(config.k, generator=generator)) / step
        telemetry.add(losses, torch.full((config.k,), 3), torch.ones(config.k) / config.k, J @ J.T if gram else None)
        if step % config.log_every == 0:
            log.log(step, telemetry.read())
    for step in range(20, steps + 1, 20):
        (folder / "samples").mkdir(exist_ok=True)
        save_grid(torch.full((16, 1, 8, 8), step, dtype=torch.uint8), folder / "samples" / f"step-{step:08d}.png")
    if measured:
        bounds = [[int(start), int(start + size)] for start, size in zip(clusters.starts, clusters.sizes, strict=True)]
        (folder / "results.json").write_text(json.dumps({**RESULTS, "intervals": bounds}))
        save_grid(torch.zeros(60, 1, 8, 8, dtype=torch.uint8), folder / "samples.png")
    return folder


def test_a_finished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "my run")
    report = Page(write_report(run))
    check(report)
    assert [name for name in report.ids if name in SECTIONS] == SECTIONS
    for text in (
        "my run", "digits, pcgrad, stratified-weighted timesteps, seed 0", "finished: 60 of 60 steps",
        "FD (digits-CNN)", "2.28 ± 0.49", "0.707 ± 0.006", "held-out images 0.606, noise 74.1",
        "per-pixel Gaussian 42.8 0.123 0.837", "2 sampling seeds of 12 images", "torch 2.13",
    ):  # fmt: skip
        assert text in report.text, text
    assert "somebody" not in report.text
    for field in fields(TrainConfig):
        assert f"{field.name} " in report.text
    assert "steps 60 1600" in report.text  # the default is shown beside a different value
    embedded = {base64.b64decode(picture["src"].partition(",")[2]) for picture in report.all("img")}
    assert embedded == {path.read_bytes() for path in (run / "samples.png", *(run / "samples").iterdir())}
    assert report.source.count("Does not show") >= 11  # every curve and heat map
    assert len([chart for chart in report.all("svg") if "role" in chart]) == 11


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        ({"steps": 0, "measured": False}, "unfinished: 0 of 60 steps", "No metrics have been written yet"),
        ({"steps": 1, "measured": False}, "unfinished: 0 of 60 steps", "No grids were drawn"),
        ({"steps": 2, "measured": False}, "unfinished: 2 of 60 steps", "antdiff train --resume"),
        ({"steps": 40, "measured": False}, "unfinished: 40 of 60 steps", "Pairs in conflict"),
        ({"measured": False}, "trained, not measured: 60 of 60 steps", "Pairs in conflict"),
        ({"steps": 80}, "finished: 80 of 60 steps", "Measured at step 60; the run has continued since"),
        (
            {"config": replace(CONFIG, method="vanilla"), "gram": False},
            "finished",
            "The method of this run, vanilla, takes no cluster gradients",
        ),
        ({"config": replace(CONFIG, experts=4), "gram": False}, "finished", "vanilla + experts"),
        ({"config": replace(CONFIG, eval_seeds=1)}, "finished", "1 sampling seed of 12 images"),
        ({"config": replace(CONFIG, k=1), "measured": False}, "trained", "0..999"),
        ({"config": replace(CONFIG, k=2), "measured": False}, "trained", "0 and 1"),
        ({"config": replace(CONFIG, k=20), "measured": False}, "trained", "19 apart"),
        ({"config": replace(CONFIG, patch="runs/<base> & co")}, "finished", "runs/<base> & co"),
    ],
)
def test_a_run_of_any_kind_in_any_state(tmp_path: Path, options: dict[str, Any], status: str, text: str) -> None:
    report = Page(write_report(make_run(tmp_path / "run", **options)))
    check(report)
    assert [name for name in report.ids if name in SECTIONS] == SECTIONS
    assert status in report.text
    assert text in report.text


@pytest.mark.parametrize("after", [0, 40])
def test_a_diverged_run_says_where(tmp_path: Path, after: int) -> None:
    run = make_run(tmp_path / "run", steps=after, measured=False)
    telemetry = Telemetry(5, window=1)
    nan = torch.full((5,), torch.nan)
    telemetry.add(nan, torch.ones(5), nan, nan.expand(5, 5))
    CsvLogger(run / "metrics.csv", start=after).log(after + 2, telemetry.read())
    report = Page(write_report(run))
    check(report)
    assert f"diverged: the loss was not finite at step {after + 2}" in report.text
    assert "A new run with a smaller --lr may help" in report.text
    assert ("Pairs in conflict" in report.text) == (after > 0)


def test_rows_of_an_earlier_version_and_a_curriculum(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", measured=False)
    rows = "".join(f"{step},0.5,{0.1 * step},{step // 10}\n" for step in range(1, 61))
    (run / "metrics.csv").write_text("step,loss,loss_0,stage\n" + rows)
    report = Page(write_report(run))
    check(report)
    assert "Curriculum" in report.text


def test_of_many_grids_a_dozen_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2, measured=False)
    (run / "samples").mkdir()
    for step in range(1, 41):
        save_grid(torch.zeros(16, 1, 8, 8, dtype=torch.uint8), run / "samples" / f"step-{step:08d}.png")
    report = Page(write_report(run))
    assert len(report.all("img")) == 12
    assert "step 1 " in report.text
    assert "step 40 " in report.text


def test_pictures_of_the_analysis_come_with_their_captions(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    folder = run / "analysis"
    folder.mkdir()
    pictures = {"affinity": ("affinity", "gaps"), "conflict": ("conflict",), "transfer": ("transfer",)}
    for kind, names in pictures.items():
        (folder / kind).mkdir()
        for name in names:
            save_grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), folder / kind / f"{name}.png")
    (folder / "affinity" / "summary.json").write_text(
        json.dumps({"captions": {"affinity.png": "Cosines <of> all pairs.", "gaps.png": "By distance."}})
    )
    (folder / "transfer" / "summary.json").write_text("{")
    report = Page(write_report(run))
    check(report)
    alts = [picture["alt"] for picture in report.all("img")]
    uncaptioned = [f"Figure of antdiff analyze: {name}" for name in ("conflict", "transfer")]
    assert alts[-4:] == ["Cosines <of> all pairs.", "By distance.", *uncaptioned]
    assert "gaps By distance." in report.text


def test_a_comparison(tmp_path: Path) -> None:
    for method in ("vanilla", "pcgrad"):
        make_run(tmp_path / "c" / f"{method}-seed0", replace(CONFIG, method=method))
    make_run(tmp_path / "c" / "uw-seed0", replace(CONFIG, method="uw"), steps=20, measured=False)
    report = Page(write_report(tmp_path / "c"))
    check(report)
    assert "A comparison of 3 runs, 2 of them measured" in report.text
    assert "Not all runs are done" in report.text
    assert "uw-seed0 uw stratified-weighted 0 unfinished: 20 of 60 steps -" in report.text
    (tmp_path / "c" / "table.txt").write_text("vanilla < pcgrad")
    save_grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), tmp_path / "c" / "comparison.png")
    report = Page(write_report(tmp_path / "c", tmp_path / "elsewhere" / "c.html"))
    check(report)
    assert "vanilla < pcgrad" in report.text
    assert len(report.all("img")) == 1


def test_folders_that_hold_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "must be the folder of a run (antdiff train) or of a comparison" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    run = make_run(tmp_path / "run")
    (run / "results.json").write_text("{")
    assert main(["report", str(run)]) == 1
    assert "results.json cannot be read" in capsys.readouterr().err
    (run / "clusters.json").unlink()
    assert main(["report", str(run)]) == 1
    assert "it has no clusters.json" in capsys.readouterr().err


# ---- charts ------------------------------------------------------------------------------------------------------


def points(d: str) -> np.ndarray:
    return np.array([[float(part) for part in point.split()] for point in re.split("[ML]", d)[1:]])


@pytest.mark.parametrize("log", [False, True])
def test_a_curve_goes_through_its_points(log: bool) -> None:
    x, y = np.array([0.0, 50.0, 100.0]), np.array([1.0, 10.0, 100.0])
    chart = svg.line_chart([svg.Line("a", x, y, 0)], title="t", y_label="y", log=log)
    (d,) = re.findall(r'class="line" d="([^"]+)"', chart)
    drawn = points(d)
    np.testing.assert_allclose(drawn[:, 0], [svg.LEFT, (svg.LEFT + svg.WIDTH - svg.RIGHT) / 2, svg.WIDTH - svg.RIGHT])
    low, high = svg.HEIGHT - svg.BOTTOM, svg.TOP
    heights = (drawn[:, 1] - low) / (high - low)
    np.testing.assert_allclose(heights, [0, 0.5, 1] if log else [0.01, 0.1, 1], atol=0.0006)  # a tenth of a pixel
    assert "a: from 1.00 to 100" in chart


def test_gaps_stay_gaps_and_what_was_not_measured_is_left_out() -> None:
    x, nan = np.arange(5.0), np.nan
    with_gap = svg.Line("a", x, np.array([1, 2, nan, 4, 5]))
    nothing = svg.Line("b", x, np.full(5, nan))
    chart = svg.line_chart([with_gap, nothing], title="t", y_label="y")
    (d,) = re.findall(r'class="line" d="([^"]+)"', chart)
    assert (d.count("M"), d.count("L")) == (2, 2)
    assert ">b<" not in chart
    assert svg.line_chart([nothing], title="t", y_label="y") == ""
    assert svg.dot_plot([("a", nan, 0.0, None)], title="t", x_label="x") == ""


def test_long_curves_are_thinned_by_means() -> None:
    x, y = svg.thinned(np.arange(1000.0), np.arange(1000.0), 10)
    np.testing.assert_allclose(y, np.arange(49.5, 1000, 100))
    np.testing.assert_allclose(x, y)
    y = np.full(100, np.nan)
    y[0] = 3
    np.testing.assert_array_equal(svg.thinned(np.arange(100.0), y, 50)[1], [3, *[np.nan] * 49])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.0031, 0.98), (1, 1), (0.4, 0.7), (1e-9, 1e9), (5, 6), (1e-30, 2e-30)])
def test_ticks_are_round_few_and_inside(low: float, high: float, log: bool) -> None:
    axis = svg.Axis(low, high, 0, 100, log=log)
    ticks = axis.ticks(4)
    assert 2 <= len(ticks) <= 9
    for tick in ticks:
        assert -0.01 <= axis(tick) <= 100.01
        if len(ticks) > 2:
            assert float(f"{tick:.1e}") == pytest.approx(tick, rel=1e-9)
    assert axis.low <= low
    assert axis.high >= high


def test_labels_of_lines_that_end_together_stand_apart() -> None:
    lines = [svg.Line(f"line {i}", np.arange(2.0), np.array([1.0, 1 + i * 1e-3]), i) for i in range(9)]
    chart = svg.line_chart(lines, title="t", y_label="y")
    heights = sorted(float(y) for y in re.findall(r'class="name" x="[\d.]+" y="([\d.]+)"', chart))
    assert len(heights) == 9
    assert min(np.diff(heights)) >= svg.LABEL_GAP - 0.1
    assert heights[0] > 0
    assert heights[-1] < svg.HEIGHT
    many = [replace(line, label=f"{line.label} {j}") for line in lines for j in range(5)]
    assert svg.line_chart(many, title="t", y_label="y").count('class="name"') <= 16


def test_negative_cells_are_hatched_where_no_number_stands() -> None:
    matrix = np.array([[np.nan, -0.25], [0.5, 0.75]])
    options: dict[str, Any] = {"title": "t", "limits": (-1.0, 1.0), "row_height": 20}
    plain = svg.heat_map(matrix, ["a", "b"], ["c", "d"], numbers=False, **options)
    assert plain.count("url(#negative-on-dark)") == plain.count("url(") == 1
    numbered = svg.heat_map(matrix, ["a", "b"], ["c", "d"], numbers=True, **options)
    assert "url(" not in numbered
    for text in ("-0.25", "0.50", "0.75"):
        assert f">{text}<" in numbered
    cells = len(re.findall("<rect", plain)) - len(re.findall("<rect", svg._scale((-1, 1), 0, 0, 9))) - 1
    assert cells == 3  # NaN has no cell


def test_numbers_are_short() -> None:
    values = {0.0123: "0.0123", 1.6: "1.60", 245.4: "245", 1600: "1600", 12345: "12.3k", 4e6: "4M", -0.5: "-0.500"}
    assert {value: svg.number(value) for value in values} == values
    assert svg.number(float("nan")) == "-"
    assert svg.with_spread(2.283, 0.491) == "2.28 ± 0.49"
    assert svg.with_spread(2.283, 0.0) == "2.28"


# ---- colours -----------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def themes() -> list[dict[str, str]]:
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{([^}]*)\}", STYLE)[:2]
    )
    return [light, dark]


@pytest.mark.parametrize("theme", [0, 1])
def test_text_and_lines_stand_out_in_both_themes(theme: int) -> None:
    colours = themes()[theme]
    for ground in ("page", "card"):
        for ink in ("ink", "muted", "accent"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)  # WCAG AA for text
    for k in (1, 2, 5, 20):
        clusters = cluster_colours(k, dark=bool(theme))
        assert len(clusters) == k
        assert min(contrast(colour, colours["card"]) for colour in clusters) >= 3  # WCAG AA for graphics
        greys = np.diff([luminance(colour) for colour in clusters])
        assert (greys > 0).all() or (greys < 0).all()  # the order of the noise also holds in greyscale


def test_numbers_on_cells_can_be_read() -> None:
    for u in np.linspace(0, 1, 101):
        cell = svg._cell(u, 0, 0, 9, 9, (0.0, 1.0), True)
        ink = {"on-dark": "#ffffff", "on-light": "#000000"}[re.findall(r'class="([\w-]+)"', cell)[0]]
        assert contrast(sequential(u), ink) >= 4.5, u
