// Gram matrix on CUDA.
//   gram_kernel       K <= 8: parallel over slabs of columns, over which a persistent grid strides. Every thread reads
//                     16 bytes of each of the K rows and keeps K (K + 1) / 2 sums in registers. Bytes moved: J once.
//   gram_tile_kernel  K > 8: the same for one 8 x 8 tile of G per block. A row is read by K / 8 tiles. Blocks of
//                     different tiles work on the same slab at the same time, so all reads but the first hit L2.
//   gram_sum_kernel   One block per entry of G adds the partial sums of the blocks in a fixed order.
//
// Sums are float32 (float64 for float64 input) over chains of at most kGramChain products and across a warp, and
// float64 across chains. Reducing over a warp takes 10 instructions per sum. It happens once per chain and takes less
// than a tenth of the instructions of the chain. Sums in float64 registers would halve the number of blocks that fit.
// Nothing is atomic, and the grid depends only on the device and the sizes, so the result is the same from run to run.
#include "core/gram.h"

#include "cuda/row_table.h"

namespace antdiff {
namespace {

constexpr int kWarps = kRowThreads / kWarp;
constexpr int kTile = 8;
constexpr int kGramBlocks = 2;  // blocks per multiprocessor: 64 KB in flight at K = 8, and registers for all sums

// Vectors of each row that a thread reads before it computes: 128 bytes or more in flight, as far as registers allow.
constexpr int vectors(int64_t K) { return K < 6 ? int(10 / K) : 1; }

// Add the N sums of all threads of the warp to the float64 totals of the warp, and set the sums to zero.
template <int N, class A>
__device__ __forceinline__ void flush(A (&sums)[N], double* totals) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const A sum = warp_sum(sums[n]);
    if (threadIdx.x % kWarp == 0) totals[n] += double(sum);
    sums[n] = 0;
  }
}

template <class T, int K>
__global__ void __launch_bounds__(kRowThreads, kGramBlocks)
    gram_kernel(const __grid_constant__ RowTable table, double* partial) {
  using A = accumulate_t<T>;
  constexpr int V = vector_width<T>(), U = vectors(K), N = K * (K + 1) / 2;
  __shared__ double totals[kWarps][N];
  const int warp = threadIdx.x / kWarp;
  for (int n = threadIdx.x; n < kWarps * N; n += kRowThreads) totals[n / N][n % N] = 0;
  __syncthreads();

  A sums[N] = {};
  int entry = 0, chain = 0;
  for (int64_t slab = blockIdx.x; slab < table.at[table.count].first; slab += gridDim.x) {
    while (slab >= table.at[entry + 1].first) ++entry;
    const RowView<T> view(table.at[entry], slab, kRowThreads * V * U);
    Pack<T, V> x[U][K];
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int r = 0; r < K; ++r) x[u][r] = view.load(r, view.column(u));
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int v = 0; v < V; ++v) {
        int n = 0;
#pragma unroll
        for (int i = 0; i < K; ++i)
#pragma unroll
          for (int j = i; j < K; ++j) sums[n++] += A(to_float(x[u][i].at[v])) * A(to_float(x[u][j].at[v]));
      }
    chain += U * V;
    if (chain + U * V > kGramChain) flush(sums, totals[warp]), chain = 0;
  }
  flush(sums, totals[warp]);
  __syncthreads();

  if (threadIdx.x == 0) {
    int n = 0;
    for (int i = 0; i < K; ++i)
      for (int j = i; j < K; ++j, ++n) {
        double total = 0;
        for (int w = 0; w < kWarps; ++w) total += totals[w][n];
        partial[int64_t(i * K + j) * gridDim.x + blockIdx.x] = total;
      }
  }
}

// Find the tile (row, column), row <= column, with row-major number t in a triangle that is `side` tiles wide.
__device__ __forceinline__ void tile_of(int64_t t, int64_t side, int64_t* row, int64_t* column) {
  int64_t i = 0;
  while (t >= side - i) t -= side - i++;
  *row = i, *column = i + t;
}

// Block b works on tile b % tiles. The gridDim.x / tiles blocks of a tile stride over the slabs together.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    gram_tile_kernel(const __grid_constant__ RowTable table, int64_t K, int64_t tiles, double* partial) {
  using A = accumulate_t<T>;
  constexpr int V = vector_width<T>();
  __shared__ double totals[kWarps][kTile * kTile];
  const int warp = threadIdx.x / kWarp;
  for (int n = threadIdx.x; n < kWarps * kTile * kTile; n += kRowThreads) (&totals[0][0])[n] = 0;
  __syncthreads();

  int64_t row, column;
  tile_of(blockIdx.x % tiles, (K + kTile - 1) / kTile, &row, &column);
  const int64_t i0 = row * kTile, j0 = column * kTile, members = gridDim.x / tiles, member = blockIdx.x / tiles;
  A sums[kTile * kTile] = {};
  int entry = 0, chain = 0;
  for (int64_t slab = member; slab < table.at[table.count].first; slab += members) {
    while (slab >= table.at[entry + 1].first) ++entry;
    const RowView<T> view(table.at[entry], slab, kRowThreads * V);
    Pack<T, V> x[kTile], y[kTile];
#pragma unroll
    for (int r = 0; r < kTile; ++r) {  // rows beyond K are zeros, and their sums are never read
      x[r] = i0 + r < K ? view.load(i0 + r, view.column(0)) : Pack<T, V>{};
      y[r] = j0 + r < K ? view.load(j0 + r, view.column(0)) : Pack<T, V>{};
    }
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
      for (int i = 0; i < kTile; ++i)
#pragma unroll
        for (int j = 0; j < kTile; ++j) sums[i * kTile + j] += A(to_float(x[i].at[v])) * A(to_float(y[j].at[v]));
    chain += V;
    if (chain + V > kGramChain) flush(sums, totals[warp]), chain = 0;
  }
  flush(sums, totals[warp]);
  __syncthreads();

  for (int n = threadIdx.x; n < kTile * kTile; n += kRowThreads) {
    const int64_t i = i0 + n / kTile, j = j0 + n % kTile;
    if (i > j || j >= K) continue;
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += totals[w][n];
    partial[(i * K + j) * members + member] = total;
  }
}

