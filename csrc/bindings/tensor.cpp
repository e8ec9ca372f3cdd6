#include "bindings/tensor.h"

#include <cmath>

namespace antdiff {
namespace {

struct Torch {
  const DLPackExchangeAPI* api = nullptr;
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
};
Torch& torch() {
  static Torch t;
  return t;
}

void attach(const py::capsule& capsule, py::handle tensor, py::handle parameter) {
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->header.version.major != 1 || !api->dltensor_from_py_object_no_sync || !api->current_work_stream)
    throw py::import_error("antdiff needs version 1 of DLPack's C exchange API; this torch offers version " +
                           std::to_string(api->header.version.major) +
                           ". Update antdiff, or install the torch version that constraints.txt names.");
  torch() = {api, reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr()),
             reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr())};
}

const char* dtype_name(DLDataType d) {
  if (d.lanes != 1) return "a vector dtype";
  if (d.code == 2)
    return d.bits == 64 ? "float64" : d.bits == 32 ? "float32" : d.bits == 16 ? "float16" : "a float dtype";
  if (d.code == 4 && d.bits == 16) return "bfloat16";
  if (d.code == 0) return d.bits == 64 ? "int64" : d.bits == 32 ? "int32" : d.bits == 16 ? "int16" : "int8";
  if (d.code == 1) return "an unsigned integer dtype";
  if (d.code == 5) return "a complex dtype";
  if (d.code == 6) return "bool";
  return "another dtype";
}
const char* dtype_name(DType d) {
  return d == DType::f64 ? "float64" : d == DType::f16 ? "float16" : d == DType::bf16 ? "bfloat16" : "float32";
}
bool to_dtype(DLDataType d, DType* out) {
  if (d.lanes != 1) return false;
  if (d.code == 4 && d.bits == 16) return *out = DType::bf16, true;
  if (d.code != 2) return false;
  if (d.bits == 64) return *out = DType::f64, true;
  if (d.bits == 32) return *out = DType::f32, true;
  if (d.bits == 16) return *out = DType::f16, true;
  return false;
}

std::string shape_text(const int64_t* shape, int64_t ndim) {
  std::string s = "[";
  for (int64_t i = 0; i < ndim; ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}
std::string device_text(DLDevice d) {
  if (d.device_type == 1) return "cpu";
  return (d.device_type == 2 ? "cuda:" : "device type " + std::to_string(d.device_type) + ":") +
         std::to_string(d.device_id);
}

}  // namespace

void throw_type(const std::string& message) { throw py::type_error(message); }
void throw_value(const std::string& message) { throw py::value_error(message); }

Tensor::Tensor(py::handle object, std::string name) : name_(std::move(name)) {
  // Accept exact types only: a FakeTensor or another subclass may have no data pointer of its own and would crash
  // below.
  PyTypeObject* type = Py_TYPE(object.ptr());
  if (type != torch().tensor && type != torch().parameter)
    throw_type(name_ + " must be a plain torch.Tensor; got " + type->tp_name +
               ". Convert it first (DTensor: .to_local(); NumPy: torch.from_numpy).");
  if (torch().api->dltensor_from_py_object_no_sync(object.ptr(), &view_)) {
    // The message of torch says why it cannot describe the tensor: sparse, meta, quantised, conjugated, ...
    py::error_already_set cause;
    throw_type(name_ + " must be a dense tensor with storage on the CPU or a CUDA device; torch says: " +
               std::string(py::str(cause.value())) + ". Use .to_dense(), .resolve_conj() or a real device.");
  }
  if (view_.device.device_type != 1 && view_.device.device_type != 2)
    throw_type(name_ + " must be on the CPU or a CUDA device; got " + device_text(view_.device) +
               ". Move it with .to().");
  is_float_ = to_dtype(view_.dtype, &dtype_);
  int64_t expected = 1;
  bool contiguous = true;
  for (int64_t i = view_.ndim - 1; i >= 0; --i) {
    if (view_.strides && view_.shape[i] != 1 && view_.strides[i] != expected) contiguous = false;
    expected *= view_.shape[i];
  }
  numel_ = expected;
  if (!contiguous && numel_ > 1)
    throw_value(name_ + " must be contiguous; got " + describe() + ". Call .contiguous().");
  if (numel_ > 0 && !view_.data)
    throw_type(name_ +
               " must have storage; got a tensor without a data pointer (torch.func transforms such as vmap and "
               "grad, fake and meta tensors have none). Call the op outside the transform.");
}

