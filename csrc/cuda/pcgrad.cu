// PCGrad weights on CUDA. One warp handles a problem, with one lane per row. G and the visiting orders are read once
// from global memory. The workspace is shared memory up to K = 32 and scratch memory beyond. Float64, deterministic.
#include "core/pcgrad.h"

#include "cuda/launch.h"
#include "cuda/warp.h"

namespace antdiff {
namespace {

__global__ void __launch_bounds__(kWarp) pcgrad_kernel(PcgradParams p, uint32_t* errors) {
  __shared__ double shared[pcgrad_workspace(kSharedK)];
  solve_problems(p, shared, pcgrad_workspace(p.K), errors,
                 [&](int64_t n, double* work, Warp warp) { return pcgrad_problem(p, n, work, warp); });
}

}  // namespace

Status cuda_pcgrad_weights(const PcgradParams& p, Stream stream) {
  DeviceGuard guard(stream.device);
  if (!guard.status().ok()) return guard.status();
  return launch(pcgrad_kernel, problem_blocks(p.n, p.K), kWarp, stream, p, device_errors(stream.device));
}

}  // namespace antdiff
