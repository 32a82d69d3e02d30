// Packed weight rows (format: moyu.h) of 4 and 8 bits on the tensor cores, float32 sums. One mma does
// 16 weight rows with 16 columns and up to 8 rows of x: rows of x beyond the first cost nothing.
//
// A code's four bits become a number by setting them below a constant exponent: 128 + code in
// bfloat16, 1024 + code in binary16. So no code is converted; the 128 or 1024 is taken out of the
// sums again, together with the group's offset. Codes of 8 bits are two sets of four bits, but in
// binary16, which holds 1024 + 255. x goes in as it is; float32 as three bfloat16 that add up to it.
#pragma once

#include "packed_sum.cuh"

namespace moyu::cuda {

// The 4 numbers x[column .. column + 3], zeros behind d, as pairs per part.
template <typename T>
__device__ __forceinline__ void load_four(const T* x, int64_t column, int64_t d,
                                          uint32_t (&pairs)[Parts<T>::kParts][2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t at = column + 2 * i;
    if constexpr (sizeof(T) == 2) {
      const auto* const raw = reinterpret_cast<const uint16_t*>(x);
      const uint32_t low = at < d ? raw[at] : 0, high = at + 1 < d ? raw[at + 1] : 0;
      pairs[0][i] = low | high << 16;
    } else {
      uint32_t parts[Parts<T>::kParts];
      split_pair(at < d ? x[at] : 0.0f, at + 1 < d ? x[at + 1] : 0.0f, parts);
#pragma unroll
      for (int p = 0; p < Parts<T>::kParts; ++p) pairs[p][i] = parts[p];
    }
  }
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

  static __device__ __forceinline__ int64_t row_bytes(const Matrix& m, int64_t) {
    return m.row_bytes;
  }
  static __device__ __forceinline__ const void* rows_of(const Matrix& m) { return m.rows; }

  // Neurons of one mma. Lane 4 g + q has the neurons g and g + 8, columns 16 t + 4 q .. + 3 of a
  // block (t < 4), and of the sums the rows 2 q and 2 q + 1 of x. Neurons and rows beyond the last
  // repeat it: no load and no product has a condition, and what they give is not kept.
  static constexpr int kNeurons = kPackedNeurons;

  // The numbers of a block of x that this lane brings: pairs [part][t][i] of columns 16 t + 4 q + 2 i.
  using Input = uint32_t[P::kParts][4][2];
  template <bool kFast>
  static __device__ __forceinline__ void load_input(const T* x, int64_t column, int64_t d,
                                                    Input& in) {
    const int q = threadIdx.x % 4;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      uint32_t four[P::kParts][2];
      if constexpr (kFast) {
        const uint2 raw = *reinterpret_cast<const uint2*>(x + column + 16 * t + 4 * q);
        four[0][0] = raw.x;
        four[0][1] = raw.y;
      } else {
        load_four(x, column + 16 * t + 4 * q, d, four);
      }
#pragma unroll
      for (int p = 0; p < P::kParts; ++p)
#pragma unroll
        for (int i = 0; i < 2; ++i) in[p][t][i] = four[p][i];
    }
  }

