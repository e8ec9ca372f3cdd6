// The Jacobian J as the bindings receive it: a list of tensors [K, ...], with None where a parameter has no gradient.
#pragma once

#include <vector>

#include "bindings/tensor.h"
#include "core/gram.h"

namespace antdiff {

struct JacobianView {
  std::vector<Tensor> tensors;   // the entries of J that are not None; their data is [K, numel]
  std::vector<RowPiece> pieces;  // the same entries, for the launcher
  int64_t K = 0;
  DType dtype = DType::f32;

  // `J` is a Python list with at least one tensor. All tensors must have the same K, dtype and device.
  explicit JacobianView(py::handle J);
  const Tensor& first() const { return tensors.front(); }
};

}  // namespace antdiff
