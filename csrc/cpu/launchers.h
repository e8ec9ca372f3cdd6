// All CPU launchers. Each has a CUDA counterpart in cuda/launchers.h, except interval clustering, which runs once
// before training.
#pragma once

#include "core/cluster_loss.h"
#include "core/gram.h"
#include "core/gram_weights.h"
#include "core/nash.h"
#include "core/pcgrad.h"
#include "core/status.h"
#include "cpu/interval.h"

namespace antdiff {

Status cpu_cluster_loss_forward(const ClusterLossParams& p);
Status cpu_cluster_loss_backward(const ClusterLossParams& p);
Status cpu_cluster_loss_and_grad(const ClusterLossParams& p);  // forward and backward in one pass over the data

Status cpu_gram(const GramParams& p);
Status cpu_combine(const CombineParams& p);

Status cpu_pcgrad_weights(const PcgradParams& p);
Status cpu_nash_weights(const NashParams& p);
Status cpu_gram_weights(const GramWeightsParams& p);

// ---- interval clustering -------------------------------------------------------------------------------------------

// Any cost [T, T], row-major. Entries with r < l are ignored, and +inf forbids an interval. Returns not_finite for NaN
// or -inf (`where` is the flat index, or -1 if sums overflow), or infeasible.
Status cpu_interval_cost(const double* cost, const IntervalParams& p);

// c(l, r) = -sum of affinity[centre][l..r] with centre = (l + r + 1) / 2, for a finite affinity [T, T]. Running sums
// give one row of costs at a time, so no second T x T matrix is needed.
Status cpu_interval_affinity(const double* affinity, const IntervalParams& p);

// c(l, r) = min over m of sum of w |x - m| (k-medians). x must be ascending, so that m = x[(l + r + 1) / 2] without
// weights. weight [T] is >= 0 with a positive sum, or null for ones.
Status cpu_interval_absolute(const double* x, const double* weight, IntervalSolver solver, const IntervalParams& p);

// c(l, r) = min over m of sum of w (x - m)^2 (k-means).
Status cpu_interval_squared(const double* x, const double* weight, IntervalSolver solver, const IntervalParams& p);

}  // namespace antdiff
