// The team that computes a K x K problem: one CPU thread (Solo) or the lanes of a warp (cuda/warp.h). The maths of core
// is written once for both. Loops stride over the members of the team, and `sync` separates writes from the reads of
// other members. Numbers that all members need are not exchanged: each member computes them, from the same memory and
// in the same order.
#pragma once

#include <cstdint>

#include "core/hd.h"

namespace antdiff {

struct Solo {
  ANTDIFF_HD int64_t rank() const { return 0; }
  ANTDIFF_HD int64_t size() const { return 1; }
  // The members arranged as a grid, for loops over two indices.
  ANTDIFF_HD int64_t grid_row() const { return 0; }
  ANTDIFF_HD int64_t grid_rows() const { return 1; }
  ANTDIFF_HD int64_t grid_column() const { return 0; }
  ANTDIFF_HD int64_t grid_columns() const { return 1; }
  ANTDIFF_HD void sync() const {}
};

// The verdict of a method on its input.
enum class Verdict : int8_t { ok, bad_gram, bad_perms };

// The largest K whose workspace fits the static shared memory of a CUDA block (48 KiB), and easily fits the stack of a
// CPU thread. The workspace of a larger K is in global memory, or on the heap.
constexpr int64_t kSharedK = 32;
// The largest number of problems that run at once if the workspace is in global memory.
constexpr int64_t kScratchBlocks = 1024;
// The number of doubles of global memory that the CUDA launchers need for n problems of `workspace` doubles each.
inline int64_t scratch_for(int64_t n, int64_t K, int64_t workspace) {
  return K <= kSharedK ? 0 : (n < kScratchBlocks ? n : kScratchBlocks) * workspace;
}

}  // namespace antdiff
