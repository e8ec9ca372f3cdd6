// Host-and-device marker: maths in core is written once and compiled for the CPU loops and for the CUDA kernels.
#pragma once

#if defined(__CUDACC__)
#define ANTDIFF_HD __host__ __device__ __forceinline__
#else
#define ANTDIFF_HD inline
#endif
