// Combination of the rows of J on CUDA. Parallel over slabs of columns, over which the grid strides. Bytes moved: J is
// read once, the result is written once. Every thread reads 16 bytes of each row, with eight rows in flight, and sums
// in row order in float32 (float64 for float64 input), so the result is deterministic. The weights are read on the
// device, so the host never waits for them.
#include "core/gram.h"

#include "cuda/row_table.h"

namespace antdiff {
namespace {

constexpr int kRows = 8;           // rows that a thread reads before it uses the first one
constexpr int kCombineBlocks = 2;  // blocks per multiprocessor: 64 KB in flight at K = 8

template <class A>
__device__ __forceinline__ void load_weights(const double* weights, int64_t k, int64_t K, A (&w)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) w[r] = k + r < K ? A(weights[k + r]) : A(0);
}

// Store V elements of the result. If aligned, use 16-byte stores. Otherwise element v goes to column + v * kRowThreads.
template <class O, int V, class A>
__device__ __forceinline__ void store(O* out, int64_t column, int64_t numel, bool aligned, const A (&sum)[V]) {
  constexpr int W = V < vector_width<O>() ? V : vector_width<O>();
  if (aligned) {
    if (column >= numel) return;
#pragma unroll
    for (int v = 0; v < V; v += W) {
      Pack<O, W> y;
#pragma unroll
      for (int w = 0; w < W; ++w) y.at[w] = from_float<O>(sum[v + w]);
      *reinterpret_cast<Pack<O, W>*>(out + column + v) = y;
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (column + v * kRowThreads < numel) out[column + v * kRowThreads] = from_float<O>(sum[v]);
  }
}

template <class T, class O>
__global__ void __launch_bounds__(kRowThreads, kCombineBlocks)
    combine_kernel(const __grid_constant__ RowTable table, const double* weights, int64_t K) {
  using A = accumulate_t<T>;
  constexpr int V = vector_width<T>();
  A w[kRows];
  load_weights(weights, 0, K, w);
  int entry = 0;
  for (int64_t slab = blockIdx.x; slab < table.at[table.count].first; slab += gridDim.x) {
    while (slab >= table.at[entry + 1].first) ++entry;
    RowView<T> view(table.at[entry], slab, kRowThreads * V);
    O* out = static_cast<O*>(table.at[entry].out);
    view.aligned = view.aligned && reinterpret_cast<uintptr_t>(out) % 16 == 0;
    const int64_t column = view.column(0);
    A sum[V] = {};
    for (int64_t k = 0; k < K; k += kRows) {
      if (K > kRows) load_weights(weights, k, K, w);
      Pack<T, V> x[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (k + r < K) x[r] = view.load(k + r, column);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (k + r < K)
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += w[r] * A(to_float(x[r].at[v]));
    }
    store(out, column, view.numel, view.aligned, sum);
  }
}

template <class T, class O>
Status combine(const CombineParams& p, Stream stream) {
  int count = 0;
  if (Status s = multiprocessors(stream.device, &count); !s.ok()) return s;
  int64_t next = 0;
  do {  // runs once unless the list is longer than a table
    RowTable table;
    const int64_t slabs = table.fill(p.pieces, p.count, int64_t(kRowThreads) * vector_width<T>(), &next);
    const int64_t most = int64_t(count) * kCombineBlocks;
    Status s = launch(combine_kernel<T, O>, slabs < most ? slabs : most, kRowThreads, stream, table, p.weights, p.K);
    if (!s.ok()) return s;
  } while (next < p.count);
  return {};
}

}  // namespace

Status cuda_combine(const CombineParams& p, Stream stream) {
  DeviceGuard guard(stream.device);
  if (!guard.status().ok()) return guard.status();
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    return p.out_dtype == p.dtype ? combine<T, T>(p, stream) : combine<T, float>(p, stream);
  });
}

}  // namespace antdiff
