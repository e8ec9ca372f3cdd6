#include "core/pcgrad.h"

#include "bindings/problems.h"
#include "cpu/launchers.h"

namespace antdiff {
namespace {

void weights(py::handle gram, py::handle perms_, py::handle keys, bool mean, bool poison, py::handle out,
             py::handle scratch) {
  Problems<PcgradParams> c(gram, poison, out);
  if (perms_.is_none()) {
    Tensor drawn(keys, "keys");
    drawn.require_dtype(DType::f64, "as antdiff.ops draws them").require_same_device(c.gram);
    if (drawn.numel() != c.gram.numel())
      throw_value("keys must have the shape of gram; got " + drawn.describe() + ". Draw one key per entry of gram.");
    c.p.keys = drawn.as<double>();
  } else {
    Tensor perms(perms_, "perms");
    perms.require_int64().require_same_device(c.gram);
    const int64_t dim = c.gram.dim();
    bool ok = perms.dim() == dim && perms.size(dim - 1) == c.p.K - 1;
    for (int64_t i = 0; ok && i < dim - 1; ++i) ok = perms.size(i) == c.gram.size(i);
    if (!ok)
      throw_value("perms must have shape [..., k, k-1] for gram [..., k, k]; got " + perms.describe() + " for gram " +
                  c.gram.describe() + ". Omit perms to draw the orders at random.");
    c.p.perms = perms.as<int64_t>();
  }
  c.p.mean = mean;
  c.scratch(scratch);
  check_problems(ANTDIFF_LAUNCH(c.gram, pcgrad_weights, c.p), c.gram);
}

}  // namespace

void bind_pcgrad(py::module_& m) {
  m.def("pcgrad_weights", &weights, py::arg("gram"), py::arg("perms"), py::arg("keys"), py::arg("mean"),
        py::arg("poison"), py::arg("out"), py::arg("scratch"));
  m.def(
      "pcgrad_scratch", [](int64_t n, int64_t K) { return scratch_for(n, K, pcgrad_workspace(K)); }, py::arg("n"),
      py::arg("K"));
}

}  // namespace antdiff
