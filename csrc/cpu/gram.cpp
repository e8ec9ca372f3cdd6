// Gram matrix on the CPU. Parallel over a fixed partition of the columns. Bytes moved: J is read once.
//
// A slab of columns of all K rows is multiplied in register tiles, while the next slab is prefetched. Software
// prefetches are needed because K rows are too many streams for the hardware prefetchers, which also stop at every
// page. Float32 and float64 rows are multiplied in place. Half-precision rows, and slabs that span several small
// pieces, are first copied into a buffer of the type in which they are multiplied. This costs one store per element,
// and one loop serves every layout.
//
// Each vector lane sums a chain of at most kGramChain products in the type of the products. Sums across chains are
// float64. They belong to a chunk of columns and not to a thread, so the result does not depend on the number of
// threads.
#include "core/gram.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/launchers.h"
#include "cpu/parallel.h"

namespace antdiff {
namespace {

constexpr int64_t kGrain = 1 << 17;       // minimum number of elements of J per thread
constexpr int64_t kMostChunks = 128;      // maximum number of partial Gram matrices
constexpr int64_t kLeastChunk = 1 << 13;  // minimum number of columns per chunk
// Size of a slab. It is small because it shares a cache of 32 or 48 KB with the next slab, which is being prefetched.
// Many rows need larger slabs, since their tiles would be too short otherwise.
constexpr int64_t kSlabBytes = 1 << 13;
constexpr int64_t kLeastSlab = 256, kMostSlab = 2048;  // columns

template <class A, int lanes>
struct Vector {
  typedef A type __attribute__((vector_size(lanes * sizeof(A)), may_alias));
  typedef A loose __attribute__((vector_size(lanes * sizeof(A)), may_alias, aligned(sizeof(A))));  // unaligned
};

// A register tile covers at most M x M entries of G, with one vector of sums per entry. Sums and operands fit the
// registers: 32 registers of 64 bytes with AVX-512, 16 registers of 32 bytes with AVX2.
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
struct LaneSum<1> {
  ANTDIFF_INLINE static double of(const Vector<double, 1>::type& v) { return v[0]; }
};

// The rows are split as evenly as possible into blocks of at most M rows, with the larger blocks first.
struct Blocks {
  int64_t count, size, larger;
  ANTDIFF_INLINE Blocks(int64_t K, int64_t most) : count((K + most - 1) / most), size(K / count), larger(K % count) {}
  ANTDIFF_INLINE int64_t first(int64_t b) const { return b * size + (b < larger ? b : larger); }
  ANTDIFF_INLINE int rows(int64_t b) const { return int(size + (b < larger)); }
};

// The rows of the next slab that a tile prefetches while it computes.
struct Prefetch {
  uintptr_t rows;  // address of the first row
  int64_t count;   // number of rows, 0 at the end of the list
  int64_t stride;  // bytes between rows
  int64_t bytes;   // size of an element
  ANTDIFF_INLINE void issue(int64_t column) const {
    for (int64_t r = 0; r < count; ++r)
      __builtin_prefetch(reinterpret_cast<const void*>(rows + uintptr_t(r * stride + column * bytes)), 0, 3);
  }
};

// The products of one chunk. X [K, slab] is the buffer. `sums` is [K, K] vectors, of which the upper triangle is used.
template <class T, class S>
struct Chunk {
  using A = accumulate_t<T>;
  static constexpr int lanes = S::lanes, M = S::most;
  using V = typename Vector<A, lanes>::type;
  using Loose = typename Vector<A, lanes>::loose;

  // sums[i, j] += x_i . y_j for I rows at x, J rows at y and n columns (a multiple of lanes). On the diagonal j >= i.
  template <int I, int J, bool diagonal>
  ANTDIFF_INLINE static void tile(const A* x, const A* y, int64_t slab, int64_t n, V* sums, int64_t K,
                                  Prefetch prefetch) {
    V s[I][J];
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
      for (int j = diagonal ? i : 0; j < J; ++j) s[i][j] = sums[i * K + j];
    for (int64_t p = 0; p < n; p += lanes) {
      prefetch.issue(p);
      V a[I], b[J];
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) a[i] = *reinterpret_cast<const Loose*>(x + i * slab + p);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) b[j] = diagonal ? a[j] : *reinterpret_cast<const Loose*>(y + j * slab + p);
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
        for (int j = diagonal ? i : 0; j < J; ++j) s[i][j] += a[i] * b[j];
    }
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
      for (int j = diagonal ? i : 0; j < J; ++j) sums[i * K + j] = s[i][j];
  }

