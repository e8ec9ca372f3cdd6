// GradVac: PCGrad with a target cosine for each pair of gradients.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/methods/nonzero_rows.h"
#include "core/pcgrad.h"

namespace antdiff {

// GradVac (Wang et al., ICLR 2021): PCGrad removes negative cosines, whereas GradVac raises each cosine phi of p_i and
// g_j to its running mean, the target t_ij: p_i += |p_i| (t s - phi r) / (|g_j| r) g_j with s = sqrt(1 - phi^2) and r =
// sqrt(1 - t^2). Targets of zero give PCGrad. S [K, K] and d [K] hold all rows; zero rows are never visited and keep
// weight 1. `targets` [K, K] is updated, and w [K] is the result. `work` holds 3 K doubles.
ANTDIFF_HD_CALL void gradvac(const double* S, const double* d, int64_t K, const double* keys, double beta,
                             double* targets, double* w, double* work) {
  double *order = work, *v = order + K, *c = v + K;
  for (int64_t j = 0; j < K; ++j) w[j] = 1;
  for (int64_t i = 0; i < K; ++i) {
    if (d[i] == 0) continue;
    order_from_keys(keys + i * K, K, i, order);
    for (int64_t j = 0; j < K; ++j) {
      v[j] = S[i * K + j];  // <p_i, g_j>
      c[j] = 0;
    }
    double square = S[i * K + i], terms = square;  // |p_i|^2, and its size without cancellation
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
      targets[i * K + j] = (1 - beta) * target + beta * phi;
    }
    for (int64_t j = 0; j < K; ++j)
      if (c[j] != 0) w[j] += c[j] * (d[j] / d[i]);
  }
}

}  // namespace antdiff
