// Balancing methods as one function of the Gram matrix each: parameters of the launchers, and one problem.
//
// All are sequential algorithms on a few hundred numbers, so one member of the team computes a problem; the others only
// share the check and the scaling of G. Rows of G that are zero are taken out before a method sees it, and get weight
// 0: a cluster without samples neither moves the direction nor, as the shortest of all gradients, stops it. A method
// sees
//
//   S [m, m], S_ij = d_i d_j <g_i, g_j> with S_ii in [1, 4), and d [m], powers of two,
//
// for the m non-zero rows g_i of K, and writes w [m]. Only ratios of the d_i matter: no result depends on a unit.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "core/active_set.h"
#include "core/cholesky.h"
#include "core/jacobi.h"
#include "core/pcgrad.h"
#include "core/scaled_gram.h"
#include "core/team.h"

namespace antdiff {

enum class GramMethod : int32_t { upgrad, dualproj, aligned_mtl, mgda, cagrad, imtl_g, config, fairgrad, gradvac };
constexpr int kGramMethods = 9;

// Contiguous, on one device.
struct GramWeightsParams {
  int64_t n = 0, K = 0;          // problems, clusters
  const double* gram = nullptr;  // [n, K, K]
  GramMethod method{};
  double option = 0;             // cagrad: c; fairgrad: alpha; gradvac: beta
  const double* keys = nullptr;  // gradvac: [n, K, K], orders of the visits as in PcgradParams
  double* targets = nullptr;     // gradvac: [n, K, K], target cosines; updated unless the gram is bad
  bool poison = false;           // a bad gram gives NaN weights and nothing else
  double* weights = nullptr;     // [n, K]
  double* scratch = nullptr;     // CUDA only: scratch_for(n, K, gram_weights_workspace(K)) doubles
};

struct NonZeroRows {
  int64_t K, m;  // rows in all, rows here
  double* S;     // [m, m]
  double* d;     // [m]
  double* w;     // [m], the result
  double* work;  // 3 K^2 + 12 K
};

constexpr int64_t gram_weights_workspace(int64_t K) { return 4 * K * K + 15 * K; }
static_assert(gram_weights_workspace(kSharedK) * sizeof(double) <= 48 * 1024,
              "must fit a block's static shared memory");

// What is this far below the terms it is the sum of is rounding of G.
constexpr double kGramRounding = 64 * DBL_EPSILON;

// The least d: 1 / d_min is the scale of the longest row, e_i = d_min / d_i in (0, 1] that of row i relative to it.
ANTDIFF_HD double least_scale(const NonZeroRows& r) {
  double least = r.d[0];
  for (int64_t i = 1; i < r.m; ++i) least = fmin(least, r.d[i]);
  return least;
}

// G [m, m] = the Gram matrix itself, up to a common factor that brings its largest entry to [1, 4).
ANTDIFF_HD void unscaled(const NonZeroRows& r, double* G) {
  const double least = least_scale(r);
  for (int64_t i = 0; i < r.m; ++i)
    for (int64_t j = 0; j < r.m; ++j) G[i * r.m + j] = r.S[i * r.m + j] * (least / r.d[i]) * (least / r.d[j]);
}

// ---- projections onto the dual cone {x : <x, g_j> >= 0}: g_i + sum_j u_j g_j with u = argmin_{u >= 0} |g_i + J^T u|^2

// UPGrad (Quinton and Rey, 2024): the mean over i of the projections of g_i.
ANTDIFF_HD_CALL void upgrad(const NonZeroRows& r) {
  double *x = r.work, *rest = x + r.m;
  for (int64_t j = 0; j < r.m; ++j) r.w[j] = 1 / double(r.K);
  for (int64_t i = 0; i < r.m; ++i) {
    nonnegative_qp(r.S, r.S + i * r.m, r.m, x, rest);
    for (int64_t j = 0; j < r.m; ++j)
      if (x[j] > 0) r.w[j] += x[j] * (r.d[j] / r.d[i]) / double(r.K);
  }
}

// DualProj, the rule of GEM (Lopez-Paz and Ranzato, NeurIPS 2017): the projection of the mean gradient.
ANTDIFF_HD_CALL void dualproj(const NonZeroRows& r) {
  double *x = r.work, *c = x + r.m, *rest = c + r.m;
  const double least = least_scale(r);
  for (int64_t j = 0; j < r.m; ++j) {
    c[j] = 0;
    for (int64_t i = 0; i < r.m; ++i) c[j] += r.S[j * r.m + i] * (least / r.d[i]) / double(r.K);
  }
  nonnegative_qp(r.S, c, r.m, x, rest);
  for (int64_t j = 0; j < r.m; ++j) r.w[j] = 1 / double(r.K) + x[j] * (r.d[j] / least);
}

// ---- spectral methods -----------------------------------------------------------------------------------------------

// Aligned-MTL (Senushkin et al., CVPR 2023): J with all non-zero singular values set to the smallest of them, then the
// mean of its rows: w = sqrt(lambda_min) V Lambda^(-1/2) V^T 1/K. Eigenvalues within rounding of zero are zero.
ANTDIFF_HD_CALL void aligned_mtl(const NonZeroRows& r) {
  double *A = r.work, *V = A + r.m * r.m;
  unscaled(r, A);
  jacobi_eigen(A, V, r.m);
  double largest = 0;
  for (int64_t k = 0; k < r.m; ++k) largest = fmax(largest, A[k * r.m + k]);
  const double zero = DBL_EPSILON * double(r.m) * largest;
  double smallest = largest;
  for (int64_t k = 0; k < r.m; ++k)
    if (A[k * r.m + k] > zero) smallest = fmin(smallest, A[k * r.m + k]);
  for (int64_t i = 0; i < r.m; ++i) r.w[i] = 0;
  for (int64_t k = 0; k < r.m; ++k) {
    if (!(A[k * r.m + k] > zero)) continue;
    double sum = 0;
    for (int64_t i = 0; i < r.m; ++i) sum += V[i * r.m + k];
    const double factor = sqrt(smallest / A[k * r.m + k]) * sum / double(r.K);
    for (int64_t i = 0; i < r.m; ++i) r.w[i] += factor * V[i * r.m + k];
  }
}

// The correlation matrix C [m, m], v [m] = C^+ 1 and p [m] = C C^+ 1, the projection of 1 onto the range of C; both are
// 0 where 1 is perpendicular to it. C is destroyed; V [m, m] is workspace. Returns what is rounding in a sum of the
// v_i, relative to its terms: that of C, times its condition.
ANTDIFF_HD_CALL double equalise(const NonZeroRows& r, double* C, double* V, double* v, double* p) {
  const double size = double(r.m);
  for (int64_t i = 0; i < r.m; ++i)
    for (int64_t j = 0; j < r.m; ++j)
      C[i * r.m + j] = i == j ? 1 : r.S[i * r.m + j] / sqrt(r.S[i * r.m + i] * r.S[j * r.m + j]);
  jacobi_eigen(C, V, r.m);
  double least = size, square = 0;  // of the eigenvalues that are not zero; |p|^2
  bool dependent = false;
  for (int64_t i = 0; i < r.m; ++i) v[i] = p[i] = 0;
  for (int64_t k = 0; k < r.m; ++k) {
    const double lambda = C[k * r.m + k];
    if (!(lambda > kGramRounding * size)) {  // the trace is m, so m bounds the eigenvalues
      dependent = true;
      continue;
    }
    least = fmin(least, lambda);
    double sum = 0;
    for (int64_t i = 0; i < r.m; ++i) sum += V[i * r.m + k];
    square += sum * sum;
    for (int64_t i = 0; i < r.m; ++i) {
      v[i] += V[i * r.m + k] * sum / lambda;
      p[i] += V[i * r.m + k] * sum;
    }
  }
  // Rounding tilts the range of C against its null space by as much as this, and 1 has length sqrt(m).
  const double rounding = kGramRounding * size * size / least;
  if (dependent && square <= rounding * rounding * size)
    for (int64_t i = 0; i < r.m; ++i) v[i] = p[i] = 0;
  return rounding;
}

// |g_i| relative to a common unit, at most 2.
ANTDIFF_HD double relative_norm(const NonZeroRows& r, double least, int64_t i) {
  return sqrt(r.S[i * r.m + i]) * (least / r.d[i]);
}

// IMTL-G (Liu et al., ICLR 2021): the combination with weights of sum 1 that has equal projections onto all g_i. There
// is none, and the weights are 0, where gradients oppose each other exactly.
ANTDIFF_HD_CALL void imtl_g(const NonZeroRows& r) {
  double *C = r.work, *V = C + r.m * r.m, *v = V + r.m * r.m, *p = v + r.m;
  const double rounding = equalise(r, C, V, v, p);
  const double least = least_scale(r);
  double shortest = DBL_MAX, sum = 0, terms = 0;
  for (int64_t i = 0; i < r.m; ++i) shortest = fmin(shortest, relative_norm(r, least, i));
  for (int64_t i = 0; i < r.m; ++i) {
    r.w[i] = v[i] * (shortest / relative_norm(r, least, i));
    sum += r.w[i];
    terms += fabs(r.w[i]);
  }
  for (int64_t i = 0; i < r.m; ++i) r.w[i] = fabs(sum) > rounding * terms ? r.w[i] / sum : 0;
}

// ConFIG (Liu et al., ICLR 2025): the direction with equal cosines to all g_i, as long as the sum of their projections
// onto it. Its coefficients are those of J with unit rows; v . C v = 1^T C^+ 1 is the squared length there.
ANTDIFF_HD_CALL void config(const NonZeroRows& r) {
  double *C = r.work, *V = C + r.m * r.m, *v = V + r.m * r.m, *p = v + r.m;
  equalise(r, C, V, v, p);
  const double least = least_scale(r);
  double square = 0, projections = 0;
  for (int64_t i = 0; i < r.m; ++i) {
    square += v[i] * p[i];
    projections += relative_norm(r, least, i) * p[i];
  }
  for (int64_t i = 0; i < r.m; ++i)
    r.w[i] = square > 0 ? v[i] / relative_norm(r, least, i) * (projections / square) : 0;
}

// ---- the point of least norm, and directions near the mean ----------------------------------------------------------

// MGDA (Desideri, 2012; Sener and Koltun, NeurIPS 2018): the shortest convex combination of the gradients.
ANTDIFF_HD_CALL void mgda(const NonZeroRows& r) {
  double *G = r.work, *rest = G + r.m * r.m;
  unscaled(r, G);
  min_norm_point(G, r.m, r.w, rest);
}

// The affine combination of the rows in use (x_i > 0) with the least norm: q [m], of sum 1. M [m, m] is workspace.
// False where the rows in use are affinely dependent.
ANTDIFF_HD_CALL bool affine_min_norm(const NonZeroRows& r, const double* x, double* q, double* M) {
  double largest = 0;
  int64_t size = 0;
  for (int64_t i = 0; i < r.m; ++i) largest = fmax(largest, r.d[i]);
  for (int64_t i = 0; i < r.m; ++i) {
    if (!(x[i] > 0)) continue;
    int64_t column = 0;
    for (int64_t j = 0; j < r.m; ++j)
      if (x[j] > 0) {
        // The first `size` rows of M are done, and the width of M is known only at the end: m wide for now.
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

// x^T G y
ANTDIFF_HD double form(const double* G, const double* x, const double* y, int64_t m) {
  double sum = 0;
  for (int64_t i = 0; i < m; ++i)
    if (x[i] != 0)
      for (int64_t j = 0; j < m; ++j) sum += x[i] * G[i * m + j] * y[j];
  return sum;
}
// The diagonal part of x^T G x: how large it would be without cancellation, within a factor of m.
ANTDIFF_HD double diagonal_form(const double* G, const double* x, int64_t m) {
  double sum = 0;
  for (int64_t i = 0; i < m; ++i) sum += x[i] * x[i] * G[i * m + i];
  return sum;
}

constexpr int kCagradIterations = 64;
constexpr double kCagradAccuracy = 1e-13;  // of |d - g_0| relative to c |g_0|

// CAGrad (Liu et al., NeurIPS 2021): of all d with |d - g_0| <= c |g_0|, the one whose least <d, g_i> is greatest.
//
// d = g_0 + J^T x with x >= 0. For a fixed nu = sum_i x_i the best x / nu is the point of least norm of the rows
// nu g_i + g_0, and |J^T x| grows with nu: one unknown. While the rows in use stay the same, x = p + nu q with q their
// affine combination of least norm and <J^T p, J^T q> = 0, so |J^T x|^2 = |J^T p|^2 + nu^2 |J^T q|^2 gives nu. Where a
// convex combination of rows vanishes, |J^T x| may stay below c |g_0| for all nu: d is then the limit, the projection
// of g_0 onto the dual cone, which is as good as any.
ANTDIFF_HD_CALL void cagrad(const NonZeroRows& r, double c) {
  const int64_t m = r.m;
  double *G = r.work, *R = G + m * m, *b = R + m * m, *x = b + m, *q = x + m, *rest = q + m;
  unscaled(r, G);
  double square = 0, terms = 0;  // |g_0|^2
  for (int64_t i = 0; i < m; ++i) {
    b[i] = x[i] = 0;
    for (int64_t j = 0; j < m; ++j) b[i] += G[i * m + j] / double(r.K);
    square += b[i] / double(r.K);
    terms += G[i * m + i] / double(r.K) / double(r.K);
  }
  const double radius2 = square > kGramRounding * double(m) * terms ? c * c * square : 0;
  double nu = c, low = 0, high = DBL_MAX;
  for (int iteration = 0; radius2 > 0 && iteration < kCagradIterations; ++iteration) {
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
      bool convex = true;
      for (int64_t i = 0; i < m; ++i) convex &= q[i] >= 0;
      const bool flat = !(slope2 > kGramRounding * double(m) * diagonal_form(G, q, m));
      if (flat && convex && length2 < radius2) break;  // the limit: more of q adds nothing to J^T x
      for (int64_t i = 0; i < m; ++i) rest[i] = x[i] - nu * q[i];
      if (!flat) next = sqrt((radius2 - form(G, rest, rest, m)) / slope2);
    }
    if (!(next > low && next < high)) next = high == DBL_MAX ? 4 * nu : low == 0 ? nu / 4 : sqrt(low) * sqrt(high);
    if (fabs(next - nu) <= kCagradAccuracy * nu) break;
    nu = next;
  }
  for (int64_t i = 0; i < m; ++i) r.w[i] = 1 / double(r.K) + x[i];
}

// ---- FairGrad -------------------------------------------------------------------------------------------------------

constexpr int kFairgradIterations = 256;
constexpr double kFairgradResidual = 1e-12;  // stop at max_i |(G w)_i w_i^(1/alpha) - 1| below

// b > 0 with (G b)_i (1 + ridge at its own row) = b_i^(-1/alpha). h, y, x [m] and M [m, m] are workspace. False where
// the iteration does not converge: some positive combination of rows vanishes.
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
    const double ray = pow(barrier / quadratic, alpha / (1 + alpha));  // to the minimum along b
    const double ray_power = pow(ray, power);
    double residual = 0;
    for (int64_t i = 0; i < m; ++i) {
      b[i] *= ray;
      h[i] *= ray_power;
      y[i] *= ray * ray;
      residual = fmax(residual, fabs(y[i] / h[i] - 1));
    }
    if (residual <= kFairgradResidual) return true;
    // In relative steps, scaled by sqrt(h): (b_i G_ij b_j / sqrt(h_i h_j) + I / alpha) sqrt(h) x = (h - y) / sqrt(h).
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = i; j < m; ++j) M[i * m + j] = b[i] * G[i * m + j] * b[j] / sqrt(h[i] * h[j]);
      M[i * m + i] = M[i * m + i] * (1 + ridge) + 1 / alpha;
      x[i] = (h[i] - y[i]) / sqrt(h[i]);
    }
    if (!cholesky_solve(M, x, m, Solo{})) return false;
    double longest = 0;
    for (int64_t i = 0; i < m; ++i) longest = fmax(longest, fabs(x[i] /= sqrt(h[i])));
    // A relative step of x changes the Hessian by about 2 bend |x|: a full step is safe well below that only.
    const bool near_solution = bend * longest < 0.25;
    if (near_solution && longest > 0.5 * last) return true;  // rounding is all that is left
    last = near_solution ? longest : DBL_MAX;
    const double step = near_solution ? 1 : 1 / (1 + bend * longest);
    for (int64_t i = 0; i < m; ++i) b[i] *= fmax(1 + step * x[i], 0.125);
  }
  return false;
}

