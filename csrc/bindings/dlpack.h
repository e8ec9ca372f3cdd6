// The part of the public C ABI of DLPack 1.x that antdiff uses: the description of a tensor, and the exchange API
// through which PyTorch (2.10 and later) provides descriptions. It is declared here so that the build needs no
// framework.
#pragma once

#include <cstdint>

extern "C" {

struct DLPackVersion {
  uint32_t major, minor;
};
struct DLDevice {
  int32_t device_type, device_id;  // 1 is the CPU, 2 is CUDA
};
struct DLDataType {
  uint8_t code, bits;  // code 0: int, 2: float, 4: bfloat
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null for a contiguous tensor
  uint64_t byte_offset;
};
struct DLManagedTensorVersioned;
struct DLPackExchangeAPIHeader {
  DLPackVersion version;
  DLPackExchangeAPIHeader* prev_api;
};
struct DLPackExchangeAPI {
  DLPackExchangeAPIHeader header;
  int (*managed_tensor_allocator)(DLTensor*, DLManagedTensorVersioned**, void*,
                                  void (*)(void*, const char*, const char*));
  int (*managed_tensor_from_py_object_no_sync)(void*, DLManagedTensorVersioned**);
  int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned*, void**);
  int (*dltensor_from_py_object_no_sync)(void*, DLTensor*);  // a borrowed view, valid while the object lives
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // extern "C"

static_assert(sizeof(void*) != 8 || (sizeof(DLTensor) == 48 && sizeof(DLPackExchangeAPI) == 56), "DLPack 1.x on LP64");
