// NashMTL (Navon et al., ICML 2022) solved exactly: the parameters of the launchers, and the solver of one problem.
//
// The weights a > 0 with G a = 1/a (elementwise) are the unique minimiser of F(a) = 1/2 a^T G a - sum_i log a_i, which
// is self-concordant. The solver is Newton's method in relative steps x = (change of b) / b on the scaled matrix S,
// with a = D b:
//
//   (I + B S B) x = 1 - b * (S b),  B = diag(b);  lambda^2 = x . (1 - b * (S b))
//   b *= 1 + t x
//
// t = 1 if lambda < 1/4, where convergence is quadratic. Otherwise t is near the minimum of F along the step. The
// matrix I + B S B has no eigenvalue below 1, however close S is to singular. Rows that nearly oppose each other need
// weights orders of magnitude above the start, and the textbook's t = 1 / (1 + lambda) could at most double them per
// step. Therefore a search finds t, at K operations per trial. Before each step, b also moves along its own ray to the
// minimum of F there, where b^T S b is the number of rows. This costs nothing.
#pragma once

#include <cfloat>
#include <cstdint>

#include "core/cholesky.h"
#include "core/scaled_gram.h"
#include "core/team.h"

namespace antdiff {

// All arrays are contiguous and on one device.
struct NashParams {
  int64_t n = 0, K = 0;          // problems, clusters
  const double* gram = nullptr;  // [n, K, K]
  bool poison = false;           // a bad gram gives NaN weights and is not reported
  double* weights = nullptr;     // [n, K]
  double* scratch = nullptr;     // CUDA only: scratch_for(n, K, nash_workspace(K)) doubles
};

constexpr int64_t nash_workspace(int64_t K) { return 2 * K * K + 4 * K; }

constexpr int kNashIterations = 64;
constexpr int kNashTrials = 32;          // each trial can double t
constexpr double kNashResidual = 1e-12;  // stop if max_i |a_i (G a)_i - 1| is at most this
constexpr double kNashRidge = 1e-9;      // relative to the diagonal, if G has no solution
// If b^T S b is below this threshold times K times its diagonal part, it is rounding error of G, and a positive
// combination of the rows vanishes.
constexpr double kNashStationary = 64 * DBL_EPSILON;

// Return the t that nearly minimises F(b (1 + t x)). This is Newton's method in one dimension; its damped steps keep
// every 1 + t x_i positive and never raise F. r is the right-hand side, so b * (S b) = 1 - r and B S B x = r - x.
ANTDIFF_HD double nash_step(const double* x, const double* r, double lambda, int64_t K) {
  double linear = 0, quadratic = 0;
  for (int64_t i = 0; i < K; ++i) {
    linear += x[i] * (1 - r[i]);
    quadratic += x[i] * (r[i] - x[i]);
  }
  quadratic = fmax(quadratic, 0.0);  // rounding error can make it negative in a direction on which S vanishes
  double t = 1 / (1 + lambda);
  for (int trial = 0; trial < kNashTrials; ++trial) {
    double slope = linear + t * quadratic, curvature = quadratic;
    for (int64_t i = 0; i < K; ++i) {
      const double change = x[i] / (1 + t * x[i]);
      slope -= change;
      curvature += change * change;
    }
    const double decrement = fabs(slope) / sqrt(curvature);
    if (!(decrement > 0.1)) break;
    t -= slope / (curvature * (1 + decrement));
  }
  return t;
}

// Minimise F for S with its diagonal multiplied by 1 + ridge. b [K] is the result, with zeros for zero rows. y, x [K]
// and M [K, K] are workspace. Return false if there is no minimum, because a positive combination of rows vanishes or S
// is indefinite.
template <class Team>
ANTDIFF_HD bool nash_newton(const double* S, double ridge, int64_t K, double* M, double* b, double* y, double* x,
                            Team team) {
  for (int64_t i = team.rank(); i < K; i += team.size()) b[i] = S[i * K + i] > 0 ? 1 / sqrt(S[i * K + i]) : 0;
  team.sync();
  double last = DBL_MAX;
  for (int iteration = 0; iteration < kNashIterations; ++iteration) {
    for (int64_t i = team.rank(); i < K; i += team.size()) {
      double sum = ridge * S[i * K + i] * b[i];
      for (int64_t k = 0; k < K; ++k) sum += S[k * K + i] * b[k];
      y[i] = sum;
    }
    team.sync();
    double form = 0, diagonal = 0, rows = 0;
    for (int64_t i = 0; i < K; ++i) {
      form += b[i] * y[i];
      diagonal += b[i] * b[i] * S[i * K + i];
      rows += double(b[i] > 0);
    }
    if (rows == 0) return true;
    if (!(form > kNashStationary * double(K) * diagonal) || !is_finite(form)) return false;
    const double ray = sqrt(rows / form);
    double residual = 0;
    for (int64_t i = 0; i < K; ++i)
      if (b[i] > 0) residual = fmax(residual, fabs(ray * b[i] * (ray * y[i]) - 1));
    team.sync();
    for (int64_t i = team.rank(); i < K; i += team.size()) {
      b[i] *= ray;
      y[i] = b[i] > 0 ? 1 - b[i] * (ray * y[i]) : 0;  // from here on y is the right-hand side
      x[i] = y[i];
    }
    team.sync();
    if (residual <= kNashResidual) return true;
    for (int64_t i = team.grid_row(); i < K; i += team.grid_rows())
      for (int64_t k = i + team.grid_column(); k < K; k += team.grid_columns()) {
        const double entry = b[i] * S[i * K + k] * b[k];
        M[i * K + k] = i == k ? 1 + entry * (1 + ridge) : entry;
      }
    team.sync();
    if (!cholesky_solve(M, x, K, team)) return false;
    double square = 0;
    for (int64_t i = 0; i < K; ++i) square += x[i] * y[i];
    if (!(square >= 0)) return false;
    const double lambda = sqrt(square);
    // Below 1/4 the decrement at least halves in each step, until only rounding error is left.
    if (lambda < 0.25 && lambda > 0.5 * last) return true;
    last = lambda < 0.25 ? lambda : DBL_MAX;
    const double step = lambda < 0.25 ? 1 : nash_step(x, y, lambda, K);
    team.sync();
    for (int64_t i = team.rank(); i < K; i += team.size()) b[i] *= 1 + step * x[i];
    team.sync();
  }
  return false;
}

// Solve problem n. `work` holds nash_workspace(K) doubles. The weights are written only if the result is ok.
template <class Team>
ANTDIFF_HD Verdict nash_problem(const NashParams& p, int64_t n, double* work, Team team) {
  const int64_t K = p.K;
  double *S = work, *M = S + K * K, *b = M + K * K, *y = b + K, *x = y + K, *d = x + K;
  if (!scale_gram(p.gram + n * K * K, K, S, d, team)) return Verdict::bad_gram;
  // The first ridge suffices for a Gram matrix that is accurate to float64. A Gram matrix that was rounded more
  // coarsely may have eigenvalues well below zero, so the ridge grows until it covers them. A ridge of K (1 +
  // kGramSlack) covers every matrix that has passed the check.
  bool solved = nash_newton(S, 0.0, K, M, b, y, x, team);
  for (double ridge = kNashRidge; !solved && ridge < 1e3 * double(K); ridge *= 100) {
    team.sync();
    solved = nash_newton(S, ridge, K, M, b, y, x, team);
  }
  for (int64_t i = team.rank(); i < K; i += team.size()) p.weights[n * K + i] = solved ? b[i] * d[i] : NAN;
  return Verdict::ok;
}

}  // namespace antdiff
