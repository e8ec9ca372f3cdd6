// Tests of the interval partition: every solver against enumeration of all partitions, and the solvers against each
// other.
#include "cpu/interval.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/launchers.h"
#include "tests/check.h"

using namespace antdiff;
using test::close;
using test::Random;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
using Matrix = std::vector<double>;

struct Result {
  Status status;
  std::vector<int64_t> starts;
  double total = 0;
};

template <class Solve>
Result solve(int64_t T, int64_t K, int64_t min, int64_t max, Solve&& run) {
  Result result{{}, std::vector<int64_t>(K, -1), 0};
  IntervalParams p;
  p.T = T;
  p.K = K;
  p.min_size = min;
  p.max_size = max;
  p.starts = result.starts.data();
  p.totals = &result.total;
  result.status = run(p);
  return result;
}

// Try every partition. Among the best ones keep the partition that the tie rule selects: the smallest last start, then
// the smallest second last start, and so on. Costs are summed from the left like in the dynamic program, so the
// floating-point results agree too.
void enumerate(const Matrix& cost, int64_t T, int64_t min, int64_t max, std::vector<int64_t>& starts, size_t j,
               double sum, Result& best) {
  const size_t K = starts.size();
  const int64_t l = starts[j];
  if (j + 1 == K) {
    if (T - l < min || T - l > max) return;
    const double total = j ? sum + cost[l * T + T - 1] : cost[l * T + T - 1];
    const bool wins = total < best.total || (total == best.total && total < kInf &&
                                             std::lexicographical_compare(starts.rbegin(), starts.rend(),
                                                                          best.starts.rbegin(), best.starts.rend()));
    if (wins) best.total = total, best.starts = starts;
    return;
  }
  for (int64_t next = l + min; next <= std::min(l + max, T - 1); ++next) {
    starts[j + 1] = next;
    const double c = cost[l * T + next - 1];
    enumerate(cost, T, min, max, starts, j + 1, j ? sum + c : c, best);
  }
}
Result brute_force(const Matrix& cost, int64_t T, int64_t K, int64_t min, int64_t max) {
  Result best{{}, std::vector<int64_t>(K, T), kInf};
  std::vector<int64_t> starts(K, 0);
  enumerate(cost, T, min, max, starts, 0, 0, best);
  return best;
}

template <class Cost>
Matrix matrix(int64_t T, Cost&& cost) {
  Matrix m(T * T, std::numeric_limits<double>::quiet_NaN());  // entries with r < l must not be read
  for (int64_t l = 0; l < T; ++l)
    for (int64_t r = l; r < T; ++r) m[l * T + r] = cost(l, r);
  return m;
}

void check_same(const Result& got, const Result& want, double relative) {
  CHECK(got.status.ok() == (want.total < kInf));
  if (!got.status.ok()) {
    CHECK(got.status.code == Status::Code::infeasible);
    return;
  }
  CHECK(got.starts == want.starts);
  CHECK(close(got.total, want.total, relative));
}

// Small integers, negative ones included, and +inf: all arithmetic is exact, and there are many ties.
void any_cost_matches_enumeration() {
  Random random(1);
  for (int trial = 0; trial < 4000; ++trial) {
    const int64_t T = 1 + random.below(9), K = 1 + random.below(T);
    const int64_t min = 1 + random.below(2), max = std::max(min, 1 + random.below(T));
    const Matrix cost =
        matrix(T, [&](int64_t, int64_t) { return random.below(9) ? double(random.below(7) - 3) : kInf; });
    const Result want = brute_force(cost, T, K, min, max);
    check_same(solve(T, K, min, max, [&](const IntervalParams& p) { return cpu_interval_cost(cost.data(), p); }), want,
               0);
  }
}

void affinity_matches_enumeration() {
  Random random(2);
  for (int trial = 0; trial < 1500; ++trial) {
    const int64_t T = 1 + random.below(10), K = 1 + random.below(T);
    const int64_t min = 1 + random.below(2), max = std::max(min, 1 + random.below(T));
    Matrix affinity(T * T);
    for (double& a : affinity) a = double(random.below(9) - 4) / 4;
    const Matrix cost = matrix(T, [&](int64_t l, int64_t r) {
      double sum = 0;
      for (int64_t t = l; t <= r; ++t) sum += affinity[(l + r + 1) / 2 * T + t];
      return -sum;
    });
    const Result want = brute_force(cost, T, K, min, max);
    check_same(
        solve(T, K, min, max, [&](const IntervalParams& p) { return cpu_interval_affinity(affinity.data(), p); }), want,
        0);
  }
}

