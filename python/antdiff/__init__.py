"""Train diffusion models as multi-task learners: cluster the timesteps, take one gradient a cluster, balance them."""

from antdiff import balancing, diffusion, distributed, ops
from antdiff.clustering import StratifiedTimesteps, TimestepClusters, UniformTimesteps
from antdiff.gradients import BalancedBackward, ClusterGradients

__all__ = [
    "BalancedBackward",
    "ClusterGradients",
    "StratifiedTimesteps",
    "TimestepClusters",
    "UniformTimesteps",
    "balancing",
    "diffusion",
    "distributed",
    "ops",
]
