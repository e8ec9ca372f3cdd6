// Tests of the Gram matrix and the combination: the CPU loops and the emulated CUDA kernels against plain sums in long
// double and double precision.
#define ANTDIFF_CUDA_EMULATION
#include "cuda/combine.cu"  // NOLINT: the emulator compiles it as C++
#include "cuda/gram.cu"     // NOLINT

#include <vector>

#include "cpu/launchers.h"
#include "tests/check.h"

using namespace antdiff;
using test::Random;

namespace {

template <class T>
double unit() {
  return sizeof(T) == 8 ? 0x1p-53 : 0x1p-24;
}

// A list of pieces in separate vectors. Each piece is misaligned by `shift` elements.
template <class T>
struct Case {
  DType dtype;
  int64_t K;
  std::vector<int64_t> sizes;
  int64_t shift;
  std::vector<std::vector<T>> rows;
  std::vector<RowPiece> pieces;

  Case(DType dtype, int64_t K, std::vector<int64_t> sizes_, int64_t shift, uint64_t seed)
      : dtype(dtype), K(K), sizes(std::move(sizes_)), shift(shift) {
    Random random(seed);
    for (int64_t n : sizes) {
      rows.emplace_back(size_t(shift + K * n));
      for (T& x : rows.back()) x = from_float<T>(float(random.normal() + .5));
      pieces.push_back({rows.back().data() + shift, n, nullptr});
    }
  }
  double at(size_t piece, int64_t k, int64_t p) const {
    return double(to_float(rows[piece][size_t(shift + k * sizes[piece] + p)]));
  }

  void check_gram(bool with_cuda = true) const {
    std::vector<long double> sums(size_t(K * K), 0);  // a plain double sum would be no more accurate than the result
    for (size_t s = 0; s < sizes.size(); ++s)
      for (int64_t i = 0; i < K; ++i)
        for (int64_t j = 0; j < K; ++j)
          for (int64_t p = 0; p < sizes[s]; ++p) sums[size_t(i * K + j)] += (long double)(at(s, i, p)) * at(s, j, p);
    const std::vector<double> want(sums.begin(), sums.end());
    std::vector<double> got(size_t(K * K));
    std::vector<double> scratch(size_t(cuda_gram_scratch(K, 0)), -1e300);
    GramParams g;
    g.dtype = dtype, g.K = K, g.pieces = pieces.data(), g.count = int64_t(pieces.size());
    g.gram = got.data(), g.scratch = scratch.data();
    for (bool cuda : test::sides())
      for (int pass = 1; pass <= 2; ++pass) {
        if (cuda && !with_cuda) continue;
        g.accumulate = pass == 2;
        CHECK((cuda ? cuda_gram(g, {}) : cpu_gram(g)).ok());
        int64_t wrong = 0;
        for (int64_t i = 0; i < K; ++i)
          for (int64_t j = 0; j < K; ++j) {
            const double magnitude = std::sqrt(want[size_t(i * K + i)] * want[size_t(j * K + j)]);
            wrong += !(std::fabs(got[size_t(i * K + j)] - pass * want[size_t(i * K + j)]) <=
                       64 * pass * unit<T>() * magnitude);
            wrong += got[size_t(i * K + j)] != got[size_t(j * K + i)];
          }
        CHECK(wrong == 0);
      }
  }

