"""What the timesteps of a diffusion model do to each other: task affinity, conflict, negative transfer."""

from antdiff.analysis.affinity import TaskAffinity, epsilon_loss, task_affinity
from antdiff.analysis.confidence import Interval, student_interval
from antdiff.analysis.conflict import Conflict, cluster_conflict
from antdiff.analysis.projection import module_groups
from antdiff.analysis.transfer import TransferGap

__all__ = [
    "Conflict",
    "Interval",
    "TaskAffinity",
    "TransferGap",
    "cluster_conflict",
    "epsilon_loss",
    "module_groups",
    "student_interval",
    "task_affinity",
]
