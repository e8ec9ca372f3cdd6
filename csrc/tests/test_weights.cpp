// Tests of the PCGrad and NashMTL weights: one CPU thread and the emulated warps, against evaluations on P-long
// vectors.
#define ANTDIFF_CUDA_EMULATION
#include "cuda/nash.cu"    // NOLINT: the emulator compiles it as C++
#include "cuda/pcgrad.cu"  // NOLINT

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

// The algorithm of the paper, applied to the gradients themselves. Returns the update and the magnitude of its terms.
Vector pairwise_pcgrad(const Vector& J, int64_t K, const int64_t* perms, double* magnitude) {
  const int64_t P = int64_t(J.size()) / K;
  Vector sum(P), p(P);
  *magnitude = 0;
  for (int64_t i = 0; i < K; ++i) {
    for (int64_t q = 0; q < P; ++q) p[q] = J[i * P + q];
    for (int64_t s = 0; s < K - 1; ++s) {
      const double* g = J.data() + perms[i * (K - 1) + s] * P;
      double dot = 0, norm = 0;
      for (int64_t q = 0; q < P; ++q) dot += p[q] * g[q], norm += g[q] * g[q];
      if (dot < 0 && norm > 0)
        for (int64_t q = 0; q < P; ++q) p[q] -= dot / norm * g[q];
    }
    double length = 0;
    for (int64_t q = 0; q < P; ++q) sum[q] += p[q], length += J[i * P + q] * J[i * P + q];
    *magnitude += std::sqrt(length);
  }
  return sum;
}

std::vector<int64_t> random_perms(int64_t K, Random& random) {
  std::vector<int64_t> perms;
  for (int64_t i = 0; i < K; ++i) {
    std::vector<int64_t> row;
    for (int64_t j = 0; j < K; ++j)
      if (j != i) row.insert(row.begin() + random.below(int64_t(row.size()) + 1), j);
    perms.insert(perms.end(), row.begin(), row.end());
  }
  return perms;
}

// Return keys that sort to the given orders.
Vector keys_of(const std::vector<int64_t>& perms, int64_t K) {
  Vector keys(K * K, -1);
  for (int64_t i = 0; i < K; ++i)
    for (int64_t s = 0; s < K - 1; ++s) keys[i * K + perms[i * (K - 1) + s]] = double(s);
  return keys;
}

struct Run {
  bool cuda;
  Vector weights, scratch;
  Status pcgrad(PcgradParams p) {
    weights.assign(p.n * p.K, -7);
    scratch.assign(scratch_for(p.n, p.K, pcgrad_workspace(p.K)), NAN);
    p.weights = weights.data(), p.scratch = scratch.data();
    return cuda ? cuda_pcgrad_weights(p, {}) : cpu_pcgrad_weights(p);
  }
  Status nash(NashParams p) {
    weights.assign(p.n * p.K, -7);
    scratch.assign(scratch_for(p.n, p.K, nash_workspace(p.K)), NAN);
    p.weights = weights.data(), p.scratch = scratch.data();
    return cuda ? cuda_nash_weights(p, {}) : cpu_nash_weights(p);
  }
};

void pcgrad_matches_the_paper(int64_t K, int64_t P) {
  for (Kind kind : kKinds) {
    Random random(uint64_t(K * 100 + P));
    const Vector J = gradients(kind, K, P, uint64_t(K + P)), G = gram_of(J, K);
    const auto perms = random_perms(K, random);
    const Vector keys = keys_of(perms, K);
    double magnitude;
    const Vector want = pairwise_pcgrad(J, K, perms.data(), &magnitude);
    PcgradParams p;
    p.n = 1, p.K = K, p.gram = G.data(), p.perms = perms.data();
    Vector first;
    for (bool cuda : {false, true}) {
      Run run{cuda, {}, {}};
      CHECK(run.pcgrad(p).ok());
      double worst = 0;
      for (int64_t q = 0; q < P; ++q) {
        double got = 0;
        for (int64_t i = 0; i < K; ++i) got += run.weights[i] * J[i * P + q];
        worst = std::fmax(worst, std::fabs(got - want[q]));
      }
      CHECK(worst <= 1e-12 * double(K) * magnitude);
      first = run.weights;
      PcgradParams by_key = p;
      by_key.perms = nullptr, by_key.keys = keys.data(), by_key.mean = true;
      CHECK(run.pcgrad(by_key).ok());
      for (int64_t i = 0; i < K; ++i) CHECK(run.weights[i] == first[i] / double(K));
    }
  }
}

