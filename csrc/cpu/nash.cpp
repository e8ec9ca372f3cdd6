// NashMTL weights on the CPU. Parallel over problems. A problem costs a few times K^3 / 6 multiplications.
#include "core/nash.h"

#include "cpu/launchers.h"
#include "cpu/problems.h"

namespace antdiff {

Status cpu_nash_weights(const NashParams& p) {
  return solve_problems<nash_workspace(kSharedK)>(
      p, nash_workspace(p.K), [&](int64_t n, double* work) { return nash_problem(p, n, work, Solo{}); });
}

}  // namespace antdiff
