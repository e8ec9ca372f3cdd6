// Tests of the small solvers and of the balancing methods that use them: optimality conditions, one CPU thread against
// emulated warps, scales, and bad input.
#define ANTDIFF_CUDA_EMULATION
#include "cuda/gram_weights.cu"  // NOLINT: the emulator compiles it as C++

#include <cmath>
#include <vector>

#include "cpu/launchers.h"
#include "tests/check.h"
#include "tests/grams.h"

namespace antdiff {
uint32_t* device_errors(int) { return &emulated_errors; }
}  // namespace antdiff

using namespace antdiff;
using namespace test;

namespace {

constexpr GramMethod kAll[] = {GramMethod::upgrad, GramMethod::dualproj, GramMethod::aligned_mtl,
                               GramMethod::mgda,   GramMethod::cagrad,   GramMethod::imtl_g,
                               GramMethod::config, GramMethod::fairgrad, GramMethod::gradvac};
static_assert(sizeof(kAll) / sizeof(kAll[0]) == kGramMethods, "every method is tested");

double option_of(GramMethod method) {
  switch (method) {
    case GramMethod::cagrad:
      return 0.5;
    case GramMethod::fairgrad:
      return 2;
    case GramMethod::gradvac:
      return 0.1;
    default:
      return 0;  // the noise of float64 rows for the spectral methods; unused by the others
  }
}

struct Run {
  Vector weights, targets;
  Status status;
  Run(bool cuda, GramMethod method, const Vector& G, int64_t K, bool poison = false) {
    const int64_t n = int64_t(G.size()) / (K * K);
    Random random(5);
    Vector keys(G.size());
    for (auto& x : keys) x = random.uniform();
    weights.assign(n * K, -7), targets.assign(G.size(), 0.1);
    Vector scratch(scratch_for(n, K, gram_weights_workspace(K)), NAN);
    GramWeightsParams p;
    p.n = n, p.K = K, p.gram = G.data(), p.method = method, p.option = option_of(method), p.keys = keys.data();
    p.targets = targets.data(), p.poison = poison, p.weights = weights.data(), p.scratch = scratch.data();
    status = cuda ? cuda_gram_weights(p, {}) : cpu_gram_weights(p);
  }
};

void warps_agree_with_threads() {
  for (int64_t K : {1, 2, 5, 8, 33})
    for (Kind kind : kKinds)
      for (GramMethod method : kAll) {
        const Vector G = gram_of(gradients(kind, K, 2 * K + 1, uint64_t(K + int(kind))), K);
        const Run cpu(false, method, G, K), cuda(true, method, G, K);
        CHECK(cpu.status.ok() && cuda.status.ok());
        CHECK(cpu.weights == cuda.weights && cpu.targets == cuda.targets);
        for (double w : cpu.weights) CHECK(std::isfinite(w));
        for (int64_t i = 0; i < K; ++i)
          if (G[i * K + i] == 0) CHECK(cpu.weights[i] == (method == GramMethod::gradvac ? 1 : 0));
      }
}

// The optimality conditions: x >= 0, slope >= 0 if x = 0, and slope = 0 if x > 0, relative to the terms of the slope.
void quadratic_programs() {
  for (int64_t K : {1, 2, 3, 6, 12, 40})
    for (Kind kind : kKinds) {
      const Vector J = gradients(kind, K, 12, uint64_t(7 * K + int(kind)));
      Vector G = gram_of(J, K), x(K), work(nonnegative_qp_workspace(K));
      for (int64_t i = 0; i < K; ++i)
        if (G[i * K + i] == 0) G[i * K + i] = 1;  // the callers of the solver remove zero rows
      for (int64_t i = 0; i < K; ++i) {
        const Vector c(G.begin() + i * K, G.begin() + (i + 1) * K);
        nonnegative_qp(G.data(), c.data(), K, x.data(), work.data());
        for (int64_t j = 0; j < K; ++j) {
          double slope = c[j], terms = std::fabs(c[j]) + std::sqrt(G[j * K + j] * G[i * K + i]);
          for (int64_t k = 0; k < K; ++k) slope += G[j * K + k] * x[k], terms += std::fabs(G[j * K + k] * x[k]);
          CHECK(x[j] >= 0 && slope >= -1e-12 * terms);
          if (x[j] > 0) CHECK(std::fabs(slope) <= 1e-11 * terms);
        }
      }
    }
}

void eigenproblems() {
  for (int64_t K : {1, 2, 5, 16, 64})
    for (Kind kind : kKinds) {
      const Vector G = gram_of(gradients(kind, K, K + 3, uint64_t(K * 11 + int(kind))), K);
      Vector A = G, V(K * K);
      jacobi_eigen(A.data(), V.data(), K);
      double norm = 0;
      for (double g : G) norm = std::fmax(norm, std::fabs(g));
      double worst = 0, skew = 0;
      for (int64_t i = 0; i < K; ++i)
        for (int64_t j = 0; j < K; ++j) {
          double product = 0, unit = 0;
          for (int64_t k = 0; k < K; ++k) {
            product += V[i * K + k] * A[k * K + k] * V[j * K + k];
            unit += V[i * K + k] * V[j * K + k];
          }
          worst = std::fmax(worst, std::fabs(product - G[i * K + j]));
          skew = std::fmax(skew, std::fabs(unit - (i == j)));
        }
      CHECK(worst <= 1e-13 * double(K) * norm && skew <= 1e-13 * double(K));
    }
}

void fixed_values() {
  const Vector J = {-4, 1, 1, 6, 1, 1}, G = gram_of(J, 2);
  const struct {
    GramMethod method;
    double x, y;
  } cases[] = {{GramMethod::upgrad, 0.2924, 1.9006},
               {GramMethod::aligned_mtl, 0.2133, 0.9673},
               {GramMethod::mgda, 0, 1},
               {GramMethod::cagrad, 0.1835, 1.2041},
               {GramMethod::imtl_g, 0.0767, 1},
               {GramMethod::config, 0.1588, 2.0706}};
  for (auto c : cases) {
    const Run run(false, c.method, G, 2);
    CHECK(std::fabs(-4 * run.weights[0] + 6 * run.weights[1] - c.x) < 5e-5);
    CHECK(std::fabs(run.weights[0] + run.weights[1] - c.y) < 5e-5);
  }
}

// Powers of four change no bit of the weights, except for fairgrad, whose weights depend on the unit of G.
void scales() {
  const Vector G = gram_of(gradients(Kind::conflicting, 5, 9, 3), 5);
  for (GramMethod method : kAll) {
    const Run plain(false, method, G, 5);
    for (double scale : {0x1p-960, 0x1p-66, 0x1p66, 0x1p960}) {
      Vector H = G;
      for (auto& g : H) g *= scale;
      const Run run(false, method, H, 5);
      for (int64_t i = 0; i < 5; ++i) {
        if (method == GramMethod::fairgrad)
          CHECK(close(run.weights[i] * std::pow(scale, 2.0 / 3), plain.weights[i], 1e-12));
        else
          CHECK(run.weights[i] == plain.weights[i]);
      }
    }
  }
}

// Opposed pairs that span an ill-conditioned space. Up to rounding, 1 is perpendicular to this space, and rounding
// error must not become a direction.
void opposed() {
  for (double angle : {1.0, 1e-2, 1e-4}) {
    Vector J = {1, 0, 0, 1, angle, 0, 1, angle, angle};
    const double lengths[] = {1.45, 0.95, 3.03};
    for (int64_t e = 0; e < 9; ++e) J[e] *= lengths[e / 3];
    for (int64_t e = 0; e < 9; ++e) J.push_back(-J[e]);
    for (GramMethod method : {GramMethod::imtl_g, GramMethod::config})
      for (double w : Run(false, method, gram_of(J, 6), 6).weights) CHECK(w == 0);
  }
}

void bad_input() {
  const Vector good = {2, 1, 0, 1, 2, 1, 0, 1, 2, 2, 1, 0, 1, 2, 1, 0, 1, 2};
  for (GramMethod method : kAll)
    for (double value : {double(NAN), double(INFINITY), -1.0, 1e300})
      for (bool cuda : {false, true})
        for (bool poison : {false, true}) {
          Vector G = good;
          G[14] = value;
          emulated_errors = 0;
          const Run run(cuda, method, G, 3, poison);
          CHECK(emulated_errors == (cuda && !poison ? kBadGram : 0u));
          CHECK(run.status.ok() == (cuda || poison));
          for (int64_t i = 0; i < 3; ++i) {
            CHECK(std::isnan(run.weights[3 + i]));
            if (cuda || poison) CHECK(std::isfinite(run.weights[i]));
          }
          for (int64_t e = 9; e < 18; ++e) CHECK(run.targets[e] == 0.1);
        }
}

}  // namespace

int main() {
  fixed_values();
  quadratic_programs();
  eigenproblems();
  warps_agree_with_threads();
  scales();
  opposed();
  bad_input();
  return test::summary();
}