void nash_solves(int64_t K, int64_t P) {
  for (Kind kind : kKinds) {
    if (kind == Kind::conflicting && K > 16) continue;  // the emulator is slow, and such a G takes the most iterations
    const Vector J = gradients(kind, K, P, uint64_t(3 * K + P)), G = gram_of(J, K);
    NashParams p;
    p.n = 1, p.K = K, p.gram = G.data();
    for (bool cuda : {false, true}) {
      Run run{cuda, {}, {}};
      CHECK(run.nash(p).ok());
      for (int64_t i = 0; i < K; ++i) {
        double product = 0, magnitude = 0;
        for (int64_t j = 0; j < K; ++j) {
          product += G[i * K + j] * run.weights[j];
          magnitude += std::fabs(G[i * K + j]) * run.weights[j];
        }
        const double a = run.weights[i];
        if (G[i * K + i] == 0)
          CHECK(a == 0);
        else
          CHECK(a > 0 && std::isfinite(a));
        // Pareto-stationary matrices have no solution, so their weights need only be finite. Otherwise cancellation in
        // G a limits the accuracy that float64 can reach.
        if (G[i * K + i] > 0 && kind != Kind::opposed && kind != Kind::deficient)
          CHECK(std::fabs(a * product - 1) <= 1e-11 + 1e-14 * double(K) * a * magnitude);
      }
    }
  }
}

// The ridge must not be used if rows nearly oppose each other, and it must be used if they oppose each other exactly.
void nash_near_conflict() {
  for (double gap : {1e-3, 1e-6, 5e-11, 1e-12}) {
    const double c = gap - 1;
    const Vector G = {1, c, c, 1};
    NashParams p;
    p.n = 1, p.K = 2, p.gram = G.data();
    for (bool cuda : {false, true}) {
      Run run{cuda, {}, {}};
      CHECK(run.nash(p).ok());
      const double a = run.weights[0], b = run.weights[1];
      CHECK(close(a * a * (1 + c) * 2, 2, 1e-3) && close(a, b, 1e-9));
    }
  }
  const Vector opposed = {4, -6, -6, 9};
  NashParams p;
  p.n = 1, p.K = 2, p.gram = opposed.data();
  for (bool cuda : {false, true}) {
    Run run{cuda, {}, {}};
    CHECK(run.nash(p).ok());
    const double direction = 2 * run.weights[0] - 3 * run.weights[1];
    CHECK(std::isfinite(run.weights[0]) && run.weights[0] > 1 && std::fabs(direction) < 1e-3);
  }
}

// Rows that cancel up to the rounding of their Gram matrix. Weights of 1e8 would solve the rounded matrix, but a
// combination in float32 would then be only rounding error, so the weights must stay small.
void nash_stationary_to_rounding() {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const int64_t K = 3, P = 7;
    Vector J = gradients(Kind::random, K, P, seed);
    for (int64_t q = 0; q < P; ++q) J[2 * P + q] = -J[q] - 2 * J[P + q];
    const Vector G = gram_of(J, K);
    NashParams p;
    p.n = 1, p.K = K, p.gram = G.data();
    Run run{false, {}, {}};
    CHECK(run.nash(p).ok());
    for (int64_t i = 0; i < K; ++i) CHECK(run.weights[i] * std::sqrt(G[i * K + i]) < 1e5);
  }
}

void scales() {
  const int64_t K = 5;
  const Vector J = gradients(Kind::conflicting, K, 9, 8), G = gram_of(J, K);
  Random random(1);
  const auto perms = random_perms(K, random);
  const double tops[] = {0x1p-960, 0x1p-100, 0x1p100, 0x1p960};
  for (bool cuda : {false, true}) {
    Run plain{cuda, {}, {}}, nash{cuda, {}, {}}, scaled{cuda, {}, {}};
    PcgradParams p;
    p.n = 1, p.K = K, p.gram = G.data(), p.perms = perms.data();
    NashParams q;
    q.n = 1, q.K = K, q.gram = G.data();
    CHECK(plain.pcgrad(p).ok() && nash.nash(q).ok());
    for (double top : tops) {
      Vector H = G;
      for (auto& x : H) x *= top;
      p.gram = q.gram = H.data();
      CHECK(scaled.pcgrad(p).ok() && scaled.weights == plain.weights);
      CHECK(scaled.nash(q).ok());
      for (int64_t i = 0; i < K; ++i) CHECK(scaled.weights[i] * std::sqrt(top) == nash.weights[i]);
    }
    // Rows of very different lengths: 2^-200 to 2^200.
    Vector H = G;
    const auto d = [](int64_t i) { return std::ldexp(1.0, int(100 * i - 200)); };
    for (int64_t e = 0; e < K * K; ++e) H[e] *= d(e / K) * d(e % K);
    q.gram = H.data();
    CHECK(scaled.nash(q).ok());
    for (int64_t i = 0; i < K; ++i) CHECK(scaled.weights[i] * d(i) == nash.weights[i]);
  }
}

