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

  static __device__ __forceinline__ int64_t row_bytes(const Matrix& m, int64_t) {
    return m.row_bytes;
  }
  static __device__ __forceinline__ const void* rows_of(const Matrix& m) { return m.rows; }

  // Neurons of one mma. Lane 4 g + q has the neurons g and g + 8, columns 16 t + 4 q .. + 3 of a
  // block (t < 4), and of the sums the rows 2 q and 2 q + 1 of x. Neurons and rows beyond the last
  // repeat it: no load and no product has a condition, and what they give is not kept.
  static constexpr int kNeurons = 16;

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

  static __device__ __forceinline__ void prefetch(const Matrix& weight, const int32_t* neurons,
                                                  int n, int64_t) {
    prefetch_rows(weight.rows, neurons, n, weight.row_bytes, kNeurons);
  }

 private:
  static __device__ __forceinline__ uint32_t below(uint32_t word, uint32_t mask) {
    return P::kExponent | (word & mask);
  }

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
