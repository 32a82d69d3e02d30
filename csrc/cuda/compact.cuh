// Compaction with the order kept, by one block of kCompactThreads threads.
#pragma once

#include "common.cuh"

namespace moyu::cuda {

inline constexpr int kCompactThreads = 1024;
inline constexpr int kCompactWarps = kCompactThreads / 32;
inline constexpr int kWords = 2048;  // 32 flags each: 65,536 positions a round
// Positions of a thread whose loads are in flight together; the latency of one load is what a
// block alone on its multiprocessor waits for.
inline constexpr int kPositionsAhead = 16;
static_assert(kCompactWarps == 32 && kWords == 2 * kCompactThreads);

struct Scan {
  int upto, total;
};

// Inclusive sum over the block's threads up to this one, and over all. Holds one barrier; another
// one must come before warp_totals is used again.
__device__ __forceinline__ Scan block_scan(int v, int32_t (&warp_totals)[kCompactWarps]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int upto = warp_scan(v);
  if (lane == 31) warp_totals[warp] = upto;
  __syncthreads();
  const int warps_upto = warp_scan(warp_totals[lane]);
  const int total = __shfl_sync(kAllLanes, warps_upto, 31);
  const int before_warp = __shfl_sync(kAllLanes, warps_upto, (warp + 31) % 32);
  return {(warp == 0 ? 0 : before_warp) + upto, total};
}

struct CompactShared {
  unsigned bits[kWords];   // flags of positions 32 w .. 32 w + 31
  int32_t offset[kWords];  // active positions in front of word w, in this round
  int32_t warp_totals[kCompactWarps];
};

// Writes the i in [0, f) for which active(i, k) holds to indices, ascending; returns how many. Up
// to kPositionsAhead * kCompactThreads positions, i = threadIdx.x + k * kCompactThreads.
template <typename Active>
__device__ __forceinline__ int64_t compact(CompactShared& s, int64_t f, const Active& active,
                                           int32_t* indices) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t found = 0;
  for (int64_t begin = 0; begin < f; begin += int64_t{kWords} * 32) {
    const int words = static_cast<int>(min((f - begin + 31) / 32, int64_t{kWords}));
    for (int first = warp; first < words; first += kPositionsAhead * kCompactWarps) {
      bool on[kPositionsAhead];
#pragma unroll
      for (int k = 0; k < kPositionsAhead; ++k) {
        const int64_t i = begin + (first + k * kCompactWarps) * 32 + lane;
        on[k] = i < f && active(i, k);
      }
#pragma unroll
      for (int k = 0; k < kPositionsAhead; ++k) {
        const int word = first + k * kCompactWarps;
        const unsigned bits = __ballot_sync(kAllLanes, on[k]);
        if (lane == 0 && word < words) s.bits[word] = bits;
      }
    }
    __syncthreads();
    // Prefix sum of the words' counts, two words a thread.
    const int word = 2 * threadIdx.x;
    const int first = word < words ? __popc(s.bits[word]) : 0;
    const int second = word + 1 < words ? __popc(s.bits[word + 1]) : 0;
    const Scan scan = block_scan(first + second, s.warp_totals);
    s.offset[word] = scan.upto - first - second;
    s.offset[word + 1] = scan.upto - second;
    __syncthreads();
#pragma unroll 4
    for (int w = warp; w < words; w += kCompactWarps) {
      const unsigned bits = s.bits[w];
      const int64_t at = found + s.offset[w] + __popc(bits & ((1u << lane) - 1));
      if (bits >> lane & 1u) indices[at] = static_cast<int32_t>(begin + w * 32 + lane);
    }
    found += scan.total;
    __syncthreads();  // the next round writes s.bits again; only where f > 65,536
  }
  return found;
}

}  // namespace moyu::cuda
