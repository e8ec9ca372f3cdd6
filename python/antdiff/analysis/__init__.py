"""What the timesteps of a diffusion model do to each other: task affinity, conflict, negative transfer."""

from antdiff.analysis.affinity import TaskAffinity, epsilon_loss, task_affinity
from antdiff.analysis.projection import module_groups

__all__ = ["TaskAffinity", "epsilon_loss", "module_groups", "task_affinity"]
