// Methods built on the shortest convex combination of gradients.
#pragma once

#include <cfloat>
#include <cmath>

#include "core/active_set.h"
#include "core/cholesky.h"
#include "core/methods/dual_cone.h"
#include "core/methods/nonzero_rows.h"
#include "core/team.h"

namespace antdiff {

// MGDA (Desideri, 2012; Sener and Koltun, NeurIPS 2018): the shortest convex combination of the gradients.
ANTDIFF_HD_CALL void mgda(const NonZeroRows& r) {
  double *G = r.work, *rest = G + r.m * r.m;
  unscaled(r, G);
  min_norm_point(G, r.m, r.w, rest);
}

// Compute q [m], the affine combination (of sum 1) of the rows in use (x_i > 0) that has the smallest norm. M [m, m] is
// workspace. Return false if the rows in use are affinely dependent.
ANTDIFF_HD_CALL bool affine_min_norm(const NonZeroRows& r, const double* x, double* q, double* M) {
  double largest = 0;
  int64_t size = 0;
  for (int64_t i = 0; i < r.m; ++i) largest = fmax(largest, r.d[i]);
  for (int64_t i = 0; i < r.m; ++i) {
    if (!(x[i] > 0)) continue;
    int64_t column = 0;
    for (int64_t j = 0; j < r.m; ++j)
      if (x[j] > 0) {
        // The width of M is known only at the end, so its rows are m wide for now.
        M[size * r.m + column++] = r.S[i * r.m + j] + (r.d[i] / largest) * (r.d[j] / largest);
      }
    q[size++] = r.d[i] / largest;
  }
  for (int64_t a = 1; a < size; ++a)
    for (int64_t b = 0; b < size; ++b) M[a * size + b] = M[a * r.m + b];
  if (!cholesky_solve(M, q, size, Solo{})) return false;
  double sum = 0;
  for (int64_t i = r.m - 1, a = size; i >= 0; --i) {
    q[i] = x[i] > 0 ? q[--a] * (r.d[i] / largest) : 0;
    sum += q[i];
  }
  for (int64_t i = 0; i < r.m; ++i) q[i] /= sum;
  return sum > 0;
}

// Return x^T G y.
ANTDIFF_HD double form(const double* G, const double* x, const double* y, int64_t m) {
  double sum = 0;
  for (int64_t i = 0; i < m; ++i)
    if (x[i] != 0)
      for (int64_t j = 0; j < m; ++j) sum += x[i] * G[i * m + j] * y[j];
  return sum;
}
// Return the diagonal part of x^T G x, which is its size without cancellation, within a factor of m.
ANTDIFF_HD double diagonal_form(const double* G, const double* x, int64_t m) {
  double sum = 0;
  for (int64_t i = 0; i < m; ++i) sum += x[i] * x[i] * G[i * m + i];
  return sum;
}

constexpr int kCagradIterations = 64;
constexpr double kCagradAccuracy = 1e-13;  // accuracy of |d - g_0|, relative to c |g_0|

// Whether a convex combination of the rows vanishes up to rounding, which does not depend on the lengths of the rows. R
// [m, m], a [m] and `rest` [min_norm_workspace(m)] are workspace.
ANTDIFF_HD_CALL bool weakly_stationary(const NonZeroRows& r, double* R, double* a, double* rest) {
  for (int64_t e = 0; e < r.m * r.m; ++e) R[e] = r.S[e];
  min_norm_point(R, r.m, a, rest);
  return !(form(r.S, a, a, r.m) > kGramRounding * double(r.m) * diagonal_form(r.S, a, r.m));
}

// CAGrad (Liu et al., NeurIPS 2021): among all d with |d - g_0| <= c |g_0|, the d that maximises min_i <d, g_i>.
//
// d = g_0 + J^T x with x >= 0. For a fixed nu = sum_i x_i, the best x / nu is the min-norm point of the rows nu g_i +
// g_0, and |J^T x| grows with nu, so nu is the only unknown. As long as the rows in use stay the same, x = p + nu q,
// where q is their affine combination of smallest norm and <J^T p, J^T q> = 0. Then |J^T x|^2 = |J^T p|^2 + nu^2 |J^T
// q|^2 gives nu.
//
// The projection of g_0 onto the dual cone is one of these d, and bounds nu from one side. If a convex combination of
// rows vanishes, no d has a min_i <d, g_i> above zero, so the projection attains the maximum as soon as it lies in the
// ball. A larger nu would then add a multiple of a vanishing combination, and its rounding error.
ANTDIFF_HD_CALL void cagrad(const NonZeroRows& r, double c) {
  const int64_t m = r.m;
  double *G = r.work, *R = G + m * m, *b = R + m * m, *x = b + m, *q = x + m, *rest = q + m;
  unscaled(r, G);
  double square = 0, terms = 0;  // |g_0|^2
  for (int64_t i = 0; i < m; ++i) {
    b[i] = 0;
    for (int64_t j = 0; j < m; ++j) b[i] += G[i * m + j] / double(r.K);
    square += b[i] / double(r.K);
    terms += G[i * m + i] / double(r.K) / double(r.K);
  }
  const double radius2 = square > kGramRounding * double(m) * terms ? c * c * square : 0;
  double low = 0, high = DBL_MAX, of_projection = 0;
  project_mean(r, x, q, rest);
  for (int64_t i = 0; i < m; ++i) of_projection += x[i];
  const bool in_ball = form(G, x, x, m) <= radius2;
  (in_ball ? low : high) = of_projection;
  const bool solved = in_ball && weakly_stationary(r, R, q, rest);
  double nu = c > low && c < high ? c : in_ball ? 2 * low : high / 2;
  for (int iteration = 0; !solved && radius2 > 0 && iteration < kCagradIterations; ++iteration) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < m; ++j) R[i * m + j] = nu * (nu * G[i * m + j] + b[i] + b[j]) + square;
    min_norm_point(R, m, x, rest);
    for (int64_t i = 0; i < m; ++i) x[i] *= nu;
    const double length2 = form(G, x, x, m);
    if (fabs(length2 - radius2) <= 2 * kCagradAccuracy * radius2) break;
    (length2 < radius2 ? low : high) = nu;
    double next = NAN;
    if (affine_min_norm(r, x, q, R)) {
      const double slope2 = form(G, q, q, m);
      for (int64_t i = 0; i < m; ++i) rest[i] = x[i] - nu * q[i];
      if (slope2 > kGramRounding * double(m) * diagonal_form(G, q, m))
        next = sqrt((radius2 - form(G, rest, rest, m)) / slope2);
    }
    if (!(next > low && next < high)) next = high == DBL_MAX ? 4 * nu : low == 0 ? nu / 4 : sqrt(low) * sqrt(high);
    if (fabs(next - nu) <= kCagradAccuracy * nu) break;
    nu = next;
  }
  for (int64_t i = 0; i < m; ++i) r.w[i] = 1 / double(r.K) + (radius2 > 0 ? x[i] : 0);
}

}  // namespace antdiff