double absolute(const std::vector<double>& x, const std::vector<double>& w, int64_t l, int64_t r) {
  double best = kInf;
  for (int64_t m = l; m <= r; ++m) {
    double sum = 0;
    for (int64_t t = l; t <= r; ++t) sum += w[t] * std::fabs(x[t] - x[m]);
    best = std::min(best, sum);
  }
  return best;
}

// Integers again. The grid represents them exactly, so enumeration and both solvers have the same ties.
void absolute_matches_enumeration() {
  Random random(3);
  for (int trial = 0; trial < 3000; ++trial) {
    const int64_t T = 1 + random.below(10), K = 1 + random.below(T);
    const int64_t min = 1 + random.below(2), max = std::max(min, 1 + random.below(T));
    std::vector<double> x(T), w(T, 1.0);
    for (double& v : x) v = double(random.below(12) - 6);
    std::sort(x.begin(), x.end());
    const bool weighted = trial % 2;
    if (weighted) {
      for (double& v : w) v = double(random.below(4));
      w[0] += 1;
    }
    const Matrix cost = matrix(T, [&](int64_t l, int64_t r) { return absolute(x, w, l, r); });
    const Result want = brute_force(cost, T, K, min, max);
    for (IntervalSolver solver : {IntervalSolver::scan, IntervalSolver::divide_and_conquer})
      check_same(solve(T, K, min, max,
                       [&](const IntervalParams& p) {
                         return cpu_interval_absolute(x.data(), weighted ? w.data() : nullptr, solver, p);
                       }),
                 want, 0);
  }
}

// Real numbers, long inputs, size limits: the two solvers must return the same starts and not only the same total.
void solvers_agree() {
  Random random(4);
  for (int trial = 0; trial < 300; ++trial) {
    const int64_t T = 2 + random.below(200), K = 1 + random.below(std::min<int64_t>(T, 12));
    int64_t min = 1, max = T;
    if (trial % 3) {
      min = 1 + random.below(T / K);
      max = (T + K - 1) / K + random.below(T);
      max = std::min(max, T);
    }
    std::vector<double> x(T), w(T);
    const bool even = trial % 5 == 0;  // evenly spaced: many ties, and 0.1 is not a binary fraction
    for (int64_t t = 0; t < T; ++t) x[t] = even ? 0.1 * double(t) : random.normal() * 7;
    if (trial % 7 == 0)
      for (int64_t t = 0; t < T; ++t) x[t] = std::floor(x[t]);
    for (double& v : w) v = random.below(5) ? random.uniform() : 0.0;
    w[T / 2] += 0.5;
    std::sort(x.begin(), x.end());
    for (const double* weight : {static_cast<const double*>(nullptr), static_cast<const double*>(w.data())}) {
      const auto run = [&](IntervalSolver solver) {
        return solve(T, K, min, max,
                     [&](const IntervalParams& p) { return cpu_interval_absolute(x.data(), weight, solver, p); });
      };
      const Result scan = run(IntervalSolver::scan), divide = run(IntervalSolver::divide_and_conquer);
      CHECK(scan.status.ok() && divide.status.ok());
      CHECK(scan.starts == divide.starts);
      CHECK(scan.total == divide.total);

      // For squared error only the totals must agree. Prefix sums of T terms round like T u, relative to the spread of
      // all points.
      const auto squared = [&](IntervalSolver solver) {
        return solve(T, K, min, max,
                     [&](const IntervalParams& p) { return cpu_interval_squared(x.data(), weight, solver, p); });
      };
      const Result a = squared(IntervalSolver::scan), b = squared(IntervalSolver::divide_and_conquer);
      const Result one = solve(T, 1, 1, T, [&](const IntervalParams& p) {
        return cpu_interval_squared(x.data(), weight, IntervalSolver::scan, p);
      });
      CHECK(a.status.ok() && b.status.ok());
      CHECK(std::fabs(a.total - b.total) <= 1e-15 * double(T) * one.total);
    }
  }
}