std::string Tensor::describe() const {
  return std::string(dtype_name(view_.dtype)) + " " + shape_text(view_.shape, view_.ndim) + " on " +
         device_text(view_.device);
}

const Tensor& Tensor::require_float() const {
  if (!is_float_)
    throw_type(name_ + " must be float32, float64, float16 or bfloat16; got " + describe() +
               ". Convert it with .to().");
  return *this;
}

const Tensor& Tensor::require_int64() const {
  if (view_.dtype.code != 0 || view_.dtype.bits != 64 || view_.dtype.lanes != 1)
    throw_type(name_ + " must be int64; got " + describe() + ". Convert it with .long().");
  return *this;
}

const Tensor& Tensor::require_dtype(DType dtype, const char* rule) const {
  if (!is_float_ || dtype_ != dtype)
    throw_type(name_ + " must be " + dtype_name(dtype) + " (" + rule + "); got " + describe() +
               ". Convert it with .to().");
  return *this;
}

const Tensor& Tensor::require_shape(std::initializer_list<int64_t> shape, const char* rule) const {
  bool ok = int64_t(shape.size()) == view_.ndim;
  int64_t i = 0;
  for (int64_t n : shape) {
    if (ok && n != kAny && view_.shape[i] != n) ok = false;
    ++i;
  }
  if (!ok) throw_value(name_ + " must have shape " + rule + "; got " + describe() + ".");
  return *this;
}

const Tensor& Tensor::require_same_device(const Tensor& other) const {
  const DLDevice a = view_.device, b = other.view_.device;
  if (a.device_type != b.device_type || a.device_id != b.device_id)
    throw_value(name_ + " must be on the device of " + other.name_ + " (" + device_text(b) + "); got " + describe() +
                ". Move it with .to(" + other.name_ + ".device).");
  return *this;
}

const Tensor& Tensor::require_same_shape(const Tensor& other) const {
  bool same = dim() == other.dim();
  for (int64_t i = 0; same && i < dim(); ++i) same = size(i) == other.size(i);
  if (!same)
    throw_value(name_ + " must have the shape of " + other.name_ + ", " +
                shape_text(other.view_.shape, other.view_.ndim) + "; got " + describe() +
                ". Expand it explicitly if broadcasting is intended.");
  return *this;
}

Stream Tensor::stream() const {
  Stream s;
  s.device = view_.device.device_id;
  if (torch().api->current_work_stream(view_.device.device_type, view_.device.device_id, &s.handle))
    throw py::error_already_set();
  return s;
}

void check(const Status& status, const std::string& id_name, int64_t k) {
  switch (status.code) {
    case Status::Code::ok:
      return;
    case Status::Code::bad_id:
      throw_value(id_name + " must be int64 [B] with 0 <= id < k; got id " + std::to_string(status.value) +
                  " with k=" + std::to_string(k) + " at row " + std::to_string(status.where) +
                  ". Map the ids to 0..k-1, or increase k.");
    case Status::Code::interrupted:
      throw py::error_already_set();
    case Status::Code::cuda:
#if defined(ANTDIFF_WITH_CUDA)
      throw std::runtime_error(std::string("CUDA error in antdiff: ") + cuda_error_text(status.value) +
                               ". Run with CUDA_LAUNCH_BLOCKING=1 to find the call that caused it.");
#endif
    default:
      throw std::runtime_error("antdiff: unexpected status " + std::to_string(int(status.code)));
  }
}

#if !defined(ANTDIFF_WITH_CUDA)
void throw_without_cuda(const Tensor& tensor) {
  throw std::runtime_error(tensor.name() +
                           " is on a CUDA device, but antdiff was built without CUDA kernels. Install the CUDA "
                           "toolkit and run this in the source tree: "
                           "ANTDIFF_CUDA=ON pip install --force-reinstall --no-deps . "
                           "The functions of antdiff.ops.reference are plain PyTorch and run on any device.");
}
#endif

void bind_tensor(py::module_& m) {
  m.def("attach", &attach, py::arg("exchange_api"), py::arg("tensor_type"), py::arg("parameter_type"));
}

}  // namespace antdiff
