"""The negative transfer gap (NTG): does joint training make a timestep worse?

This is the second observation of Go et al. (NeurIPS 2023). A specialist is trained on one interval of timesteps only
and a joint model on all timesteps. With a metric for which lower is better,

    NTG = metric(specialist) - metric(joint).

**NTG < 0 is negative transfer**: the specialist beats the joint model on its interval, because learning the other
timesteps has made the joint model worse there. NTG > 0 means that the joint model gains from the other timesteps.

The sign depends on the training budget. With equal iterations, the specialist sees T / |I| times as many samples of its
interval as the joint model, so a negative gap may also come from more practice. With equal samples of the interval, it
takes |I| / T of the steps, and a positive gap may come from too few steps. A negative gap with equal samples is
therefore clear evidence of negative transfer, and a positive gap with equal iterations of positive transfer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from antdiff._checks import as_choice, as_tensor
from antdiff.analysis.confidence import Interval, student_interval

Budget = Literal["iterations", "samples"]
BUDGETS: tuple[Budget, ...] = ("iterations", "samples")


@dataclass
class TransferGap:
    """Specialists of K intervals compared with the joint model, over S training seeds. A lower metric is better.

    Attributes:
        joint: float64 ``[S, K]``, the metric of the joint model on each interval (for sample quality, of its own
            reverse chain).
        specialist: ``[S, K]``, the metric of the specialist trained with the same seed.
        budget: "iterations" means as many steps as the joint model, "samples" as many samples of the interval.

    Raises:
        ValueError: the shapes differ or are not [S, K], or an unknown budget.
    """

    joint: Tensor
    specialist: Tensor
    budget: Budget

    def __post_init__(self) -> None:
        as_tensor("joint", self.joint, kind="real"), as_tensor("specialist", self.specialist, kind="real")
        if self.joint.shape != self.specialist.shape or self.joint.dim() != 2:
            raise ValueError(
                "joint and specialist must both be [S, K], seeds by intervals; got "
                f"{list(self.joint.shape)} and {list(self.specialist.shape)}."
            )
        as_choice("budget", self.budget, BUDGETS)

    @property
    def gap(self) -> Interval:
        """NTG ``[K]``, paired by seed, with its interval."""
        return student_interval(self.specialist - self.joint)

    @property
    def relative(self) -> Interval:
        """NTG relative to the joint model's metric, ``[K]``, with its interval."""
        return student_interval(self.specialist / self.joint - 1)

    def verdicts(self) -> list[str]:
        """Return the interpretation of each interval's gap, in words."""
        gap = self.gap
        return [
            _verdict(float(mean), bool(sure), self.budget, len(self.joint))
            for mean, sure in zip(gap.mean, gap.beyond_zero, strict=True)
        ]


def _verdict(mean: float, sure: bool, budget: Budget, seeds: int) -> str:
    if seeds < 2:
        return "one seed: no statement possible"
    if not sure:
        return "no gap beyond the noise of the seeds"
    if mean < 0:
        practice = "" if budget == "samples" else ", or more practice on its interval"
        return f"the specialist is better: negative transfer{practice}"
    undertrained = "" if budget == "iterations" else ", or a specialist of too few steps"
    return f"the joint model is better: positive transfer{undertrained}"
