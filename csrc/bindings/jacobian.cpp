#include "bindings/jacobian.h"

namespace antdiff {

JacobianView::JacobianView(py::handle J) {
  const auto list = py::reinterpret_borrow<py::list>(J);
  tensors.reserve(list.size());
  pieces.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const py::handle entry = list[i];
    if (entry.is_none()) continue;
    tensors.emplace_back(entry, list.size() == 1 ? "J" : "J[" + std::to_string(i) + "]");
    Tensor& x = tensors.back();
    if (x.dim() < 1)
      throw_value(x.name() + " must be [k, ...], one row per cluster; got a 0-d tensor. Stack the gradients.");
    if (tensors.size() == 1) {
      dtype = x.require_float().dtype();
      K = x.size(0);
      if (K < 1) throw_value(x.name() + " must have at least one row (k >= 1); got " + x.describe() + ".");
    } else {
      x.require_dtype(dtype, "the dtype of the other entries of J").require_same_device(first());
      if (x.size(0) != K)
        throw_value(x.name() + " must have k=" + std::to_string(K) + " rows, like the other entries of J; got " +
                    x.describe() + ".");
    }
    pieces.push_back({x.data(), x.numel() / K, nullptr});
  }
  if (tensors.empty()) throw_value("J must hold at least one tensor; got an empty list or None entries only.");
}

}  // namespace antdiff
