#include "cpu/interval.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/launchers.h"

namespace antdiff {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
__extension__ typedef __int128 int128;

// ---- the cells that can be on a path --------------------------------------------------------------------------------

// Cell (j, r) covers points 0..r with j+1 intervals. These bounds follow from the sizes alone. Every cell inside them
// has at least one start inside [first_start, last_start], and all bounds grow with r.
struct Cells {
  int64_t T, K, min, max;
  bool all;

  explicit Cells(const IntervalParams& p) : T(p.T), K(p.K), min(p.min_size), max(p.max_size), all(p.all) {}

  bool feasible(int64_t k) const { return k * min <= T && T <= k * max; }
  int64_t first_end(int64_t j) const {
    const int64_t from_left = (j + 1) * min;
    return (all ? from_left : std::max(from_left, T - (K - 1 - j) * max)) - 1;
  }
  int64_t last_end(int64_t j) const {
    const int64_t from_left = std::min((j + 1) * max, T);
    return (all ? from_left : std::min(from_left, T - (K - 1 - j) * min)) - 1;
  }
  int64_t first_start(int64_t j, int64_t r) const { return std::max(first_end(j - 1) + 1, r - max + 1); }
  int64_t last_start(int64_t j, int64_t r) const { return std::min(last_end(j - 1) + 1, r - min + 1); }
};

// ---- cells from a cost that is a function of [l, r] ----------------------------------------------------------------

constexpr int64_t kPollEvery = 1 << 14;  // cost evaluations between two calls of `interrupted`

template <class Cost>
class Solver {
 public:
  using Value = decltype(std::declval<const Cost&>()(0, 0));

  Solver(const Cost& cost, const IntervalParams& p) : cost_(cost), p_(p), cells_(p), table_((p.K - 1) * p.T) {}

  const Cells& cells() const { return cells_; }
  Value* layer(int64_t j) { return table_.data() + j * p_.T; }
  void fill(Value v) { std::fill(table_.begin(), table_.end(), v); }

  bool impossible() const { return !p_.all && !cells_.feasible(p_.K); }

  Status solve(IntervalSolver solver) {
    if (impossible()) return {Status::Code::infeasible};
    for (int64_t j = 0; j < p_.K - 1 && !stopped_; ++j) {
      const int64_t lo = cells_.first_end(j), hi = cells_.last_end(j);
      if (j > 0 && solver == IntervalSolver::divide_and_conquer)
        divide(j, lo, hi, 0, p_.T - 1);
      else
        for (int64_t r = lo; r <= hi && !stopped_; ++r) layer(j)[r] = best(j, r).value;
    }
    return trace();
  }

  // Read the optimum (every optimum with `all`) from the finished table.
  Status trace() {
    for (int64_t k = p_.all ? 1 : p_.K; k <= p_.K && !stopped_; ++k) {
      double& total = p_.totals[p_.all ? k - 1 : 0];
      int64_t* starts = p_.starts + (p_.all ? (k - 1) * p_.K : 0);
      total = kInf;
      if (!cells_.feasible(k)) continue;
      int64_t r = p_.T - 1;
      for (int64_t j = k - 1; j >= 0 && !stopped_; --j) {
        const Best b = best(j, r);
        if (j == k - 1) total = cost_.natural(b.value);
        starts[j] = b.start;
        r = b.start - 1;
      }
    }
    if (stopped_) return {Status::Code::interrupted};
    for (int64_t k = 0; k < (p_.all ? p_.K : 1); ++k)
      if (!(p_.totals[k] > -kInf)) return {Status::Code::not_finite, -1};  // finite costs whose sum overflows
    if (!p_.all && p_.totals[0] == kInf) return {Status::Code::infeasible};
    return {};
  }

 private:
  struct Best {
    Value value;
    int64_t start;
  };

  Best best(int64_t j, int64_t r) {
    if (j == 0) return {cost_(0, r), 0};
    return best(j, r, cells_.first_start(j, r), cells_.last_start(j, r));
  }

