"""The kernels as functions of tensors. They need only torch and NumPy, and do not depend on models or training."""

from antdiff.ops import reference
from antdiff.ops._extension import check_errors
from antdiff.ops._precision import precision_of, with_precision
from antdiff.ops.cluster_loss import cluster_loss, cluster_loss_and_grad, cluster_mean
from antdiff.ops.combine import combine
from antdiff.ops.gram import gram, gram_
from antdiff.ops.gram_weights import gradvac_weights, gram_weights
from antdiff.ops.interval import (
    interval_partition,
    interval_partition_affinity,
    interval_partition_all,
    interval_partition_values,
)
from antdiff.ops.nash import nash, nash_residual, nash_weights
from antdiff.ops.pcgrad import pcgrad, pcgrad_weights

__all__ = [
    "check_errors",
    "cluster_loss",
    "cluster_loss_and_grad",
    "cluster_mean",
    "combine",
    "gradvac_weights",
    "gram",
    "gram_",
    "gram_weights",
    "interval_partition",
    "interval_partition_affinity",
    "interval_partition_all",
    "interval_partition_values",
    "nash",
    "nash_residual",
    "nash_weights",
    "pcgrad",
    "pcgrad_weights",
    "precision_of",
    "reference",
    "with_precision",
]
