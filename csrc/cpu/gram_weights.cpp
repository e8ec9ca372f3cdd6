// Balancing weights from the Gram matrix on the CPU. Parallel over problems. A problem costs of the order of K^3
// multiplications, or K^4 for UPGrad and CAGrad.
#include "core/gram_weights.h"

#include "cpu/launchers.h"
#include "cpu/problems.h"

namespace antdiff {

Status cpu_gram_weights(const GramWeightsParams& p) {
  return solve_problems<gram_weights_workspace(kSharedK)>(p, gram_weights_workspace(p.K), [&](int64_t n, double* work) {
    return gram_weights_problem(p, n, work, Solo{});
  });
}

}  // namespace antdiff
