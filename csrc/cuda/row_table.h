// The pieces of J as a kernel receives them: a table passed by value in the kernel parameters. One launch serves a list
// of hundreds of tensors, nothing is copied to the device beforehand, and a captured CUDA graph holds its own table.
#pragma once

#include "core/gram.h"
#include "cuda/launch.h"

namespace antdiff {

// The parameters of a kernel hold 4096 bytes, or 32764 bytes from CUDA 12.1 and compute capability 7.0 on.
#if defined(ANTDIFF_CUDA_EMULATION)
constexpr int kTableBytes = 288;  // room for only a few entries, so that even short lists take several launches
#elif CUDART_VERSION >= 12010 && defined(__CUDA_ARCH_LIST__)
constexpr int kArchs[] = {__CUDA_ARCH_LIST__};  // ascending
constexpr int kTableBytes = kArchs[0] >= 700 ? 32764 : 4096;
#else
constexpr int kTableBytes = 4096;
#endif

// A piece is cut into slabs of columns. `first` is the number of its first slab, counted over the whole table.
struct TableEntry {
  const void* rows;
  void* out;
  int64_t numel, first;
};
constexpr int kTableEntries = (kTableBytes - 128) / int(sizeof(TableEntry));  // 128 bytes for the other parameters

struct RowTable {
  TableEntry at[kTableEntries];  // `count` entries, and one more whose `first` is the number of slabs
  int count;

  // Add pieces from *next on until none is left or the table is full, and advance *next. Return the number of slabs.
  int64_t fill(const RowPiece* pieces, int64_t number, int64_t slab, int64_t* next) {
    int64_t first = 0;
    for (count = 0; *next < number && count < kTableEntries - 1; ++*next) {
      const RowPiece& piece = pieces[*next];
      if (piece.numel == 0) continue;
      at[count++] = {piece.rows, piece.out, piece.numel, first};
      first += (piece.numel + slab - 1) / slab;
    }
    at[count] = {nullptr, nullptr, 0, first};
    return first;
  }
};

inline Status multiprocessors(int device, int* count) {
  return cuda_status(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
}

#if defined(__CUDACC__) || defined(ANTDIFF_CUDA_EMULATION)

constexpr int kRowThreads = 256;

// Locates the V elements of a slab that belong to a thread of a block. In aligned rows they are consecutive, and one
// 16-byte access moves them. In other rows they are kRowThreads elements apart, so that single accesses are coalesced.
template <class T>
struct RowView {
  static constexpr int V = vector_width<T>();
  const T* rows;
  int64_t numel, start;  // start: first column of the slab
  bool aligned;

  __device__ __forceinline__ RowView(const TableEntry& entry, int64_t slab, int64_t columns)
      : rows(static_cast<const T*>(entry.rows)),
        numel(entry.numel),
        start((slab - entry.first) * columns),
        aligned(reinterpret_cast<uintptr_t>(entry.rows) % 16 == 0 && uint64_t(entry.numel) % V == 0) {}

  // Return the first column of vector u of this thread. The vector has columns [column, column + V) if aligned, else
  // column + v * kRowThreads.
  __device__ __forceinline__ int64_t column(int u) const {
    return start + int64_t(u) * kRowThreads * V + int64_t(threadIdx.x) * (aligned ? V : 1);
  }
  // Load V elements of row r, with zeros beyond the end of the piece.
  __device__ __forceinline__ Pack<T, V> load(int64_t r, int64_t column) const {
    Pack<T, V> x{};
    const T* row = rows + r * numel;
    if (aligned) {
      if (column < numel) x = *reinterpret_cast<const Pack<T, V>*>(row + column);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (column + v * kRowThreads < numel) x.at[v] = row[column + v * kRowThreads];
    }
    return x;
  }
};

#endif

}  // namespace antdiff
