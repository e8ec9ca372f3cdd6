// A borrowed, checked view of a torch.Tensor. Only the bindings use both Python objects and the data of tensors.
//
// All checks that need only metadata are made here. Every error names the argument, the rule, what was passed and the
// remedy. Python allocates the outputs with torch.empty and passes them in, so that they are ordinary tensors.
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

// In a required shape, kAny matches every size.
constexpr int64_t kAny = -1;

class Tensor {
 public:
  // Create a view of `object`, which must be a plain torch.Tensor or torch.nn.Parameter, dense, contiguous and with
  // storage.
  Tensor(py::handle object, std::string name);

  const std::string& name() const { return name_; }
  int64_t dim() const { return view_.ndim; }
  int64_t size(int64_t i) const { return view_.shape[i]; }
  int64_t numel() const { return numel_; }
  bool is_cpu() const { return view_.device.device_type == 1; }

  // Each of these throws TypeError or ValueError of the form "<name> must be <rule>; got <description>. <remedy>".
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
  Stream stream() const;  // the current CUDA stream of PyTorch on the device of this tensor
  std::string describe() const;

 private:
  DLTensor view_{};
  std::string name_;
  int64_t numel_ = 1;
  bool is_float_ = false;  // whether the dtype is a DType, which dtype_ then holds
  DType dtype_ = DType::f32;
};

[[noreturn]] void throw_type(const std::string& message);
[[noreturn]] void throw_value(const std::string& message);

// Turn the Status of a launcher into an exception. `id_name` and `k` describe a bad id.
void check(const Status& status, const std::string& id_name = "cluster", int64_t k = 0);

}  // namespace antdiff

// Run the CPU or the CUDA launcher, chosen by the device of `tensor`, without the GIL on the CPU. A build without CUDA
// throws an error that names the command to rebuild.
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
