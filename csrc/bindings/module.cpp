// The Python module antdiff._C. One bind_ function per family of ops, in the order in which a training step uses them.
#include "bindings/tensor.h"
#include "cpu/isa.h"

namespace antdiff {

void bind_tensor(py::module_& m);
void bind_cluster_loss(py::module_& m);
void bind_gram(py::module_& m);
void bind_combine(py::module_& m);
void bind_pcgrad(py::module_& m);
void bind_nash(py::module_& m);
void bind_gram_weights(py::module_& m);
void bind_interval(py::module_& m);

namespace {

// Describe how this binary was built, the instruction set that it uses, and the best one of this processor.
py::dict build_info() {
  py::dict d;
  d["version"] = ANTDIFF_VERSION;
  d["compiler"] = ANTDIFF_COMPILER;
  d["isa"] = isa_name(isa());
  d["supported_isa"] = isa_name(supported_isa());
#if defined(ANTDIFF_WITH_OPENMP)
  d["openmp"] = true;
#else
  d["openmp"] = false;
#endif
#if defined(ANTDIFF_WITH_CUDA)
  d["cuda"] = true;
  d["cuda_compiler"] = ANTDIFF_CUDA_COMPILER;
  d["cuda_archs"] = ANTDIFF_CUDA_ARCHS;
#else
  d["cuda"] = false;
  d["cuda_compiler"] = "";
  d["cuda_archs"] = "";
#endif
  return d;
}

// Return the bits of DeviceError that kernels on this device have set since the last call. Waits for the device.
uint32_t take_errors(int device) {
  uint32_t errors = 0;
#if defined(ANTDIFF_WITH_CUDA)
  Status status;
  {
    py::gil_scoped_release release;
    status = cuda_take_errors(device, &errors);
  }
  check(status);
#else
  (void)device;
#endif
  return errors;
}

}  // namespace
}  // namespace antdiff

PYBIND11_MODULE(_C, m) {
  antdiff::isa();  // an unknown ANTDIFF_CPU_CAPABILITY throws here, and the import raises ImportError
  m.def("build_info", &antdiff::build_info);
  m.def("take_errors", &antdiff::take_errors, pybind11::arg("device"));
  antdiff::bind_tensor(m);
  antdiff::bind_cluster_loss(m);
  antdiff::bind_gram(m);
  antdiff::bind_combine(m);
  antdiff::bind_pcgrad(m);
  antdiff::bind_nash(m);
  antdiff::bind_gram_weights(m);
  antdiff::bind_interval(m);
}
