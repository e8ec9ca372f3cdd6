// Per-cluster means of per-sample errors: the parameters of the launchers, and the error terms that host and device
// share.
//
//   losses[i] = 1/counts[i] * sum over samples b of cluster i of weight[b] * mean_n error(pred[b, n] - target[b, n])
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/hd.h"

namespace antdiff {

enum class LossKind : int8_t { mse, huber, l1 };

// error(d) and its derivative. Huber is quadratic up to |d| = delta and linear beyond, as in torch's huber_loss.
template <LossKind kind, class A>
ANTDIFF_HD A error_value(A d, A delta) {
  if (kind == LossKind::mse) return d * d;
  const A magnitude = d < A(0) ? -d : d;
  if (kind == LossKind::l1) return magnitude;
  return magnitude <= delta ? A(0.5) * d * d : delta * (magnitude - A(0.5) * delta);
}
template <LossKind kind, class A>
ANTDIFF_HD A error_slope(A d, A delta) {
  if (kind == LossKind::mse) return A(2) * d;
  // The subgradient at 0 is 0. NaN fails both comparisons, so d is added back to propagate it.
  const A sign = A(d > A(0)) - A(d < A(0)) + (d != d ? d : A(0));
  if (kind == LossKind::l1) return sign;
  return (d < A(0) ? -d : d) <= delta ? d : delta * sign;
}

// All arrays are contiguous and on one device. The loss dtype is accumulate_t<T>: float for half precision, else T.
struct ClusterLossParams {
  DType dtype = DType::f32;
  LossKind kind = LossKind::mse;
  double delta = 1.0;                // huber only
  int64_t B = 0, N = 0, K = 0;       // samples, elements per sample, clusters
  const void* pred = nullptr;        // [B, N]
  const void* target = nullptr;      // [B, N]
  const int64_t* cluster = nullptr;  // [B]
  const void* weight = nullptr;      // [B] in loss dtype, or null for ones
  // forward
  void* losses = nullptr;      // [K] loss dtype
  int64_t* counts = nullptr;   // [K]
  void* per_sample = nullptr;  // [B] loss dtype: unweighted mean error
  double* scratch = nullptr;   // CUDA only: [cluster_loss_tiles(B, N)] partial sums
  // backward, and the fused pass, which reads the caller's cluster weights from grad_losses
  const void* grad_losses = nullptr;  // [K] loss dtype
  void* grad_pred = nullptr;          // [B, N] in dtype
};

// A CUDA block handles one tile of one sample. Each partial sum has its own slot in `scratch`, so nothing is atomic.
constexpr int64_t kClusterLossTile = 4096;
inline int64_t cluster_loss_tiles(int64_t B, int64_t N) { return B * ((N + kClusterLossTile - 1) / kClusterLossTile); }

}  // namespace antdiff
