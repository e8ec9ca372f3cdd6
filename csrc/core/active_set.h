// Small convex quadratic programs over x >= 0. The active-set method of Lawson and Hanson ("Solving Least Squares
// Problems", 1974, chapter 23) solves them exactly on the Gram matrix. Each step solves one linear system on the rows
// in use, which are the rows whose x is positive.
#pragma once

#include <cfloat>
#include <cstdint>

#include "core/cholesky.h"
#include "core/scaled_gram.h"
#include "core/team.h"

namespace antdiff {

// Relative threshold, scaled by K. A slope or pivot this small compared with its summands is rounding error and is
// treated as zero.
constexpr double kActiveSetRounding = 8 * DBL_EPSILON;

constexpr int64_t nonnegative_qp_workspace(int64_t K) { return K * K + 3 * K; }

// Solve H_PP z = -c_P for the rows P = order[0..size). Return false if the last row of `order`, which is the newest,
// depends linearly on the others.
ANTDIFF_HD bool solve_in_use(const double* H, const double* c, int64_t K, const double* order, int64_t size, double* M,
                             double* z) {
  for (int64_t a = 0; a < size; ++a) {
    const int64_t i = int64_t(order[a]);
    for (int64_t b = a; b < size; ++b) M[a * size + b] = H[i * K + int64_t(order[b])];
    z[a] = -c[i];
  }
  if (!cholesky_solve(M, z, size, Solo{})) return false;
  const int64_t newest = int64_t(order[size - 1]);
  return M[size * size - 1] > kActiveSetRounding * double(K) * H[newest * K + newest];
}

// Return the row whose entry lowers the objective most steeply, or -1 at the optimum. Only rows with state 0 are
// candidates.
ANTDIFF_HD int64_t row_to_enter(const double* H, const double* c, int64_t K, const double* x, const double* state) {
  int64_t best = -1;
  double steepest = 0;
  for (int64_t j = 0; j < K; ++j) {
    if (state[j] != 0) continue;
    double slope = -c[j], terms = fabs(c[j]);
    for (int64_t k = 0; k < K; ++k) {
      slope -= H[j * K + k] * x[k];
      terms += fabs(H[j * K + k] * x[k]);
    }
    const double steep = slope / sqrt(H[j * K + j]);
    if (slope > kActiveSetRounding * double(K) * terms && steep > steepest) {
      best = j;
      steepest = steep;
    }
  }
  return best;
}

// Compute x [K] = argmin 1/2 x^T H x + c^T x over x >= 0. H [K, K] must be positive semidefinite with a positive
// diagonal, and c must lie in its range, so that a minimum exists. If H is singular, x is one of several minimisers,
// which all have the same H x. Every row that enters lowers the objective, and the rows in use stay linearly
// independent, so no ridge is needed.
ANTDIFF_HD_CALL void nonnegative_qp(const double* H, const double* c, int64_t K, double* x, double* work) {
  double *M = work, *order = M + K * K, *state = order + K, *z = state + K;
  enum : int { out = 0, in = 1, blocked = 2 };  // blocked: depends on the rows in use, until those change
  for (int64_t i = 0; i < K; ++i) x[i] = state[i] = 0;
  int64_t size = 0;
  // In exact arithmetic no set of rows recurs, and a few times K steps suffice. The bound guards against an endless
  // loop caused by rounding.
  for (int64_t step = 0; step < 16 * K + 16; ++step) {
    const int64_t entering = row_to_enter(H, c, K, x, state);
    if (entering < 0) return;
    order[size++] = double(entering);
    if (!solve_in_use(H, c, K, order, size, M, z) || !(z[size - 1] > 0)) {
      --size;
      state[entering] = blocked;
      continue;
    }
    state[entering] = in;
    for (bool feasible = false; !feasible && size > 0;) {
      double fraction = 1;  // how far x can move towards z before a row in use reaches zero
      for (int64_t a = 0; a < size; ++a) {
        const double from = x[int64_t(order[a])];
        if (!(z[a] > 0)) fraction = fmin(fraction, from / (from - z[a]));
      }
      feasible = true;
      int64_t kept = 0;
      for (int64_t a = 0; a < size; ++a) {
        const int64_t i = int64_t(order[a]);
        // This repeats the division above bit for bit, so at least one row leaves.
        const bool leaves = !(z[a] > 0) && !(x[i] / (x[i] - z[a]) > fraction);
        x[i] = leaves ? 0 : x[i] + fraction * (z[a] - x[i]);
        state[i] = leaves ? out : in;
        if (!leaves) order[kept++] = double(i);
        feasible &= z[a] > 0;
      }
      size = kept;
      if (!feasible && size > 0 && !solve_in_use(H, c, K, order, size, M, z)) break;
    }
    for (int64_t i = 0; i < K; ++i)
      if (state[i] == blocked) state[i] = out;
  }
}

constexpr int64_t min_norm_workspace(int64_t K) { return nonnegative_qp_workspace(K) + 3 * K; }

// Compute a [K], the point of the simplex with the smallest a^T R a, for a Gram matrix R [K, K]. R is overwritten.
//
// The simplex needs no constraint of its own. For any sigma > 0, x = argmin x^T R x + (sigma . x - 1)^2 over x >= 0,
// divided by its sum, is that point (Lawson and Hanson reduce least distance to least squares in this way). sigma is
// measured in units of the length of the shortest row, which keeps rows of very different lengths resolved.
ANTDIFF_HD_CALL void min_norm_point(double* R, int64_t K, double* a, double* work) {
  double *scale = work, *sigma = scale + K, *c = sigma + K, *rest = c + K;
  double largest = 0;
  int64_t vanishing = -1;
  for (int64_t i = 0; i < K; ++i) {
    a[i] = 0;
    scale[i] = power_of_two_scale(fmax(R[i * K + i], 0.0));
    if (scale[i] == 0) vanishing = i;
    largest = fmax(largest, scale[i]);
  }
  if (vanishing >= 0) {
    a[vanishing] = 1;
    return;
  }
  for (int64_t i = 0; i < K; ++i) {
    sigma[i] = scale[i] / largest;
    c[i] = -sigma[i];
  }
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = 0; j < K; ++j) R[i * K + j] = R[i * K + j] * scale[i] * scale[j] + sigma[i] * sigma[j];
  nonnegative_qp(R, c, K, a, rest);
  double sum = 0;
  for (int64_t i = 0; i < K; ++i) sum += a[i] *= sigma[i];
  for (int64_t i = 0; i < K; ++i) a[i] /= sum;
}

}  // namespace antdiff
