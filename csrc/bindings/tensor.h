// torch.Tensor as the bindings see it: a borrowed, checked view. Nothing else in the project knows both Python and
// data.
//
// Every check that metadata allows is made here, and every failure names the argument, the rule, what came and the
// remedy. Outputs are allocated in Python with torch.empty and passed in, so that they are ordinary tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "bindings/dlpack.h"
#include "core/dtype.h"
#include "core/status.h"
#include "cuda/launchers.h"

namespace antdiff {

namespace py = pybind11;

// A dimension in a shape that a tensor must have; kAny matches every size.
constexpr int64_t kAny = -1;

class Tensor {
 public:
  // Views `object`, which must be a plain torch.Tensor or torch.nn.Parameter with storage, dense and contiguous.
  Tensor(py::handle object, std::string name);

  const std::string& name() const { return name_; }
  int64_t dim() const { return view_.ndim; }
  int64_t size(int64_t i) const { return view_.shape[i]; }
  int64_t numel() const { return numel_; }
  bool is_cpu() const { return view_.device.device_type == 1; }

  // Each throws TypeError or ValueError in the form "<name> must be <rule>; got <what came>. <remedy>".
  const Tensor& require_float() const;  // one of DType
  const Tensor& require_int64() const;
  const Tensor& require_dtype(DType dtype, const char* rule) const;
  const Tensor& require_shape(std::initializer_list<int64_t> shape, const char* rule) const;
  const Tensor& require_same_device(const Tensor& other) const;
  const Tensor& require_same_shape(const Tensor& other) const;

  DType dtype() const { return dtype_; }  // after require_float or require_dtype
  void* data() const { return static_cast<char*>(view_.data) + view_.byte_offset; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }
  Stream stream() const;  // the CUDA stream PyTorch is using on this tensor's device
  std::string describe() const;

 private:
  DLTensor view_{};
  std::string name_;
  int64_t numel_ = 1;
  bool is_float_ = false;  // whether the dtype is one of DType, and then dtype_ names it
  DType dtype_ = DType::f32;
};

[[noreturn]] void throw_type(const std::string& message);
[[noreturn]] void throw_value(const std::string& message);

// Turns a launcher's report into an exception; `k` and `name` describe a bad id.
void check(const Status& status, const std::string& id_name = "cluster", int64_t k = 0);

}  // namespace antdiff

// Runs the CPU or the CUDA launcher, by the device of `tensor`, without the GIL. A wheel built without CUDA names the
// command that rebuilds it.
#if defined(ANTDIFF_WITH_CUDA)
#define ANTDIFF_LAUNCH(tensor, op, ...)                 \
  ([&]() -> ::antdiff::Status {                         \
    if ((tensor).is_cpu()) {                            \
      ::antdiff::py::gil_scoped_release release;        \
      return ::antdiff::cpu_##op(__VA_ARGS__);          \
    }                                                   \
    const ::antdiff::Stream stream = (tensor).stream(); \
    return ::antdiff::cuda_##op(__VA_ARGS__, stream);   \
  }())
#else
#define ANTDIFF_LAUNCH(tensor, op, ...)                            \
  ([&]() -> ::antdiff::Status {                                    \
    if (!(tensor).is_cpu()) ::antdiff::throw_without_cuda(tensor); \
    ::antdiff::py::gil_scoped_release release;                     \
    return ::antdiff::cpu_##op(__VA_ARGS__);                       \
  }())
namespace antdiff {
[[noreturn]] void throw_without_cuda(const Tensor& tensor);
}
#endif
