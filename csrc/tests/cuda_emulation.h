// Emulates the CUDA kernels of csrc/cuda on the CPU, without a GPU or nvcc, so that every commit executes every kernel
// under the address and undefined-behaviour sanitizers.
//
// A test compiles a .cu file as C++ after defining ANTDIFF_CUDA_EMULATION. Blocks run one after the other. The threads
// of a block are fibers (ucontext) that switch only at __syncthreads and at warp shuffles. If some threads of a block
// never reach a barrier, or some lanes of the mask never reach a shuffle, the emulation aborts with a message instead
// of hanging. It cannot show races between barriers, memory ordering, occupancy or speed. benchmarks/gpu_gate.sh tests
// those on a GPU.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define ANTDIFF_FIBER_ASAN 1
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

namespace antdiff::emulation {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

struct Block {
  static constexpr size_t kStack = 128 * 1024;
  std::vector<Fiber> fibers;
  std::vector<uint64_t> exchange;  // one slot per thread, for shuffles
  std::vector<unsigned> arrived;   // number of shuffles that each thread has reached
  std::vector<unsigned> left;      // number of shuffles whose value each thread has read
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  std::function<void()> body;
  unsigned current = 0, live = 0, barrier_count = 0, barrier_generation = 0;
  bool progress = false;
};

inline Block& block() {
  static Block b;
  return b;
}
inline dim3& block_index() {
  static dim3 i;
  return i;
}
inline dim3& block_size() {
  static dim3 i;
  return i;
}
inline dim3& grid_size() {
  static dim3 i;
  return i;
}
inline dim3 thread_index() { return {block().current, 0, 0}; }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda emulation: %s (block %u)\n", what, block_index().x);
  std::abort();
}

inline void yield() {
  Block& b = block();
#if ANTDIFF_FIBER_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, b.scheduler_stack, b.scheduler_size);
#endif
  swapcontext(&b.fibers[b.current].context, &b.scheduler);
#if ANTDIFF_FIBER_ASAN
  __sanitizer_finish_switch_fiber(fake, &b.scheduler_stack, &b.scheduler_size);
#endif
}

inline void entry() {
  Block& b = block();
#if ANTDIFF_FIBER_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack, &b.scheduler_size);
#endif
  b.body();
  b.fibers[b.current].done = true;
  --b.live;
  b.progress = true;
#if ANTDIFF_FIBER_ASAN
  __sanitizer_start_switch_fiber(nullptr, b.scheduler_stack, b.scheduler_size);
#endif
  swapcontext(&b.fibers[b.current].context, &b.scheduler);
}

inline void run_block(unsigned threads) {
  Block& b = block();
  if (b.fibers.size() < threads) b.fibers.resize(threads);
  b.exchange.assign(threads, 0);
  b.arrived.assign(threads, 0);
  b.left.assign(threads, 0);
  b.live = threads;
  b.barrier_count = 0;
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& f = b.fibers[t];
    if (!f.stack) f.stack.reset(new char[Block::kStack]);
    f.done = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = Block::kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, reinterpret_cast<void (*)()>(entry), 0);
  }
  while (b.live) {
    b.progress = false;
    for (unsigned t = 0; t < threads; ++t) {
      if (b.fibers[t].done) continue;
      b.current = t;
#if ANTDIFF_FIBER_ASAN
      void* fake = nullptr;
      __sanitizer_start_switch_fiber(&fake, b.fibers[t].stack.get(), Block::kStack);
#endif
      swapcontext(&b.scheduler, &b.fibers[t].context);
#if ANTDIFF_FIBER_ASAN
      __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    }
    if (!b.progress && b.live) fail("threads wait at a barrier or shuffle that others never reach");
  }
}

inline void barrier() {
  Block& b = block();
  const unsigned generation = b.barrier_generation;
  if (++b.barrier_count == block_size().x) {
    b.barrier_count = 0;
    ++b.barrier_generation;
    b.progress = true;
  }
  while (generation == b.barrier_generation) yield();
}

// Every lane of the mask writes its value to its slot, then reads the slot of another lane. A lane continues only when
// all lanes have read.
template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  Block& b = block();
  const unsigned me = b.current, warp = me / 32 * 32, turn = ++b.arrived[me];
  std::memcpy(&b.exchange[me], &value, sizeof value);
  b.progress = true;
  const auto all_lanes = [&](const std::vector<unsigned>& met) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1u)) continue;
      if (warp + lane >= block_size().x) fail("the mask of a shuffle names lanes the block does not have");
      if (met[warp + lane] < turn) return false;
    }
    return true;
  };
  while (!all_lanes(b.arrived)) yield();
  T other;
  std::memcpy(&other, &b.exchange[warp + source], sizeof other);
  b.left[me] = turn;
  b.progress = true;
  while (!all_lanes(b.left)) yield();
  return other;
}

}  // namespace antdiff::emulation

#define threadIdx (::antdiff::emulation::thread_index())
#define blockIdx (::antdiff::emulation::block_index())
#define blockDim (::antdiff::emulation::block_size())
#define gridDim (::antdiff::emulation::grid_size())

inline void __syncthreads() { antdiff::emulation::barrier(); }
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits) {
  return antdiff::emulation::shuffle(mask, x, (antdiff::emulation::block().current % 32) ^ unsigned(bits));
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { (void)antdiff::emulation::shuffle(mask, 0, 0); }
template <class T>
T atomicOr(T* address, T x) {
  const T before = *address;
  *address = before | x;
  return before;
}
inline double __longlong_as_double(long long bits) {
  double d;
  std::memcpy(&d, &bits, sizeof d);
  return d;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
enum { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 1, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

#include "core/status.h"
#include "cuda/launchers.h"

namespace antdiff {

inline uint32_t emulated_errors = 0;

template <class... P, class... A>
Status launch(void (*kernel)(P...), int64_t blocks, int threads, Stream, A... args) {
  emulation::block_size() = {unsigned(threads), 1, 1};
  emulation::grid_size() = {unsigned(blocks > 0 ? blocks : 0), 1, 1};
  emulation::block().body = [=] { kernel(P(args)...); };
  for (int64_t i = 0; i < blocks; ++i) {
    emulation::block_index() = {unsigned(i), 0, 0};
    emulation::run_block(unsigned(threads));
  }
  return {};
}

}  // namespace antdiff