  Best best(int64_t j, int64_t r, int64_t first, int64_t last) {
    poll(last - first + 1);
    const Value* before = layer(j - 1) - 1;
    Best b{before[first] + cost_(first, r), first};
    for (int64_t l = first + 1; l <= last; ++l) {
      const Value v = before[l] + cost_(l, r);
      if (v < b.value) b = {v, l};
    }
    return b;
  }

  void divide(int64_t j, int64_t lo, int64_t hi, int64_t first, int64_t last) {
    while (lo <= hi && !stopped_) {
      const int64_t r = lo + (hi - lo) / 2;
      const Best b = best(j, r, std::max(first, cells_.first_start(j, r)), std::min(last, cells_.last_start(j, r)));
      layer(j)[r] = b.value;
      divide(j, lo, r - 1, first, b.start);
      lo = r + 1;
      first = b.start;
    }
  }

  void poll(int64_t work) {
    if ((work_ += work) < kPollEvery) return;
    work_ = 0;
    if (p_.interrupted && p_.interrupted()) stopped_ = true;
  }

  const Cost& cost_;
  const IntervalParams& p_;
  Cells cells_;
  std::vector<Value> table_;
  int64_t work_ = 0;
  bool stopped_ = false;
};

// ---- cells from rows of costs: the dense dynamic program -----------------------------------------------------------

// D[j][r] = min(D[j][r], D[j-1][l-1] + c(l, r)) for one l and all ends r. The loop is contiguous in r, so it
// vectorises.
struct Relax {
  ANTDIFF_INLINE static void run(const double* __restrict row, double before, double* __restrict layer, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const double v = before + row[i];
      layer[i] = v < layer[i] ? v : layer[i];
    }
  }
};

// Count the entries that are NaN or -inf.
struct CountBad {
  ANTDIFF_INLINE static int64_t run(const double* row, int64_t n) {
    int64_t bad = 0;
    for (int64_t i = 0; i < n; ++i) bad += !(row[i] > -kInf);
    return bad;
  }
};

constexpr int64_t kTile = 2048;  // 16 KiB of a row, which stay in the L1 cache while all layers use them

// `cost_rows(l, &row)` points `row` to costs with row[r] = c(l, r) for r >= l, or returns a Status that is not ok.
template <class Cost, class CostRows>
Status solve_dense(const Cost& cost, CostRows&& cost_rows, const IntervalParams& p) {
  Solver<Cost> solver(cost, p);
  const Cells& cells = solver.cells();
  if (solver.impossible()) return {Status::Code::infeasible};
  solver.fill(kInf);
  for (int64_t l = 0; l < p.T; ++l) {
    if (p.interrupted && p.interrupted()) return {Status::Code::interrupted};
    const double* row = nullptr;
    if (const Status s = cost_rows(l, &row); !s.ok()) return s;
    const int64_t first = l + p.min_size - 1, stop = std::min(l + p.max_size, p.T);
    for (int64_t tile = first; tile < stop; tile += kTile)
      for (int64_t j = 0; j < p.K - 1; ++j) {
        const bool open = j == 0 ? l == 0 : cells.first_end(j - 1) < l && l <= cells.last_end(j - 1) + 1;
        if (!open) continue;
        const int64_t from = std::max(tile, cells.first_end(j));
        const int64_t to = std::min({tile + kTile, stop, cells.last_end(j) + 1});
        const double before = j == 0 ? 0.0 : solver.layer(j - 1)[l - 1];
        if (from < to && before < kInf) multiversion<Relax>(row + from, before, solver.layer(j) + from, to - from);
      }
  }
  return solver.trace();
}

struct MatrixCost {
  const double* cost;
  int64_t T;
  double operator()(int64_t l, int64_t r) const { return cost[l * T + r]; }
  double natural(double total) const { return total; }
};

// ---- exact sums ----------------------------------------------------------------------------------------------------

int exponent_of_max(const double* x, int64_t n) {  // max |x| < 2^e
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
  int e = 0;
  std::frexp(largest, &e);
  return e;
}
int log2_ceil(int64_t n) {
  int bits = 0;
  while ((int64_t(1) << bits) < n) ++bits;
  return bits;
}