  ANTDIFF_INLINE static void multiply(const A* X, int64_t K, int64_t slab, int64_t n, V* sums, Prefetch next) {
    const Blocks blocks(K, M);
    const int64_t tiles = blocks.count * (blocks.count + 1) / 2;
    int64_t t = 0;
    for (int64_t r = 0; r < blocks.count; ++r)
      for (int64_t c = r; c < blocks.count; ++c, ++t) {
        const int64_t i = blocks.first(r), j = blocks.first(c);
        const A *x = X + i * slab, *y = X + j * slab;
        V* to = sums + i * K + j;
        // Every tile prefetches its share of the rows of the next slab, at most four.
        Prefetch prefetch = next;
        const int64_t from = next.count * t / tiles;
        prefetch.rows += uintptr_t(from * next.stride);
        prefetch.count = next.count * (t + 1) / tiles - from;
        if (r == c) {
          switch (blocks.rows(r)) {
            case 1:
              tile<1, 1, true>(x, y, slab, n, to, K, prefetch);
              break;
            case 2:
              tile<2, 2, true>(x, y, slab, n, to, K, prefetch);
              break;
            case 3:
              tile<3, 3, true>(x, y, slab, n, to, K, prefetch);
              break;
            default:
              tile<M, M, true>(x, y, slab, n, to, K, prefetch);
          }
        } else {
          switch (10 * blocks.rows(r) + blocks.rows(c)) {  // block sizes differ by at most one
            case 22:
              tile<2, 2, false>(x, y, slab, n, to, K, prefetch);
              break;
            case 32:
              tile<3, 2, false>(x, y, slab, n, to, K, prefetch);
              break;
            case 33:
              tile<3, 3, false>(x, y, slab, n, to, K, prefetch);
              break;
            case 43:
              tile<M, 3, false>(x, y, slab, n, to, K, prefetch);
              break;
            default:
              tile<M, M, false>(x, y, slab, n, to, K, prefetch);
          }
        }
      }
  }

