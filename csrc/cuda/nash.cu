// NashMTL weights on CUDA. One warp handles a problem, and its lanes share each elimination step. G is read once from
// global memory. The workspace is shared memory up to K = 32 and scratch memory beyond. Float64, deterministic.
#include "core/nash.h"

#include "cuda/launch.h"
#include "cuda/warp.h"

namespace antdiff {
namespace {

__global__ void __launch_bounds__(kWarp) nash_kernel(NashParams p, uint32_t* errors) {
  __shared__ double shared[nash_workspace(kSharedK)];
  solve_problems(p, shared, nash_workspace(p.K), errors,
                 [&](int64_t n, double* work, Warp warp) { return nash_problem(p, n, work, warp); });
}

}  // namespace

Status cuda_nash_weights(const NashParams& p, Stream stream) {
  DeviceGuard guard(stream.device);
  if (!guard.status().ok()) return guard.status();
  return launch(nash_kernel, problem_blocks(p.n, p.K), kWarp, stream, p, device_errors(stream.device));
}

}  // namespace antdiff
