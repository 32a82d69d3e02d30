// The MLP over a set known in advance (the `given` plan): what is not in the set is not read.
#include "given.cuh"

namespace moyu::cuda {

template <typename Rows>
struct SparseMlpParams {
  MlpParams<Rows> mlp;
  ActiveSet set;
  Pieces pieces;
  int64_t capacity;  // entries that set.indices has room for
};

// A type of its own: the kernel without estimates would be compiled to other code by this alone.
template <typename Rows>
struct EstimatesMlpParams : SparseMlpParams<Rows> {
  Estimates estimates;
};

template <typename Rows, int kRows>
struct SparseMlpShared {
  union {  // one or the other, as the MLP is gated or not
    TileSums<2, kRows> pair;
    TileSums<1, kRows> single;
    typename Rows::template Scratch<kRows> scratch;  // of the sum
  } sums;
  float values[kTile][kRows];
  int32_t neurons[kTile];
  bool valid[kTile];
  int32_t piece_end[kMaxBlocks];  // positions of the whole list up to the end of piece b
  int32_t warp_totals[kWarps];
};

// Fills s.piece_end; returns the length of the whole list.
template <typename Rows, int kRows>
__device__ __forceinline__ int find_pieces(SparseMlpShared<Rows, kRows>& s, const Pieces& pieces) {
  const int warp = threadIdx.x / 32, piece = 2 * threadIdx.x;
  const int first = piece < pieces.blocks ? pieces.counts[piece] : 0;
  const int second = piece + 1 < pieces.blocks ? pieces.counts[piece + 1] : 0;
  int upto = warp_scan(first + second);
  if (threadIdx.x % 32 == 31) s.warp_totals[warp] = upto;
  __syncthreads();
  for (int w = 0; w < warp; ++w) upto += s.warp_totals[w];
  s.piece_end[piece] = upto - second;
  s.piece_end[piece + 1] = upto;
  __syncthreads();
  return s.piece_end[kMaxBlocks - 1];
}

// The neuron at position k of the list.
template <typename Rows, int kRows>
__device__ __forceinline__ int32_t listed(const SparseMlpShared<Rows, kRows>& s,
                                          const ActiveSet& set, const Pieces& pieces, int64_t f,
                                          int k) {
  if (set.indices == nullptr) return k;
  if (pieces.counts == nullptr) return set.indices[k];
  int low = 0, high = pieces.blocks - 1;  // the first piece that ends behind k
  while (low < high) {
    const int middle = (low + high) / 2;
    if (s.piece_end[middle] > k) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const int before = low == 0 ? 0 : s.piece_end[low - 1];
  return set.indices[f * low / pieces.blocks + k - before];
}

// Behind its share of the set, a block has one of the estimated neurons where there are some: they
// only take part in the sum.
template <typename Rows, int kRows, typename Params>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sparse_mlp_kernel(Params params) {
  constexpr bool kEstimates = std::is_same_v<Params, EstimatesMlpParams<Rows>>;
  static_assert(kMaxBlocks == 2 * kThreads);
  using Shared = SparseMlpShared<Rows, kRows>;
  MOYU_SHARED(Shared, s);
  wait_for_previous_kernel();
  allow_next_kernel();
  const MlpParams<Rows>& p = params.mlp;
  const ActiveSet& set = params.set;
  const int count = params.pieces.counts == nullptr ? clamped_count(set.count, params.capacity)
                                                    : find_pieces(s, params.pieces);
  const int begin = share_begin(count, blockIdx.x), end = share_begin(count, blockIdx.x + 1);
  float* const partial = p.partial + blockIdx.x * p.rows * p.d;
  int more_begin = 0, last = end;
  if constexpr (kEstimates) {
    const int estimated = clamped_count(params.estimates.count, p.f);
    more_begin = share_begin(estimated, blockIdx.x);
    last += share_begin(estimated, blockIdx.x + 1) - more_begin;
  }
  int first = begin;
  do {  // once even for an empty share: the partial output is 0 then
    const int n = min(kTile, last - first);
    const int computed = kEstimates ? max(0, min(n, end - first)) : n;
    if (static_cast<int>(threadIdx.x) < n) {
      const int at = first + static_cast<int>(threadIdx.x);
      int32_t neuron;
      if (!kEstimates || at < end) neuron = listed(s, set, params.pieces, p.f, at);
      if constexpr (kEstimates)
        if (at >= end) neuron = params.estimates.neurons[more_begin + at - end];
      s.valid[threadIdx.x] = neuron >= 0 && neuron < p.f;
      s.neurons[threadIdx.x] = s.valid[threadIdx.x] ? neuron : 0;
    }
    __syncthreads();
    if (p.gate) {
      const typename Rows::Matrix weights[2] = {p.gate, p.up};
      Rows::template dot_products<2, kRows>(weights, s.neurons, computed, p.x, p.rows, p.d,
                                            s.sums.pair);
    } else {
      const typename Rows::Matrix weights[1] = {p.up};
      Rows::template dot_products<1, kRows>(weights, s.neurons, computed, p.x, p.rows, p.d,
                                            s.sums.single);
    }
    Rows::prefetch(p.down_t, s.neurons, n, p.d);
    __syncthreads();
    for (int slot = threadIdx.x; slot < n * kRows; slot += kThreads) {
      const int j = slot / kRows, r = slot % kRows;
      const int64_t neuron = s.neurons[j];
      float a = 0.0f;
      bool computes =
          r < p.rows && s.valid[j] && (set.mask == nullptr || set.mask[r * p.f + neuron] != 0);
      if constexpr (kEstimates)
        if (computes && set.mask[r * p.f + neuron] == kEstimated) {
          a = params.estimates.scores[r * p.f + neuron] * params.estimates.inverse[neuron];
          computes = false;
        }
      if (computes)
        a = p.gate ? gated_activation<Rows, kRows>(p, s.sums.pair, neuron, j, r)
                   : single_activation<Rows, kRows>(p, p.up_bias, s.sums.single, neuron, j, r);
      s.values[j][r] = a;
    }
    __syncthreads();
    Rows::template scaled_sum<kRows>(p.down_t, s.neurons, s.values, n, p.rows, p.d, first > begin,
                                     partial, s.sums.scratch);
    __syncthreads();  // the next tile writes what this one reads
    first += kTile;
  } while (first < last);
}

void launch_given(const char* op, const Mlp& mlp, int64_t first, int64_t rows, const ActiveSet& set,
                  int64_t capacity, const Pieces& pieces, const Estimates& estimates,
                  const BlockCounts& counted, float* workspace, void* stream) {
  const int64_t blocks = persistent_blocks(op, mlp.f);
  dispatch_mlp(op, mlp, workspace, rows, [&]<typename Rows, int kRows>() {
    const SparseMlpParams<Rows> params{mlp_params<Rows>(mlp, first, rows, workspace), set, pieces,
                                       capacity};
    if (estimates.neurons == nullptr) {
      launch(op, sparse_mlp_kernel<Rows, kRows, SparseMlpParams<Rows>>, blocks, kThreads, stream,
             params);
    } else {
      launch(op, sparse_mlp_kernel<Rows, kRows, EstimatesMlpParams<Rows>>, blocks, kThreads, stream,
             {params, estimates});
    }
    auto reduce = mlp_reduce_params<typename Rows::T>(mlp, first, rows, blocks, workspace);
    reduce.block_counts = counted.of_blocks;
    reduce.counts = counted.counts;
    launch_reduce(op, reduce, stream);
  });
}

void sparse_mlp(const Mlp& mlp, const ActiveSet& set, int64_t capacity, float* workspace,
                void* stream) {
  for (int64_t first = 0; first < mlp.rows; first += kMaxRows) {
    const int64_t n = std::min(kMaxRows, mlp.rows - first);
    ActiveSet mine = set;
    if (set.mask != nullptr) mine.mask += first * mlp.f;
    launch_given("sparse_mlp", mlp, first, n, mine, set.indices == nullptr ? mlp.f : capacity, {},
                 {}, {}, workspace, stream);
  }
}

}  // namespace moyu::cuda
