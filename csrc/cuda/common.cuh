// Types, sizes and small functions that all kernels share. Internal to csrc/cuda.
#pragma once

#include <algorithm>

#include "../moyu_cuda.h"
#include "platform.cuh"

namespace moyu::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
// Blocks per multiprocessor of the persistent grids. Two let one block stream while the other
// reduces; each block more costs another partial output row in gather_gemv_t's second stage.
inline constexpr int kBlocksPerMultiprocessor = 2;
// Blocks of a persistent grid at most: a block sums up what so many others have found.
inline constexpr int kMaxBlocks = 2 * kThreads;
// Neurons that a block holds in shared memory at a time. On 132 multiprocessors a block's whole
// share of f = 14336 is 55, so that the second tile is met only by larger MLPs or smaller GPUs.
inline constexpr int kTile = 64;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ void from_float(float v, float* out) { *out = v; }
__device__ __forceinline__ void from_float(float v, __half* out) { *out = __float2half_rn(v); }
__device__ __forceinline__ void from_float(float v, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(v);
}

// The kWidth elements that a thread moves at a time: 16 bytes, or one element where a row of d
// elements does not stay on 16-byte boundaries. Kept packed: unpacking early costs registers.
template <typename T, int kWidth>
struct Vector {
  static_assert(kWidth * sizeof(T) == 16);
  uint32_t words[4] = {};
};
template <typename T>
struct Vector<T, 1> {
  float value = 0.0f;
};

__device__ __forceinline__ float unpack(const Vector<float, 4>& v, int e) {
  return __uint_as_float(v.words[e]);
}
__device__ __forceinline__ float unpack(const Vector<__half, 8>& v, int e) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(v.words[e / 2] >> (e % 2 * 16))));
}
__device__ __forceinline__ float unpack(const Vector<__nv_bfloat16, 8>& v, int e) {
  return __uint_as_float(e % 2 == 0 ? v.words[e / 2] << 16 : v.words[e / 2] & 0xffff0000u);
}
template <typename T>
__device__ __forceinline__ float unpack(const Vector<T, 1>& v, int) {
  return v.value;
}

template <typename T, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> load_weights(const T* p, bool wanted) {
  if constexpr (kWidth > 1) {
    const uint4 raw = load_streaming(reinterpret_cast<const uint4*>(p), wanted);
    return {{raw.x, raw.y, raw.z, raw.w}};
  } else {
    return {wanted ? to_float(*p) : 0.0f};
  }
}

template <typename T, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> load_input(const T* p) {
  if constexpr (kWidth > 1) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    return {{raw.x, raw.y, raw.z, raw.w}};
  } else {
    return {to_float(*p)};
  }
}

template <typename T>
__device__ __forceinline__ float bias_at(const T* bias, int64_t i) {
  return bias == nullptr ? 0.0f : to_float(bias[i]);
}

__device__ inline float activate(Activation kind, float h) {
  switch (kind) {
    case Activation::kSilu: return h / (1.0f + expf(-h));
    // Not 1 + erf and 1 + tanh, which cancel where h is far below zero.
    case Activation::kGelu: return 0.5f * h * erfcf(h * -0.70710678118654752f);
    case Activation::kGeluTanh:
      return h / (1.0f + expf(-1.59576912160573073f * (h + 0.044715f * h * h * h)));
    // Written so that a NaN passes through, as it does in torch.
    case Activation::kRelu: return h < 0.0f ? 0.0f : h;
    case Activation::kRelu2: return h < 0.0f ? 0.0f : h * h;
  }
  return h;
}

// Entries of a device-side count that may be used: what the buffer holds, whatever it says.
__device__ __forceinline__ int clamped_count(const int32_t* count, int64_t capacity) {
  if (count == nullptr) return static_cast<int>(capacity);
  return static_cast<int>(min(max(static_cast<int64_t>(*count), int64_t{0}), capacity));
}

// Where block `block` of gridDim.x begins when n items are split evenly; the split follows from
// n and the grid alone, so that sums are made in the same order in every run.
__device__ __forceinline__ int share_begin(int64_t n, int64_t block) {
  return static_cast<int>(n * block / gridDim.x);
}

// Inclusive sum over the lanes up to this one.
__device__ __forceinline__ int warp_scan(int v) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, v, offset);
    if (lane >= offset) v += other;
  }
  return v;
}

// Whether some row uses the neuron.
template <int kRows>
__device__ __forceinline__ bool any_row(const bool (&active)[kRows]) {
  bool any = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) any = any || active[r];
  return any;
}

// Sums each of kValues (a power of two up to 32) over the warp, halving the number of values with
// the number of lanes. Lane l returns the total of value l * kValues / 32, added in the same
// order whatever kValues is: a row's result does not depend on how many rows there are.
template <int kOffset = 16, int kValues>
__device__ __forceinline__ float warp_sum(const float (&v)[kValues]) {
  static_assert(kValues >= 1 && kValues <= 32 && (kValues & (kValues - 1)) == 0);
  if constexpr (kOffset == 0) {
    return v[0];
  } else if constexpr (kValues == 1) {
    const float pair[1] = {v[0] + __shfl_xor_sync(kAllLanes, v[0], kOffset)};
    return warp_sum<kOffset / 2>(pair);
  } else {
    const bool upper = (threadIdx.x & kOffset) != 0;
    float pairs[kValues / 2];
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) {
      const float send = upper ? v[i] : v[i + kValues / 2];
      const float keep = upper ? v[i + kValues / 2] : v[i];
      pairs[i] = keep + __shfl_xor_sync(kAllLanes, send, kOffset);
    }
    return warp_sum<kOffset / 2>(pairs);
  }
}

// ---- host side ----

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Whether every row of a [*, d] matrix at each of these addresses starts on 16 bytes.
template <typename... Pointers>
bool rows_aligned(DType dtype, int64_t d, Pointers... pointers) {
  return d * element_size(dtype) % 16 == 0 && (aligned16(pointers) && ...);
}

// Blocks of a persistent grid over n items.
inline int64_t persistent_blocks(const char* op, int64_t n) {
  const int64_t most = int64_t{kBlocksPerMultiprocessor} * current_device(op).multiprocessors;
  return std::max<int64_t>(1, std::min({most, n, int64_t{kMaxBlocks}}));
}

}  // namespace moyu::cuda
