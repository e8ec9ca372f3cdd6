"""K cluster gradients of one network for about the price of one backward."""

from antdiff.gradients.cluster_gradients import ClusterGradients

__all__ = ["ClusterGradients"]
