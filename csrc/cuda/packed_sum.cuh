// The sum of packed neuron-major rows, each times a number per row of x (`scaled_sum` of tile.cuh).
#pragma once

#include "packed_parts.cuh"

namespace moyu::cuda {

struct PackedSum {
  using Matrix = PackedMatrix;
  static constexpr int kNeurons = kPackedNeurons;

  // Lane 4 g + q has the neurons 2 q, 2 q + 1, 2 q + 8, 2 q + 9 of 16, and the columns 16 t + 2 g and
  // + 1 of a block; a warp an even share of the blocks, and of each all neurons, 16 at a time.
  template <int kBits, int kGroup, int kRows>
  static __device__ __forceinline__ void sum(const Matrix& weight_t, const int32_t* neurons,
                                             const float (*values)[kRows], int n, int rows,
                                             int64_t d, bool add, float* partial) {
    constexpr int kLoads = kBits / 4, kGroups = kBlock / kGroup;
    constexpr int kAhead = 4 / (kLoads * kGroups) > 1 ? 4 / (kLoads * kGroups) : 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int blocks = weight_t.blocks;
    const int begin = blocks * warp / kWarps, end = blocks * (warp + 1) / kWarps;
    const int chunks = (n + kNeurons - 1) / kNeurons;
    float acc[4][4], base[kGroups][4];
    int next_block = begin, next_chunk = 0;  // of the loads
    int block = begin, chunk = 0;
    while (block < end) {
      uint32_t codes[kAhead][4][kLoads], numbers[kAhead][4][kGroups];
#pragma unroll
      for (int b = 0; b < kAhead; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = next_chunk * kNeurons + 2 * q + i % 2 + i / 2 * 8;
          const int at = min(next_block, blocks - 1);
          const uint8_t* const row = weight_t.rows + neurons[min(j, n - 1)] * weight_t.row_bytes;
#pragma unroll
          for (int l = 0; l < kLoads; ++l)
            codes[b][i][l] = load_code_word(row + (at * kLoads + l) * 32 + 4 * g);
#pragma unroll
          for (int k = 0; k < kGroups; ++k)
            numbers[b][i][k] =
                load_scale(row + blocks * 8 * kBits + 2 * (at * kGroups + k), 2 * blocks * kGroups);
        }
        if (++next_chunk == chunks) {
          next_chunk = 0;
          ++next_block;
        }
      }
#pragma unroll
      for (int b = 0; b < kAhead; ++b) {
        if (block >= end) break;
        if (chunk == 0) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int t = 0; t < 4; ++t) acc[t][i] = 0.0f;
#pragma unroll
            for (int k = 0; k < kGroups; ++k) base[k][i] = 0.0f;
          }
        }
        float a[4];  // of the row g of x
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = chunk * kNeurons + 2 * q + i % 2 + i / 2 * 8;
          a[i] = j < n && g < rows ? values[j][g % kRows] : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < kGroups; ++k)
          add_group<kBits, kGroups>(codes[b], numbers[b], k, a, acc, base[k]);
        if (++chunk < chunks) continue;
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int r = 2 * q + i % 2;
            const int64_t column = int64_t{block} * kBlock + 16 * t + 2 * g + i / 2;
            if (r >= min(rows, kRows) || column >= d) continue;
            const float v = acc[t][i] + base[t * kGroups / 4][i];
            float* const out = partial + r * d + column;
            *out = add ? *out + v : v;
          }
        chunk = 0;
        ++block;
      }
    }
  }

  // One group of columns of 16 neurons: codes and numbers (scale below, offset above) of this lane's
  // four, a what they are multiplied with.
  template <int kBits, int kGroups, int kLoads>
  static __device__ __forceinline__ void add_group(const uint32_t (&codes)[4][kLoads],
                                                   const uint32_t (&numbers)[4][kGroups], int k,
                                                   const float (&a)[4], float (&acc)[4][4],
                                                   float (&base)[4]) {
    using M = Parts<__nv_bfloat16>;
    constexpr float kZero = kBits == 8 ? 17 * M::kZero : M::kZero;
    uint32_t low[2][2], high[2][2], rest[2][3];  // [neurons 2 q .. or 2 q + 8 ..][part]
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float factor[2], offset[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t number = numbers[2 * h + e][k];
        factor[e] = a[2 * h + e] * half_in(number);
        offset[e] = a[2 * h + e] * half_in(number >> 16);
      }
      split_pair(factor[0], factor[1], low[h]);
      if constexpr (kBits == 8) split_pair(16.0f * factor[0], 16.0f * factor[1], high[h]);
      // Less what 128 in the place of 0 adds, by the factors as they were rounded.
      offset[0] -= kZero * (__uint_as_float(low[h][0] << 16) + __uint_as_float(low[h][1] << 16));
      offset[1] -= kZero * (__uint_as_float(low[h][0] & 0xffff0000u) +
                            __uint_as_float(low[h][1] & 0xffff0000u));
      split_pair(offset[0], offset[1], rest[h]);
    }
