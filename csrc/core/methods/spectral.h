// Methods that use the eigenvalues and eigenvectors of the Gram matrix or of the correlation matrix.
#pragma once

#include <cfloat>
#include <cmath>

#include "core/jacobi.h"
#include "core/methods/nonzero_rows.h"

namespace antdiff {

// Aligned-MTL (Senushkin et al., CVPR 2023): set all non-zero singular values of J to the smallest of them, then take
// the mean of the rows: w = sqrt(lambda_min) V Lambda^(-1/2) V^T 1/K. Eigenvalues of at most max(DBL_EPSILON, noise) m
// times the largest count as zero.
ANTDIFF_HD_CALL void aligned_mtl(const NonZeroRows& r, double noise) {
  double *A = r.work, *V = A + r.m * r.m;
  unscaled(r, A);
  jacobi_eigen(A, V, r.m);
  double largest = 0;
  for (int64_t k = 0; k < r.m; ++k) largest = fmax(largest, A[k * r.m + k]);
  const double zero = fmax(DBL_EPSILON, noise) * double(r.m) * largest;
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

// With the correlation matrix C [m, m], compute v [m] = C^+ 1 and p [m] = C C^+ 1, the projection of 1 onto the range
// of C. Both are 0 if 1 is perpendicular to the range. C and V [m, m] are workspace. Return the relative rounding error
// of a sum of the v_i compared with its terms, which is the rounding error of C times its condition number.
ANTDIFF_HD_CALL double equalise(const NonZeroRows& r, double noise, double* C, double* V, double* v, double* p) {
  const double size = double(r.m), zero = fmax(kGramRounding, noise) * size;
  for (int64_t i = 0; i < r.m; ++i)
    for (int64_t j = 0; j < r.m; ++j)
      C[i * r.m + j] = i == j ? 1 : r.S[i * r.m + j] / sqrt(r.S[i * r.m + i] * r.S[j * r.m + j]);
  jacobi_eigen(C, V, r.m);
  double least = size, square = 0;  // the smallest non-zero eigenvalue; |p|^2
  bool dependent = false;
  for (int64_t i = 0; i < r.m; ++i) v[i] = p[i] = 0;
  for (int64_t k = 0; k < r.m; ++k) {
    const double lambda = C[k * r.m + k];
    if (!(lambda > zero)) {  // the trace is m, so no eigenvalue exceeds m
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
  // Rounding tilts the range of C against its null space by this much, and 1 has length sqrt(m).
  const double rounding = fmax(kGramRounding, kTypicalNoise * noise) * size * size / least;
  if (dependent && square <= rounding * rounding * size)
    for (int64_t i = 0; i < r.m; ++i) v[i] = p[i] = 0;
  return rounding;
}

// IMTL-G (Liu et al., ICLR 2021): the combination with weights of sum 1 that has equal projections onto all g_i. If
// gradients oppose each other exactly, no such combination exists, and the weights are 0.
ANTDIFF_HD_CALL void imtl_g(const NonZeroRows& r, double noise) {
  double *C = r.work, *V = C + r.m * r.m, *v = V + r.m * r.m, *p = v + r.m;
  const double rounding = equalise(r, noise, C, V, v, p);
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

// ConFIG (Liu et al., ICLR 2025): the direction with equal cosines to all g_i, whose length is the sum of their
// projections onto it. Its coefficients are computed for J with unit rows, for which v . C v = 1^T C^+ 1 is the squared
// length.
ANTDIFF_HD_CALL void config(const NonZeroRows& r, double noise) {
  double *C = r.work, *V = C + r.m * r.m, *v = V + r.m * r.m, *p = v + r.m;
  equalise(r, noise, C, V, v, p);
  const double least = least_scale(r);
  double square = 0, projections = 0;
  for (int64_t i = 0; i < r.m; ++i) {
    square += v[i] * p[i];
    projections += relative_norm(r, least, i) * p[i];
  }
  for (int64_t i = 0; i < r.m; ++i)
    r.w[i] = square > 0 ? v[i] / relative_norm(r, least, i) * (projections / square) : 0;
}

}  // namespace antdiff
