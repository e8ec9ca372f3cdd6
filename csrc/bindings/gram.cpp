#include "core/gram.h"

#include "bindings/rows.h"
#include "cpu/launchers.h"

namespace antdiff {

Rows::Rows(py::handle J) {
  const auto list = py::reinterpret_borrow<py::list>(J);
  tensors.reserve(list.size());
  pieces.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const py::handle entry = list[i];
    if (entry.is_none()) continue;
    tensors.emplace_back(entry, list.size() == 1 ? "J" : "J[" + std::to_string(i) + "]");
    Tensor& x = tensors.back();
    if (x.dim() < 1)
      throw_value(x.name() + " must be [k, ...], one row a cluster; got a 0-d tensor. Stack the gradients.");
    if (tensors.size() == 1) {
      dtype = x.require_float().dtype();
      K = x.size(0);
      if (K < 1) throw_value(x.name() + " must have at least one row (k >= 1); got " + x.describe() + ".");
    } else {
      x.require_dtype(dtype, "the dtype of the other entries of J").require_same_device(first());
      if (x.size(0) != K)
        throw_value(x.name() + " must have k=" + std::to_string(K) + " rows, as the other entries of J; got " +
                    x.describe() + ".");
    }
    pieces.push_back({x.data(), x.numel() / K, nullptr});
  }
  if (tensors.empty()) throw_value("J must hold at least one tensor; got an empty list or None entries only.");
}

namespace {

void gram(py::handle out, py::handle J, bool accumulate, py::handle scratch) {
  const Rows rows(J);
  Tensor g(out, "out");
  g.require_dtype(DType::f64, "Gram matrices are float64")
      .require_same_device(rows.first())
      .require_shape({rows.K, rows.K}, ("[k, k] with k=" + std::to_string(rows.K)).c_str());
  GramParams p;
  p.dtype = rows.dtype;
  p.K = rows.K;
  p.pieces = rows.pieces.data();
  p.count = int64_t(rows.pieces.size());
  p.gram = g.as<double>();
  p.accumulate = accumulate;
  if (!scratch.is_none()) p.scratch = Tensor(scratch, "scratch").as<double>();
  check(ANTDIFF_LAUNCH(rows.first(), gram, p));
}

}  // namespace

void bind_gram(py::module_& m) {
  m.def("gram", &gram, py::arg("out"), py::arg("J"), py::arg("accumulate"), py::arg("scratch"));
#if defined(ANTDIFF_WITH_CUDA)
  m.def("gram_scratch", &cuda_gram_scratch, py::arg("k"), py::arg("device"));
#else  // the call that follows names the remedy
  m.def("gram_scratch", [](int64_t, int) -> int64_t { return 0; }, py::arg("k"), py::arg("device"));
#endif
}

}  // namespace antdiff
