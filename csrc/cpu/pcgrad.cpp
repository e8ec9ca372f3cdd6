// PCGrad weights on the CPU. Parallel over problems. A problem costs O(K^2) without conflicts and O(K^3) with
// conflicts.
#include "core/pcgrad.h"

#include "cpu/launchers.h"
#include "cpu/problems.h"

namespace antdiff {

Status cpu_pcgrad_weights(const PcgradParams& p) {
  return solve_problems<pcgrad_workspace(kSharedK)>(
      p, pcgrad_workspace(p.K), [&](int64_t n, double* work) { return pcgrad_problem(p, n, work, Solo{}); });
}

}  // namespace antdiff
