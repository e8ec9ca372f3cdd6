"""The content of a run folder, for its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from antdiff import TimestepClusters
from antdiff._files import read_json
from antdiff.info import collect
from antdiff.train.config import TrainConfig
from antdiff.train.log import read_csv
from antdiff.train.run import intervals

CLOSING = 0.1  # share of the rows that "at the end" averages over


@dataclass(frozen=True)
class Run:
    """The part of a run that exists so far."""

    folder: Path
    config: TrainConfig
    intervals: list[tuple[int, int]]
    rows: list[dict[str, float]]
    results: dict[str, Any] | None
    environment: dict[str, str]

    @staticmethod
    def load(folder: Path) -> Run:
        """Read a run folder; raise a ValueError that names a missing or unreadable file."""
        config = TrainConfig.load(folder / "config.json")
        try:
            clusters = TimestepClusters.load(folder / "clusters.json")
        except FileNotFoundError:
            raise ValueError(f"{folder} must be the folder of a run; it has no clusters.json") from None
        metrics = folder / "metrics.csv"
        environment = _read_json(folder / "environment.json")
        return Run(
            folder,
            config,
            intervals(clusters),
            read_csv(metrics) if metrics.exists() else [],
            _read_json(folder / "results.json"),
            environment if environment is not None else collect()[0] | {"seen": "when this report was made"},
        )

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def method(self) -> str:
        """The balancing method and the companions, as shown in titles."""
        return self.config.label

    @property
    def labels(self) -> list[str]:
        return [f"{start}..{stop - 1}" for start, stop in self.intervals]

    def column(self, name: str) -> np.ndarray:
        """Return a column of metrics.csv, [rows]. NaN where it was not measured."""
        return np.array([row.get(name, np.nan) for row in self.rows], dtype=float)

    def closing(self, name: str) -> float:
        """Return the mean of a column over the last tenth of the rows."""
        values = self.column(name)
        values = values[-max(1, round(CLOSING * len(values))) :]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else float("nan")

    @property
    def diverged(self) -> bool:
        """Whether the loss of the last row is not finite. A resumed run drops that row."""
        return bool(self.rows) and not np.isfinite(self.rows[-1].get("loss", 0.0))

    @property
    def no_curves(self) -> str:
        """The reason why there is no curve to draw; empty if there is one."""
        if not self.rows:
            return "<p>No metrics have been written yet.</p>"
        return "" if np.isfinite(self.column("loss")).any() else "<p>No row of the metrics has a finite loss.</p>"

    @property
    def status(self) -> tuple[str, bool]:
        """The status in words, and whether it is an error."""
        steps = f"{self.step:,} of {self.config.steps:,} steps"
        if self.diverged:
            return f"diverged: the loss was not finite at step {self.step:,}", True
        if self.step < self.config.steps:
            return f"unfinished: {steps}", False
        return (f"finished: {steps}", False) if self.results else (f"trained, not measured: {steps}", False)


def caption_of(picture: Path) -> str:
    """Return the caption of `picture` in the summary.json beside it, under ``captions``; empty if there is none."""
    try:
        captions = (_read_json(picture.parent / "summary.json") or {}).get("captions")
    except ValueError:
        return ""  # a damaged caption is no reason to fail
    text = captions.get(picture.name) if isinstance(captions, dict) else None
    return text if isinstance(text, str) else ""


def _read_json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None
