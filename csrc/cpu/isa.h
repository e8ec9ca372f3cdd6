// One binary for every x86-64 processor: each loop body is compiled three times, and the best version that the
// processor supports is called. ANTDIFF_CPU_CAPABILITY=generic, avx2 or avx512 in the environment lowers the choice, for
// tests and bug reports.
//
// A body is a struct with `ANTDIFF_INLINE static R run(Args...)`, and `multiversion<Body>(args...)` runs it. The body
// must be inlined completely into each version, so it may call only ANTDIFF_INLINE functions (no lambdas, no std::).
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#define ANTDIFF_INLINE [[gnu::always_inline]] inline

namespace antdiff {

enum class Isa { generic, avx2, avx512 };

constexpr const char* kIsaNames[] = {"generic", "avx2", "avx512"};
inline const char* isa_name(Isa level) { return kIsaNames[int(level)]; }

// Return the best instruction set of this processor.
inline Isa supported_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::generic;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : Isa::avx2;
#else
  return Isa::generic;
#endif
}

// Return the level to use if ANTDIFF_CPU_CAPABILITY is `wanted`. Null and "" mean that it is unset. The variable can
// only lower the level, since code for a higher one would crash. An unknown name throws std::invalid_argument.
inline Isa lowered_isa(Isa supported, const char* wanted) {
  if (!wanted || !*wanted) return supported;
  for (Isa level : {Isa::generic, Isa::avx2, Isa::avx512})
    if (!std::strcmp(wanted, isa_name(level))) return level < supported ? level : supported;
  throw std::invalid_argument("ANTDIFF_CPU_CAPABILITY must be generic, avx2 or avx512; got '" + std::string(wanted) +
                              "'. Set one of these, or unset it to use the best instruction set of the processor.");
}

// Return the level of this process. The environment is read once. The module calls this function first when it is
// imported, so that an unknown name is an error of the import and never of a kernel.
inline Isa isa() {
  static const Isa level = lowered_isa(supported_isa(), std::getenv("ANTDIFF_CPU_CAPABILITY"));
  return level;
}

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
