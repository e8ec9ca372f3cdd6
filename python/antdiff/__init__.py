"""Train diffusion models as multi-task learners: cluster the timesteps, take one gradient a cluster, balance them."""

from antdiff import ops

__all__ = ["ops"]
