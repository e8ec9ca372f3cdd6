#include "core/gram.h"

#include "bindings/jacobian.h"
#include "cpu/launchers.h"

namespace antdiff {

namespace {

void gram(py::handle out, py::handle J, bool accumulate, py::handle scratch) {
  const JacobianView jacobian(J);
  Tensor g(out, "out");
  g.require_dtype(DType::f64, "Gram matrices are float64")
      .require_same_device(jacobian.first())
      .require_shape({jacobian.K, jacobian.K}, ("[k, k] with k=" + std::to_string(jacobian.K)).c_str());
  GramParams p;
  p.dtype = jacobian.dtype;
  p.K = jacobian.K;
  p.pieces = jacobian.pieces.data();
  p.count = int64_t(jacobian.pieces.size());
  p.gram = g.as<double>();
  p.accumulate = accumulate;
  if (!scratch.is_none()) p.scratch = Tensor(scratch, "scratch").as<double>();
  check(ANTDIFF_LAUNCH(jacobian.first(), gram, p));
}

}  // namespace

void bind_gram(py::module_& m) {
  m.def("gram", &gram, py::arg("out"), py::arg("J"), py::arg("accumulate"), py::arg("scratch"));
#if defined(ANTDIFF_WITH_CUDA)
  m.def("gram_scratch", &cuda_gram_scratch, py::arg("k"), py::arg("device"));
#else  // the next call, _C.gram, raises an error with the remedy
  m.def("gram_scratch", [](int64_t, int) -> int64_t { return 0; }, py::arg("k"), py::arg("device"));
#endif
}

}  // namespace antdiff