// FairGrad (Ban and Ji, ICML 2024): w > 0 with (G w)_i = w_i^(-1/alpha), the minimum of the strictly convex
// 1/2 w^T G w - sum_i w_i^(1 - 1/alpha) / (1 - 1/alpha); alpha = 1 is NashMTL. Where rows cancel there is none, and a
// ridge gives finite weights, as in nash.h. The result may be NaN only where G is far from positive semidefinite.
ANTDIFF_HD_CALL void fairgrad(const NonZeroRows& r, double alpha) {
  const int64_t m = r.m;
  double *G = r.work, *M = G + m * m, *h = M + m * m, *y = h + m, *x = y + m;
  unscaled(r, G);
  bool solved = fairgrad_newton(G, m, alpha, 0.0, M, r.w, h, y, x);
  for (double ridge = 1e-9; !solved && ridge < 1e3 * double(m); ridge *= 100)
    solved = fairgrad_newton(G, m, alpha, ridge, M, r.w, h, y, x);
  // G here is least^2 times the true one, and w scales with G^(-alpha / (1 + alpha)).
  const double unit = pow(least_scale(r), 2 * alpha / (1 + alpha));
  for (int64_t i = 0; i < m; ++i) r.w[i] = solved ? r.w[i] * unit : NAN;
}

