"""Training on several ranks: the single-process names, for a batch that is spread over torch.distributed's ranks."""

from antdiff.distributed.balanced_backward import BalancedBackward
from antdiff.distributed.checkpoint import load_checkpoint, save_checkpoint
from antdiff.distributed.cluster_gradients import ClusterGradients
from antdiff.distributed.cost import Cost, cost_model
from antdiff.distributed.losses import global_losses, reduce_gradients
from antdiff.distributed.ranks import LostRankError, NonFiniteError
from antdiff.distributed.schemes import Scheme
from antdiff.distributed.timesteps import StratifiedTimesteps, contiguous_counts

__all__ = [
    "BalancedBackward",
    "ClusterGradients",
    "Cost",
    "LostRankError",
    "NonFiniteError",
    "Scheme",
    "StratifiedTimesteps",
    "contiguous_counts",
    "cost_model",
    "global_losses",
    "load_checkpoint",
    "reduce_gradients",
    "save_checkpoint",
]
