// Combination of the rows of J on the CPU. Parallel over columns. Bytes moved: J is read once, the result is written
// once.
//
// A run of columns is summed in a buffer that stays in the cache, four rows at a time. This reads few streams at once,
// and loads and stores the sum once per four rows. A column is always summed in row order, so the number of threads
// does not change a bit.
#include "core/gram.h"

#include <algorithm>
#include <vector>

#include "cpu/isa.h"
#include "cpu/launchers.h"
#include "cpu/parallel.h"

namespace antdiff {
namespace {

constexpr int64_t kGrain = 1 << 17;  // minimum number of elements of J per thread
constexpr int64_t kRun = 512;  // columns summed at once; the next run of the rows is prefetched into the same cache

template <class T, class O>
struct Run {
  using A = accumulate_t<T>;
  // out[p] = sum_k weights[k] rows[k, p] for p in [start, stop).
  ANTDIFF_INLINE static void run(const RowPiece* piece, int64_t start, int64_t stop, const A* weights, int64_t K) {
    const T* rows = static_cast<const T*>(piece->rows);
    O* out = static_cast<O*>(piece->out);
    const int64_t numel = piece->numel;
    alignas(64) A sum[kRun];
    for (; start < stop; start += kRun) {
      const int64_t n = stop - start < kRun ? stop - start : kRun;
      for (int64_t p = 0; p < n; ++p) sum[p] = 0;
      int64_t k = 0;
      for (; k + 4 <= K; k += 4) add<4>(rows + k * numel + start, numel, weights + k, n, sum);
      switch (K - k) {
        case 3:
          add<3>(rows + k * numel + start, numel, weights + k, n, sum);
          break;
        case 2:
          add<2>(rows + k * numel + start, numel, weights + k, n, sum);
          break;
        case 1:
          add<1>(rows + k * numel + start, numel, weights + k, n, sum);
          break;
      }
      for (int64_t p = 0; p < n; ++p) out[start + p] = from_float<O>(sum[p]);
    }
  }
  template <int R>
  ANTDIFF_INLINE static void add(const T* __restrict rows, int64_t numel, const A* __restrict weights, int64_t n,
                                 A* __restrict sum) {
    constexpr int64_t kLine = 64 / sizeof(T);
    int64_t p = 0;
    for (; p + kLine <= n; p += kLine) {
      for (int r = 0; r < R; ++r)
        __builtin_prefetch(
            reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(rows + r * numel + p) + kRun * sizeof(T)), 0, 3);
#pragma GCC unroll 1  // otherwise the loop is unrolled before it can be vectorised
      for (int64_t l = 0; l < kLine; ++l) {
        A s = sum[p + l];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) s += weights[r] * A(to_float(rows[r * numel + p + l]));
        sum[p + l] = s;
      }
    }
    for (; p < n; ++p)
      for (int r = 0; r < R; ++r) sum[p] += weights[r] * A(to_float(rows[r * numel + p]));
  }
};

template <class T, class O>
void combine(const CombineParams& p) {
  using A = accumulate_t<T>;
  const int64_t P = total_numel(p.pieces, p.count);
  std::vector<A> weights(p.weights, p.weights + p.K);
  const int threads = threads_for(p.K * P, kGrain);
  parallel_for(threads, threads, [&](int64_t t) {
    // Thread t handles columns [start, stop) of the concatenated pieces.
    int64_t start = P / kRun * t / threads * kRun, stop = t + 1 == threads ? P : P / kRun * (t + 1) / threads * kRun;
    for (const RowPiece* piece = p.pieces; stop > 0; ++piece) {
      const int64_t to = std::min(stop, piece->numel);
      if (start < to) multiversion<Run<T, O>>(piece, start, to, weights.data(), p.K);
      start = std::max<int64_t>(start - piece->numel, 0);
      stop -= piece->numel;
    }
  });
}

}  // namespace

Status cpu_combine(const CombineParams& p) {
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    p.out_dtype == p.dtype ? combine<T, T>(p) : combine<T, float>(p);
  });
  return {};
}

}  // namespace antdiff
