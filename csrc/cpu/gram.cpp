// Gram matrix on the CPU. Parallel over a fixed partition of the columns; bytes moved: J once.
//
// A slab of columns of all K rows is copied into a buffer that stays in the cache, in the type it is multiplied in, and
// multiplied there in register tiles. The copy costs a store an element and buys one loop for every element type and
// alignment, slabs that run on across small pieces, and no set conflicts between rows a multiple of 4096 bytes apart.
// Partial sums belong to a chunk of columns, not to a thread: the result does not depend on the number of threads.
#include "core/gram.h"

#include <algorithm>
#include <vector>

#include "core/isa.h"
#include "cpu/launchers.h"
#include "cpu/parallel.h"

namespace antdiff {
namespace {

constexpr int64_t kGrain = 1 << 17;       // elements of J a thread should at least have
constexpr int64_t kMostChunks = 128;      // partial Gram matrices at most
constexpr int64_t kLeastChunk = 1 << 13;  // columns a chunk should at least have
constexpr int64_t kSlabBytes =
    1 << 13;  // the buffer, while K rows of kLeastSlab columns fit: leaves room in a 48 KB L1
constexpr int64_t kLeastSlab = 256, kMostSlab = 2048;

template <class A, int lanes>
struct Vector {
  typedef A type __attribute__((vector_size(lanes * sizeof(A)), may_alias));
};

// How much of G one register tile covers: M x M vectors of `lanes` elements, chosen so that a tile's sums and operands
// fit the registers (32 of 64 bytes with AVX-512, 16 of 32 bytes with AVX2).
template <class A, int bytes, int M>
struct Shape {
  static constexpr int lanes = bytes / int(sizeof(A)), most = M;
};

template <int lanes>
struct LaneSum {
  ANTDIFF_INLINE static double of(const typename Vector<double, lanes>::type& v) {
    typename Vector<double, lanes / 2>::type half[2];
    std::memcpy(half, &v, sizeof v);
    return LaneSum<lanes / 2>::of(half[0] + half[1]);
  }
};
template <>
struct LaneSum<2> {
  ANTDIFF_INLINE static double of(const Vector<double, 2>::type& v) { return v[0] + v[1]; }
};
template <int lanes>
ANTDIFF_INLINE double lane_sum(const typename Vector<float, lanes>::type& v, float) {
  typename Vector<float, lanes / 2>::type half[2];
  std::memcpy(half, &v, sizeof v);
  using Wide = typename Vector<double, lanes / 2>::type;
  return LaneSum<lanes / 2>::of(__builtin_convertvector(half[0], Wide) + __builtin_convertvector(half[1], Wide));
}
template <int lanes>
ANTDIFF_INLINE double lane_sum(const typename Vector<double, lanes>::type& v, double) {
  return LaneSum<lanes>::of(v);
}

// Lines of the next slab that a tile asks for while it computes.
struct Ahead {
  const char* rows[4];
  int count;
  int64_t bytes;  // of one column
};

// G[i, j] += x_i . y_j for I rows at x and J rows at y, n columns (a multiple of lanes); only j >= i on the diagonal.
template <class A, int lanes, int I, int J, bool diagonal>
ANTDIFF_INLINE void tile(const A* x, const A* y, int64_t slab, int64_t n, double* G, int64_t K, const Ahead& ahead) {
  using V = typename Vector<A, lanes>::type;
  V sums[I][J] = {};
  for (int64_t p = 0; p < n; p += lanes) {
    V a[I], b[J];
    for (int r = 0; r < ahead.count; ++r) __builtin_prefetch(ahead.rows[r] + p * ahead.bytes, 0, 3);
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i) a[i] = *reinterpret_cast<const V*>(x + i * slab + p);
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) b[j] = diagonal ? a[j] : *reinterpret_cast<const V*>(y + j * slab + p);
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
      for (int j = diagonal ? i : 0; j < J; ++j) sums[i][j] += a[i] * b[j];
  }
#pragma GCC unroll 4
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
    for (int j = diagonal ? i : 0; j < J; ++j) G[i * K + j] += lane_sum<lanes>(sums[i][j], A());
}

