// A warp as the team that computes a K x K problem (core/team.h), and the workspace of a problem.
#pragma once

#include <cmath>

#include "core/team.h"
#include "cuda/launch.h"

#if defined(__CUDACC__) || defined(ANTDIFF_CUDA_EMULATION)

namespace antdiff {

struct Warp {
  int lane;
  __device__ __forceinline__ int64_t rank() const { return lane; }
  __device__ __forceinline__ int64_t size() const { return kWarp; }
  __device__ __forceinline__ int64_t grid_row() const { return lane / 8; }
  __device__ __forceinline__ int64_t grid_rows() const { return kWarp / 8; }
  __device__ __forceinline__ int64_t grid_column() const { return lane % 8; }
  __device__ __forceinline__ int64_t grid_columns() const { return 8; }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
};

// Run problem(n, work, warp) -> Verdict for the problems [blockIdx.x, n) with stride gridDim.x, with one warp per
// block. A problem that fails gets NaN weights and sets its bit in the sticky error word.
template <class Params, class Problem>
__device__ __forceinline__ void solve_problems(const Params& p, double* shared, int64_t workspace, uint32_t* errors,
                                               Problem&& problem) {
  const Warp warp{int(threadIdx.x)};
  double* work = p.K <= kSharedK ? shared : p.scratch + int64_t(blockIdx.x) * workspace;
  for (int64_t n = blockIdx.x; n < p.n; n += gridDim.x) {
    const Verdict verdict = problem(n, work, warp);
    if (verdict != Verdict::ok) {
      for (int64_t i = warp.rank(); i < p.K; i += warp.size()) p.weights[n * p.K + i] = NAN;
      if (warp.rank() == 0 && verdict == Verdict::bad_perms) record(errors, kBadPerms);
      if (warp.rank() == 0 && verdict == Verdict::bad_gram && !p.poison) record(errors, kBadGram);
    }
    warp.sync();  // the next problem overwrites memory that some lanes may still read
  }
}

inline int64_t problem_blocks(int64_t n, int64_t K) {
  return K <= kSharedK || n < kScratchBlocks ? grid_for(n) : kScratchBlocks;
}

}  // namespace antdiff

#endif
