// The input of a method of core/gram_weights.h, and helpers that several methods share.
//
//   S [m, m], S_ij = d_i d_j <g_i, g_j> with S_ii in [1, 4), and d [m], powers of two,
//
// for the m non-zero rows g_i of the K rows. A method writes w [m]. Only the ratios of the d_i matter, so no result
// depends on a unit.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "core/hd.h"

namespace antdiff {

struct NonZeroRows {
  int64_t K, m;  // number of all rows, number of non-zero rows
  double* S;     // [m, m]
  double* d;     // [m]
  double* w;     // [m], the result
  double* work;  // 3 K^2 + 12 K
};

// Relative threshold. A sum this small compared with its terms is rounding error of G.
constexpr double kGramRounding = 64 * DBL_EPSILON;

// The argument `noise` of the spectral methods is a bound on the error of G_ij relative to |g_i| |g_j| that results
// from the precision of J, and 0 for float64. An eigenvalue of the correlation matrix of at most m times this bound
// counts as a zero that rounding has moved. A typical error is at most this fraction of the bound.
constexpr double kTypicalNoise = 1.0 / 4;

// Return the smallest d. 1 / d_min is the scale of the longest row, and d_min / d_i in (0, 1] is the scale of row i
// relative to it.
ANTDIFF_HD double least_scale(const NonZeroRows& r) {
  double least = r.d[0];
  for (int64_t i = 1; i < r.m; ++i) least = fmin(least, r.d[i]);
  return least;
}

// Compute G [m, m], the Gram matrix without the scales, up to a common factor that brings its largest entry to [1, 4).
ANTDIFF_HD void unscaled(const NonZeroRows& r, double* G) {
  const double least = least_scale(r);
  for (int64_t i = 0; i < r.m; ++i)
    for (int64_t j = 0; j < r.m; ++j) G[i * r.m + j] = r.S[i * r.m + j] * (least / r.d[i]) * (least / r.d[j]);
}

// Return |g_i| relative to a common unit. The result is at most 2.
ANTDIFF_HD double relative_norm(const NonZeroRows& r, double least, int64_t i) {
  return sqrt(r.S[i * r.m + i]) * (least / r.d[i]);
}

}  // namespace antdiff
