// Packed weight rows (format: moyu.h) of 4 and 8 bits on the tensor cores, float32 sums. One mma does
// 16 weight rows with 16 columns and up to 8 rows of x: rows of x beyond the first cost nothing.
//
// A code's four bits become a number by setting them below a constant exponent: 128 + code in
// bfloat16, 1024 + code in binary16. So no code is converted; the 128 or 1024 is taken out of the
// sums again, together with the group's offset. Codes of 8 bits are two sets of four bits, but in
// binary16, which holds 1024 + 255. x goes in as it is; float32 as three bfloat16 that add up to it.
#pragma once

#include "tile.cuh"

namespace moyu::cuda {

struct PackedMatrix {
  const uint8_t* rows;  // [n, row_bytes] or null
  int64_t row_bytes;
  int32_t blocks, bits, group;
  __device__ __forceinline__ explicit operator bool() const { return rows != nullptr; }
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

// The 4 numbers x[column .. column + 3], zeros behind d, as pairs per part.
template <typename T>
__device__ __forceinline__ void load_four(const T* x, int64_t column, int64_t d, bool aligned,
                                          uint32_t (&pairs)[Parts<T>::kParts][2]) {
  if constexpr (sizeof(T) == 2) {
    if (aligned) {
      uint2 raw = {0, 0};
      if (column < d) raw = *reinterpret_cast<const uint2*>(x + column);
      pairs[0][0] = raw.x;
      pairs[0][1] = raw.y;
      return;
    }
    const auto* const raw = reinterpret_cast<const uint16_t*>(x);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t low = column + 2 * i < d ? raw[column + 2 * i] : 0;
      const uint32_t high = column + 2 * i + 1 < d ? raw[column + 2 * i + 1] : 0;
      pairs[0][i] = low | high << 16;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float low = column + 2 * i < d ? x[column + 2 * i] : 0.0f;
      const float high = column + 2 * i + 1 < d ? x[column + 2 * i + 1] : 0.0f;
      uint32_t parts[Parts<T>::kParts];
      split_pair(low, high, parts);
#pragma unroll
      for (int p = 0; p < Parts<T>::kParts; ++p) pairs[p][i] = parts[p];
    }
  }
}

__device__ __forceinline__ float half_in(uint32_t lower_half) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(lower_half)));
}

template <typename T_>
struct PackedRows {
  using T = T_;
  using Matrix = PackedMatrix;
  using P = Parts<T>;
  static Matrix matrix(const moyu::Matrix& m, int64_t d) {
    if (!m) return {};
    return {static_cast<const uint8_t*>(m.rows), packed_row_bytes(d, m.bits, m.group),
            static_cast<int32_t>(packed_blocks(d)), m.bits, m.group};
  }

  // Neurons of one mma. Lane 4 g + q has the neurons g and g + 8, columns 16 t + 4 q .. + 3 of a
  // block (t < 4), and of the sums the rows 2 q and 2 q + 1 of x.
  static constexpr int kNeurons = 16;

