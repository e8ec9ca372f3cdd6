// The kinds of gradients that every method on a Gram matrix must handle. tests/grams.py has the same kinds.
#pragma once

#include <cmath>
#include <vector>

#include "tests/check.h"

namespace antdiff::test {

using Vector = std::vector<double>;

enum class Kind { random, conflicting, duplicates, opposed, deficient, zeros, scaled };
constexpr Kind kKinds[] = {Kind::random,    Kind::conflicting, Kind::duplicates, Kind::opposed,
                           Kind::deficient, Kind::zeros,       Kind::scaled};

// Return J [K, P] of a kind. The rows of `scaled` are multiplied by 10^-30, 1 and 10^30 in turn.
inline Vector gradients(Kind kind, int64_t K, int64_t P, uint64_t seed) {
  Random random(seed);
  Vector J(K * P), shared(P);
  for (auto& x : J) x = random.normal();
  for (auto& x : shared) x = random.normal();
  for (int64_t i = 0; i < K; ++i)
    for (int64_t p = 0; p < P; ++p) {
      double& x = J[i * P + p];
      if (kind == Kind::conflicting) x += (i % 2 ? -3 : 3) * shared[p];
      if (kind == Kind::duplicates && i > 0) x = J[(i / 2) * P + p];
      if (kind == Kind::opposed && i % 2) x = -2 * J[(i - 1) * P + p];
      if (kind == Kind::deficient && p > 1) x = 0;
      if (kind == Kind::zeros && i % 2 == 0) x = 0;
      if (kind == Kind::scaled) x *= std::pow(10.0, double(30 * (i % 3) - 30));
    }
  return J;
}

inline Vector gram_of(const Vector& J, int64_t K) {
  const int64_t P = int64_t(J.size()) / K;
  Vector G(K * K);
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = 0; j < K; ++j)
      for (int64_t p = 0; p < P; ++p) G[i * K + j] += J[i * P + p] * J[j * P + p];
  return G;
}

}  // namespace antdiff::test
