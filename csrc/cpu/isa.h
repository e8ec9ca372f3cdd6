// One binary for every x86-64 processor: each loop body is compiled three times, and the best version that the
// processor supports is called.
//
// A body is a struct with `ANTDIFF_INLINE static R run(Args...)`, and `multiversion<Body>(args...)` runs it. The body
// must be inlined completely into each version, so it may call only ANTDIFF_INLINE functions (no lambdas, no std::).
#pragma once

#include <cstdlib>
#include <cstring>
#include <utility>

#define ANTDIFF_INLINE [[gnu::always_inline]] inline

namespace antdiff {

enum class Isa { generic, avx2, avx512 };

// Return the best instruction set of the processor. ANTDIFF_ISA=generic or avx2 in the environment lowers it, for tests
// and bug reports.
inline Isa isa() {
  static const Isa found = [] {
    Isa best = Isa::generic;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
    if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      best = Isa::avx512;
#endif
    const char* cap = std::getenv("ANTDIFF_ISA");
    if (cap && !std::strcmp(cap, "generic")) best = Isa::generic;
    if (cap && !std::strcmp(cap, "avx2") && best == Isa::avx512) best = Isa::avx2;
    return best;
  }();
  return found;
}

inline const char* isa_name() { return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "generic"; }

#if defined(__x86_64__)
template <class Body, class... Args>
[[gnu::target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")]] auto run_avx512(Args... args) {
  return Body::run(args...);
}
template <class Body, class... Args>
[[gnu::target("avx2,fma")]] auto run_avx2(Args... args) {
  return Body::run(args...);
}
#endif

template <class Body, class... Args>
auto multiversion(Args... args) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return run_avx512<Body, Args...>(args...);
  if (isa() == Isa::avx2) return run_avx2<Body, Args...>(args...);
#endif
  return Body::run(args...);
}

}  // namespace antdiff