  // sums of matrices first .. first + kSome - 1, which have one format. A warp has an even share of the
  // blocks of 64 columns, for all neurons.
  template <int kBits, int kGroup, int kSome, int kMatrices, int kRows>
  static __device__ __forceinline__ void dots(const Matrix (&weights)[kSome], int first,
                                              const int32_t* neurons, int n, const T* x, int rows,
                                              int64_t d, TileSums<kMatrices, kRows>& sums) {
    constexpr bool kSplit = kBits == 8 && !P::kWhole8;
    constexpr int kLoads = kBits / 4, kGroups = kBlock / kGroup;
    constexpr int kAhead =
        kBits == 4 && sizeof(T) == 2 ? 2 : 1;  // blocks whose loads are in flight
    constexpr float kZero = kSplit ? 17 * P::kZero : P::kZero;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int blocks = weights[0].blocks;
    const int64_t row_bytes = weights[0].row_bytes;
    const int begin = blocks * warp / kWarps, end = blocks * (warp + 1) / kWarps;
    const bool wide = row_bytes % 8 == 0 && (reinterpret_cast<uintptr_t>(weights[0].rows) |
                                             reinterpret_cast<uintptr_t>(weights[kSome - 1].rows)) %
                                                    8 ==
                                                0;
    const bool x_aligned = d % 4 == 0 && reinterpret_cast<uintptr_t>(x) % 8 == 0;
    const bool mine = g < rows;  // of x's rows, the one that this lane brings
    const T* const row_of_x = x + (mine ? g : 0) * d;
    for (int j0 = 0; j0 < n; j0 += kNeurons) {
      bool wanted[2];
      int64_t at[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        wanted[h] = j0 + g + 8 * h < n;
        at[h] = neurons[min(j0 + g + 8 * h, n - 1)] * row_bytes;
      }
      float acc[kSome][4] = {};
      for (int block0 = begin; block0 < end; block0 += kAhead) {
        uint2 codes[kAhead][kSome][2][kLoads];
        uint32_t numbers[kAhead][kSome][2][kGroups];  // scale below, offset above
#pragma unroll
        for (int b = 0; b < kAhead; ++b) {
          const int block = min(block0 + b, end - 1);
#pragma unroll
          for (int m = 0; m < kSome; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const uint8_t* const row = weights[m].rows + at[h];
#pragma unroll
              for (int l = 0; l < kLoads; ++l)
                codes[b][m][h][l] = load_codes(row + (block * kLoads + l) * 32 + 8 * q,
                                               wanted[h] && block0 + b < end, wide);
            }
        }
#pragma unroll
        for (int b = 0; b < kAhead; ++b) {
          const int block = min(block0 + b, end - 1);
#pragma unroll
          for (int m = 0; m < kSome; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const uint8_t* const scales = weights[m].rows + at[h] + blocks * 8 * kBits;
#pragma unroll
              for (int k = 0; k < kGroups; ++k)
                numbers[b][m][h][k] =
                    load_scale(scales + 2 * (block * kGroups + k), 2 * blocks * kGroups, wanted[h]);
            }
        }
#pragma unroll
        for (int b = 0; b < kAhead; ++b) {
          if (block0 + b >= end) break;
          uint32_t in[P::kParts][4][2] = {};
          if (mine) {
#pragma unroll
            for (int t = 0; t < 4; ++t) {
              uint32_t four[P::kParts][2];
              load_four(row_of_x, (block0 + b) * kBlock + 16 * t + 4 * q, d, x_aligned, four);
#pragma unroll
              for (int p = 0; p < P::kParts; ++p)
#pragma unroll
                for (int i = 0; i < 2; ++i) in[p][t][i] = four[p][i];
            }
          }
#pragma unroll
          for (int k = 0; k < kGroups; ++k) {
            float total[4] = {};  // the sums of x itself, for each row
#pragma unroll
            for (int t = k * 4 / kGroups; t < (k + 1) * 4 / kGroups; ++t)
#pragma unroll
              for (int p = 0; p < P::kParts; ++p)
                mma<typename P::Half>(total, {P::kOnes, P::kOnes, P::kOnes, P::kOnes}, in[p][t]);
#pragma unroll
            for (int m = 0; m < kSome; ++m) {
              float low[4] = {}, high[4] = {};
#pragma unroll
              for (int t = k * 4 / kGroups; t < (k + 1) * 4 / kGroups; ++t) {
                uint32_t a[4], upper[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {  // neuron g or g + 8, then the next two columns
                  const uint2& c = codes[b][m][i % 2][kBits == 4 ? 0 : t / 2];
                  const uint32_t word = i < 2 ? c.x : c.y;
                  if constexpr (kBits == 4) {
                    a[i] = below(word >> 4 * t, 0x000f000fu);
                  } else if constexpr (!kSplit) {
                    a[i] = below(word >> 8 * (t % 2), 0x00ff00ffu);
                  } else {
                    a[i] = below(word >> 8 * (t % 2), 0x000f000fu);
                    upper[i] = below(word >> (8 * (t % 2) + 4), 0x000f000fu);
                  }
                }
#pragma unroll
                for (int p = 0; p < P::kParts; ++p) {
                  mma<typename P::Half>(low, a, in[p][t]);
                  if constexpr (kSplit) mma<typename P::Half>(high, upper, in[p][t]);
                }
              }
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const uint32_t number = numbers[b][m][i / 2][k];
                const float s = half_in(number), base = half_in(number >> 16) - kZero * s;
                const float sum = kSplit ? low[i] + 16.0f * high[i] : low[i];
                acc[m][i] += s * sum + base * total[i];
              }
            }
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kSome; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = 2 * q + i % 2;
          if (r < kRows && wanted[i / 2]) sums[warp][j0 + g + i / 2 * 8][first + m][r] = acc[m][i];
        }
    }
  }

  template <int kMatrices, int kRows>
  static __device__ __forceinline__ void dot_products(const Matrix (&weights)[kMatrices],
                                                      const int32_t* neurons, int n, const T* x,
                                                      int rows, int64_t d,
                                                      TileSums<kMatrices, kRows>& sums) {
    const Matrix &a = weights[0], &b = weights[kMatrices - 1];
    if (kMatrices == 2 && a.bits == b.bits && a.group == b.group)
      return with_format(a, [&]<int kBits, int kGroup>() {
        dots<kBits, kGroup, kMatrices>(weights, 0, neurons, n, x, rows, d, sums);
      });
#pragma unroll 1
    for (int m = 0; m < kMatrices; ++m) {
      const Matrix one[1] = {m == 0 ? a : b};
      with_format(one[0], [&]<int kBits, int kGroup>() {
        dots<kBits, kGroup, 1>(one, m, neurons, n, x, rows, d, sums);
      });
    }
  }

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
    while (block < end && n > 0) {
      uint32_t codes[kAhead][4][kLoads], numbers[kAhead][4][kGroups];
#pragma unroll
      for (int b = 0; b < kAhead; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = next_chunk * kNeurons + 2 * q + i % 2 + i / 2 * 8;
          const bool wanted = j < n && next_block < end;
          const uint8_t* const row = weight_t.rows + neurons[min(j, n - 1)] * weight_t.row_bytes;
#pragma unroll
          for (int l = 0; l < kLoads; ++l)
            codes[b][i][l] = load_code_word(row + (next_block * kLoads + l) * 32 + 4 * g, wanted);
#pragma unroll
          for (int k = 0; k < kGroups; ++k)
            numbers[b][i][k] = load_scale(row + blocks * 8 * kBits + 2 * (next_block * kGroups + k),
                                          2 * blocks * kGroups, wanted && g < rows);
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
    if (n > 0 || add) return;
    for (int64_t i = threadIdx.x; i < rows * d; i += kThreads) partial[i] = 0.0f;
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
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // columns 2 g, 2 g + 1 of two neurons, then of the others
        const uint32_t pair = halves(codes[i / 2 * 2][l], codes[i / 2 * 2 + 1][l], i % 2);
        lower[i] = M::kExponent | (pair >> shift & 0x000f000fu);
        if constexpr (kBits == 8) upper[i] = M::kExponent | (pair >> (shift + 4) & 0x000f000fu);
      }
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        mma<__nv_bfloat16>(acc[t], lower, {low[0][p], low[1][p]});
        if constexpr (kBits == 8) mma<__nv_bfloat16>(acc[t], upper, {high[0][p], high[1][p]});
      }
    }
  }

