"""What surrounds the steps of a run: the lock of its folder, signals, metrics, checkpoints and grids of samples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from antdiff._files import remove_temporary
from antdiff._progress import progress_bar
from antdiff._signals import stop_requests
from antdiff.data import ImageData
from antdiff.gradients import BackwardResult
from antdiff.train.checkpoint import check_finite
from antdiff.train.config import TrainConfig
from antdiff.train.log import Logger, MetricLog
from antdiff.train.prepare import Parts, prepare
from antdiff.train.progress import save_progress_grid
from antdiff.train.ranks import RunRanks
from antdiff.train.run import locked_by_first


@contextmanager
def open_session(
    config: TrainConfig, data: ImageData, run: Path, *, progress: bool, loggers: Sequence[Logger]
) -> Iterator[Session]:
    """Lock the folder `run`, prepare the parts of the run, and catch signals inside the block."""
    ranks = RunRanks()
    with locked_by_first(run, ranks):
        if ranks.is_first:
            for folder in (run, run / "checkpoints", run / "samples", run / "model"):
                remove_temporary(folder)
        parts = prepare(config, data, run)
        active = ranks.is_first
        rows = MetricLog(run, start=parts.start, also=loggers) if active else None
        bar = progress_bar(parts.steps, initial=parts.start, unit="step", active=progress and active)
        try:
            with stop_requests(ignore_repeats=ranks.size > 1) as stop:
                parts.model.train()
                yield Session(run, parts, rows, bar, stop)
        finally:
            bar.close()
            if rows is not None:
                rows.close()


class Session:
    """The steps that are left of a run, and what follows each of them.

    Attributes:
        parts: the parts of the run.
        complete: whether the last step is done.
    """

    def __init__(self, run: Path, parts: Parts, rows: MetricLog | None, bar: Any, stop: Event) -> None:
        self.run, self.parts, self.rows, self.bar, self.stop = run, parts, rows, bar, stop
        self.complete = parts.start >= parts.steps

    def steps(self) -> Iterator[int]:
        """Yield the number of each step that is left. Stop early after a step in which a signal arrived."""
        for step in range(self.parts.start + 1, self.parts.steps + 1):
            yield step
            stopping = self._save(step)
            self.complete = step == self.parts.steps
            if stopping:
                return

    def log(self, step: int, result: BackwardResult) -> None:
        """Record a step. Its numbers stay on the device until a row of metrics is read.

        Raises:
            DivergenceError: a loss became NaN or infinite.
        """
        parts = self.parts
        losses = result.losses / parts.importance()  # [K], without the importance weights
        if parts.curriculum is not None:
            parts.curriculum.update((losses * result.counts).sum() / result.counts.sum())
        parts.telemetry.add(losses, result.counts, result.weights, result.gram)
        self.bar.update()
        if step % parts.log_every == 0 or step == parts.steps:
            row = parts.telemetry.read()
            if parts.curriculum is not None:
                row["stage"] = float(parts.curriculum.stage)
            if self.rows is not None:
                self.rows.log(step, row)
            self.bar.set_postfix_str(_losses(row), refresh=False)
            # Check after the row is written, so that it shows which loss is not finite. The first check names ranks.
            parts.backward.gradients.check()
            check_finite(row["loss"], step, self.run)

    def _save(self, step: int) -> bool:
        """Write the checkpoint and the grid of samples that are due after a step. Return whether to stop."""
        parts = self.parts
        stopping = parts.ranks.any(self.stop.is_set(), parts.device, now=step % parts.log_every == 0)
        due = step % parts.checkpoint_every == 0 or step == parts.steps or stopping
        if due:
            check_finite(sum(p.detach().abs().sum().item() for p in parts.model.parameters()), step, self.run)
        # The grid first: if the process is killed between the two, the step and its grid are made again.
        if parts.ranks.is_first and parts.grid_every and (step % parts.grid_every == 0 or step == parts.steps):
            save_progress_grid(
                parts.ema.module, parts.schedule, parts.shape, self.run, step, parts.sample_steps, parts.device
            )
        if due and parts.ranks.is_first:
            parts.state.save(step)
        return stopping


def _losses(row: Mapping[str, float]) -> str:
    """Return the losses of a row for the progress bar, those of the clusters if there are at most 10."""
    losses = [f"{value:.3f}" for key, value in row.items() if re.fullmatch(r"loss_\d+", key)]
    clusters = f" | clusters {' '.join(losses)}" if len(losses) <= 10 else ""
    return f"loss {row['loss']:.3f}{clusters}"
