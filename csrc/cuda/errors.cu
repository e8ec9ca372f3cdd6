// The sticky error word of each device, and the error texts of CUDA.
#include <array>
#include <atomic>

#include "cuda/launch.h"

namespace antdiff {
namespace {
__device__ uint32_t error_word;
constexpr int kMostDevices = 64;
}  // namespace

uint32_t* device_errors(int device) {
  static std::array<std::atomic<uint32_t*>, kMostDevices> found{};
  if (device < 0 || device >= kMostDevices) return nullptr;
  uint32_t* word = found[device].load(std::memory_order_acquire);
  if (!word) {
    void* address = nullptr;
    if (cudaGetSymbolAddress(&address, error_word) != cudaSuccess) {
      (void)cudaGetLastError();  // clear it: without the word, kernels still poison their results but record nothing
      return nullptr;
    }
    word = static_cast<uint32_t*>(address);
    found[device].store(word, std::memory_order_release);
  }
  return word;
}

Status cuda_take_errors(int device, uint32_t* errors) {
  DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  if (Status s = cuda_status(cudaDeviceSynchronize()); !s.ok()) return s;
  uint32_t* word = device_errors(device);
  *errors = 0;
  if (!word) return {};
  if (Status s = cuda_status(cudaMemcpy(errors, word, sizeof *errors, cudaMemcpyDeviceToHost)); !s.ok()) return s;
  return *errors ? cuda_status(cudaMemset(word, 0, sizeof *errors)) : Status{};
}

const char* cuda_error_text(int64_t code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace antdiff
