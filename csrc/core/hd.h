// Markers for host and device. The maths of core is written once and compiled for the CPU loops and the CUDA kernels.
#pragma once

#if defined(__CUDACC__)
#define ANTDIFF_HD __host__ __device__ __forceinline__
// For functions that one lane of a warp runs. The call costs next to nothing, and without inlining ptxas takes an
// eighth of the time.
#define ANTDIFF_HD_CALL inline __host__ __device__ __noinline__
#else
#define ANTDIFF_HD inline
#define ANTDIFF_HD_CALL inline
#endif
