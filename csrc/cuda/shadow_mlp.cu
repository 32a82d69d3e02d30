// qRIDA: a shadow of gate and up names each row's tiers, then the exact MLP runs on the first, and the
// second adds the shadow's own values. With a threshold the estimating kernel lists the exact neurons
// itself; for the top k a block per row and tier finds the k-th largest score by its digits.
#include "compact.cuh"
#include "given.cuh"
#include "shadow.cuh"

namespace moyu::cuda {
namespace {

constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
constexpr int kIndexBits = 31, kKeyBits = 31 + kIndexBits;

struct ChooseParams {
  const float* scores;        // [rows, f]
  uint64_t* cuts;             // [tiers, kMaxRows]
  uint8_t* mask;              // [rows, f]; not written for one row and tier
  int32_t* indices;           // [tiers, f]
  int32_t* count;             // [tiers]
  int32_t* exact_counts;      // [rows]
  int32_t* estimated_counts;  // [rows]
  int64_t f, exact, estimated;
  int rows;
};

struct ChooseShared {
  union {
    int32_t histogram[kBins];
    CompactShared compact;
  };
  int32_t warp_totals[kCompactWarps];
  uint64_t cuts[kMaxTiers][kMaxRows];
  int32_t bin, above, in_bin;
};

// No two keys are equal: by the score without its sign, of equals the lower index is larger. So
// scores order like their bits; a NaN is the largest.
__device__ __forceinline__ uint64_t key_of(float score, int64_t i) {
  return uint64_t{__float_as_uint(score) & 0x7fffffffu} << kIndexBits |
         (0x7fffffffu - static_cast<uint32_t>(i));
}

// A row's scores where each of the block's threads keeps its own in registers, for f up to kMost:
// they are looked at once per digit and once more for the list.
struct HeldScores {
  static constexpr int64_t kMost = int64_t{kPositionsAhead} * kCompactThreads;
  float held[kPositionsAhead];
  int64_t f;
  __device__ __forceinline__ HeldScores(const float* scores, int64_t f) : f(f) {
#pragma unroll
    for (int k = 0; k < kPositionsAhead; ++k) {
      const int64_t i = threadIdx.x + int64_t{k} * kCompactThreads;
      held[k] = i < f ? scores[i] : 0.0f;
    }
  }
  template <typename Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
#pragma unroll
    for (int k = 0; k < kPositionsAhead; ++k) {
      const int64_t i = threadIdx.x + int64_t{k} * kCompactThreads;
      if (i < f) visit(held[k], i);
    }
  }
  __device__ __forceinline__ float at(int64_t, int k) const { return held[k]; }
};

// The same where there are more.
struct StoredScores {
  const float* scores;
  int64_t f;
  __device__ __forceinline__ StoredScores(const float* scores, int64_t f) : scores(scores), f(f) {}
  template <typename Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < f; i += kCompactThreads) visit(scores[i], i);
  }
  __device__ __forceinline__ float at(int64_t i, int) const { return scores[i]; }
};

