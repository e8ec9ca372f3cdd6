#include "core/nash.h"

#include "bindings/problems.h"
#include "cpu/launchers.h"

namespace antdiff {
namespace {

void weights(py::handle gram, bool poison, py::handle out, py::handle scratch) {
  Problems<NashParams> c(gram, poison, out);
  c.scratch(scratch);
  check_problems(ANTDIFF_LAUNCH(c.gram, nash_weights, c.p), c.gram);
}

}  // namespace

void bind_nash(py::module_& m) {
  m.def("nash_weights", &weights, py::arg("gram"), py::arg("poison"), py::arg("out"), py::arg("scratch"));
  m.def(
      "nash_scratch", [](int64_t n, int64_t K) { return scratch_for(n, K, nash_workspace(K)); }, py::arg("n"),
      py::arg("K"));
}

}  // namespace antdiff
