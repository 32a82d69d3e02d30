// CUDA's vector and 16-bit types and the intrinsics on single values, for the emulator: own code,
// so that no CUDA toolkit is needed. Names and meaning are CUDA's; only what the kernels use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}
inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}
inline int atomicAdd(int* p, int v) {  // fibers switch at warp operations and barriers only
  const int old = *p;
  *p += v;
  return old;
}
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }

inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(uint32_t{v.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t bits = __float_as_uint(v);
  if (std::isnan(v)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half v) {
  const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16;
  const uint32_t exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {  // a subnormal: fraction * 2^-24, exact in float
    const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
    return sign != 0 ? -magnitude : magnitude;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
inline __half __float2half_rn(float v) {
  const uint16_t sign = __float_as_uint(v) >> 16 & 0x8000;
  const float magnitude = std::fabs(v);
  if (std::isnan(v)) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
  if (magnitude < 6.103515625e-05f) {  // 2^-14: a subnormal, in steps of 2^-24
    const float steps = std::nearbyint(std::ldexp(magnitude, 24));
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(steps))};
  }
  const uint32_t bits = __float_as_uint(magnitude) - (112u << 23);
  return {static_cast<uint16_t>(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13)};
}

// CUDA's min and max take mixed widths as long as the types convert.
template <typename A, typename B>
constexpr auto min(A a, B b) -> decltype(a + b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr auto max(A a, B b) -> decltype(a + b) {
  return a < b ? b : a;
}