// The cut such that exactly `wanted` of the keys are >= it, 1 <= wanted <= f: digit by digit from
// the top.
template <typename Scores>
__device__ __forceinline__ uint64_t find_cut(ChooseShared& s, const Scores& scores, int wanted) {
  static_assert(kBins == 2 * kCompactThreads);
  const int tid = static_cast<int>(threadIdx.x);
  uint64_t prefix = 0;  // from now on `wanted` is of the keys that begin with it
  for (int end = kKeyBits; end > 0;) {
    const int shift = max(end - kDigitBits, 0);
    const unsigned digits = (1u << (end - shift)) - 1;
    s.histogram[tid] = 0;
    s.histogram[tid + kCompactThreads] = 0;
    __syncthreads();
    scores.for_each([&](float score, int64_t i) {
      const uint64_t key = key_of(score, i);
      const unsigned digit = static_cast<unsigned>(key >> shift) & digits;
      // Digit 0 is what remains; not counting it saves many threads from adding to one place where
      // many scores are 0.
      if (key >> end == prefix && digit != 0) atomicAdd(&s.histogram[digit], 1);
    });
    __syncthreads();
    const int high = kBins - 1 - 2 * tid;  // this thread's bins: high and high - 1, from the top
    const int first = s.histogram[high], second = s.histogram[high - 1];
    const Scan scan = block_scan(first + second, s.warp_totals);
    const int before = scan.upto - first - second;
    if (before < wanted && wanted <= scan.upto) {
      const bool upper = wanted <= before + first;
      s.bin = upper ? high : high - 1;
      s.above = upper ? before : before + first;
      s.in_bin = upper ? first : second;
    } else if (tid == 0 && scan.total < wanted) {
      s.bin = 0;
      s.above = scan.total;
      s.in_bin = -1;  // not counted
    }
    __syncthreads();
    prefix = prefix << (end - shift) | static_cast<unsigned>(s.bin);
    wanted -= s.above;
    end = shift;
    // All keys of the bin stay: the digits behind it do not matter.
    if (s.in_bin == wanted) return prefix << end;
    __syncthreads();  // the next digit writes the shared words again
  }
  return prefix;
}

// One block per row and tier; one that is alone also makes the list. One block per multiprocessor is
// all there is to run, so that registers are not to be spared.
template <typename Scores>
__global__ void __launch_bounds__(kCompactThreads, 1) choose_kernel(ChooseParams p) {
  MOYU_SHARED(ChooseShared, s);
  wait_for_previous_kernel();
  allow_next_kernel();
  const int block = static_cast<int>(blockIdx.x), row = block % p.rows, tier = block / p.rows;
  const Scores scores(p.scores + row * p.f, p.f);
  const int wanted = static_cast<int>(tier == 0 ? p.exact : p.exact + p.estimated);
  const uint64_t cut = wanted > 0 ? find_cut(s, scores, wanted) : ~uint64_t{0};
  if (threadIdx.x == 0) {
    p.cuts[tier * kMaxRows + row] = cut;
    if (tier == 0) {
      p.exact_counts[row] = static_cast<int32_t>(p.exact);
      p.estimated_counts[row] = static_cast<int32_t>(p.estimated);
    }
  }
  if (gridDim.x > 1) return;
  __syncthreads();  // the list takes the histogram's place
  const auto active = [&](int64_t i, int k) { return key_of(scores.at(i, k), i) >= cut; };
  const int64_t found = compact(s.compact, p.f, active, p.indices);
  if (threadIdx.x == 0) *p.count = static_cast<int32_t>(found);
}

// One block per tier, for several rows or tiers: the mask of all rows, which counts the cuts that a
// neuron reaches, and the list of those that reach all in some row, or at most all but one.
template <int kTiers>
__global__ void __launch_bounds__(kCompactThreads, 1) unite_kernel(ChooseParams p) {
  MOYU_SHARED(ChooseShared, s);
  wait_for_previous_kernel();
  allow_next_kernel();
  if (static_cast<int>(threadIdx.x) < p.rows)
    for (int t = 0; t < kTiers; ++t)
      s.cuts[t][threadIdx.x] = p.cuts[t * kMaxRows + static_cast<int>(threadIdx.x)];
  __syncthreads();
  const int tier = static_cast<int>(blockIdx.x);
  const auto listed = [&](int64_t i, int) {
    int most = 0;
    for (int r = 0; r < p.rows; ++r) {
      const uint64_t key = key_of(p.scores[r * p.f + i], i);
      int reached = 0;
#pragma unroll
      for (int t = 0; t < kTiers; ++t) reached += key >= s.cuts[t][r] ? 1 : 0;
      if (tier == 0) p.mask[r * p.f + i] = static_cast<uint8_t>(reached);
      most = max(most, reached);
    }
    return most == kTiers - tier;
  };
  const int64_t found = compact(s.compact, p.f, listed, p.indices + tier * p.f);
  if (threadIdx.x == 0) p.count[tier] = static_cast<int32_t>(found);
}

}  // namespace