// Round to the grid on which sums of T numbers below 2^e are exact. Adding 1.5 * 2^52 grid steps shifts everything
// finer than the grid out of the double. If the grid is finer than the smallest double, the constant is 0 and nothing
// needs rounding.
class Grid {
 public:
  Grid(int e, int64_t T) : shift_constant_(std::ldexp(1.5, 52 + e + log2_ceil(T) - 51)) {}
  double operator()(double v) const { return (v + shift_constant_) - shift_constant_; }

 private:
  double shift_constant_;
};

// ---- task affinity -------------------------------------------------------------------------------------------------

struct AffinityCost {
  const double* affinity;
  int64_t T;
  Grid grid;

  double at(int64_t c, int64_t t) const { return grid(affinity[c * T + t]); }
  double operator()(int64_t l, int64_t r) const {  // sums are exact, so four chains give the result of one
    const int64_t c = (l + r + 1) / 2;
    double sum[4] = {};
    int64_t t = l;
    for (; t + 4 <= r + 1; t += 4)
      for (int i = 0; i < 4; ++i) sum[i] += at(c, t + i);
    for (; t <= r; ++t) sum[0] += at(c, t);
    return -((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  double natural(double total) const { return total; }
};

// Each centre c keeps the sum over the part of [l, 2c-l-1] inside 0..T-1, which shrinks at both ends as l grows. This
// interval and [l, 2c-l] are the two intervals with start l and centre c.
class AffinityCostRows {
 public:
  explicit AffinityCostRows(const AffinityCost& cost) : cost_(cost), inner_(cost.T), row_(cost.T) {
    for (int64_t c = 0; c < cost.T; ++c)
      for (int64_t t = 0; t < std::min(2 * c, cost.T); ++t) inner_[c] += cost.at(c, t);
  }
  Status operator()(int64_t l, const double** row) {
    const int64_t T = cost_.T;
    for (int64_t c = l; c < T; ++c) {
      const int64_t r = 2 * c - l;
      if (r - 1 < T && c > l) row_[r - 1] = -inner_[c];
      if (r < T) row_[r] = -(inner_[c] + cost_.at(c, r));
      if (c > l) {
        inner_[c] -= cost_.at(c, l);
        if (r - 1 < T) inner_[c] -= cost_.at(c, r - 1);
      }
    }
    *row = row_.data();
    return {};
  }

 private:
  const AffinityCost& cost_;
  std::vector<double> inner_, row_;
};

// ---- absolute error ------------------------------------------------------------------------------------------------

// For sorted numbers, the sum of distances to the median is the sum of the upper half minus the sum of the lower half,
// which takes four look-ups.
class AbsoluteCost {
 public:
  AbsoluteCost(const double* x, int64_t T) : sum_(T + 1) {
    const Grid grid(exponent_of_max(x, T), T);
    for (int64_t i = 0; i < T; ++i) sum_[i + 1] = sum_[i] + grid(x[i]);
  }
  double operator()(int64_t l, int64_t r) const {
    const int64_t lower = (l + r + 1) / 2, upper = (l + r) / 2 + 1;
    return (sum_[r + 1] - sum_[upper]) - (sum_[lower] - sum_[l]);
  }
  double natural(double total) const { return total; }

 private:
  std::vector<double> sum_;  // [T + 1]
};

// With weights a cost is a sum of products, which is exact in 128-bit integers with x in steps of 2^-50 max|x| and w in
// steps of 2^-61 T max w.
class WeightedAbsoluteCost {
 public:
  WeightedAbsoluteCost(const double* x, const double* weight, int64_t T) : x_(T), w_(T + 1), wx_(T + 1) {
    const int x_shift = 50 - exponent_of_max(x, T);
    const int w_shift = 61 - log2_ceil(T) - exponent_of_max(weight, T);
    shift_ = -x_shift - w_shift;
    for (int64_t i = 0; i < T; ++i) {
      const int64_t w = std::llround(std::ldexp(weight[i], w_shift));
      x_[i] = std::llround(std::ldexp(x[i], x_shift));
      w_[i + 1] = w_[i] + w;
      wx_[i + 1] = wx_[i] + int128(w) * x_[i];
    }
  }
  int128 operator()(int64_t l, int64_t r) const {
    const int64_t m = median(l, r);
    const int64_t below = w_[m] - w_[l], above = w_[r + 1] - w_[m + 1];
    return int128(below - above) * x_[m] - (wx_[m] - wx_[l]) + (wx_[r + 1] - wx_[m + 1]);
  }
  double natural(int128 total) const { return std::ldexp(double(total), shift_); }

 private:
  // Return the first m that has at least half of the weight of [l, r] at or below it.
  int64_t median(int64_t l, int64_t r) const {
    const int64_t total = w_[r + 1] - w_[l], below = w_[l];
    while (l < r) {
      const int64_t m = l + (r - l) / 2;
      if (2 * (w_[m + 1] - below) >= total)
        r = m;
      else
        l = m + 1;
    }
    return l;
  }

  std::vector<int64_t> x_, w_;  // [T], [T + 1]
  std::vector<int128> wx_;      // [T + 1]
  int shift_;
};

// ---- squared error -------------------------------------------------------------------------------------------------

// Uses prefix sums of w, w x and w x^2. x is taken about its mean, which reduces cancellation, and scaled to |x| <= 1,
// w <= 1, which avoids overflow.
class SquaredCost {
 public:
  SquaredCost(const double* x, const double* weight, int64_t T) : w_(T + 1), wx_(T + 1), wxx_(T + 1) {
    const int x_exponent = exponent_of_max(x, T), w_exponent = weight ? exponent_of_max(weight, T) : 0;
    exponent_ = 2 * x_exponent + w_exponent;
    double mean = 0;
    for (int64_t i = 0; i < T; ++i) mean += std::ldexp(x[i], -x_exponent) / double(T);
    for (int64_t i = 0; i < T; ++i) {
      const double w = weight ? std::ldexp(weight[i], -w_exponent) : 1.0;
      const double d = std::ldexp(x[i], -x_exponent) - mean;
      w_[i + 1] = w_[i] + w;
      wx_[i + 1] = wx_[i] + w * d;
      wxx_[i + 1] = wxx_[i] + w * d * d;
    }
  }
  double operator()(int64_t l, int64_t r) const {
    const double w = w_[r + 1] - w_[l], wx = wx_[r + 1] - wx_[l], wxx = wxx_[r + 1] - wxx_[l];
    return w > 0 ? std::max(0.0, wxx - wx * wx / w) : 0.0;
  }
  double natural(double total) const { return std::ldexp(total, exponent_); }

 private:
  std::vector<double> w_, wx_, wxx_;  // [T + 1]
  int exponent_;
};

}  // namespace

Status cpu_interval_cost(const double* cost, const IntervalParams& p) {
  const auto cost_rows = [&](int64_t l, const double** row) -> Status {
    *row = cost + l * p.T;
    if (!multiversion<CountBad>(*row + l, p.T - l)) return {};
    int64_t r = l;
    while ((*row)[r] > -kInf) ++r;
    return {Status::Code::not_finite, l * p.T + r};
  };
  return solve_dense(MatrixCost{cost, p.T}, cost_rows, p);
}

Status cpu_interval_affinity(const double* affinity, const IntervalParams& p) {
  const AffinityCost cost{affinity, p.T, Grid(exponent_of_max(affinity, p.T * p.T), p.T)};
  return solve_dense(cost, AffinityCostRows(cost), p);
}

Status cpu_interval_absolute(const double* x, const double* weight, IntervalSolver solver, const IntervalParams& p) {
  if (weight) {
    const WeightedAbsoluteCost cost(x, weight, p.T);
    return Solver(cost, p).solve(solver);
  }
  const AbsoluteCost cost(x, p.T);
  return Solver(cost, p).solve(solver);
}

Status cpu_interval_squared(const double* x, const double* weight, IntervalSolver solver, const IntervalParams& p) {
  const SquaredCost cost(x, weight, p.T);
  return Solver(cost, p).solve(solver);
}

}  // namespace antdiff
