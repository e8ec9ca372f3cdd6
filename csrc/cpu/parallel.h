// Loops over independent chunks on several threads.
//
// The loops use OpenMP because torch does too: both share one thread pool, and torch.set_num_threads also applies here.
// ThreadSanitizer does not understand the barriers of libgomp, so a build without OpenMP uses std::thread.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif

namespace antdiff {

inline int max_threads() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#elif defined(__SANITIZE_THREAD__)
  return 4;
#else
  return 1;
#endif
}

// Return the number of threads for `work` units if each thread should get at least `grain` of them. Starting threads
// costs a few microseconds, so small tensors stay on the calling thread.
inline int threads_for(int64_t work, int64_t grain) {
  const int64_t wanted = work / grain;
  const int most = max_threads();
  return wanted < 2 ? 1 : wanted < most ? int(wanted) : most;
}

// Call f(i) for i in [0, n), with one contiguous range of i per thread. f must not throw.
template <class F>
void parallel_for(int64_t n, int threads, F&& f) {
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) f(i);
#else
  std::vector<std::thread> started;
  for (int t = 0; t < threads; ++t)
    started.emplace_back([&, t] {
      for (int64_t i = n * t / threads; i < n * (t + 1) / threads; ++i) f(i);
    });
  for (auto& thread : started) thread.join();
#endif
}

}  // namespace antdiff
