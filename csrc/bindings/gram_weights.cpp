#include "core/gram_weights.h"

#include "bindings/problems.h"
#include "cpu/launchers.h"

namespace antdiff {
namespace {

constexpr const char* kNames[kGramMethods] = {"upgrad", "dualproj", "aligned_mtl", "mgda",   "cagrad",
                                              "imtl_g", "config",   "fairgrad",    "gradvac"};

GramMethod method_of(const std::string& name) {
  for (int i = 0; i < kGramMethods; ++i)
    if (name == kNames[i]) return GramMethod(i);
  throw_value("method must be a method of antdiff.ops.gram_weights; got '" + name +
              "'. See its documentation for the names.");
}

void weights(py::handle gram, const std::string& method, double option, py::handle keys_, py::handle targets_,
             bool poison, py::handle out, py::handle scratch) {
  Problems<GramWeightsParams> c(gram, poison, out);
  c.p.method = method_of(method);
  c.p.option = option;
  if (c.p.method == GramMethod::gradvac) {
    Tensor keys(keys_, "keys"), targets(targets_, "targets");
    c.p.keys = keys.require_same_shape(c.gram).require_same_device(c.gram).as<double>();
    targets.require_dtype(DType::f64, "cosines have the precision of gram");
    c.p.targets = targets.require_same_shape(c.gram).require_same_device(c.gram).as<double>();
  }
  c.scratch(scratch);
  check_problems(ANTDIFF_LAUNCH(c.gram, gram_weights, c.p), c.gram);
}

}  // namespace

void bind_gram_weights(py::module_& m) {
  m.def("gram_weights", &weights, py::arg("gram"), py::arg("method"), py::arg("option"), py::arg("keys"),
        py::arg("targets"), py::arg("poison"), py::arg("out"), py::arg("scratch"));
  m.def(
      "gram_weights_scratch", [](int64_t n, int64_t K) { return scratch_for(n, K, gram_weights_workspace(K)); },
      py::arg("n"), py::arg("K"));
}

}  // namespace antdiff
