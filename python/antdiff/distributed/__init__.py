"""Training on several ranks: exchanges of rows, the cost model, losses over all ranks, sharded checkpoints."""

from antdiff.distributed.checkpoint import load_checkpoint, save_checkpoint
from antdiff.distributed.chunks import contiguous_counts
from antdiff.distributed.cost import Cost, cost_model
from antdiff.distributed.losses import global_losses, reduce_gradients
from antdiff.distributed.ranks import LostRankError, NonFiniteError
from antdiff.distributed.schemes import Scheme

__all__ = [
    "Cost",
    "LostRankError",
    "NonFiniteError",
    "Scheme",
    "contiguous_counts",
    "cost_model",
    "global_losses",
    "load_checkpoint",
    "reduce_gradients",
    "save_checkpoint",
]
