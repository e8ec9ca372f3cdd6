"""Groups of timesteps that are trained as one task each, and the samplers that draw timesteps from them."""

from antdiff.clustering.clusters import TimestepClusters
from antdiff.clustering.timesteps import StratifiedTimesteps, UniformTimesteps

__all__ = ["StratifiedTimesteps", "TimestepClusters", "UniformTimesteps"]
