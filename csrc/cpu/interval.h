// Interval clustering: the exact partition of T points into K contiguous, non-empty intervals at the smallest total
// cost.
//
//   D[0][r] = c(0, r)        D[j][r] = min over l of D[j-1][l-1] + c(l, r)        total = D[K-1][T-1]
//
// where [l, r] is inclusive and 0-based. Ties go to the smallest l in each cell, so the result never depends on the
// solver, the instruction set or the machine. Only the values D are stored, (K-1) T numbers. The starts are found
// afterwards by searching the K-1 cells on the optimal path again, so the last layer need not be computed at all.
//
// Time: O(K T^2) for any cost, and O(K T log T) for costs that satisfy the quadrangle inequality
//   c(a, c) + c(b, d) <= c(a, d) + c(b, c)   for a <= b <= c <= d.
// The inequality makes the first best l of a cell grow with r, so a layer can be split in two at its middle cell.
//
// This argument needs the inequality and the ties to hold in floating-point arithmetic and not only on paper.
// Therefore, if a cost is a sum of inputs, the inputs are first rounded to a grid so coarse that no sum of them rounds
// (2^-51 T max|x| for doubles). Every cost and total is then exact, and both solvers return the same starts by
// construction. Squared error divides by the size and cannot be made exact. For it, the totals of both solvers agree up
// to rounding, and the starts agree if the optimum is unique by more than that.
#pragma once

#include <cstdint>
#include <functional>

#include "core/status.h"

namespace antdiff {

struct IntervalParams {
  int64_t T = 0;         // points
  int64_t K = 1;         // intervals
  int64_t min_size = 1;  // minimum size of an interval
  int64_t max_size = 0;  // maximum size of an interval, at most T
  bool all = false;      // compute the optimum for every number of intervals 1..K, not only for K

  int64_t* starts = nullptr;  // [K]; with `all` [K, K], where row k-1 begins with the k starts of the optimum for k
  double* totals = nullptr;   // [1]; with `all` [K], +inf if no partition is feasible

  std::function<bool()> interrupted;  // polled often, so it must be cheap; true stops with Status::interrupted
};

enum class IntervalSolver {
  divide_and_conquer,  // for ascending x
  scan,                // every l in every cell; for squared error of x in any order, and as the reference
};

}  // namespace antdiff
