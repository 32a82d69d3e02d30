// What everything is made of: a block's work on up to kTile neurons, in two loops that a kind of rows
// supplies (plain_rows.cuh, packed_rows.cuh):
//   dot_products  of gathered weight rows with the input rows, into TileSums
//   scaled_sum    of gathered neuron-major rows, into a partial output
// A kind Rows also names the type of x (Rows::T) and how it sees a matrix (Rows::Matrix, false where
// there is none).
#pragma once

#include "common.cuh"

namespace moyu::cuda {

// sums[warp][j][m][r] = this warp's part of weights[m][neurons[j]] . x[r]; the caller adds up the
// warps behind a barrier (dot_total). Rows from `rows` to kRows repeat another one: no branch.
template <int kMatrices, int kRows>
using TileSums = float[kWarps][kTile][kMatrices][kRows];

// The dot product that the warps made together.
template <int kMatrices, int kRows>
__device__ __forceinline__ float dot_total(const TileSums<kMatrices, kRows>& sums, int j, int m,
                                           int r) {
  float total = sums[0][j][m][r];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) total += sums[warp][j][m][r];
  return total;
}

// Asks the L2 for the first rows of the next loop, before the barrier in front of it: memory would be
// idle there otherwise. At most `most` rows: of many, some would be evicted before their use.
__device__ __forceinline__ void prefetch_rows(const void* rows, const int32_t* neurons, int n,
                                              int64_t row_bytes, int most) {
  constexpr int kLine = 128;
  const int lines = static_cast<int>((row_bytes + kLine - 1) / kLine);
  for (int i = threadIdx.x; i < min(n, most) * lines; i += kThreads)
    prefetch_l2(static_cast<const char*>(rows) + neurons[i / lines] * row_bytes +
                i % lines * kLine);
}

// The same for a block's share of consecutive rows, before it waits for the previous kernel: what
// the L2 holds is never old. At most `most` bytes.
__device__ __forceinline__ void prefetch_share(const void* rows, int64_t row_bytes, int begin,
                                               int end, int64_t most) {
  constexpr int kLine = 128;
  const char* const first = static_cast<const char*>(rows) + begin * row_bytes;
  const int64_t bytes = min((end - begin) * row_bytes, most);
  for (int64_t at = int64_t{threadIdx.x} * kLine; at < bytes; at += kThreads * kLine)
    prefetch_l2(first + at);
}

// Of a whole matrix, per block: what the memory can bring while a small kernel ends.
inline constexpr int64_t kPrefetchBytes = 32 * 1024;

}  // namespace moyu::cuda