ShadowScratch shadow_scratch(float* workspace, int64_t rows, int64_t d, int64_t f) {
  size_t floats = workspace_floats(rows, d, f);
  const auto take = [&](size_t bytes) {
    const size_t at = (floats + 3) / 4 * 4;  // on 16 bytes
    floats = at + (bytes + 3) / 4;
    return workspace == nullptr ? nullptr : static_cast<void*>(workspace + at);
  };
  const int64_t n = std::min(rows, kMaxRows), blocks = shadow_blocks(d);
  ShadowScratch s{};
  s.x = static_cast<int8_t*>(take(n * blocks * kShadowBlock));
  s.step = static_cast<float*>(take(n * blocks * sizeof(float)));
  s.offset = static_cast<float*>(take(n * blocks * sizeof(float)));
  s.scores = static_cast<float*>(take(n * f * sizeof(float)));
  s.cuts = static_cast<uint64_t*>(take(kMaxTiers * kMaxRows * sizeof(uint64_t)));
  s.indices = static_cast<int32_t*>(take(kMaxTiers * f * sizeof(int32_t)));
  s.count = static_cast<int32_t*>(take(kMaxTiers * sizeof(int32_t)));
  s.piece_counts = static_cast<int32_t*>(take(kMaxBlocks * sizeof(int32_t)));
  s.mask = static_cast<uint8_t*>(take(n * f));
  s.floats = floats;
  return s;
}

size_t shadow_workspace_floats(int64_t rows, int64_t d, int64_t f) {
  return shadow_scratch(nullptr, rows, d, f).floats;
}

void shadow_mlp(const Mlp& mlp, const Shadow& shadow, const Tiers& tiers, int32_t* counts,
                float* workspace, void* stream) {
  constexpr const char* op = "shadow_mlp";
  const int64_t f = mlp.f;
  for (int64_t first = 0; first < mlp.rows; first += kMaxRows) {
    const int64_t n = std::min(kMaxRows, mlp.rows - first);
    const ShadowScratch s = shadow_scratch(workspace, n, mlp.d, f);
    const bool two = tiers.estimated > 0, masked = n > 1 || two;
    int32_t *const exact_counts = counts + first, *const estimated_counts = exact_counts + mlp.rows;
    const ActiveSet set{s.indices, s.count, masked ? s.mask : nullptr};
    if (tiers.epsilon != nullptr) {
      const int64_t blocks = persistent_blocks(op, f);
      int32_t* const block_counts = block_counts_in(workspace, blocks, n, mlp.d);
      launch_estimate(op, mlp, first, n, shadow, s,
                      {nullptr, false, tiers.epsilon, s.indices, s.piece_counts, block_counts,
                       estimated_counts, masked ? s.mask : nullptr},
                      stream);
      launch_given(op, mlp, first, n, set, f, {s.piece_counts, static_cast<int>(blocks)}, {},
                   {block_counts, exact_counts}, workspace, stream);
      continue;
    }
    EstimateResult all;
    all.scores = s.scores;
    all.signs = true;
    launch_estimate(op, mlp, first, n, shadow, s, all, stream);
    const ChooseParams choose{
        s.scores,           s.cuts,           s.mask, s.indices,   s.count,
        exact_counts,       estimated_counts, f,      tiers.exact, tiers.estimated,
        static_cast<int>(n)};
    const auto kernel =
        f <= HeldScores::kMost ? choose_kernel<HeldScores> : choose_kernel<StoredScores>;
    launch(op, kernel, two ? 2 * n : n, kCompactThreads, stream, choose);
    Estimates estimates;
    if (two) {
      launch(op, unite_kernel<2>, 2, kCompactThreads, stream, choose);
      estimates = {s.scores, shadow.inverse, s.indices + f, s.count + 1};
    } else if (n > 1) {
      launch(op, unite_kernel<1>, 1, kCompactThreads, stream, choose);
    }
    launch_given(op, mlp, first, n, set, f, {}, estimates, {}, workspace, stream);
  }
}

}  // namespace moyu::cuda
