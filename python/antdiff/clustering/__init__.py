"""Clusters of timesteps, each trained as one task, and the samplers that draw timesteps from them."""

from antdiff.clustering.clusters import TimestepClusters
from antdiff.clustering.timesteps import StratifiedTimesteps, UniformTimesteps

__all__ = ["StratifiedTimesteps", "TimestepClusters", "UniformTimesteps"]
