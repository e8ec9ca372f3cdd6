// Parameters of the launchers for the two passes over J: the Gram matrix G = J J^T, and the combination w^T J.
//
// J is K x P with one row per cluster. It is a list of pieces, one per parameter tensor (one piece for a plain matrix).
// Each piece stores its K rows one after the other, so nothing needs to be concatenated.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace antdiff {

struct RowPiece {
  const void* rows = nullptr;  // [K, numel], row r starts at rows + r * numel
  int64_t numel = 0;           // elements of one row
  void* out = nullptr;         // [numel], output of the combination; unused by gram
};

// G[i, j] = sum_p J[i, p] J[j, p], symmetric. Float64 input is multiplied and summed in float64. All other input is
// multiplied in float32, summed in float32 over chains of at most kGramChain products, and summed in float64 across
// chains.
struct GramParams {
  DType dtype = DType::f32;
  int64_t K = 0;
  const RowPiece* pieces = nullptr;  // [count], in host memory
  int64_t count = 0;
  double* gram = nullptr;     // [K, K]
  bool accumulate = false;    // add to `gram` instead of overwriting it
  double* scratch = nullptr;  // CUDA only: [cuda_gram_scratch(K, device)]
};
// The rounding error of a chain of n float32 products grows like sqrt(n) u, and like n u at worst. With 256 the error
// of one chain is near 1e-6, and each entry of G averages over P / 256 chains.
constexpr int64_t kGramChain = 256;

// out[p] = sum_k weights[k] J[k, p], computed in float32 (float64 for float64 input) and rounded once to out_dtype.
// Rows of weight 0 are read too: 0 * inf is NaN, so a diverged row never turns into a finite update.
struct CombineParams {
  DType dtype = DType::f32;
  DType out_dtype = DType::f32;  // dtype, or f32
  int64_t K = 0;
  const RowPiece* pieces = nullptr;  // [count], in host memory
  int64_t count = 0;
  const double* weights = nullptr;  // [K], on the device of J
};

inline int64_t total_numel(const RowPiece* pieces, int64_t count) {
  int64_t P = 0;
  for (int64_t i = 0; i < count; ++i) P += pieces[i].numel;
  return P;
}

}  // namespace antdiff
