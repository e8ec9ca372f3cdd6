"""Measurements of the gradients and losses of timesteps: telemetry of a training loop, and analyses of a trained model.

The analyses are task affinity, conflict and negative transfer.
"""

from antdiff.analysis.affinity import TaskAffinity, epsilon_loss, task_affinity
from antdiff.analysis.confidence import Interval, student_interval
from antdiff.analysis.conflict import Conflict, cluster_conflict
from antdiff.analysis.projection import module_groups
from antdiff.analysis.telemetry import Telemetry
from antdiff.analysis.transfer import TransferGap

__all__ = [
    "Conflict",
    "Interval",
    "TaskAffinity",
    "Telemetry",
    "TransferGap",
    "cluster_conflict",
    "epsilon_loss",
    "module_groups",
    "student_interval",
    "task_affinity",
]
