// The second stage: adds the blocks' partial outputs in a fixed order, so that the result is the
// same in every run, with no floating-point atomics.
#pragma once

#include "common.cuh"

namespace moyu::cuda {

inline constexpr int kReduceThreads = 512;
inline constexpr int kReduceWarps = kReduceThreads / 32;

template <typename T>
struct ReduceParams {
  const float* partial;         // [blocks, rows, d]
  const int32_t* block_counts;  // [blocks, kMaxRows] or null
  const T* bias;                // [d] or null
  T* out;                       // [rows, d]
  int32_t* counts;              // [rows], written where block_counts is given
  int64_t d;
  int blocks, rows;
};

template <typename T>
__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(ReduceParams<T> p) {
  struct Shared {
    float sums[kReduceWarps][32];
  };
  MOYU_SHARED(Shared, s);
  wait_for_previous_kernel();
  allow_next_kernel();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t chunks = (p.d + 31) / 32;  // of 32 columns, one a lane
  for (int64_t item = blockIdx.x; item < chunks * p.rows; item += gridDim.x) {
    const int64_t r = item / chunks, c = item % chunks * 32 + lane;
    float sum = 0.0f;
    if (c < p.d) {
#pragma unroll 8
      for (int b = warp; b < p.blocks; b += kReduceWarps)
        sum += p.partial[(int64_t{b} * p.rows + r) * p.d + c];
    }
    s.sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && c < p.d) {
      float total = s.sums[0][lane];
#pragma unroll
      for (int w = 1; w < kReduceWarps; ++w) total += s.sums[w][lane];
      from_float(total + bias_at(p.bias, c), p.out + r * p.d + c);
    }
    __syncthreads();  // the next item writes what this one reads
  }
  if (p.block_counts != nullptr && blockIdx.x == 0 && warp < p.rows) {
    int total = 0;
    for (int b = lane; b < p.blocks; b += 32) total += p.block_counts[b * kMaxRows + warp];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      total += __shfl_xor_sync(kAllLanes, total, offset);
    if (lane == 0) p.counts[warp] = total;
  }
}

template <typename T>
void launch_reduce(const char* op, const ReduceParams<T>& p, void* stream) {
  static_assert(kReduceWarps >= kMaxRows);
  const int64_t items = (p.d + 31) / 32 * p.rows;
  const int64_t most = int64_t{8} * current_device(op).multiprocessors;
  launch(op, reduce_kernel<T>, std::max<int64_t>(1, std::min(items, most)), kReduceThreads, stream,
         p);
}

// Scratch of one call: the blocks' partial outputs, then their counts of active neurons.
inline int32_t* block_counts_in(float* workspace, int64_t blocks, int64_t rows, int64_t d) {
  return reinterpret_cast<int32_t*>(workspace + blocks * rows * d);
}

}  // namespace moyu::cuda
