// Every CPU launcher. Each mirrors its namesake in cuda/launchers.h.
#pragma once

#include "core/cluster_loss.h"
#include "core/gram.h"
#include "core/gram_weights.h"
#include "core/nash.h"
#include "core/pcgrad.h"
#include "core/status.h"

namespace antdiff {

Status cpu_cluster_loss_forward(const ClusterLossParams& p);
Status cpu_cluster_loss_backward(const ClusterLossParams& p);
Status cpu_cluster_loss_and_grad(const ClusterLossParams& p);  // forward and backward in one pass over the data

Status cpu_gram(const GramParams& p);
Status cpu_combine(const CombineParams& p);

Status cpu_pcgrad_weights(const PcgradParams& p);
Status cpu_nash_weights(const NashParams& p);
Status cpu_gram_weights(const GramWeightsParams& p);

}  // namespace antdiff
