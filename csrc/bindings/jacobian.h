// J as the bindings see it: a tensor [K, ...], or a list of them with None where a parameter has no gradient.
#pragma once

#include <vector>

#include "bindings/tensor.h"
#include "core/gram.h"

namespace antdiff {

struct JacobianView {
  std::vector<Tensor> tensors;   // the entries of J that are not None; their data is [K, numel]
  std::vector<RowPiece> pieces;  // the same, for the launcher
  int64_t K = 0;
  DType dtype = DType::f32;

  // `J` is a Python list. All entries must agree in K, dtype and device, and there must be at least one.
  explicit JacobianView(py::handle J);
  const Tensor& first() const { return tensors.front(); }
};

}  // namespace antdiff
