// Shared by all .cu files: the launch, sums over a block, vector loads, and the sticky error word of the device.
#pragma once

#if defined(ANTDIFF_CUDA_EMULATION)
#include "tests/cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

#include "core/status.h"
#include "cuda/launchers.h"

namespace antdiff {

constexpr int kWarp = 32;

inline Status cuda_status(cudaError_t code) {
  if (code == cudaSuccess) return {};
  return {Status::Code::cuda, 0, int64_t(code)};
}

// Make `device` current for a scope, since tensors may live on a device other than the current one of the caller.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cuda_status(cudaGetDevice(&before_));
    if (status_.ok() && before_ != device) {
      status_ = cuda_status(cudaSetDevice(device));
      changed_ = status_.ok();
    }
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  const Status& status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  Status status_;
};

#if !defined(ANTDIFF_CUDA_EMULATION)
// Launch a kernel on the current device. An empty grid is an error in CUDA but not for the caller, so nothing is
// launched.
template <class... P, class... A>
Status launch(void (*kernel)(P...), int64_t blocks, int threads, Stream stream, const A&... args) {
  if (blocks <= 0) return {};
  kernel<<<unsigned(blocks), unsigned(threads), 0, static_cast<cudaStream_t>(stream.handle)>>>(P(args)...);
  return cuda_status(cudaGetLastError());
}
#endif

// The largest grid. Kernels stride over the remaining work.
constexpr int64_t kMostBlocks = int64_t(1) << 30;
inline int64_t grid_for(int64_t work) { return work < kMostBlocks ? work : kMostBlocks; }

// Return the address of the word of DeviceError bits on a device, or null if it cannot be found. Given null, kernels
// record nothing.
uint32_t* device_errors(int device);

#if defined(__CUDACC__) || defined(ANTDIFF_CUDA_EMULATION)

__device__ __forceinline__ void record(uint32_t* errors, uint32_t error) {
  if (errors) atomicOr(errors, error);
}

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Return the sum over the block to every thread. The order of the sum depends only on the size of the block. `shared`
// holds one A per warp and can be reused immediately. All threads of the block must call this function.
template <class A>
__device__ __forceinline__ A block_sum(A x, A* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  x = warp_sum(x);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  A total = 0;
  for (int w = 0; w < warps; ++w) total += shared[w];
  __syncthreads();
  return total;
}

// V consecutive elements, moved by one load or store of sizeof(T) * V bytes (at most 16).
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

#endif

template <class T>
constexpr int vector_width() {
  return int(16 / sizeof(T));
}
inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace antdiff
