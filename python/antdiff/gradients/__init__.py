"""K cluster gradients of one network for about the price of one backward."""

from antdiff.gradients.balanced_backward import BackwardResult, BalancedBackward
from antdiff.gradients.batch import GroupingError
from antdiff.gradients.cluster_gradients import ClusterGradients
from antdiff.gradients.jacobian import ClusterJacobian
from antdiff.gradients.routes import Route
from antdiff.gradients.walk import shared

__all__ = [
    "BackwardResult",
    "BalancedBackward",
    "ClusterGradients",
    "ClusterJacobian",
    "GroupingError",
    "Route",
    "shared",
]
