"""Tests of comparisons: the rule that keeps chance from winning, and cells that run only once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from antdiff.experiments import compare as comparing
from antdiff.experiments.compare import compare, comparison_table, difference
from antdiff.train.config import TrainConfig

TINY = TrainConfig(steps=2, batch_size=6, device="cpu", eval_samples=12, eval_seeds=1, sample_steps=1)
SPANS = [(0, 300), (300, 1000)]


def cell(fd: float, losses: list[float]) -> dict[str, Any]:
    one = {"mean": 0.5, "sd": 0.0}
    return {
        "data": "digits",
        "timesteps": "stratified-weighted",
        "fd": {"mean": fd, "sd": 1.0},
        "precision": one,
        "recall": one,
        "anchors": {"held-out images (floor)": {"fd": 1.2, "precision": 0.9, "recall": 0.9}},
        "held_out_losses": losses,
        "intervals": SPANS,
    }


def test_difference_is_students_t() -> None:
    rng = np.random.default_rng(0)
    for shift in (0.0, 1.5, 4.0):
        a, b = rng.normal(shift, 1, 5), rng.normal(0, 1, 4)
        found = difference(list(a), list(b), comparisons=1)
        assert found is not None
        p = scipy.stats.ttest_ind(a, b, equal_var=True).pvalue
        assert found.beyond_noise == (p < 0.05)
        stricter = difference(list(a), list(b), comparisons=10)
        assert stricter is not None
        assert stricter.beyond_noise == (p < 0.005)
        assert found.mean == pytest.approx(a.mean() - b.mean())
    assert difference([1.0], [2.0, 3.0], 1) is None


def test_luck_rarely_wins() -> None:
    """Eight simultaneous differences between identical methods: at most about 5 % of the comparisons have a winner."""
    rng = np.random.default_rng(0)
    wins = 0
    for _ in range(400):
        values = rng.normal(size=(5, 3))
        found = [difference(list(row), list(values[0]), 8) for row in values[1:]]
        wins += any(d is not None and d.beyond_noise for d in found)
    assert wins <= 400 * 0.05


def test_table_states_differences_only_beyond_the_noise() -> None:
    results = {
        "vanilla": [cell(25 + d, [0.4 + d / 1000, 0.1]) for d in (-1, 0, 1)],
        "linear": [cell(24 + d, [0.4 + d / 1000, 0.1]) for d in (-3, 0, 3)],
        "uw": [cell(5 + d, [0.3 + d / 1000, 0.1]) for d in (-1, 0, 1)],
    }
    results["longer"] = [cell(fd, [0.4, 0.1]) for fd in (3, 4, 5)]
    results["patch"] = [cell(fd, [0.4, 0.1]) for fd in (13, 14, 15)]
    text = comparison_table(results, "a title")
    lines = text.splitlines()
    verdicts = {line.split("  ")[0]: line.split() for line in lines if " - " in line}
    assert list(verdicts) == ["linear - vanilla", "uw - vanilla", "longer - vanilla", "patch - longer"]
    assert verdicts["patch - longer"][3] == "+10"
    assert verdicts["linear - vanilla"][3] == "-1"
    assert verdicts["linear - vanilla"][5:] == ["within", "noise", "+0", "0.0029", "within", "noise"]
    assert verdicts["uw - vanilla"][3] == "-20"
    assert verdicts["uw - vanilla"][5:7] == ["lower", "-0.03"]
    assert verdicts["uw - vanilla"][8:] == ["lower"]
    assert len({line.index("FD") for line in lines if "FD" in line}) == 2  # two tables, each with aligned columns
    assert "25 ± 1 " in text
    assert "0.19 ± 0.0003" in text  # 0.3 of 0.4 and 0.7 of 0.1, weighted by the lengths of the intervals
    assert "Bonferroni" in text
    single = comparison_table({method: cells[:1] for method, cells in results.items()}, "one seed")
    assert "differences cannot be judged" in single
    assert "lower" not in single


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """Replace training by a list of the settings that would have been trained, and by made-up results."""
    noted: list[TrainConfig] = []

    def fake(config: TrainConfig, run: Path, **_: Any) -> dict[str, Any] | None:
        if len(noted) == 3:
            return None  # as after a signal
        noted.append(config)
        result = cell(20 + config.seed, [0.4, 0.1])
        (run / "results.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(comparing, "execute", fake)
    return noted


def test_an_interrupted_comparison_goes_on_cell_by_cell(runs: list[TrainConfig], tmp_path: Path) -> None:
    out = tmp_path / "c"
    assert compare(TINY, ["uw"], [0, 7], out, progress=False) is None
    first = [(config.method, config.seed, config.timestep_sampling) for config in runs]
    weighted = "stratified-weighted"
    assert first == [("vanilla", 0, "uniform"), ("linear", 0, weighted), ("uw", 0, weighted)]
    runs.clear()
    results = compare(TINY, ["uw"], [0, 7], out, progress=False)
    assert [(config.method, config.seed) for config in runs] == [("vanilla", 7), ("linear", 7), ("uw", 7)]
    assert results is not None
    assert {method: len(cells) for method, cells in results.items()} == {"vanilla": 2, "linear": 2, "uw": 2}
    assert (out / "table.txt").read_text().startswith("digits, unet, 2 steps, 2 training seeds")
    assert (out / "comparison.png").stat().st_size > 1000
    refused = "settings other than this comparison's"
    for options, error in (({"companions": ["patch"]}, r"patch needs a DiT.* Pass --model dit"), ({}, refused)):
        with pytest.raises(ValueError, match=error):
            compare(replace(TINY, lr=0.1), ["uw"], [0, 7], out, progress=False, **options)
    with pytest.raises(ValueError, match="settings other than this comparison's"):
        compare(replace(TINY, lr=0.1), ["uw"], [0, 7], out, progress=False)
    for seeds in ([], [1, 1]):
        with pytest.raises(ValueError, match="seeds must be distinct"):
            compare(TINY, ["uw"], seeds, out, progress=False)


@pytest.mark.usefixtures("few_digits")
def test_a_real_comparison(tmp_path: Path) -> None:
    results = compare(TINY, ["pcgrad"], [0], tmp_path / "c", progress=False)
    assert results is not None
    assert list(results) == ["vanilla", "linear", "pcgrad"]
    assert (tmp_path / "c" / "pcgrad-seed0" / "samples.png").exists()
    assert "With one training seed" in (tmp_path / "c" / "table.txt").read_text()
