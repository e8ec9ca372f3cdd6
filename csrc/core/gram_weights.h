// Balancing methods that are one function of the Gram matrix: the parameters of the launchers, and the solver of one
// problem. core/methods/ holds the methods, one file per family.
//
// All methods are sequential algorithms on a few hundred numbers, so one member of the team computes a problem. The
// other members only share the check and the scaling of G. Zero rows of G are removed before a method runs, and get
// weight 0: a cluster without samples does not move the direction, and it does not stop the direction by being the
// shortest of all gradients. GradVac is the exception, since it works on all rows.
#pragma once

#include <cstdint>

#include "core/methods/dual_cone.h"
#include "core/methods/fairgrad.h"
#include "core/methods/gradvac.h"
#include "core/methods/min_norm.h"
#include "core/methods/spectral.h"
#include "core/scaled_gram.h"
#include "core/team.h"

namespace antdiff {

enum class GramMethod : int32_t { upgrad, dualproj, aligned_mtl, mgda, cagrad, imtl_g, config, fairgrad, gradvac };
constexpr int kGramMethods = 9;

// All arrays are contiguous and on one device.
struct GramWeightsParams {
  int64_t n = 0, K = 0;          // problems, clusters
  const double* gram = nullptr;  // [n, K, K]
  GramMethod method{};
  double option = 0;             // cagrad: c; fairgrad: alpha; gradvac: beta; spectral methods: the noise of G
  const double* keys = nullptr;  // gradvac: [n, K, K], visiting orders as in PcgradParams
  double* targets = nullptr;     // gradvac: [n, K, K], target cosines; updated unless gram is bad
  bool poison = false;           // a bad gram gives NaN weights and is not reported
  double* weights = nullptr;     // [n, K]
  double* scratch = nullptr;     // CUDA only: scratch_for(n, K, gram_weights_workspace(K)) doubles
};

constexpr int64_t gram_weights_workspace(int64_t K) { return 4 * K * K + 15 * K; }
static_assert(gram_weights_workspace(kSharedK) * sizeof(double) <= 48 * 1024,
              "the workspace must fit the static shared memory of a block");

ANTDIFF_HD void solve_non_zero_rows(const NonZeroRows& r, GramMethod method, double option) {
  switch (method) {
    case GramMethod::upgrad:
      return upgrad(r);
    case GramMethod::dualproj:
      return dualproj(r);
    case GramMethod::aligned_mtl:
      return aligned_mtl(r, option);
    case GramMethod::mgda:
      return mgda(r);
    case GramMethod::cagrad:
      return cagrad(r, option);
    case GramMethod::imtl_g:
      return imtl_g(r, option);
    case GramMethod::config:
      return config(r, option);
    case GramMethod::fairgrad:
      return fairgrad(r, option);
    case GramMethod::gradvac:
      return;  // handled by gram_weights_problem, on all rows
  }
}

// Solve problem n. `work` holds gram_weights_workspace(K) doubles. The weights are written only if the result is ok.
template <class Team>
ANTDIFF_HD Verdict gram_weights_problem(const GramWeightsParams& p, int64_t n, double* work, Team team) {
  const int64_t K = p.K;
  double *S = work, *d = S + K * K, *w = d + K, *index = w + K, *rest = index + K;
  if (!scale_gram(p.gram + n * K * K, K, S, d, team)) return Verdict::bad_gram;
  team.sync();  // all members have read S before one member overwrites it
  if (team.rank() != 0) return Verdict::ok;
  if (p.method == GramMethod::gradvac) {
    const int64_t matrix = n * K * K;
    gradvac(S, d, K, p.keys + matrix, p.option, p.targets + matrix, w, rest);
    for (int64_t i = 0; i < K; ++i) p.weights[n * K + i] = w[i];
    return Verdict::ok;
  }
  int64_t m = 0;
  for (int64_t i = 0; i < K; ++i) {
    p.weights[n * K + i] = 0;
    if (d[i] != 0) index[m++] = double(i);
  }
  if (m == 0) return Verdict::ok;
  for (int64_t a = 0; a < m; ++a) {  // in place: no entry is overwritten before it is read
    d[a] = d[int64_t(index[a])];
    for (int64_t b = 0; b < m; ++b) S[a * m + b] = S[int64_t(index[a]) * K + int64_t(index[b])];
  }
  solve_non_zero_rows({K, m, S, d, w, rest}, p.method, p.option);
  for (int64_t a = 0; a < m; ++a) p.weights[n * K + int64_t(index[a])] = w[a];
  return Verdict::ok;
}

}  // namespace antdiff