// Set gram[i, j] and gram[j, i] to the sum of partial[i, j, 0:blocks], or add it if `accumulate`.
__global__ void __launch_bounds__(kRowThreads)
    gram_sum_kernel(const double* partial, int64_t blocks, int64_t K, double* gram, bool accumulate) {
  __shared__ double shared[kWarps];
  for (int64_t e = blockIdx.x; e < K * K; e += gridDim.x) {
    const int64_t i = e / K, j = e % K;
    if (i > j) continue;
    double sum = 0;
    for (int64_t b = threadIdx.x; b < blocks; b += kRowThreads) sum += partial[e * blocks + b];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) {
      if (i != j) gram[j * K + i] = accumulate ? gram[j * K + i] + sum : sum;
      gram[e] = accumulate ? gram[e] + sum : sum;
    }
  }
}

// Return the number of blocks that share the slabs (of one tile, for K > 8), if there are at least as many slabs.
int64_t sharing_blocks(int64_t K, int multiprocessors) {
  if (K <= kTile) return int64_t(multiprocessors) * kGramBlocks;
  const int64_t side = (K + kTile - 1) / kTile, tiles = side * (side + 1) / 2;
  return tiles < multiprocessors ? multiprocessors / tiles : 1;
}

template <class T, int K>
Status launch_partial(const RowTable& table, int64_t blocks, double* partial, Stream stream) {
  return launch(gram_kernel<T, K>, blocks, kRowThreads, stream, table, partial);
}

template <class T>
Status launch_partial(const RowTable& table, int64_t K, int64_t blocks, double* partial, Stream stream) {
  switch (K) {
    case 1:
      return launch_partial<T, 1>(table, blocks, partial, stream);
    case 2:
      return launch_partial<T, 2>(table, blocks, partial, stream);
    case 3:
      return launch_partial<T, 3>(table, blocks, partial, stream);
    case 4:
      return launch_partial<T, 4>(table, blocks, partial, stream);
    case 5:
      return launch_partial<T, 5>(table, blocks, partial, stream);
    case 6:
      return launch_partial<T, 6>(table, blocks, partial, stream);
    case 7:
      return launch_partial<T, 7>(table, blocks, partial, stream);
    case 8:
      return launch_partial<T, 8>(table, blocks, partial, stream);
  }
  const int64_t side = (K + kTile - 1) / kTile, tiles = side * (side + 1) / 2;
  return launch(gram_tile_kernel<T>, blocks * tiles, kRowThreads, stream, table, K, tiles, partial);
}

template <class T>
Status gram(const GramParams& p, Stream stream) {
  int count = 0;
  if (Status s = multiprocessors(stream.device, &count); !s.ok()) return s;
  const int64_t slab = int64_t(kRowThreads) * vector_width<T>() * vectors(p.K);
  bool accumulate = p.accumulate;
  int64_t next = 0;
  do {  // runs once unless the list is longer than a table
    RowTable table;
    const int64_t slabs = table.fill(p.pieces, p.count, slab, &next);
    const int64_t most = sharing_blocks(p.K, count), blocks = slabs < 1 ? 1 : slabs < most ? slabs : most;
    if (Status s = launch_partial<T>(table, p.K, blocks, p.scratch, stream); !s.ok()) return s;
    Status s = launch(gram_sum_kernel, grid_for(p.K * p.K), kRowThreads, stream, static_cast<const double*>(p.scratch),
                      blocks, p.K, p.gram, accumulate);
    if (!s.ok()) return s;
    accumulate = true;
  } while (next < p.count);
  return {};
}

}  // namespace

int64_t cuda_gram_scratch(int64_t k, int device) {
  int count = 0;
  // If the device cannot be queried, cuda_gram fails as well and reports the error.
  if (!multiprocessors(device, &count).ok()) count = 1;
  return k * k * sharing_blocks(k, count);
}

Status cuda_gram(const GramParams& p, Stream stream) {
  DeviceGuard guard(stream.device);
  if (!guard.status().ok()) return guard.status();
  return dispatch(p.dtype, [&](auto t) { return gram<decltype(t)>(p, stream); });
}

}  // namespace antdiff