  template <int kRows>
  static __device__ __forceinline__ void scaled_sum(const Matrix& weight_t, const int32_t* neurons,
                                                    const float (*values)[kRows], int n, int rows,
                                                    int64_t d, bool add,
                                                    float* partial /* [rows, d] */) {
    with_format(weight_t, [&]<int kBits, int kGroup>() {
      sum<kBits, kGroup, kRows>(weight_t, neurons, values, n, rows, d, add, partial);
    });
  }

  static __device__ __forceinline__ void prefetch(const Matrix& weight, const int32_t* neurons,
                                                  int n, int64_t) {
    prefetch_rows(weight.rows, neurons, n, weight.row_bytes);
  }

 private:
  static __device__ __forceinline__ uint32_t below(uint32_t word, uint32_t mask) {
    return P::kExponent | (word & mask);
  }

  // The lower or the upper 16 bits of two words.
  static __device__ __forceinline__ uint32_t halves(uint32_t first, uint32_t second, int upper) {
    return upper ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16;
  }

  template <typename F>
  static __device__ __forceinline__ void with_format(const Matrix& m, F&& f) {
    if (m.bits == 4) {
      m.group == 64 ? f.template operator()<4, 64>() : f.template operator()<4, 32>();
    } else {
      m.group == 64 ? f.template operator()<8, 64>() : f.template operator()<8, 32>();
    }
  }
};

}  // namespace moyu::cuda
