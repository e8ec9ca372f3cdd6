"""Loggers for the rows of a run: metrics.csv, TensorBoard, Weights & Biases, any object with ``log`` and ``close``."""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from einops import repeat

from antdiff._command import command, warn
from antdiff._csv import DamagedTableError, read_table, table_text
from antdiff._files import unused_name, write_atomically
from antdiff.plotting.palette import SEQUENTIAL

IMAGE_EVERY = 10  # rows per image of the cosines, since TensorBoard shows at most ten images per tag


class Logger(Protocol):
    """The interface of a logger."""

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Take a row of numbers, means over the steps since the previous row. NaN: not measured."""

    def close(self) -> None:
        """Finish after the last row."""


class MetricLog:
    """Write rows to ``metrics.csv``, to TensorBoard events and to further loggers.

    Args:
        folder: the run folder.
        start: the step of the checkpoint that the run is resumed from, or 0. Later rows, which an interrupted run
            wrote, are deleted.
        also: further loggers.
    """

    def __init__(self, folder: Path, *, start: int, also: Sequence[Logger] = ()) -> None:
        self.loggers: list[Logger] = [
            CsvLogger(folder / "metrics.csv", start=start),
            TensorBoardLogger(folder / "tensorboard", start=start),
            *also,
        ]

    def log(self, step: int, row: Mapping[str, float]) -> None:
        for logger in self.loggers:
            logger.log(step, row)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


class CsvLogger:
    """Append rows to a CSV file. A row is in the file when `log` returns.

    Rows after `start` are deleted. If an editor or a crash has damaged the file, the rows that cannot be read are left
    out with a warning, and the damaged file is kept beside the new one.
    """

    def __init__(self, path: Path, *, start: int) -> None:
        self.path = path
        self.names: list[str] = []
        if path.exists():
            damage: list[str] = []
            self.names, rows = read_table(path, "step", damaged=damage.append)
            if damage:
                kept_as = unused_name(path.with_name(f"{path.name}.damaged"))
                write_atomically(kept_as, path.read_bytes())
                more = f" ({len(damage) - 1} more rows are damaged)" if len(damage) > 1 else ""
                warn(f"{damage[0]}{more}. These rows are left out, and the file is kept as {kept_as.name}")
            kept = [row for row in rows if row["step"] <= start]
            self.names = self.names if kept else []
            self._rewrite(kept)
        else:
            write_atomically(path, b"")

    def log(self, step: int, row: Mapping[str, float]) -> None:
        numbers = {"step": step, **row}
        if new := [name for name in numbers if name not in self.names]:
            old = read_csv(self.path) if self.names else []
            self.names += new
            self._rewrite(old)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(table_text([numbers], self.names, "step", header=False))

    def close(self) -> None:
        pass

    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        write_atomically(self.path, table_text(rows, self.names, "step", header=bool(self.names)).encode())


class TensorBoardLogger:
    """Write scalars grouped by kind (``loss/cluster_0``) and, every tenth row, an image of the K x K cosines."""

    def __init__(self, folder: Path, *, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard reads event files in the order of their names. A name begins with the second in which the file was
        # opened, and names of one second do not sort by age. So a run that is resumed within this second waits for the
        # next one.
        while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.02)
        # Events from purge_step on are deleted. The row of the checkpoint's own step stays: it is not written again.
        self.events = SummaryWriter(str(folder), purge_step=start + 1)  # type: ignore[no-untyped-call]
        self.rows = 0

    def log(self, step: int, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            tag = scalar_tag(key)
            if tag is not None and not math.isnan(value):
                self.events.add_scalar(tag, value, step)  # type: ignore[no-untyped-call]
        cosines = cosine_matrix(row)  # [K, K]
        if self.rows % IMAGE_EVERY == 0 and np.isfinite(cosines).all() and len(cosines) > 1:
            from matplotlib import colormaps

            side = max(1, 240 // len(cosines))  # pixels per cell
            colours = colormaps[SEQUENTIAL]((cosines + 1) / 2)[..., :3]  # [K, K, 3]
            image = repeat(colours, "i j rgb -> (i a) (j b) rgb", a=side, b=side)
            self.events.add_image("cosines", image, step, dataformats="HWC")  # type: ignore[no-untyped-call]
        self.rows += 1

    def close(self) -> None:
        self.events.close()  # type: ignore[no-untyped-call]


class WandbLogger:
    """Send rows to Weights & Biases, which must be installed. A resumed run continues the same page.

    Args:
        project: the name of the project.
        run: the run folder. The page has its name, and its file ``wandb-id`` holds the id of the page.
        config: the settings that the page shows.

    Raises:
        RuntimeError: wandb is not installed.
    """

    def __init__(self, project: str, run: Path, config: Mapping[str, Any]) -> None:
        wandb = import_wandb()
        kept = run / "wandb-id"
        if not kept.exists():
            write_atomically(kept, uuid.uuid4().hex[:16].encode())
        self.page: Any = wandb.init(
            project=project, name=run.name, dir=str(run), id=kept.read_text(), resume="allow", config=dict(config)
        )

    def log(self, step: int, row: Mapping[str, float]) -> None:
        # After a crash the rows since the checkpoint are sent a second time. wandb keeps the first ones.
        tags = {scalar_tag(key) or key: value for key, value in row.items() if not math.isnan(value)}
        self.page.log(tags, step=step)

    def close(self) -> None:
        self.page.finish()


def import_wandb() -> Any:
    """Return the wandb module. Raise RuntimeError with the remedy if it is not installed."""
    try:
        import wandb  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        raise RuntimeError("wandb is not installed: pip install wandb, or leave out --wandb") from error
    return wandb


def scalar_tag(column: str) -> str | None:
    """Return the tag of a column in dashboards: ``loss_0`` is loss/cluster_0, ``loss`` is train/loss, a cosine None."""
    name, _, cluster = column.rpartition("_")
    if re.fullmatch(r"cosine_\d+", name):
        return None  # there are K (K - 1) / 2 cosines, which an image shows better
    return f"{name}/cluster_{cluster}" if cluster.isdigit() else f"train/{column}"


def cosine_matrix(row: Mapping[str, float]) -> np.ndarray:
    """Return the cosines of a row, float64 [K, K] with ones on the diagonal. NaN: a pair was not measured."""
    matches = {key: re.fullmatch(r"cosine_(\d+)_(\d+)", key) for key in row}
    pairs = {key: (int(match[1]), int(match[2])) for key, match in matches.items() if match}
    matrix = np.eye(1 + max((j for _, j in pairs.values()), default=0))
    for key, (i, j) in pairs.items():
        matrix[i, j] = matrix[j, i] = row[key]
    return matrix


def read_csv(path: Path) -> list[dict[str, float]]:
    """Read the rows of a metrics.csv, without a last line that a crash has truncated.

    Raises:
        ValueError: a row is damaged. The message names it.
    """
    try:
        return read_table(path, "step")[1]
    except DamagedTableError as error:
        remedy = command("train", "--resume", path.parent)
        raise ValueError(f"{error}. Repair or remove the row; this command removes damaged rows: {remedy}") from error
