// Eigenvalues and eigenvectors of a small symmetric matrix by cyclic Jacobi rotations (Golub and Van Loan, section
// 8.5).
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "core/hd.h"

namespace antdiff {

// Convergence is quadratic near the end: K = 8 takes six to eight sweeps, K = 64 takes ten.
constexpr int kJacobiSweeps = 40;

// Diagonalise A [K, K]. On return the diagonal of A holds the eigenvalues in no particular order, and column j of V [K,
// K] is the unit eigenvector of A_jj. Eigenvalues are accurate to a few roundings of the largest one.
ANTDIFF_HD_CALL void jacobi_eigen(double* A, double* V, int64_t K) {
  double norm = 0;
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = 0; j < K; ++j) {
      V[i * K + j] = double(i == j);
      norm = fmax(norm, fabs(A[i * K + j]));
    }
  const double negligible = norm * DBL_EPSILON / 64;
  bool rotated = true;
  for (int sweep = 0; rotated && sweep < kJacobiSweeps; ++sweep) {
    rotated = false;
    for (int64_t p = 0; p < K; ++p)
      for (int64_t q = p + 1; q < K; ++q) {
        const double off = A[p * K + q];
        if (fabs(off) <= negligible) continue;
        rotated = true;
        const double theta = (A[q * K + q] - A[p * K + p]) / (2 * off);
        const double t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1));  // the smaller angle
        const double c = 1 / sqrt(t * t + 1), s = t * c;
        for (int64_t k = 0; k < K; ++k) {
          const double x = A[k * K + p], y = A[k * K + q];
          A[k * K + p] = c * x - s * y;
          A[k * K + q] = s * x + c * y;
          const double v = V[k * K + p], w = V[k * K + q];
          V[k * K + p] = c * v - s * w;
          V[k * K + q] = s * v + c * w;
        }
        for (int64_t k = 0; k < K; ++k) {
          const double x = A[p * K + k], y = A[q * K + k];
          A[p * K + k] = c * x - s * y;
          A[q * K + k] = s * x + c * y;
        }
      }
  }
}

}  // namespace antdiff
