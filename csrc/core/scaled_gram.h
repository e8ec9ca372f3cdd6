// The Gram matrix G = J J^T as the balancing methods read it: checked, symmetrised and scaled.
//
//   S = D G D,  D = diag(d_i),  d_i = 2^-h with S_ii in [1, 4);  d_i = 0 for a zero row
//
// The scales d_i are powers of two, so no entry is rounded. A method therefore gives the same bits for J and for J with
// its rows multiplied by powers of two, and nothing overflows or underflows unless G itself did.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/hd.h"

namespace antdiff {

// How far G_ij and G_ji may differ, and how far |G_ij| may exceed |g_i| |g_j|, in units of |g_i| |g_j|. This is above
// the rounding of a Gram matrix accumulated in half precision, and below the error of a matrix that is not one.
constexpr double kGramSlack = 1.0 / 16;

ANTDIFF_HD bool is_finite(double x) { return x - x == 0; }

// Return the power of two d with d * d * x in [1, 4). Return 0 for x = 0, and NaN if x is negative or not finite.
ANTDIFF_HD double power_of_two_scale(double x) {
  if (!(x >= 0) || !is_finite(x)) return NAN;
  if (x == 0) return 0;
  int exponent;
  (void)frexp(x, &exponent);  // x in [2^(exponent - 1), 2^exponent)
  --exponent;
  return ldexp(1.0, -(exponent - (exponent & 1)) / 2);  // the half is rounded towards minus infinity
}

// Return S_ij, or NaN if G_ij shows that G is not a Gram matrix. Rows and columns with a zero diagonal entry count
// as zero.
ANTDIFF_HD double scaled_entry(const double* G, const double* d, int64_t K, int64_t i, int64_t j) {
  const double entry = G[i * K + j], mirrored = G[j * K + i];
  if (!is_finite(entry) || !is_finite(mirrored)) return NAN;
  if (d[i] == 0 || d[j] == 0) return 0;
  const double a = entry * d[i] * d[j], b = mirrored * d[i] * d[j];
  const double norms = sqrt((G[i * K + i] * d[i] * d[i]) * (G[j * K + j] * d[j] * d[j]));  // in [1, 4)
  const double s = 0.5 * (a + b);
  return fabs(a - b) <= kGramSlack * norms && fabs(s) <= (1 + kGramSlack) * norms ? s : NAN;
}

// Fill S [K, K] and d [K]. Return false if G is not a Gram matrix, which is finite and symmetric and has a diagonal >=
// 0 and |G_ij| <= |g_i| |g_j|.
template <class Team>
ANTDIFF_HD bool scale_gram(const double* G, int64_t K, double* S, double* d, Team team) {
  for (int64_t i = team.rank(); i < K; i += team.size()) d[i] = power_of_two_scale(G[i * K + i]);
  team.sync();
  for (int64_t i = team.rank(); i < K; i += team.size()) {
    bool bad = d[i] != d[i];
    for (int64_t j = 0; j < K; ++j) {
      S[i * K + j] = scaled_entry(G, d, K, i, j);
      bad |= S[i * K + j] != S[i * K + j];
    }
    if (bad) S[i * K + i] = NAN;  // the other members of the team look for this mark
  }
  team.sync();
  bool ok = true;
  for (int64_t i = 0; i < K; ++i) ok &= S[i * K + i] == S[i * K + i];
  return ok;
}

}  // namespace antdiff