void bad_input() {
  const int64_t K = 3, n = 2;
  const Vector good = {2, 1, 0, 1, 2, 1, 0, 1, 2, 2, 1, 0, 1, 2, 1, 0, 1, 2};
  const std::vector<int64_t> perms = {1, 2, 0, 2, 0, 1, 1, 2, 0, 2, 0, 1};
  struct Bad {
    int64_t at;
    double value;
  } cases[] = {{9, NAN}, {10, INFINITY}, {13, -1}, {12, 2.5}, {11, 1}, {14, 1e300}};
  for (auto c : cases)
    for (bool cuda : {false, true})
      for (bool poison : {false, true}) {
        Vector G = good;
        G[c.at] = c.value;
        PcgradParams p;
        p.n = n, p.K = K, p.gram = G.data(), p.perms = perms.data(), p.poison = poison;
        NashParams q;
        q.n = n, q.K = K, q.gram = G.data(), q.poison = poison;
        Run first{cuda, {}, {}}, second{cuda, {}, {}};
        emulated_errors = 0;
        const Status s = first.pcgrad(p), t = second.nash(q);
        CHECK(emulated_errors == (cuda && !poison ? kBadGram : 0u));
        CHECK(s.ok() == (cuda || poison) && t.ok() == s.ok());
        if (!s.ok()) CHECK(s.code == Status::Code::bad_gram && s.where / 9 == 1 && t.where == s.where);
        if (!s.ok() && (c.value < 0 || std::isnan(c.value))) CHECK(s.where == c.at);
        for (int64_t i = 0; i < K; ++i) {
          CHECK(std::isnan(first.weights[K + i]) && std::isnan(second.weights[K + i]));
          if (cuda || poison) CHECK(std::isfinite(first.weights[i]) && std::isfinite(second.weights[i]));
        }
      }
  for (int64_t wrong : {-1, 1, 2, 3})  // row 1 of problem 1 lists 0 and 2
    for (bool cuda : {false, true}) {
      auto order = perms;
      order[8] = wrong;
      PcgradParams p;
      p.n = n, p.K = K, p.gram = good.data(), p.perms = order.data(), p.poison = true;
      Run run{cuda, {}, {}};
      emulated_errors = 0;
      const Status s = run.pcgrad(p);
      CHECK(cuda ? s.ok() && emulated_errors == kBadPerms : s.code == Status::Code::bad_perms && s.where == 1);
      CHECK(std::isfinite(run.weights[0]) && std::isnan(run.weights[K]));
    }
}

// More problems than blocks with workspace in global memory, no problem at all, and a batch against single problems.
void batches() {
  const int64_t K = kSharedK + 1, n = kScratchBlocks + 3;
  CHECK(scratch_for(n, K, 10) == kScratchBlocks * 10 && scratch_for(2, K, 10) == 20 && scratch_for(n, K - 1, 10) == 0);
  CHECK(problem_blocks(n, K) == kScratchBlocks && problem_blocks(n, K - 1) == n);
  for (bool cuda : {false, true}) {
    Run run{cuda, {}, {}};
    NashParams q;
    q.n = 0, q.K = 3;
    CHECK(run.nash(q).ok());
    const int64_t many = 40;
    Vector G, alone;
    for (int64_t i = 0; i < many; ++i) {
      const Vector one = gram_of(gradients(Kind::random, 4, 6, uint64_t(i)), 4);
      G.insert(G.end(), one.begin(), one.end());
    }
    q.n = many, q.K = 4, q.gram = G.data();
    CHECK(run.nash(q).ok());
    const Vector together = run.weights;
    q.n = 1, q.gram = G.data() + 39 * 16;
    CHECK(run.nash(q).ok());
    for (int64_t i = 0; i < 4; ++i) CHECK(run.weights[i] == together[39 * 4 + i]);
  }
}

}  // namespace

int main() {
  const int64_t sizes[][2] = {{1, 1}, {2, 3}, {5, 40}, {8, 8}, {33, 50}, {64, 80}};
  for (auto& s : sizes) {
    pcgrad_matches_the_paper(s[0], s[1]);
    nash_solves(s[0], s[1]);
  }
  nash_near_conflict();
  nash_stationary_to_rounding();
  scales();
  bad_input();
  batches();
  return test::summary();
}
