// Cluster loss on the CPU. Parallel over samples. Bytes moved: pred and target are read once, grad_pred is written
// once. A sample is summed in 16 lanes over short runs, and in double across runs. A cluster is summed in double, in
// sample order. The result does not depend on the number of threads.
#include "core/cluster_loss.h"

#include "cpu/isa.h"
#include "cpu/launchers.h"
#include "cpu/parallel.h"

namespace antdiff {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kRun = 1024;       // elements summed in the accumulation type before the sum goes to double
constexpr int64_t kGrain = 1 << 16;  // minimum number of elements per thread

// One sample. Return the sum of errors if `value`, and write factor * slope of the error to `grad` if `slope`.
template <class T, LossKind kind, bool value, bool slope>
struct Sample {
  using A = accumulate_t<T>;
  ANTDIFF_INLINE static double run(const T* pred, const T* target, T* grad, int64_t n, A factor, A delta) {
    double total = 0;
    for (int64_t start = 0; start < n; start += kRun) {
      const int64_t stop = start + kRun < n ? start + kRun : n;
      A lanes[kLanes] = {};
      int64_t i = start;
      for (; i + kLanes <= stop; i += kLanes) {
#pragma GCC unroll 1
        for (int64_t l = 0; l < kLanes; ++l) {
          const A d = to_float(pred[i + l]) - to_float(target[i + l]);
          if (value) lanes[l] += error_value<kind>(d, delta);
          if (slope) grad[i + l] = from_float<T>(factor * error_slope<kind>(d, delta));
        }
      }
      for (; i < stop; ++i) {
        const A d = to_float(pred[i]) - to_float(target[i]);
        if (value) lanes[i % kLanes] += error_value<kind>(d, delta);
        if (slope) grad[i] = from_float<T>(factor * error_slope<kind>(d, delta));
      }
      if (value)
        for (int64_t l = 0; l < kLanes; ++l) total += double(lanes[l]);
    }
    return total;
  }
};

Status check_ids(const ClusterLossParams& p) {
  for (int64_t b = 0; b < p.B; ++b)
    if (p.cluster[b] < 0 || p.cluster[b] >= p.K) return {Status::Code::bad_id, b, p.cluster[b]};
  return {};
}

template <class A>
A weight_of(const ClusterLossParams& p, int64_t b) {
  return p.weight ? static_cast<const A*>(p.weight)[b] : A(1);
}

template <class T, LossKind kind, bool value, bool slope>
void all_samples(const ClusterLossParams& p) {
  using A = accumulate_t<T>;
  const auto* pred = static_cast<const T*>(p.pred);
  const auto* target = static_cast<const T*>(p.target);
  parallel_for(p.B, threads_for(p.B * p.N, kGrain), [&](int64_t b) {
    A factor = 0;
    if (slope) {
      const int64_t i = p.cluster[b];  // counts[i] >= 1, since sample b belongs to cluster i
      factor = A(double(static_cast<const A*>(p.grad_losses)[i]) * double(weight_of<A>(p, b)) /
                 (double(p.counts[i]) * double(p.N)));
    }
    T* grad = slope ? static_cast<T*>(p.grad_pred) + b * p.N : nullptr;
    const double sum =
        multiversion<Sample<T, kind, value, slope>>(pred + b * p.N, target + b * p.N, grad, p.N, factor, A(p.delta));
    if (value) static_cast<A*>(p.per_sample)[b] = A(sum / double(p.N));
  });
}

template <class T, bool value, bool slope>
void all_samples(const ClusterLossParams& p) {
  switch (p.kind) {
    case LossKind::mse:
      return all_samples<T, LossKind::mse, value, slope>(p);
    case LossKind::huber:
      return all_samples<T, LossKind::huber, value, slope>(p);
    case LossKind::l1:
      return all_samples<T, LossKind::l1, value, slope>(p);
  }
}

void count(const ClusterLossParams& p) {
  for (int64_t i = 0; i < p.K; ++i) p.counts[i] = 0;
  for (int64_t b = 0; b < p.B; ++b) ++p.counts[p.cluster[b]];
}

// Compute losses from per_sample and counts. The sums are kept in a buffer of 64 clusters, so that no memory is
// allocated. A larger K takes several passes over the ids: B * K / 64 reads, which is still far less than one pass over
// the data.
template <class A>
void reduce(const ClusterLossParams& p) {
  constexpr int64_t kBlock = 64;
  for (int64_t first = 0; first < p.K; first += kBlock) {
    double sums[kBlock] = {};
    for (int64_t b = 0; b < p.B; ++b) {
      const int64_t i = p.cluster[b] - first;
      if (i >= 0 && i < kBlock) sums[i] += double(static_cast<const A*>(p.per_sample)[b]) * double(weight_of<A>(p, b));
    }
    for (int64_t i = first; i < p.K && i < first + kBlock; ++i)
      static_cast<A*>(p.losses)[i] = p.counts[i] ? A(sums[i - first] / double(p.counts[i])) : A(0);
  }
}

}  // namespace

Status cpu_cluster_loss_forward(const ClusterLossParams& p) {
  if (Status s = check_ids(p); !s.ok()) return s;
  count(p);
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.pred) all_samples<T, true, false>(p);  // pred is null if per_sample is the input (cluster_mean)
    reduce<accumulate_t<T>>(p);
  });
  return {};
}

Status cpu_cluster_loss_backward(const ClusterLossParams& p) {
  if (Status s = check_ids(p); !s.ok()) return s;
  dispatch(p.dtype, [&](auto t) { all_samples<decltype(t), false, true>(p); });
  return {};
}

Status cpu_cluster_loss_and_grad(const ClusterLossParams& p) {
  if (Status s = check_ids(p); !s.ok()) return s;
  count(p);
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    all_samples<T, true, true>(p);
    reduce<accumulate_t<T>>(p);
  });
  return {};
}

}  // namespace antdiff
