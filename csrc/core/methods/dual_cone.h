// Methods that project onto the dual cone {x : <x, g_j> >= 0 for all j}. The projection of g is g + sum_j u_j g_j with
// u = argmin_{u >= 0} |g + J^T u|^2.
#pragma once

#include "core/active_set.h"
#include "core/methods/nonzero_rows.h"

namespace antdiff {

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

// Compute x [m], x >= 0, such that g_0 + sum_j x_j g_j is the projection of the mean gradient g_0. c [m] and `rest`
// [nonnegative_qp_workspace(m)] are workspace.
ANTDIFF_HD_CALL void project_mean(const NonZeroRows& r, double* x, double* c, double* rest) {
  const double least = least_scale(r);
  for (int64_t j = 0; j < r.m; ++j) {
    c[j] = 0;
    for (int64_t i = 0; i < r.m; ++i) c[j] += r.S[j * r.m + i] * (least / r.d[i]) / double(r.K);
  }
  nonnegative_qp(r.S, c, r.m, x, rest);
  for (int64_t j = 0; j < r.m; ++j) x[j] *= r.d[j] / least;
}

// DualProj, the rule of GEM (Lopez-Paz and Ranzato, NeurIPS 2017): the projection of the mean gradient.
ANTDIFF_HD_CALL void dualproj(const NonZeroRows& r) {
  double *x = r.work, *c = x + r.m, *rest = c + r.m;
  project_mean(r, x, c, rest);
  for (int64_t j = 0; j < r.m; ++j) r.w[j] = 1 / double(r.K) + x[j];
}

}  // namespace antdiff