// ---- GradVac --------------------------------------------------------------------------------------------------------

// GradVac (Wang et al., ICLR 2021): where PCGrad removes a negative cosine, GradVac raises each cosine phi of p_i and
// g_j to its running mean, the target t_ij: p_i += |p_i| (t s - phi r) / (|g_j| r) g_j, s = sqrt(1 - phi^2),
// r = sqrt(1 - t^2). Targets of zero are PCGrad. S [K, K] and d [K] hold all rows; a zero row meets nobody.
ANTDIFF_HD_CALL void gradvac(const GramWeightsParams& p, int64_t n, const double* S, const double* d, double* work) {
  const int64_t K = p.K;
  double *order = work, *v = order + K, *c = v + K, *sum = c + K;
  double* targets = p.targets + n * K * K;
  for (int64_t j = 0; j < K; ++j) sum[j] = 1;
  for (int64_t i = 0; i < K; ++i) {
    if (d[i] == 0) continue;
    order_from_keys(p.keys + (n * K + i) * K, K, i, order);
    for (int64_t j = 0; j < K; ++j) {
      v[j] = S[i * K + j];  // <p_i, g_j>
      c[j] = 0;
    }
    double square = S[i * K + i], terms = square;  // |p_i|^2, and the same without cancellation
    for (int64_t s = 0; s < K - 1; ++s) {
      const int64_t j = int64_t(order[s]);
      if (d[j] == 0 || !(square > kGramRounding * double(K) * terms)) continue;
      const double length = sqrt(square), norm = sqrt(S[j * K + j]);
      const double phi = fmin(fmax(v[j] / (length * norm), -1.0), 1.0), target = targets[i * K + j];
      const double r = sqrt(fmax(1 - target * target, 0.0));
      if (phi < target && r > 0) {  // a target of exactly 1 cannot be reached by adding g_j
        const double step = length * (target * sqrt(1 - phi * phi) - phi * r) / (norm * r);
        square = fmax(square + step * (2 * v[j] + step * S[j * K + j]), 0.0);
        terms += step * step * S[j * K + j];
        c[j] += step;
        for (int64_t l = 0; l < K; ++l) v[l] += step * S[j * K + l];
      }
      targets[i * K + j] = (1 - p.option) * target + p.option * phi;
    }
    for (int64_t j = 0; j < K; ++j)
      if (c[j] != 0) sum[j] += c[j] * (d[j] / d[i]);
  }
  for (int64_t j = 0; j < K; ++j) p.weights[n * K + j] = sum[j];
}