  // sums of matrices first .. first + kSome - 1, which have one format. A warp has an even share of
  // the blocks of 64 columns, for all neurons. kFast: x is of 16-bit numbers,
  // whole blocks, and like the rows on 8 bytes.
  template <int kBits, int kGroup, bool kFast, int kSome, int kMatrices, int kRows>
  static __device__ __forceinline__ void dots(const Matrix (&weights)[kSome], int first,
                                              const int32_t* neurons, int n, const T* x, int rows,
                                              int64_t d, TileSums<kMatrices, kRows>& sums) {
    constexpr int kLoads = kBits / 4, kGroups = kBlock / kGroup;
    constexpr int kAhead =
        kBits == 4 && sizeof(T) == 2 ? 2 : 1;  // blocks whose loads are in flight
    // Blocks whose scales lie in the four lanes of a neuron, two groups to a lane.
    constexpr int kWindow = 8 / kGroups;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int blocks = weights[0].blocks, groups = blocks * kGroups;
    const int begin = blocks * warp / kWarps, end = blocks * (warp + 1) / kWarps;
    const T* const row_of_x = x + min(g, rows - 1) * d;
    for (int j0 = 0; j0 < n; j0 += kNeurons) {
      if (j0 + kNeurons < n) {
#pragma unroll
        for (int m = 0; m < kSome; ++m)
          prefetch(weights[m], neurons + j0 + kNeurons, n - j0 - kNeurons, d);
      }
      const uint8_t* row[kSome][2];
#pragma unroll
      for (int m = 0; m < kSome; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          row[m][h] = weights[m].rows + neurons[min(j0 + g + 8 * h, n - 1)] * weights[m].row_bytes;
      float acc[kSome][4] = {};
      for (int window = begin; window < end; window += kWindow) {
        uint32_t numbers[kSome][2][2];  // scale below, offset above
#pragma unroll
        for (int m = 0; m < kSome; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int k = 0; k < 2; ++k)
              numbers[m][h][k] = load_scale(row[m][h] + blocks * 8 * kBits +
                                                2 * min(window * kGroups + 4 * k + q, groups - 1),
                                            2 * groups);
        const int upto = min(window + kWindow, end);
        for (int block0 = window; block0 < upto; block0 += kAhead) {
          uint2 codes[kAhead][kSome][2][kLoads];
          Input in[kAhead];
#pragma unroll
          for (int b = 0; b < kAhead; ++b)
#pragma unroll
            for (int m = 0; m < kSome; ++m)
#pragma unroll
              for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int l = 0; l < kLoads; ++l)
                  codes[b][m][h][l] = load_codes<kFast>(
                      row[m][h] + (min(block0 + b, blocks - 1) * kLoads + l) * 32 + 8 * q);
#pragma unroll
          for (int b = 0; b < kAhead; ++b)
            load_input<kFast>(row_of_x, int64_t{min(block0 + b, blocks - 1)} * kBlock, d, in[b]);
#pragma unroll
          for (int b = 0; b < kAhead; ++b) {
            if (block0 + b >= upto) break;
#pragma unroll
            for (int k = 0; k < kGroups; ++k) {
              float total[4] = {};  // the sums of x itself, for each row
#pragma unroll
              for (int t = k * 4 / kGroups; t < (k + 1) * 4 / kGroups; ++t)
#pragma unroll
                for (int p = 0; p < P::kParts; ++p)
                  mma<typename P::Half>(total, {P::kOnes, P::kOnes, P::kOnes, P::kOnes},
                                        in[b][p][t]);
              const int at = (block0 + b - window) * kGroups + k;
#pragma unroll
              for (int m = 0; m < kSome; ++m) {
                uint32_t number[2];
#pragma unroll
                for (int h = 0; h < 2; ++h)
                  number[h] = static_cast<uint32_t>(__shfl_sync(
                      kAllLanes, static_cast<int>(at < 4 ? numbers[m][h][0] : numbers[m][h][1]),
                      4 * g + at % 4));
                add_dots<kBits, kRows>(codes[b][m], number, in[b], k * 4 / kGroups,
                                       (k + 1) * 4 / kGroups, total, acc[m]);
              }
            }
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kSome; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = 2 * q + i % 2, j = j0 + g + i / 2 * 8;
          if (r < kRows && j < n) sums[warp][j][first + m][r] = acc[m][i];
        }
    }
  }

  // acc += the products of one group, the columns with t in [first, end), of neurons g and g + 8.
  template <int kBits, int kRows, int kLoads>
  static __device__ __forceinline__ void add_dots(const uint2 (&codes)[2][kLoads],
                                                  const uint32_t (&number)[2], const Input& in,
                                                  int first, int end, const float (&total)[4],
                                                  float (&acc)[4]) {
    constexpr bool kSplit = kBits == 8 && !P::kWhole8;
    constexpr float kZero = kSplit ? 17 * P::kZero : P::kZero;
    float low[4] = {}, high[4] = {};
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if (t < first || t >= end) continue;
      uint32_t a[4], upper[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // neuron g or g + 8, then the next two columns
        const uint2& c = codes[i % 2][kBits == 4 ? 0 : t / 2];
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
      if (kRows == 1 && i % 2 == 1) continue;  // a second row
      const float s = half_in(number[i / 2]), base = half_in(number[i / 2] >> 16) - kZero * s;
      acc[i] += s * (kSplit ? low[i] + 16.0f * high[i] : low[i]) + base * total[i];
    }
  }

  template <int kMatrices, int kRows>
  static __device__ __forceinline__ void dot_products(const Matrix (&weights)[kMatrices],
                                                      const int32_t* neurons, int n, const T* x,
                                                      int rows, int64_t d,
                                                      TileSums<kMatrices, kRows>& sums) {
    const Matrix &a = weights[0], &b = weights[kMatrices - 1];
    const bool fast = sizeof(T) == 2 && d % kBlock == 0 && a.bits == b.bits && a.group == b.group &&
                      a.wide() && b.wide() && reinterpret_cast<uintptr_t>(x) % 8 == 0;
    if constexpr (sizeof(T) == 2)
      if (fast)
        return with_format(a, [&]<int kBits, int kGroup>() {
          dots<kBits, kGroup, true, kMatrices>(weights, 0, neurons, n, x, rows, d, sums);
        });
#pragma unroll 1
    for (int m = 0; m < kMatrices; ++m) {
      const Matrix one[1] = {m == 0 ? a : b};
      with_format(one[0], [&]<int kBits, int kGroup>() {
        dots<kBits, kGroup, false, 1>(one, m, neurons, n, x, rows, d, sums);
      });
    }
  }

  template <int kRows>
  using Scratch = PackedSum::Scratch<kRows>;
  template <int kRows>
  static __device__ __forceinline__ void scaled_sum(const Matrix& weight_t, const int32_t* neurons,
                                                    const float (*values)[kRows], int n, int rows,
                                                    int64_t d, bool add,
                                                    float* partial /* [rows, d] */,
                                                    Scratch<kRows>& scratch) {
    PackedSum::scaled_sum<kRows>(weight_t, neurons, values, n, rows, d, add, partial, scratch);
  }

  static __device__ __forceinline__ void prefetch(const Matrix& weight, const int32_t* neurons,
                                                  int n, int64_t) {
    prefetch_rows(weight.rows, neurons, n, weight.row_bytes, kNeurons);
  }

 private:
  static __device__ __forceinline__ uint32_t below(uint32_t word, uint32_t mask) {
    return P::kExponent | (word & mask);
  }
};

}  // namespace moyu::cuda