  // Add the sums of all lanes to the upper triangle of G, and set the lanes to zero.
  ANTDIFF_INLINE static void flush(V* sums, int64_t K, double* G) {
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = i; j < K; ++j) {
        using Wide = typename Vector<double, lanes>::type;
        G[i * K + j] += LaneSum<lanes>::of(__builtin_convertvector(sums[i * K + j], Wide));
        sums[i * K + j] = V{};
      }
  }

  // Copy from[0:n] to to[0:n], converting each element to the accumulation type.
  ANTDIFF_INLINE static void widen(const T* __restrict from, A* __restrict to, int64_t n) {
    constexpr int64_t kBlock = 64 / sizeof(T);
    int64_t p = 0;
    for (; p + kBlock <= n; p += kBlock) {
#pragma GCC unroll 1  // otherwise the loop is unrolled before it can be vectorised
      for (int64_t l = 0; l < kBlock; ++l) to[p + l] = to_float(from[p + l]);
    }
    for (; p < n; ++p) to[p] = to_float(from[p]);
  }

  // Return whether `width` columns can be multiplied in place: in their own type, as whole vectors, within one piece.
  ANTDIFF_INLINE static bool in_place(const RowPiece& piece, int64_t offset, int64_t width) {
    return std::is_same<T, A>::value && width % lanes == 0 && piece.numel - offset >= width;
  }

  // Copy the next `width` columns of the pieces into X [K, slab], and advance `piece` and `offset`.
  ANTDIFF_INLINE static void fill(const RowPiece*& piece, int64_t& offset, int64_t K, int64_t width, int64_t slab,
                                  A* X) {
    for (int64_t filled = 0; filled < width;) {
      const int64_t left = piece->numel - offset, n = left < width - filled ? left : width - filled;
      const T* from = static_cast<const T*>(piece->rows) + offset;
      for (int64_t k = 0; k < K; ++k) widen(from + k * piece->numel, X + k * slab + filled, n);
      filled += n, offset += n;
      if (offset == piece->numel) ++piece, offset = 0;
    }
  }

  // Add J J^T over columns [start, stop) of the concatenated pieces to the upper triangle of G.
  ANTDIFF_INLINE static void run(const GramParams* p, int64_t start, int64_t stop, int64_t slab, A* X, A* lane_sums,
                                 double* G) {
    const int64_t K = p->K;
    V* sums = reinterpret_cast<V*>(lane_sums);
    const RowPiece *piece = p->pieces, *end = p->pieces + p->count;
    int64_t offset = start;  // within the piece
    while (piece != end && offset >= piece->numel) offset -= (piece++)->numel;
    int64_t chain = 0;
    for (; start < stop; start += slab) {
      const int64_t width = slab < stop - start ? slab : stop - start;
      const A* from = X;
      int64_t stride = slab, used = (width + lanes - 1) / lanes * lanes;
      if (in_place(*piece, offset, width)) {
        from = reinterpret_cast<const A*>(piece->rows) + offset;
        stride = piece->numel, used = width;
        offset += width;
        if (offset == piece->numel) ++piece, offset = 0;
      } else {
        fill(piece, offset, K, width, slab, X);
        for (int64_t k = 0; k < K; ++k)
          for (int64_t c = width; c < used; ++c) X[k * slab + c] = 0;
      }
      Prefetch next{0, 0, 0, int64_t(sizeof(T))};
      if (piece != end) {  // if rows are shorter than a slab, some prefetched lines are not needed
        next.rows = reinterpret_cast<uintptr_t>(static_cast<const T*>(piece->rows) + offset);
        next.count = K;
        next.stride = piece->numel * int64_t(sizeof(T));
      }
      multiply(from, K, stride, used, sums, next);
      chain += slab / lanes;
      if (chain + slab / lanes > kGramChain) flush(sums, K, G), chain = 0;
    }
    flush(sums, K, G);
  }
};

struct alignas(64) Line {
  char bytes[64];
};

// Workspace of one thread: the buffer of the slab and the sums of the lanes, both multiples of a cache line.
template <class A>
struct Workspace {
  int64_t slab, buffer, sums;  // columns; elements; elements
  explicit Workspace(int64_t K) {
    constexpr int64_t kLine = 64 / sizeof(A);
    const int64_t fitting = kSlabBytes / (K * int64_t(sizeof(A))) / 64 * 64;
    slab = std::clamp(fitting, kLeastSlab, kMostSlab);
    buffer = K * slab;
    sums = K * K * kLine;
  }
  size_t lines() const { return size_t((buffer + sums) * int64_t(sizeof(A)) / 64); }
};

template <class T>
void gram(const GramParams& p) {
  using A = accumulate_t<T>;
  const int64_t K = p.K, P = total_numel(p.pieces, p.count);
  const int64_t chunks = std::clamp<int64_t>(P / kLeastChunk, 1, kMostChunks);
  const auto bound = [&](int64_t c) { return c == chunks ? P : P / 64 * c / chunks * 64; };  // first column of chunk c
  const int threads = int(std::min<int64_t>(threads_for(K * P, kGrain), chunks));
  const Workspace<A> work(K);
  std::vector<Line> memory(work.lines() * size_t(threads));
  std::vector<double> partial(size_t(chunks * K * K));
  parallel_for(threads, threads, [&](int64_t t) {
    A* X = reinterpret_cast<A*>(memory.data() + work.lines() * size_t(t));
    for (int64_t c = chunks * t / threads; c < chunks * (t + 1) / threads; ++c) {
      double* G = partial.data() + c * K * K;
      if (isa() == Isa::avx512)
        multiversion<Chunk<T, Shape<A, 64, 4>>>(&p, bound(c), bound(c + 1), work.slab, X, X + work.buffer, G);
      else
        multiversion<Chunk<T, Shape<A, 32, 3>>>(&p, bound(c), bound(c + 1), work.slab, X, X + work.buffer, G);
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
