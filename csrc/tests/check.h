// A minimal test harness. CHECK prints the failed expression and its location, and `summary` returns the exit code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace antdiff::test {

inline int& failures() {
  static int n = 0;
  return n;
}
inline int& checks() {
  static int n = 0;
  return n;
}

inline void check(bool ok, const char* text, const char* file, int line) {
  ++checks();
  if (ok) return;
  ++failures();
  std::printf("%s:%d: failed: %s\n", file, line, text);
}
// Return whether |a - b| <= relative * max(|a|, |b|). There is no absolute epsilon, so zero must match exactly.
inline bool close(double a, double b, double relative) {
  return a == b || std::fabs(a - b) <= relative * std::fmax(std::fabs(a), std::fabs(b));
}
inline int summary() {
  std::printf("%d checks, %d failed\n", checks(), failures());
  return failures() ? 1 : 0;
}

// Return the sides to test: the CPU loops (false) and the emulated CUDA kernels (true). The emulator is slow and does not
// depend on the level of the CPU code, so runs at a fixed level leave it out.
inline std::vector<bool> sides() {
  return std::getenv("ANTDIFF_CPU_CAPABILITY") ? std::vector<bool>{false} : std::vector<bool>{false, true};
}

// A small reproducible generator (splitmix64). The output of <random> differs between standard libraries.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed) {}
  uint64_t bits() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  double uniform() { return double(bits() >> 11) * 0x1p-53; }  // [0, 1)
  double normal() {                                            // sum of 12 uniforms, which has light tails
    double s = -6;
    for (int i = 0; i < 12; ++i) s += uniform();
    return s;
  }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
};

}  // namespace antdiff::test

#define CHECK(...) ::antdiff::test::check(bool(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
