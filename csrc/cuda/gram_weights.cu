// Balancing weights from the Gram matrix on CUDA. One warp handles a problem, and one lane of it runs the sequential
// solver; the purpose of this kernel is that nothing leaves the device. G is read once from global memory. The
// workspace is shared memory up to K = 32 and scratch memory beyond. Float64, deterministic.
#include "core/gram_weights.h"

#include "cuda/launch.h"
#include "cuda/warp.h"

namespace antdiff {
namespace {

__global__ void __launch_bounds__(kWarp) gram_weights_kernel(GramWeightsParams p, uint32_t* errors) {
  __shared__ double shared[gram_weights_workspace(kSharedK)];
  solve_problems(p, shared, gram_weights_workspace(p.K), errors,
                 [&](int64_t n, double* work, Warp warp) { return gram_weights_problem(p, n, work, warp); });
}

}  // namespace

Status cuda_gram_weights(const GramWeightsParams& p, Stream stream) {
  DeviceGuard guard(stream.device);
  if (!guard.status().ok()) return guard.status();
  return launch(gram_weights_kernel, problem_blocks(p.n, p.K), kWarp, stream, p, device_errors(stream.device));
}

}  // namespace antdiff
