"""The negative transfer gap: is a timestep better off alone?

Go et al. (NeurIPS 2023), the second observation. A specialist is trained on one interval of timesteps only, a joint
model on all of them, and

    NTG = metric(specialist) - metric(joint),    the metric one of which less is better,

so that **NTG < 0 is negative transfer**: on its interval the specialist beats the joint model, which learning the other
timesteps has made worse there. NTG > 0: the joint model gains from the others.

The sign depends on what "trained as long" means. With equal iterations the specialist sees T / |I| times as many
samples of its interval as the joint model, so a negative gap mixes transfer with plain practice. With equal samples of
the interval it takes |I| / T of the steps, and a positive gap can come from too few of them. Negative with equal
samples is negative transfer beyond doubt; positive with equal iterations is positive transfer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from antdiff.analysis.confidence import Interval, student_interval

Budget = Literal["iterations", "samples"]
BUDGETS: tuple[Budget, ...] = ("iterations", "samples")


@dataclass
class TransferGap:
    """Specialists of K intervals against the joint model, over S training seeds, by a metric of which less is better.

    Attributes:
        joint: float64 ``[S, K]``: of the joint model, on (or with its own chain, for sample quality) each interval.
        specialist: ``[S, K]``: of the specialist, trained with the same seed.
        budget: "iterations": as many steps as the joint model; "samples": as many samples of the interval.

    Raises:
        ValueError: two shapes that differ, or not [S, K].
    """

    joint: Tensor
    specialist: Tensor
    budget: Budget

    def __post_init__(self) -> None:
        if self.joint.shape != self.specialist.shape or self.joint.dim() != 2:
            raise ValueError(
                "joint and specialist must both be [S, K], seeds by intervals; got "
                f"{list(self.joint.shape)} and {list(self.specialist.shape)}."
            )
        if self.budget not in BUDGETS:
            raise ValueError(f"budget must be 'iterations' or 'samples'; got {self.budget!r}.")

    @property
    def gap(self) -> Interval:
        """NTG ``[K]``, paired by seed."""
        return student_interval(self.specialist - self.joint)

    @property
    def relative(self) -> Interval:
        """NTG as a share of the joint model's metric, ``[K]``."""
        return student_interval(self.specialist / self.joint - 1)

    def verdicts(self) -> list[str]:
        """What each interval's gap says, in words."""
        gap = self.gap
        return [
            _verdict(float(mean), bool(sure), self.budget, len(self.joint))
            for mean, sure in zip(gap.mean, gap.beyond_zero, strict=True)
        ]


def _verdict(mean: float, sure: bool, budget: Budget, seeds: int) -> str:
    if seeds < 2:
        return "one seed: nothing is said"
    if not sure:
        return "no gap beyond the seeds' noise"
    if mean < 0:
        practice = "" if budget == "samples" else ", or more practice on its interval"
        return f"the specialist is better: negative transfer{practice}"
    undertrained = "" if budget == "iterations" else ", or a specialist of too few steps"
    return f"the joint model is better: positive transfer{undertrained}"
