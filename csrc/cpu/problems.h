// A batch of small independent problems, run on several threads if that is faster.
#pragma once

#include <atomic>
#include <cmath>
#include <memory>

#include "core/scaled_gram.h"
#include "core/status.h"
#include "core/team.h"
#include "cpu/parallel.h"

namespace antdiff {

// Return the flat index of the first entry of G [K, K] that makes scale_gram refuse G, or -1.
inline int64_t bad_entry(const double* G, int64_t K) {
  for (int64_t e = 0; e < K * K; ++e)
    if (!is_finite(G[e]) || (e % (K + 1) == 0 && G[e] < 0)) return e;
  std::unique_ptr<double[]> d(new double[K]);
  for (int64_t i = 0; i < K; ++i) d[i] = power_of_two_scale(G[i * K + i]);
  for (int64_t e = 0; e < K * K; ++e)
    if (std::isnan(scaled_entry(G, d.get(), K, e / K, e % K))) return e;
  return -1;
}

// Run problem(n, work) -> Verdict for every n. A problem that fails gets NaN weights. The returned Status describes the
// first failure that must be reported: `where` is the flat index into gram, or the problem whose perms are bad. Up to K
// = kSharedK the workspace is on the stack, where kLocal doubles suffice, because a heap allocation of this size per
// call can make malloc trim its heap each time.
template <int64_t kLocal, class Params, class Problem>
Status solve_problems(const Params& p, int64_t workspace, Problem&& problem) {
  constexpr int64_t kGrain = 1 << 16;  // minimum number of multiplications per thread
  std::atomic<int64_t> first{p.n};
  parallel_for(p.n, threads_for(p.n * p.K * p.K * p.K, kGrain), [&](int64_t n) {
    double local[kLocal];
    std::unique_ptr<double[]> heap(p.K > kSharedK ? new double[workspace] : nullptr);
    const Verdict verdict = problem(n, heap ? heap.get() : local);
    if (verdict == Verdict::ok) return;
    for (int64_t i = 0; i < p.K; ++i) p.weights[n * p.K + i] = NAN;
    if (verdict == Verdict::bad_gram && p.poison) return;
    int64_t seen = first.load();
    while (n < seen && !first.compare_exchange_weak(seen, n)) {
    }
  });
  const int64_t n = first.load();
  if (n == p.n) return {};
  const int64_t entry = bad_entry(p.gram + n * p.K * p.K, p.K);
  if (entry >= 0) return {Status::Code::bad_gram, n * p.K * p.K + entry, 0};
  return {Status::Code::bad_perms, n, 0};
}

}  // namespace antdiff
