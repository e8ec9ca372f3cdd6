// The element types of tensors, and conversions to and from the type in which the kernels accumulate.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/hd.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace antdiff {

enum class DType : int8_t { f32, f64, f16, bf16 };

// Storage only. Arithmetic happens in float or double after to_float, as on the GPU.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

namespace detail {
ANTDIFF_HD float bits_to_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
#endif
}
ANTDIFF_HD uint32_t float_to_bits(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
#endif
}
}  // namespace detail

ANTDIFF_HD float to_float(float x) { return x; }
ANTDIFF_HD double to_float(double x) { return x; }
ANTDIFF_HD float to_float(BFloat16 x) { return detail::bits_to_float(uint32_t(x.bits) << 16); }
ANTDIFF_HD float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // Shift the 15 magnitude bits into the exponent and mantissa of a float, then multiply by 2^112 to move the bias from
  // 15 to 127. This is exact for normal and subnormal numbers. Infinity and NaN (exponent 31) are patched afterwards.
  // The code has no branch, so it vectorises without f16c.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  float f = detail::bits_to_float(magnitude) * 0x1p112f;
  uint32_t u = detail::float_to_bits(f);
  u |= (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return detail::bits_to_float(u | uint32_t(x.bits & 0x8000u) << 16);
#endif
}

// Round to nearest, ties to even. NaN stays NaN.
template <class T>
ANTDIFF_HD T from_float(float x);
template <>
ANTDIFF_HD float from_float<float>(float x) {
  return x;
}
template <>
ANTDIFF_HD BFloat16 from_float<BFloat16>(float x) {
  const uint32_t u = detail::float_to_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {uint16_t((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded)};
}
template <>
ANTDIFF_HD Half from_float<Half>(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t u = detail::float_to_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    h = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal, in units of 2^-24. Adding 0.5 aligns the last bit of the float with that
    // unit, and the addition itself rounds to nearest even.
    h = detail::float_to_bits(detail::bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {uint16_t(h | sign)};
#endif
}
template <>
ANTDIFF_HD double from_float<double>(float x) {
  return x;
}
template <class T>
ANTDIFF_HD T from_float(double x) {
  return from_float<T>(float(x));
}
template <>
ANTDIFF_HD double from_float<double>(double x) {
  return x;
}

inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// The type in which a short chain of additions of T is accumulated.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

// Call f(T{}) with the C++ type T of a dtype tag.
template <class F>
auto dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64:
      return f(double{});
    case DType::f16:
      return f(Half{});
    case DType::bf16:
      return f(BFloat16{});
    default:
      return f(float{});
  }
}

}  // namespace antdiff