// Rows are split into blocks of at most M rows, as even as can be, the larger ones first.
struct Blocks {
  int64_t count, size, larger;
  ANTDIFF_INLINE Blocks(int64_t K, int64_t most) : count((K + most - 1) / most), size(K / count), larger(K % count) {}
  ANTDIFF_INLINE int64_t first(int64_t b) const { return b * size + (b < larger ? b : larger); }
  ANTDIFF_INLINE int rows(int64_t b) const { return int(size + (b < larger)); }
};

// The upper triangle of G += X X^T for the buffered slab X [K, slab], of which n columns are in use.
template <class A, class S>
ANTDIFF_INLINE void multiply(const A* X, int64_t K, int64_t slab, int64_t n, double* G, const char* next,
                             int64_t stride, int64_t bytes) {
  constexpr int L = S::lanes, M = S::most;
  const Blocks blocks(K, M);
  const int64_t tiles = blocks.count * (blocks.count + 1) / 2;
  int64_t t = 0;
  for (int64_t r = 0; r < blocks.count; ++r) {
    const int64_t i = blocks.first(r);
    const A* x = X + i * slab;
    double* at = G + i * K + i;
    Ahead ahead;
    {
      const int64_t f = K * t / tiles, l = K * (t + 1) / tiles;
      ++t;
      ahead.count = int(l - f);
      ahead.bytes = bytes;
      for (int64_t q = f; q < l; ++q) ahead.rows[q - f] = next + q * stride;
    }
    switch (blocks.rows(r)) {
      case 1:
        tile<A, L, 1, 1, true>(x, x, slab, n, at, K, ahead);
        break;
      case 2:
        tile<A, L, 2, 2, true>(x, x, slab, n, at, K, ahead);
        break;
      case 3:
        tile<A, L, 3, 3, true>(x, x, slab, n, at, K, ahead);
        break;
      default:
        tile<A, L, M, M, true>(x, x, slab, n, at, K, ahead);
    }
    for (int64_t c = r + 1; c < blocks.count; ++c) {
      const int64_t j = blocks.first(c);
      const A* y = X + j * slab;
      double* to = G + i * K + j;
      Ahead ahead;
      {
        const int64_t f = K * t / tiles, l = K * (t + 1) / tiles;
        ++t;
        ahead.count = int(l - f);
        ahead.bytes = bytes;
        for (int64_t q = f; q < l; ++q) ahead.rows[q - f] = next + q * stride;
      }
      switch (10 * blocks.rows(r) + blocks.rows(c)) {  // block sizes differ by one at most
        case 22:
          tile<A, L, 2, 2, false>(x, y, slab, n, to, K, ahead);
          break;
        case 32:
          tile<A, L, 3, 2, false>(x, y, slab, n, to, K, ahead);
          break;
        case 33:
          tile<A, L, 3, 3, false>(x, y, slab, n, to, K, ahead);
          break;
        case 43:
          tile<A, L, M, 3, false>(x, y, slab, n, to, K, ahead);
          break;
        default:
          tile<A, L, M, M, false>(x, y, slab, n, to, K, ahead);
      }
    }
  }
}

// to[0:n] = from[0:n]; meanwhile the lines `ahead` bytes further on are asked for, since the hardware's prefetchers
// stop at every page and K rows are as many streams.
template <class T, class A>
ANTDIFF_INLINE void widen(const T* __restrict from, A* __restrict to, int64_t n, int64_t ahead) {
  constexpr int64_t kLine = 64 / sizeof(T);
  int64_t p = 0;
  for (; p + kLine <= n; p += kLine) {
    (void)ahead;
#pragma GCC unroll 1  // or the loop is unrolled before it can be vectorised
    for (int64_t l = 0; l < kLine; ++l) to[p + l] = to_float(from[p + l]);
  }
  for (; p < n; ++p) to[p] = to_float(from[p]);
}