  template <class O>
  void check_combine(DType out_dtype) {
    Random random(uint64_t(K) + 17);
    std::vector<double> weights(static_cast<size_t>(K));
    for (double& w : weights) w = random.normal();
    std::vector<std::vector<O>> out;
    for (size_t s = 0; s < sizes.size(); ++s) {
      out.emplace_back(size_t(sizes[s] + shift), from_float<O>(-77.f));
      pieces[s].out = out.back().data() + shift;
    }
    CombineParams c;
    c.dtype = dtype, c.out_dtype = out_dtype, c.K = K, c.pieces = pieces.data(), c.count = int64_t(pieces.size());
    c.weights = weights.data();
    const double rounding = sizeof(O) == 2 ? (out_dtype == DType::f16 ? 0x1p-11 : 0x1p-8) : unit<O>();
    for (bool cuda : test::sides()) {
      CHECK((cuda ? cuda_combine(c, {}) : cpu_combine(c)).ok());
      int64_t wrong = 0;
      for (size_t s = 0; s < sizes.size(); ++s)
        for (int64_t p = 0; p < shift + sizes[s]; ++p) {
          O& o = out[s][size_t(p)];
          double want = 0, magnitude = 0;
          for (int64_t k = 0; k < K && p >= shift; ++k) {
            want += weights[size_t(k)] * at(s, k, p - shift);
            magnitude += std::fabs(weights[size_t(k)] * at(s, k, p - shift));
          }
          const double bound = (2 * double(K) * unit<T>() + rounding) * magnitude + 0x1p-25;
          wrong += p < shift ? to_float(o) != -77 : !(std::fabs(double(to_float(o)) - want) <= bound);
          if (p >= shift) o = from_float<O>(-77.f);  // reset for the next launcher
        }
      CHECK(wrong == 0);
    }
  }
};

// Sizes below, at and beyond a slab, aligned and misaligned rows, and lists longer than a table. The emulator switches
// fibers at every shuffle of the K (K + 1) / 2 sums, so K > 8, whose tile kernel has 64 sums, gets only one list.
template <class T>
void all(DType dtype) {
  const std::vector<int64_t> mixed = {3, 0, 129, 8, 2050, 1, 1, 64, 300};
  for (int64_t shift : {0, 1}) {
    for (int64_t K : {1, 3, 5, 8}) {
      Case<T> c(dtype, K, mixed, shift, uint64_t(K * 100 + shift));
      c.check_gram();
      c.template check_combine<T>(dtype);
      c.template check_combine<float>(DType::f32);
    }
    for (const auto& sizes : std::vector<std::vector<int64_t>>{{0}, {1}, {1024}, {5000}})
      Case<T>(dtype, 2, sizes, shift, uint64_t(shift)).check_gram();
  }
  Case<T> c(dtype, 11, {40, 1030}, 0, 11);
  c.check_gram();
  c.template check_combine<T>(dtype);
}

// Every tile shape of the CPU loop, which needs no emulator.
template <class T>
void all_rows(DType dtype) {
  for (int64_t K = 1; K <= 21; ++K) Case<T>(dtype, K, {3, 700, 40}, 1, uint64_t(K)).check_gram(false);
}

// Long rows: several chunks and threads on the CPU, several flushes of a chain on CUDA.
void long_rows() {
  Case<float> c(DType::f32, 3, {70001, 200000}, 0, 3);
  c.check_gram();
  c.check_combine<float>(DType::f32);
  Case<BFloat16> b(DType::bf16, 1, {400000}, 0, 4);
  b.check_gram();
}

// A table takes as many pieces as fit, and its offsets are 64-bit.
void tables() {
  std::vector<RowPiece> pieces(3, RowPiece{nullptr, int64_t(5) << 40, nullptr});
  RowTable table;
  int64_t next = 0;
  CHECK(table.fill(pieces.data(), 3, 1024, &next) == int64_t(15) << 30);
  CHECK(next == 3 && table.count == 3 && table.at[2].first == int64_t(10) << 30);
  const std::vector<RowPiece> many(size_t(3 * kTableEntries), RowPiece{nullptr, 1, nullptr});
  int64_t seen = 0;
  for (next = 0; next < int64_t(many.size());) seen += table.fill(many.data(), int64_t(many.size()), 1024, &next);
  CHECK(seen == int64_t(many.size()));
  static_assert(sizeof(RowTable) + 40 <= kTableBytes);
}

}  // namespace

int main() {
  all<float>(DType::f32);
  all<double>(DType::f64);
  all<Half>(DType::f16);
  all<BFloat16>(DType::bf16);
  all_rows<float>(DType::f32);
  all_rows<double>(DType::f64);
  long_rows();
  tables();
  return test::summary();
}
