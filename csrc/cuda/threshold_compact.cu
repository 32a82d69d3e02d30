// Compare and compact, order kept: one launch, one block per row, one read of the values.
#include "common.cuh"

namespace moyu::cuda {
namespace {

constexpr int kCompactThreads = 1024;
constexpr int kCompactWarps = kCompactThreads / 32;
constexpr int kWords = 2048;  // 32 flags each: 65,536 values a round

struct CompactParams {
  const float* values;   // [rows, f]
  const float* epsilon;  // [1]
  int32_t* indices;      // [rows, f]
  int32_t* count;        // [rows]
  int64_t f;
};

struct CompactShared {
  unsigned bits[kWords];   // flags of values 32 w .. 32 w + 31
  int32_t offset[kWords];  // active values in front of word w, in this round
  int32_t warp_totals[kCompactWarps];
};

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

__global__ void __launch_bounds__(kCompactThreads) threshold_compact_kernel(CompactParams p) {
  MOYU_SHARED(CompactShared, s);
  wait_for_previous_kernel();
  allow_next_kernel();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* const values = p.values + blockIdx.x * p.f;
  int32_t* const indices = p.indices + blockIdx.x * p.f;
  const float epsilon = *p.epsilon;
  int64_t found = 0;
  for (int64_t begin = 0; begin < p.f; begin += int64_t{kWords} * 32) {
    const int words = static_cast<int>(min((p.f - begin + 31) / 32, int64_t{kWords}));
#pragma unroll 4
    for (int word = warp; word < words; word += kCompactWarps) {
      const int64_t i = begin + word * 32 + lane;
      const unsigned bits = __ballot_sync(kAllLanes, i < p.f && !(values[i] < epsilon));
      if (lane == 0) s.bits[word] = bits;
    }
    __syncthreads();
    // Prefix sum of the words' counts, two words a thread.
    const int word = 2 * threadIdx.x;
    const int first = word < words ? __popc(s.bits[word]) : 0;
    const int second = word + 1 < words ? __popc(s.bits[word + 1]) : 0;
    const int upto = warp_scan(first + second);
    if (lane == 31) s.warp_totals[warp] = upto;
    __syncthreads();
    const int warps_upto = warp_scan(s.warp_totals[lane]);
    const int round_total = __shfl_sync(kAllLanes, warps_upto, 31);
    const int before_warp = __shfl_sync(kAllLanes, warps_upto, (warp + 31) % 32);
    const int before = (warp == 0 ? 0 : before_warp) + upto - first - second;
    s.offset[word] = before;
    s.offset[word + 1] = before + first;
    __syncthreads();
    for (int w = warp; w < words; w += kCompactWarps) {
      const unsigned bits = s.bits[w];
      if (bits >> lane & 1u)
        indices[found + s.offset[w] + __popc(bits & ((1u << lane) - 1))] =
            static_cast<int32_t>(begin + w * 32 + lane);
    }
    found += round_total;
    __syncthreads();  // the next round writes s.bits again; only where f > 65,536
  }
  for (int64_t i = found + threadIdx.x; i < p.f; i += kCompactThreads) indices[i] = 0;
  if (threadIdx.x == 0) p.count[blockIdx.x] = static_cast<int32_t>(found);
}

}  // namespace

void threshold_compact(const float* values, int64_t rows, int64_t f, const float* epsilon,
                       int32_t* indices, int32_t* count, void* stream) {
  static_assert(kCompactWarps == 32 && kWords == 2 * kCompactThreads);
  if (rows == 0) return;
  launch("threshold_compact", threshold_compact_kernel, rows, kCompactThreads, stream,
         CompactParams{values, epsilon, indices, count, f});
}

}  // namespace moyu::cuda
