// All CUDA launchers, declared without a CUDA header. Each has a CPU counterpart in cpu/launchers.h.
#pragma once

#include <cstdint>

#include "core/cluster_loss.h"
#include "core/gram.h"
#include "core/gram_weights.h"
#include "core/nash.h"
#include "core/pcgrad.h"
#include "core/status.h"

namespace antdiff {

struct Stream {
  void* handle = nullptr;  // a cudaStream_t; null is the default stream
  int device = 0;
};

Status cuda_cluster_loss_forward(const ClusterLossParams& p, Stream stream);
Status cuda_cluster_loss_backward(const ClusterLossParams& p, Stream stream);
Status cuda_cluster_loss_and_grad(const ClusterLossParams& p, Stream stream);

int64_t cuda_gram_scratch(int64_t k, int device);  // number of doubles in GramParams::scratch
Status cuda_gram(const GramParams& p, Stream stream);
Status cuda_combine(const CombineParams& p, Stream stream);

Status cuda_pcgrad_weights(const PcgradParams& p, Stream stream);
Status cuda_nash_weights(const NashParams& p, Stream stream);
Status cuda_gram_weights(const GramWeightsParams& p, Stream stream);

// ---- errors recorded by kernels: read only on request, since reading synchronises with the device -----------------
enum DeviceError : uint32_t { kBadClusterId = 1u, kBadGram = 2u, kBadPerms = 4u };
Status cuda_take_errors(int device, uint32_t* errors);  // the bits of DeviceError set since the last call; clears them
const char* cuda_error_text(int64_t code);

}  // namespace antdiff
