// The linear solver of the K x K methods.
#pragma once

#include <cstdint>

#include "core/hd.h"
#include "core/team.h"

namespace antdiff {

// Solve M y = x in place, with y replacing x, for a symmetric positive definite M [K, K]. Only the upper triangle of M
// is read, and it is overwritten: M = U^T diag(pivots)^-1 U with unscaled rows of U, which costs one division per row
// and no square root. Return false if a pivot is not positive. The caller must sync the team before the call. After the
// call all members may read x.
template <class Team>
ANTDIFF_HD bool cholesky_solve(double* M, double* x, int64_t K, Team team) {
  for (int64_t j = 0; j < K; ++j) {
    const double pivot = M[j * K + j];
    if (!(pivot > 0)) return false;
    const double inverse = 1 / pivot;
    for (int64_t i = j + 1 + team.grid_row(); i < K; i += team.grid_rows()) {
      const double factor = M[j * K + i] * inverse;
      for (int64_t k = i + team.grid_column(); k < K; k += team.grid_columns()) M[i * K + k] -= factor * M[j * K + k];
      if (team.grid_column() == 0) x[i] -= factor * x[j];
    }
    team.sync();
  }
  for (int64_t j = K - 1; j > 0; --j) {
    const double value = x[j] / M[j * K + j];
    for (int64_t i = team.rank(); i < j; i += team.size()) x[i] -= M[i * K + j] * value;
    team.sync();
  }
  for (int64_t i = team.rank(); i < K; i += team.size()) x[i] /= M[i * K + i];
  team.sync();
  return true;
}

}  // namespace antdiff