// The vectorised dense program against the exact solver, for lengths that are not a multiple of a vector or of a tile.
void dense_agrees_with_built_in() {
  Random random(5);
  for (int64_t T : {1, 2, 7, 64, 333, 2500}) {
    std::vector<double> x(T), w(T, 1.0), sum(T + 1);
    for (double& v : x) v = double(random.below(100000));
    std::sort(x.begin(), x.end());
    for (int64_t t = 0; t < T; ++t) sum[t + 1] = sum[t] + x[t];
    const Matrix cost = matrix(T, [&](int64_t l, int64_t r) {
      const int64_t c = (l + r + 1) / 2;
      return double(c - l) * x[c] - (sum[c] - sum[l]) + (sum[r + 1] - sum[c]) - double(r + 1 - c) * x[c];
    });
    for (int64_t K : {1, 2, 3, 6}) {
      if (K > T) continue;
      const Result dense =
          solve(T, K, 1, T, [&](const IntervalParams& p) { return cpu_interval_cost(cost.data(), p); });
      const Result divide = solve(T, K, 1, T, [&](const IntervalParams& p) {
        return cpu_interval_absolute(x.data(), nullptr, IntervalSolver::divide_and_conquer, p);
      });
      CHECK(dense.starts == divide.starts && dense.total == divide.total);
      if (T < 1000) {
        Matrix affinity(T * T);
        for (int64_t i = 0; i < T * T; ++i) affinity[i] = -std::fabs(x[i / T] - x[i % T]);
        const Result by_affinity =
            solve(T, K, 1, T, [&](const IntervalParams& p) { return cpu_interval_affinity(affinity.data(), p); });
        CHECK(by_affinity.starts == dense.starts && by_affinity.total == dense.total);
      }
    }
  }
}

void every_k_at_once() {
  Random random(6);
  for (int trial = 0; trial < 200; ++trial) {
    const int64_t T = 1 + random.below(30), K = 1 + random.below(T), min = 1 + random.below(3),
                  max = std::max(min, 1 + random.below(T));
    if (min > T) continue;
    const Matrix cost =
        matrix(T, [&](int64_t, int64_t) { return random.below(9) ? double(random.below(50) - 25) : kInf; });
    std::vector<int64_t> starts(K * K, -1);
    std::vector<double> totals(K, -1);
    IntervalParams p;
    p.T = T, p.K = K, p.min_size = min, p.max_size = max, p.all = true;
    p.starts = starts.data();
    p.totals = totals.data();
    CHECK(cpu_interval_cost(cost.data(), p).ok());
    for (int64_t k = 1; k <= K; ++k) {
      const bool sizes = k * min <= T && T <= k * max;
      if (!sizes) {
        CHECK(totals[k - 1] == kInf);
        continue;
      }
      const Result one =
          solve(T, k, min, max, [&](const IntervalParams& q) { return cpu_interval_cost(cost.data(), q); });
      CHECK(one.total == totals[k - 1]);
      if (one.status.ok()) CHECK(std::equal(one.starts.begin(), one.starts.end(), starts.begin() + (k - 1) * K));
    }
  }
}

void what_cannot_be_solved_is_reported() {
  Matrix cost = matrix(5, [](int64_t, int64_t) { return 1.0; });
  const auto run = [&](int64_t K) {
    return solve(5, K, 1, 5, [&](const IntervalParams& p) { return cpu_interval_cost(cost.data(), p); }).status;
  };
  CHECK(run(3).ok());
  for (double bad : {std::numeric_limits<double>::quiet_NaN(), -kInf}) {
    cost[1 * 5 + 3] = bad;
    for (int64_t K : {1, 2, 4}) {
      CHECK(run(K).code == Status::Code::not_finite);
      CHECK(run(K).where == 8);
    }
    cost[1 * 5 + 3] = 1;
  }
  for (int64_t l = 0; l < 5; ++l) cost[l * 5 + 4] = kInf;  // no interval may end at the last point
  CHECK(run(2).code == Status::Code::infeasible);
  for (double& c : cost) c = -1e308;
  CHECK(run(3).code == Status::Code::not_finite);
  CHECK(run(3).where == -1);
}

void interruption_stops() {
  const int64_t T = 400;
  std::vector<double> x(T);
  for (int64_t t = 0; t < T; ++t) x[t] = double(t);
  const Matrix cost = matrix(T, [](int64_t l, int64_t r) { return double(r - l); });
  int polls = 0;
  const auto run = [&](auto&& call) {
    polls = 0;
    return solve(T, 5, 1, T, [&](IntervalParams p) {
             p.interrupted = [&] { return ++polls == 2; };
             return call(p);
           }).status.code == Status::Code::interrupted;
  };
  CHECK(run([&](const IntervalParams& p) { return cpu_interval_cost(cost.data(), p); }));
  CHECK(polls == 2);
  CHECK(
      run([&](const IntervalParams& p) { return cpu_interval_absolute(x.data(), nullptr, IntervalSolver::scan, p); }));
  CHECK(polls == 2);
}

}  // namespace

int main() {
  any_cost_matches_enumeration();
  affinity_matches_enumeration();
  absolute_matches_enumeration();
  solvers_agree();
  dense_agrees_with_built_in();
  every_k_at_once();
  what_cannot_be_solved_is_reported();
  interruption_stops();
  return test::summary();
}
