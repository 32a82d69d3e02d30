// Packed rows as numbers that the tensor cores take; see packed_rows.cuh.
#pragma once

#include "tile.cuh"

namespace moyu::cuda {

struct PackedMatrix {
  const uint8_t* rows;  // [n, row_bytes] or null
  int64_t row_bytes;
  int32_t blocks, bits, group;
  __device__ __forceinline__ explicit operator bool() const { return rows != nullptr; }
  __device__ __forceinline__ bool wide() const {  // every row starts on 8 bytes
    return (reinterpret_cast<uintptr_t>(rows) | static_cast<uintptr_t>(row_bytes)) % 8 == 0;
  }
};

inline constexpr int kBlock = kPackedBlock;

// How x enters the products. kParts numbers of type Half add up to one of x.
template <typename T>
struct Parts {
  using Half = __nv_bfloat16;
  static constexpr int kParts = sizeof(T) == 2 ? 1 : 3;
  static constexpr uint32_t kExponent = 0x43004300u, kOnes = 0x3f803f80u;
  static constexpr float kZero = 128.0f;
  static constexpr bool kWhole8 = false;  // whether a code of 8 bits fits below the exponent
};
template <>
struct Parts<__half> {
  using Half = __half;
  static constexpr int kParts = 1;
  static constexpr uint32_t kExponent = 0x64006400u, kOnes = 0x3c003c00u;
  static constexpr float kZero = 1024.0f;
  static constexpr bool kWhole8 = true;
};

// Two floats as kParts pairs of bfloat16 that add up to them, to 8 bits a part.
template <int kParts>
__device__ __forceinline__ void split_pair(float low, float high, uint32_t (&parts)[kParts]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    parts[p] = bfloat16_pair(low, high);
    low -= __uint_as_float(parts[p] << 16);
    high -= __uint_as_float(parts[p] & 0xffff0000u);
  }
}

__device__ __forceinline__ float half_in(uint32_t lower_half) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(lower_half)));
}

// Neurons of one product.
inline constexpr int kPackedNeurons = 16;

// Calls f<kBits, kGroup>() for a matrix.
template <typename F>
__device__ __forceinline__ void with_format(const PackedMatrix& m, F&& f) {
  if (m.bits == 4) {
    m.group == 64 ? f.template operator()<4, 64>() : f.template operator()<4, 32>();
  } else {
    m.group == 64 ? f.template operator()<8, 64>() : f.template operator()<8, 32>();
  }
}

}  // namespace moyu::cuda
