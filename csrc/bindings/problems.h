// Shared by the ops on batches of K x K problems: the checked gram and weights, and the errors for invalid values.
#pragma once

#include <string>

#include "bindings/tensor.h"

namespace antdiff {

// gram float64 [..., K, K] and weights [..., K] of n problems. antdiff.ops allocates the weights.
template <class Params>
struct Problems {
  Tensor gram;
  Params p;

  Problems(py::handle gram_, bool poison, py::handle weights) : gram(gram_, "gram") {
    gram.require_dtype(DType::f64, "balancing computes in double precision, which antdiff.ops.gram returns");
    const int64_t dim = gram.dim();
    if (dim < 2 || gram.size(dim - 1) != gram.size(dim - 2) || gram.size(dim - 1) < 1)
      throw_value("gram must have shape [..., k, k] with k >= 1; got " + gram.describe() +
                  ". Compute it with antdiff.ops.gram.");
    p.K = gram.size(dim - 1);
    p.n = gram.numel() / (p.K * p.K);
    p.gram = gram.as<double>();
    p.poison = poison;
    p.weights = Tensor(weights, "weights").as<double>();
  }
  void scratch(py::handle scratch) {
    if (!scratch.is_none()) p.scratch = Tensor(scratch, "scratch").as<double>();
  }
};

// Turn the Status of a CPU launcher into a ValueError that names the entry of gram, or the problem with invalid perms.
void check_problems(const Status& status, const Tensor& gram);

}  // namespace antdiff
