"""The numbers of a run, gathered on the device and read every ``log_every`` steps into CSV and TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from antdiff.train.checkpoint import write_atomically


class Meter:
    """Sums of a step's numbers, kept on the device so that a step costs no host synchronisation.

    Per-cluster losses are averaged over samples (each step's mean times its count), everything else over steps.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        self.k = k
        self.sums = torch.zeros(4, k, dtype=torch.float64, device=device)  # losses x counts, counts, weights, conflicts
        self.steps = 0

    @torch.no_grad()
    def add(
        self, losses: torch.Tensor, counts: torch.Tensor, weights: torch.Tensor, gram: torch.Tensor | None = None
    ) -> None:
        """Take in one step: mean losses [K] and counts [K] of the clusters, their weights [K], and G [K, K] or None."""
        rows = [losses.double() * counts, counts.double(), weights.double()]
        # For each cluster, the share of the other clusters whose gradient points against its own.
        rows.append((gram < 0).double().mean(1) * self.k / max(1, self.k - 1) if gram is not None else 0 * rows[1])
        self.sums += torch.stack(rows)
        self.steps += 1

    def read(self, clusters_share: torch.Tensor) -> dict[str, float]:
        """The means since the last read, as plain numbers; the one host synchronisation. Then starts again.

        ``loss`` is what the mean over uniformly drawn t would be, whatever the sampling of t: the sum over clusters of
        `clusters_share` [K] (interval length / T) times the cluster's loss.
        """
        sums, steps = self.sums.cpu().clone(), self.steps  # .cpu() of a CPU tensor is itself
        self.sums.zero_()
        self.steps = 0
        weighted_losses, counts, weights, conflicts = sums.unbind()
        losses = weighted_losses / counts  # an interval without a sample in the whole window gives NaN: not 0
        seen = counts > 0
        share = clusters_share.double().cpu()
        row = {"loss": float((losses[seen] * share[seen]).sum() / share[seen].sum())}
        row |= {f"loss_{i}": float(losses[i]) for i in range(self.k)}
        row |= {f"weight_{i}": float(weights[i] / steps) for i in range(self.k)}
        row["conflict_rate"] = float(conflicts.mean() / steps)
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums.copy_(state["sums"])
        self.steps = int(state["steps"])


class MetricLog:
    """``metrics.csv`` and TensorBoard events of a run folder. Rows after `start` (from a run that died) are dropped."""

    def __init__(self, folder: Path, *, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.csv"
        rows = read_csv(self.path) if self.path.exists() else []
        kept = [row for row in rows if row["step"] <= start]
        write_atomically(self.path, _to_csv(kept).encode())
        self.has_header = bool(kept)
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=start)  # type: ignore[no-untyped-call]

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Append one row; on the disk when this returns."""
        text = _to_csv([{"step": step, **row}], header=not self.has_header)
        with self.path.open("a") as file:
            file.write(text)
        self.has_header = True
        for key, value in row.items():
            group, _, cluster = key.partition("_")
            tag = f"{group}/cluster_{cluster}" if cluster.isdigit() else f"train/{key}"
            self.events.add_scalar(tag, value, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.events.close()  # type: ignore[no-untyped-call]


def read_csv(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv. A last line cut short by a crash is left out."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(value) for key, value in row.items()} for row in rows if None not in row.values()]


def _to_csv(rows: list[dict[str, float]], *, header: bool = True) -> str:
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    if header:
        writer.writeheader()
    # repr gives back exactly the float that was measured
    writer.writerows({key: int(value) if key == "step" else repr(value) for key, value in row.items()} for row in rows)
    return text.getvalue()
