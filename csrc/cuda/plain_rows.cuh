// Weight rows of plain numbers. All threads of a block walk along d together, so that every warp has
// the same work however few neurons the block has, and several neurons' loads are in flight at once.
#pragma once

#include "tile.cuh"

namespace moyu::cuda {

template <typename T_, int kWidth>
struct PlainRows {
  using T = T_;
  using Matrix = const T*;  // [n, d]
  static Matrix matrix(const moyu::Matrix& m, int64_t) { return static_cast<Matrix>(m.rows); }

  static __device__ __forceinline__ int64_t row_bytes(Matrix, int64_t d) {
    return d * static_cast<int64_t>(sizeof(T));
  }
  static __device__ __forceinline__ const void* rows_of(Matrix m) { return m; }

  template <int kRows>
  struct Scratch {};

  template <int kMatrices, int kRows>
  static __device__ __forceinline__ void dot_products(const Matrix (&weights)[kMatrices],
                                                      const int32_t* neurons, int n, const T* x,
                                                      int rows, int64_t d,
                                                      TileSums<kMatrices, kRows>& sums) {
    // Neurons at once: 8 loads of 16 bytes in flight per thread, and at most 32 sums, which is what
    // one warp reduces in 31 shuffles.
    constexpr int kMost = 32 / (kMatrices * kRows);
    constexpr int kBatch = kMost < 8 / kMatrices ? kMost : 8 / kMatrices;
    constexpr int kValues = kBatch * kMatrices * kRows;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int j0 = 0; j0 < n; j0 += kBatch) {
      float acc[kValues] = {};
      for (int64_t c = int64_t{threadIdx.x} * kWidth; c < d; c += kThreads * kWidth) {
        Vector<T, kWidth> w[kBatch][kMatrices];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int64_t row = neurons[min(j0 + b, n - 1)] * d + c;
#pragma unroll
          for (int m = 0; m < kMatrices; ++m)
            w[b][m] = load_weights<T, kWidth>(weights[m] + row, j0 + b < n);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const auto in = load_input<T, kWidth>(x + min(r, rows - 1) * d + c);
          float xf[kWidth];
#pragma unroll
          for (int e = 0; e < kWidth; ++e) xf[e] = unpack(in, e);
#pragma unroll
          for (int b = 0; b < kBatch; ++b)
#pragma unroll
            for (int m = 0; m < kMatrices; ++m)
#pragma unroll
              for (int e = 0; e < kWidth; ++e)
                acc[(b * kMatrices + m) * kRows + r] += unpack(w[b][m], e) * xf[e];
        }
      }
      const float total = warp_sum(acc);
      constexpr int kLanesPerValue = 32 / kValues;
      const int value = lane / kLanesPerValue;
      const int j = j0 + value / (kMatrices * kRows);
      if (lane % kLanesPerValue == 0 && j < n)
        sums[warp][j][value / kRows % kMatrices][value % kRows] = total;
    }
  }

  // partial[r] = (add ? partial[r] : 0) + sum over j < n of values[j][r] * weight_t[neurons[j]].
  // A thread keeps its columns of partial from tile to tile, so that needs no barrier.
  template <int kRows>
  static __device__ __forceinline__ void scaled_sum(Matrix weight_t, const int32_t* neurons,
                                                    const float (*values)[kRows], int n, int rows,
                                                    int64_t d, bool add,
                                                    float* partial /* [rows, d] */,
                                                    Scratch<kRows>&) {
    constexpr int kBatch = kRows <= 4 ? 8 : 4;  // loads in flight, as registers allow
    for (int64_t c = int64_t{threadIdx.x} * kWidth; c < d; c += kThreads * kWidth) {
      float acc[kRows][kWidth] = {};
      for (int j0 = 0; j0 < n; j0 += kBatch) {
        Vector<T, kWidth> w[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
          w[b] =
              load_weights<T, kWidth>(weight_t + neurons[min(j0 + b, n - 1)] * d + c, j0 + b < n);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (j0 + b >= n) break;
#pragma unroll
          for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int e = 0; e < kWidth; ++e) acc[r][e] += values[j0 + b][r] * unpack(w[b], e);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
        float* const out = partial + r * d + c;
        if constexpr (kWidth > 1) {
#pragma unroll
          for (int e = 0; e < kWidth; e += 4) {
            float4* const out4 = reinterpret_cast<float4*>(out + e);
            float4 v = {acc[r][e], acc[r][e + 1], acc[r][e + 2], acc[r][e + 3]};
            if (add) v = {out4->x + v.x, out4->y + v.y, out4->z + v.z, out4->w + v.w};
            *out4 = v;
          }
        } else {
          *out = add ? *out + acc[r][0] : acc[r][0];
        }
      }
    }
  }

  static __device__ __forceinline__ void prefetch(Matrix weight, const int32_t* neurons, int n,
                                                  int64_t d) {
    prefetch_rows(weight, neurons, n, row_bytes(weight, d), 4);
  }
};

}  // namespace moyu::cuda