// ---- one problem ----------------------------------------------------------------------------------------------------

ANTDIFF_HD void solve_non_zero_rows(const NonZeroRows& r, GramMethod method, double option) {
  switch (method) {
    case GramMethod::upgrad:
      return upgrad(r);
    case GramMethod::dualproj:
      return dualproj(r);
    case GramMethod::aligned_mtl:
      return aligned_mtl(r);
    case GramMethod::mgda:
      return mgda(r);
    case GramMethod::cagrad:
      return cagrad(r, option);
    case GramMethod::imtl_g:
      return imtl_g(r);
    case GramMethod::config:
      return config(r);
    case GramMethod::fairgrad:
      return fairgrad(r, option);
    case GramMethod::gradvac:
      return;  // works on all rows
  }
}

// `work` holds gram_weights_workspace(K) doubles. Weights are written only if ok.
template <class Team>
ANTDIFF_HD Verdict gram_weights_problem(const GramWeightsParams& p, int64_t n, double* work, Team team) {
  const int64_t K = p.K;
  double *S = work, *d = S + K * K, *w = d + K, *index = w + K, *rest = index + K;
  if (!scale_gram(p.gram + n * K * K, K, S, d, team)) return Verdict::bad_gram;
  team.sync();  // the others have read what the one will overwrite
  if (team.rank() != 0) return Verdict::ok;
  if (p.method == GramMethod::gradvac) {
    gradvac(p, n, S, d, rest);
    return Verdict::ok;
  }
  int64_t m = 0;
  for (int64_t i = 0; i < K; ++i) {
    p.weights[n * K + i] = 0;
    if (d[i] != 0) index[m++] = double(i);
  }
  if (m == 0) return Verdict::ok;
  for (int64_t a = 0; a < m; ++a) {  // in place: nothing is overwritten before it is read
    d[a] = d[int64_t(index[a])];
    for (int64_t b = 0; b < m; ++b) S[a * m + b] = S[int64_t(index[a]) * K + int64_t(index[b])];
  }
  solve_non_zero_rows({K, m, S, d, w, rest}, p.method, p.option);
  for (int64_t a = 0; a < m; ++a) p.weights[n * K + int64_t(index[a])] = w[a];
  return Verdict::ok;
}

}  // namespace antdiff
