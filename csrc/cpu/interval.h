// Interval clustering: T points in K contiguous, non-empty intervals at the least total cost, exactly.
//
//   D[0][r] = c(0, r)        D[j][r] = min over l of D[j-1][l-1] + c(l, r)        total = D[K-1][T-1]
//
// with [l, r] inclusive and 0-based. Ties go to the smallest l in each cell, so a result never depends on the solver,
// the instruction set or the machine. Only the values D are tabled, (K-1) T numbers; the starts are found afterwards by
// searching the K-1 cells on the optimal path again, which also spares the whole of the last layer.
//
// Time: O(K T^2) for any cost, O(K T log T) for those that obey the quadrangle inequality
//   c(a, c) + c(b, d) <= c(a, d) + c(b, c)   for a <= b <= c <= d,
// which makes the first best l of a cell grow with r, so that a layer splits in two around its middle cell.
//
// The argument needs the inequality, and ties, to hold in the arithmetic and not only on paper. So where a cost is a
// sum of inputs, the inputs are first rounded to a grid so coarse that no sum of them rounds (2^-51 T max|x| for
// doubles): every cost and total is then exact, and both solvers return the same starts by construction. Squared error
// divides by the size and cannot be made exact: there both totals agree to rounding, and the starts wherever the
// optimum is unique by more than that.
#pragma once

#include <cstdint>
#include <functional>

#include "core/status.h"

namespace antdiff {

struct IntervalParams {
  int64_t T = 0;         // points
  int64_t K = 1;         // intervals
  int64_t min_size = 1;  // of an interval
  int64_t max_size = 0;  // at most T
  bool all = false;      // the optimum for every number of intervals 1..K, not for K alone

  int64_t* starts = nullptr;  // [K]; with `all` [K, K], whose row k-1 begins with the k starts of the optimum for k
  double* totals = nullptr;   // [1]; with `all` [K], +inf where no partition is feasible

  std::function<bool()> interrupted;  // polled often (it must be cheap); true stops with Status::interrupted
};

enum class IntervalSolver {
  divide_and_conquer,  // for ascending x
  scan,                // every l in every cell: for squared error of x in any order, and as the oracle of the other
};

}  // namespace antdiff
