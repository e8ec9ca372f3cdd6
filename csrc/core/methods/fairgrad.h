// FairGrad (alpha-fair utilities), solved by Newton's method.
#pragma once

#include <cfloat>
#include <cmath>

#include "core/cholesky.h"
#include "core/methods/nonzero_rows.h"
#include "core/scaled_gram.h"
#include "core/team.h"

namespace antdiff {

constexpr int kFairgradIterations = 256;
constexpr double kFairgradResidual = 1e-12;  // stop if max_i |(G w)_i w_i^(1/alpha) - 1| is at most this

// Find b > 0 with (H b)_i = b_i^(-1/alpha), where H is G with its diagonal multiplied by 1 + ridge. h, y, x [m] and M
// [m, m] are workspace. Return false if the iteration does not converge, which happens if a positive combination of
// rows vanishes.
ANTDIFF_HD_CALL bool fairgrad_newton(const double* G, int64_t m, double alpha, double ridge, double* M, double* b,
                                     double* h, double* y, double* x) {
  const double power = 1 - 1 / alpha, bend = 0.5 * (1 + 1 / alpha);
  for (int64_t i = 0; i < m; ++i) b[i] = pow(G[i * m + i], -alpha / (1 + alpha));
  double last = DBL_MAX;
  for (int iteration = 0; iteration < kFairgradIterations; ++iteration) {
    double quadratic = 0, barrier = 0, diagonal = 0;
    for (int64_t i = 0; i < m; ++i) {
      y[i] = ridge * G[i * m + i] * b[i];
      for (int64_t j = 0; j < m; ++j) y[i] += G[i * m + j] * b[j];
      y[i] *= b[i];
      quadratic += y[i];
      diagonal += b[i] * b[i] * G[i * m + i];
    }
    if (!(quadratic > kGramRounding * double(m) * diagonal) || !is_finite(quadratic)) return false;
    for (int64_t i = 0; i < m; ++i) barrier += h[i] = pow(b[i], power);
    const double ray = pow(barrier / quadratic, alpha / (1 + alpha));  // moves b to the minimum along its own ray
    const double ray_power = pow(ray, power);
    double residual = 0;
    for (int64_t i = 0; i < m; ++i) {
      b[i] *= ray;
      h[i] *= ray_power;
      y[i] *= ray * ray;
      residual = fmax(residual, fabs(y[i] / h[i] - 1));
    }
    if (residual <= kFairgradResidual) return true;
    // Solve for relative steps x, scaled by sqrt(h): (b_i G_ij b_j / sqrt(h_i h_j) + I / alpha) sqrt(h) x = (h - y) /
    // sqrt(h).
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = i; j < m; ++j) M[i * m + j] = b[i] * G[i * m + j] * b[j] / sqrt(h[i] * h[j]);
      M[i * m + i] = M[i * m + i] * (1 + ridge) + 1 / alpha;
      x[i] = (h[i] - y[i]) / sqrt(h[i]);
    }
    if (!cholesky_solve(M, x, m, Solo{})) return false;
    double longest = 0;
    for (int64_t i = 0; i < m; ++i) longest = fmax(longest, fabs(x[i] /= sqrt(h[i])));
    // A relative step x changes the Hessian by a factor of about 2 bend |x|, so a full step is safe only if that is
    // small.
    const bool near_solution = bend * longest < 0.25;
    if (near_solution && longest > 0.5 * last) return true;  // only rounding error is left
    last = near_solution ? longest : DBL_MAX;
    const double step = near_solution ? 1 : 1 / (1 + bend * longest);
    for (int64_t i = 0; i < m; ++i) b[i] *= fmax(1 + step * x[i], 0.125);
  }
  return false;
}

// FairGrad (Ban and Ji, ICML 2024): w > 0 with (G w)_i = w_i^(-1/alpha), which minimises the strictly convex function
// 1/2 w^T G w - sum_i w_i^(1 - 1/alpha) / (1 - 1/alpha). alpha = 1 is NashMTL. If a positive combination of rows
// vanishes, there is no minimum, and a ridge gives finite weights, as in nash.h. The result can be NaN only if G is far
// from positive semidefinite.
ANTDIFF_HD_CALL void fairgrad(const NonZeroRows& r, double alpha) {
  const int64_t m = r.m;
  double *G = r.work, *M = G + m * m, *h = M + m * m, *y = h + m, *x = y + m;
  unscaled(r, G);
  bool solved = fairgrad_newton(G, m, alpha, 0.0, M, r.w, h, y, x);
  for (double ridge = 1e-9; !solved && ridge < 1e3 * double(m); ridge *= 100)
    solved = fairgrad_newton(G, m, alpha, ridge, M, r.w, h, y, x);
  // The G above is least_scale^2 times the true one, and w scales with G^(-alpha / (1 + alpha)).
  const double unit = pow(least_scale(r), 2 * alpha / (1 + alpha));
  for (int64_t i = 0; i < m; ++i) r.w[i] = solved ? r.w[i] * unit : NAN;
}

}  // namespace antdiff
