// PCGrad (Yu et al., NeurIPS 2020, algorithm 1) on the Gram matrix: the parameters of the launchers, and the solver of
// one problem.
//
// Row i starts from p_i = g_i and visits the other rows j in its order. If <p_i, g_j> < 0, then p_i -= <p_i, g_j> /
// |g_j|^2 g_j, always with the original g_j. With p_i = sum_j c_ij g_j, the products v_j = <p_i, g_j> start as row i of
// G, and a projection is c_ij = -v_j / G_jj, v += c_ij G_j. A visit without conflict costs one comparison. Every j is
// visited once, so each c_ij is written once. weights_j = sum_i c_ij.
#pragma once

#include <cstdint>

#include "core/scaled_gram.h"
#include "core/team.h"

namespace antdiff {

// All arrays are contiguous and on one device. Exactly one of perms and keys is given.
struct PcgradParams {
  int64_t n = 0, K = 0;            // problems, clusters
  const double* gram = nullptr;    // [n, K, K]
  const int64_t* perms = nullptr;  // [n, K, K-1]: row i lists the other rows in its visiting order
  const double* keys = nullptr;    // [n, K, K]: row i visits the others by ascending keys[i, j]; ties go by j
  bool mean = false;               // divide the weights by K
  bool poison = false;             // a bad gram gives NaN weights and is not reported
  double* weights = nullptr;       // [n, K]
  double* scratch = nullptr;       // CUDA only: scratch_for(n, K, pcgrad_workspace(K)) doubles
};

constexpr int64_t pcgrad_workspace(int64_t K) { return 4 * K * K + K; }

// Write the visiting order of row i as doubles, which hold these integers exactly, since the workspace has one type.
// order_from_perms returns false for an invalid row of perms.
ANTDIFF_HD bool order_from_perms(const int64_t* perm, int64_t K, int64_t i, double* order, double* seen) {
  for (int64_t j = 0; j < K; ++j) seen[j] = double(j == i);
  for (int64_t s = 0; s < K - 1; ++s) {
    const int64_t j = perm[s];
    if (j < 0 || j >= K || seen[j] != 0) return false;
    seen[j] = 1;
    order[s] = double(j);
  }
  return true;
}
ANTDIFF_HD void order_from_keys(const double* key, int64_t K, int64_t i, double* order) {
  for (int64_t s = 0; s < K - 1; ++s) order[s] = double(i == 0);  // a valid row index, in case NaN keys leave a gap
  for (int64_t j = 0; j < K; ++j) {
    if (j == i) continue;
    int64_t rank = i < j ? -(key[i] <= key[j]) : -(key[i] < key[j]);  // the loops below also count row i itself
    for (int64_t l = 0; l < j; ++l) rank += key[l] <= key[j];
    for (int64_t l = j + 1; l < K; ++l) rank += key[l] < key[j];
    order[rank] = double(j);
  }
}

// Compute the coefficients c [K] of row i in the scaled rows d_j g_j, given its visiting order. v [K] is workspace.
ANTDIFF_HD void pcgrad_row(const double* S, int64_t K, int64_t i, const double* order, double* v, double* c) {
  for (int64_t j = 0; j < K; ++j) {
    v[j] = S[i * K + j];
    c[j] = double(j == i);
  }
  for (int64_t s = 0; s < K - 1; ++s) {
    const int64_t j = int64_t(order[s]);
    if (!(v[j] < 0)) continue;  // a zero row has v_j = 0 and is skipped
    const double coefficient = -v[j] / S[j * K + j];
    c[j] = coefficient;
    for (int64_t l = 0; l < K; ++l) v[l] += coefficient * S[j * K + l];
  }
}

// Solve problem n, with one row per member of the team. `work` holds pcgrad_workspace(K) doubles. The weights are
// written only if the result is ok.
template <class Team>
ANTDIFF_HD Verdict pcgrad_problem(const PcgradParams& p, int64_t n, double* work, Team team) {
  const int64_t K = p.K;
  double *S = work, *c = S + K * K, *v = c + K * K, *order = v + K * K, *d = order + K * K;
  if (!scale_gram(p.gram + n * K * K, K, S, d, team)) return Verdict::bad_gram;
  for (int64_t i = team.rank(); i < K; i += team.size()) {
    double* visits = order + i * K;
    bool ok = true;
    if (p.perms) {
      ok = order_from_perms(p.perms + (n * K + i) * (K - 1), K, i, visits, v + i * K);
    } else {
      order_from_keys(p.keys + (n * K + i) * K, K, i, visits);
    }
    if (ok) {
      pcgrad_row(S, K, i, visits, v + i * K, c + i * K);
    } else {
      c[i * K + i] = NAN;  // the other members of the team look for this mark
    }
  }
  team.sync();
  bool ok = true;
  for (int64_t i = 0; i < K; ++i) ok &= c[i * K + i] == c[i * K + i];
  if (!ok) return Verdict::bad_perms;
  for (int64_t j = team.rank(); j < K; j += team.size()) {
    double sum = 1;  // c_jj = 1, since rows never visit themselves
    for (int64_t i = 0; i < K; ++i)
      if (i != j && c[i * K + j] != 0) sum += c[i * K + j] * d[j] / d[i];  // convert from d_j g_j to g_j
    p.weights[n * K + j] = p.mean ? sum / double(K) : sum;
  }
  return Verdict::ok;
}

}  // namespace antdiff