#pragma unroll
    for (int p = 0; p < 3; ++p)
      mma<__nv_bfloat16>(base, {M::kOnes, M::kOnes, M::kOnes, M::kOnes}, {rest[0][p], rest[1][p]});
#pragma unroll
    for (int t = k * 4 / kGroups; t < (k + 1) * 4 / kGroups; ++t) {
      const int l = kBits == 4 ? 0 : t / 2, shift = kBits == 4 ? 4 * t : 8 * (t % 2);
      uint32_t lower[4], upper[4];
      pairs_of(codes, l, shift, lower);
      if constexpr (kBits == 8) pairs_of(codes, l, shift + 4, upper);
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        mma<__nv_bfloat16>(acc[t], lower, {low[0][p], low[1][p]});
        if constexpr (kBits == 8) mma<__nv_bfloat16>(acc[t], upper, {high[0][p], high[1][p]});
      }
    }
  }

  // What `sum_one` multiplies the codes of 8 groups with, each warp its own: words [group][16
  // neurons][q][pair of neurons 2 q or 2 q + 8, by part].
  static constexpr int kHeld = 8, kParts = 2;
  template <int kRows>
  struct Scratch {
    alignas(16) uint32_t factors[kRows == 1 ? kWarps : 1][kHeld][kTile / kNeurons][4][4];
  };

  // The same for one row of x. All lanes make the factors, which few of them would need to make for
  // themselves; lanes as in `sum`.
  template <int kBits, int kGroup>
  static __device__ __forceinline__ void sum_one(
      const Matrix& weight_t, const int32_t* neurons, const float (*values)[1], int n, int64_t d,
      bool add, float* partial, uint32_t (&factors)[kHeld][kTile / kNeurons][4][4]) {
    using M = Parts<__nv_bfloat16>;
    constexpr int kLoads = kBits / 4, kGroups = kBlock / kGroup, kWindow = kHeld / kGroups;
    constexpr int kAhead = kBits == 4 ? 4 : 2;
    constexpr float kZero = kBits == 8 ? 17 * M::kZero : M::kZero;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int blocks = weight_t.blocks, groups = blocks * kGroups;
    const int begin = blocks * warp / kWarps, end = blocks * (warp + 1) / kWarps;
    const int chunks = (n + kNeurons - 1) / kNeurons;
    for (int window = begin; window < end; window += kWindow) {
      const int k = lane % 8, group = min(window * kGroups + k, groups - 1);
      float base = 0.0f;  // of this lane's group: what is added to each of its columns
      __syncwarp();       // the last window's factors have been used
#pragma unroll 4
      for (int j = lane / 8; j < chunks * kNeurons; j += 4) {
        const uint8_t* const row =
            weight_t.rows + neurons[min(j, n - 1)] * weight_t.row_bytes + blocks * 8 * kBits;
        const uint32_t number = load_scale(row + 2 * group, 2 * groups);
        const float a = j < n ? values[j][0] : 0.0f;
        uint32_t parts[kParts];
        split_pair(a * half_in(number), 0.0f, parts);
        auto* const to = reinterpret_cast<uint16_t*>(factors[k][j / kNeurons][j % 8 / 2]);
        float used = 0.0f;  // the factor as it was rounded, for what 128 in the place of 0 adds
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          to[4 * p + j % kNeurons / 8 * 2 + j % 2] = static_cast<uint16_t>(parts[p]);
          used += __uint_as_float(parts[p] << 16);
        }
        base += a * half_in(number >> 16) - kZero * used;
      }
      base += __shfl_xor_sync(kAllLanes, base, 8);
      base += __shfl_xor_sync(kAllLanes, base, 16);
      __syncwarp();
      const int upto = min(window + kWindow, end);
      float acc[4][4] = {}, high[4][4] = {};
      int next_block = window, next_chunk = 0, block = window, chunk = 0;
      while (block < upto) {
        uint32_t codes[kAhead][4][kLoads];
#pragma unroll
        for (int b = 0; b < kAhead; ++b) {
          const int from = min(next_block, blocks - 1) * kLoads * 32 + 4 * g;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int j = next_chunk * kNeurons + 2 * q + i % 2 + i / 2 * 8;
            const uint8_t* const row = weight_t.rows + neurons[min(j, n - 1)] * weight_t.row_bytes;
#pragma unroll
            for (int l = 0; l < kLoads; ++l) codes[b][i][l] = load_code_word(row + from + 32 * l);
          }
          if (++next_chunk == chunks) {
            next_chunk = 0;
            ++next_block;
          }
        }
#pragma unroll
        for (int b = 0; b < kAhead; ++b) {
          if (block >= upto) break;
#pragma unroll
          for (int part = 0; part < kGroups; ++part) {
            const uint4 f = *reinterpret_cast<const uint4*>(
                factors[(block - window) * kGroups + part][chunk][q]);
#pragma unroll
            for (int t = part * 4 / kGroups; t < (part + 1) * 4 / kGroups; ++t) {
              const int l = kBits == 4 ? 0 : t / 2, shift = kBits == 4 ? 4 * t : 8 * (t % 2);
              uint32_t lower[4], upper[4];
              pairs_of(codes[b], l, shift, lower);
              mma<__nv_bfloat16>(acc[t], lower, {f.x, f.y});
              mma<__nv_bfloat16>(acc[t], lower, {f.z, f.w});
              if constexpr (kBits == 8) {
                pairs_of(codes[b], l, shift + 4, upper);
                mma<__nv_bfloat16>(high[t], upper, {f.x, f.y});
                mma<__nv_bfloat16>(high[t], upper, {f.z, f.w});
              }
            }
          }
          if (++chunk < chunks) continue;
          float out[4][2];
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            const float plus =
                __shfl_sync(kAllLanes, base, (block - window) * kGroups + t * kGroups / 4);
#pragma unroll
            for (int e = 0; e < 2; ++e)
              out[t][e] = plus + acc[t][2 * e] + (kBits == 8 ? 16.0f * high[t][2 * e] : 0.0f);
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[t][i] = high[t][i] = 0.0f;
          }
          float* const to = partial + int64_t{block} * kBlock + 2 * g;
          const int64_t left = q == 0 ? d - int64_t{block} * kBlock - 2 * g : 0;  // columns
          if (add)
#pragma unroll
            for (int t = 0; t < 4; ++t)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                if (16 * t + e < left) out[t][e] += to[16 * t + e];
#pragma unroll
          for (int t = 0; t < 4; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (16 * t + e < left) to[16 * t + e] = out[t][e];
          chunk = 0;
          ++block;
        }
      }
    }
  }

  template <int kRows>
  static __device__ __forceinline__ void scaled_sum(const Matrix& weight_t, const int32_t* neurons,
                                                    const float (*values)[kRows], int n, int rows,
                                                    int64_t d, bool add,
                                                    float* partial /* [rows, d] */,
                                                    Scratch<kRows>& scratch) {
    if (n == 0) {
      for (int64_t i = threadIdx.x; i < rows * d && !add; i += kThreads) partial[i] = 0.0f;
      return;
    }
    with_format(weight_t, [&]<int kBits, int kGroup>() {
      if constexpr (kRows == 1) {
        sum_one<kBits, kGroup>(weight_t, neurons, values, n, d, add, partial,
                               scratch.factors[threadIdx.x / 32]);
      } else {
        sum<kBits, kGroup, kRows>(weight_t, neurons, values, n, rows, d, add, partial);
      }
    });
  }

 private:
  // Four bits each of the columns 2 g and 2 g + 1, of two neurons and then of two others.
  template <int kLoads>
  static __device__ __forceinline__ void pairs_of(const uint32_t (&codes)[4][kLoads], int l,
                                                  int shift, uint32_t (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = codes[i / 2 * 2][l], second = codes[i / 2 * 2 + 1][l];
      const uint32_t both =
          i % 2 ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16;
      pairs[i] = Parts<__nv_bfloat16>::kExponent | (both >> shift & 0x000f000fu);
    }
  }
};

}  // namespace moyu::cuda
