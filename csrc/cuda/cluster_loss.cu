// Cluster loss on CUDA.
//   tile_kernel     Parallel over tiles of samples. It reads pred and target once and writes grad_pred once. Sums are
//                   float (double for float64) over the 16 elements of a thread, and double across threads.
//   cluster_kernel  One block per cluster. It reads B ids and the tile sums of its own samples. Sums are double.
// Nothing is atomic and every sum has a fixed order, so the result is the same from run to run.
#include "core/cluster_loss.h"

#include "cuda/launch.h"

namespace antdiff {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ double not_a_number() { return __longlong_as_double(0x7ff8000000000000LL); }

template <class A>
__device__ __forceinline__ A weight_of(const ClusterLossParams& p, int64_t b) {
  return p.weight ? static_cast<const A*>(p.weight)[b] : A(1);
}

// Return d losses[i] / d (sum of errors of sample b), times grad_losses[i], where i is the cluster of b. A bad id gives
// NaN and is never used as an index.
template <class A>
__device__ __forceinline__ A slope_factor(const ClusterLossParams& p, int64_t b) {
  const int64_t i = p.cluster[b];
  if (i < 0 || i >= p.K) return A(not_a_number());
  return A(double(static_cast<const A*>(p.grad_losses)[i]) * double(weight_of<A>(p, b)) /
           (double(p.counts[i]) * double(p.N)));
}

template <class T, LossKind kind, bool value, bool slope, int V>
__global__ void __launch_bounds__(kThreads) tile_kernel(ClusterLossParams p, int64_t tiles_per_sample) {
  using A = accumulate_t<T>;
  __shared__ double shared[kThreads / kWarp];
  const A delta = A(p.delta);
  for (int64_t tile = blockIdx.x; tile < p.B * tiles_per_sample; tile += gridDim.x) {
    const int64_t b = tile / tiles_per_sample, start = (tile % tiles_per_sample) * kClusterLossTile;
    const int64_t stop = start + kClusterLossTile < p.N ? start + kClusterLossTile : p.N;
    const T* pred = static_cast<const T*>(p.pred) + b * p.N;
    const T* target = static_cast<const T*>(p.target) + b * p.N;
    T* grad = static_cast<T*>(p.grad_pred) + (slope ? b * p.N : 0);
    const A factor = slope ? slope_factor<A>(p, b) : A(0);
    A sum = 0;
#pragma unroll 4
    for (int64_t n = start + int64_t(threadIdx.x) * V; n < stop; n += kThreads * V) {
      const Pack<T, V> x = *reinterpret_cast<const Pack<T, V>*>(pred + n);
      const Pack<T, V> y = *reinterpret_cast<const Pack<T, V>*>(target + n);
      Pack<T, V> g;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A d = to_float(x.at[v]) - to_float(y.at[v]);
        if (value) sum += error_value<kind>(d, delta);
        if (slope) g.at[v] = from_float<T>(factor * error_slope<kind>(d, delta));
      }
      if (slope) *reinterpret_cast<Pack<T, V>*>(grad + n) = g;
    }
    if (value) {
      const double total = block_sum(double(sum), shared);
      if (threadIdx.x == 0) p.scratch[tile] = total;
    }
  }
}

// Block i computes counts[i], and losses[i] unless `counts_only`. One id out of range makes every loss of the call NaN.
template <class A>
__global__ void __launch_bounds__(kThreads)
    cluster_kernel(ClusterLossParams p, int64_t tiles_per_sample, bool counts_only, uint32_t* errors) {
  __shared__ double sums[kThreads / kWarp];
  __shared__ int64_t numbers[kThreads / kWarp];
  for (int64_t i = blockIdx.x; i < p.K; i += gridDim.x) {
    double sum = 0;
    int64_t count = 0, bad = 0;
    for (int64_t b = threadIdx.x; b < p.B; b += kThreads) {
      const int64_t id = p.cluster[b];
      bad += id < 0 || id >= p.K;
      if (id != i) continue;
      ++count;
      if (counts_only) continue;
      A mean;
      if (p.pred) {
        double total = 0;
        for (int64_t t = 0; t < tiles_per_sample; ++t) total += p.scratch[b * tiles_per_sample + t];
        mean = A(total / double(p.N));
        static_cast<A*>(p.per_sample)[b] = mean;
      } else {
        mean = static_cast<const A*>(p.per_sample)[b];
      }
      sum += double(mean) * double(weight_of<A>(p, b));
    }
    sum = block_sum(sum, sums);
    count = block_sum(count, numbers);
    bad = block_sum(bad, numbers);
    if (threadIdx.x == 0) {
      p.counts[i] = count;
      if (bad) record(errors, kBadClusterId);
      if (!counts_only) static_cast<A*>(p.losses)[i] = A(bad ? not_a_number() : count ? sum / double(count) : 0.0);
    }
  }
}

template <class T, LossKind kind, bool value, bool slope>
Status launch_tiles(const ClusterLossParams& p, Stream stream) {
  constexpr int V = vector_width<T>();
  const bool vector = p.N % V == 0 && aligned16(p.pred) && aligned16(p.target) && aligned16(p.grad_pred);
  const auto kernel = vector ? tile_kernel<T, kind, value, slope, V> : tile_kernel<T, kind, value, slope, 1>;
  const int64_t tiles = cluster_loss_tiles(p.B, p.N);
  return launch(kernel, grid_for(tiles), kThreads, stream, p, p.B ? tiles / p.B : 0);
}

template <class T, bool value, bool slope>
Status launch_tiles(const ClusterLossParams& p, Stream stream) {
  switch (p.kind) {
    case LossKind::huber:
      return launch_tiles<T, LossKind::huber, value, slope>(p, stream);
    case LossKind::l1:
      return launch_tiles<T, LossKind::l1, value, slope>(p, stream);
    default:
      return launch_tiles<T, LossKind::mse, value, slope>(p, stream);
  }
}

template <class A>
Status launch_clusters(const ClusterLossParams& p, bool counts_only, Stream stream) {
  const int64_t tiles_per_sample = p.B && p.pred ? cluster_loss_tiles(p.B, p.N) / p.B : 0;
  return launch(cluster_kernel<A>, grid_for(p.K), kThreads, stream, p, tiles_per_sample, counts_only,
                device_errors(stream.device));
}

}  // namespace

Status cuda_cluster_loss_forward(const ClusterLossParams& p, Stream stream) {
  DeviceGuard guard(stream.device);
  if (!guard.status().ok()) return guard.status();
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    Status s = p.pred ? launch_tiles<T, true, false>(p, stream) : Status{};
    return s.ok() ? launch_clusters<accumulate_t<T>>(p, false, stream) : s;
  });
}

Status cuda_cluster_loss_backward(const ClusterLossParams& p, Stream stream) {
  DeviceGuard guard(stream.device);
  if (!guard.status().ok()) return guard.status();
  return dispatch(p.dtype, [&](auto t) { return launch_tiles<decltype(t), false, true>(p, stream); });
}

Status cuda_cluster_loss_and_grad(const ClusterLossParams& p, Stream stream) {
  DeviceGuard guard(stream.device);
  if (!guard.status().ok()) return guard.status();
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    Status s = launch_clusters<accumulate_t<T>>(p, true, stream);
    if (s.ok()) s = launch_tiles<T, true, true>(p, stream);
    return s.ok() ? launch_clusters<accumulate_t<T>>(p, false, stream) : s;
  });
}

}  // namespace antdiff