template <class T, class S>
struct Chunk {
  using A = accumulate_t<T>;
  // G (upper triangle) += J J^T over columns [start, stop) of the concatenated pieces. X is the buffer [K, slab].
  ANTDIFF_INLINE static void run(const GramParams* p, int64_t start, int64_t stop, int64_t slab, A* X, double* G) {
    const int64_t K = p->K;
    const RowPiece* piece = p->pieces;
    int64_t offset = start;  // within the piece
    while (offset >= piece->numel && start < stop) offset -= (piece++)->numel;
    while (start < stop) {
      const int64_t width = slab < stop - start ? slab : stop - start;
      int64_t filled = 0;
      while (filled < width) {
        const int64_t left = piece->numel - offset, n = left < width - filled ? left : width - filled;
        for (int64_t k = 0; k < K; ++k)
          widen(static_cast<const T*>(piece->rows) + k * piece->numel + offset, X + k * slab + filled, n,
                slab * int64_t(sizeof(T)));
        filled += n, offset += n;
        if (offset == piece->numel) ++piece, offset = 0;
      }
      const int64_t padded = (width + S::lanes - 1) / S::lanes * S::lanes;
      for (int64_t k = 0; k < K; ++k)
        for (int64_t c = width; c < padded; ++c) X[k * slab + c] = 0;
      multiply<A, S>(X, K, slab, padded, G, static_cast<const char*>(piece->rows) + offset * sizeof(T),
                     piece->numel * sizeof(T), sizeof(T));
      start += width;
    }
  }
};

struct alignas(64) Line {
  char bytes[64];
};

template <class T>
void gram(const GramParams& p) {
  using A = accumulate_t<T>;
  const int64_t K = p.K, P = total_numel(p.pieces, p.count);
  const int64_t fitting = kSlabBytes / (K * int64_t(sizeof(A))) / 64 * 64;
  const int64_t slab = fitting < kLeastSlab ? kLeastSlab : fitting < kMostSlab ? fitting : kMostSlab;
  const int64_t chunks = std::clamp<int64_t>(P / kLeastChunk, 1, kMostChunks);
  const int threads = int(std::min<int64_t>(threads_for(K * P, kGrain), chunks));
  const int64_t buffer = K * slab * int64_t(sizeof(A)) / 64;  // in lines; slab is a multiple of 64 columns
  std::vector<Line> buffers(size_t(buffer * threads));
  std::vector<double> partial(size_t(chunks * K * K));
  const auto bound = [&](int64_t c) { return c == chunks ? P : P / 64 * c / chunks * 64; };
  parallel_for(threads, threads, [&](int64_t t) {
    A* X = reinterpret_cast<A*>(buffers.data() + t * buffer);
    for (int64_t c = chunks * t / threads; c < chunks * (t + 1) / threads; ++c) {
      double* G = partial.data() + c * K * K;
      if (isa() == Isa::avx512)
        multiversion<Chunk<T, Shape<A, 64, 4>>>(&p, bound(c), bound(c + 1), slab, X, G);
      else
        multiversion<Chunk<T, Shape<A, 32, 3>>>(&p, bound(c), bound(c + 1), slab, X, G);
    }
  });
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = i; j < K; ++j) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += partial[size_t((c * K + i) * K + j)];
      p.gram[i * K + j] = p.accumulate ? p.gram[i * K + j] + sum : sum;
      if (i != j) p.gram[j * K + i] = p.accumulate ? p.gram[j * K + i] + sum : sum;
    }
}

}  // namespace

Status cpu_gram(const GramParams& p) {
  dispatch(p.dtype, [&](auto t) { gram<decltype(t)>(p); });
  return {};
}

}  // namespace antdiff
