// The MLP whose set follows from a threshold on the way (the `gate` and `product` plans). The
// block that makes the deciding projection also compares and compacts, in its own neurons, and
// goes on with those that passed: no list in global memory, no launch in between.
#include "mlp.cuh"

namespace moyu::cuda {

template <typename Rows>
struct ThresholdMlpParams {
  MlpParams<Rows> mlp;
  const float* scale;     // [f] or null
  const float* epsilon;   // [1]
  int32_t* block_counts;  // [blocks, kMaxRows]
  bool gate_decides;      // the gate alone; else the activation
};

template <typename Rows, int kRows>
struct ThresholdMlpShared {
  union {
    TileSums<2, kRows> pair;
    TileSums<1, kRows> single;
    typename Rows::template Scratch<kRows> scratch;  // of the sum
  } sums;
  float decided[kTile][kRows];  // act(gate) or the activation, of every neuron
  bool active[kTile][kRows];
  int32_t neurons[kTile];
  int32_t kept;                 // neurons that are active for some row,
  int32_t source[kTile];        // where they are in `decided`,
  int32_t kept_neurons[kTile];  // and which they are
  float values[kTile][kRows];   // their activations
};

// Warp 0 lists the neurons that some row keeps, in order.
template <typename Rows, int kRows>
__device__ __forceinline__ void compact_tile(ThresholdMlpShared<Rows, kRows>& s, int n) {
  const int lane = threadIdx.x;
  int kept = 0;
  for (int j0 = 0; j0 < n; j0 += 32) {
    const int j = j0 + lane;
    const bool any = j < n && any_row<kRows>(s.active[j]);
    const unsigned bits = __ballot_sync(kAllLanes, any);
    if (any) {
      const int at = kept + __popc(bits & ((1u << lane) - 1));
      s.source[at] = j;
      s.kept_neurons[at] = s.neurons[j];
    }
    kept += __popc(bits);
  }
  if (lane == 0) s.kept = kept;
}

template <typename Rows, int kRows>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    threshold_mlp_kernel(ThresholdMlpParams<Rows> params) {
  using Shared = ThresholdMlpShared<Rows, kRows>;
  MOYU_SHARED(Shared, s);
  wait_for_previous_kernel();
  allow_next_kernel();
  const MlpParams<Rows>& p = params.mlp;
  const float epsilon = *params.epsilon;
  const bool pair = p.gate && !params.gate_decides;
  const typename Rows::Matrix deciding = p.gate ? p.gate : p.up;
  const typename Rows::T* const deciding_bias = p.gate ? p.gate_bias : p.up_bias;
  const int begin = share_begin(p.f, blockIdx.x), end = share_begin(p.f, blockIdx.x + 1);
  float* const partial = p.partial + blockIdx.x * p.rows * p.d;
  const int row_counted = static_cast<int>(threadIdx.x) - 32;  // warp 1 counts, a row a lane
  int my_count = 0;
  int first = begin;
  do {
    const int n = min(kTile, end - first);
    if (static_cast<int>(threadIdx.x) < n) s.neurons[threadIdx.x] = first + threadIdx.x;
    __syncthreads();
    if (pair) {
      const typename Rows::Matrix weights[2] = {p.gate, p.up};
      Rows::template dot_products<2, kRows>(weights, s.neurons, n, p.x, p.rows, p.d, s.sums.pair);
    } else {
      const typename Rows::Matrix weights[1] = {deciding};
      Rows::template dot_products<1, kRows>(weights, s.neurons, n, p.x, p.rows, p.d, s.sums.single);
    }
    __syncthreads();
    for (int slot = threadIdx.x; slot < n * kRows; slot += kThreads) {
      const int j = slot / kRows, r = slot % kRows;
      const int64_t neuron = first + j;
      const float v =
          pair ? gated_activation<Rows, kRows>(p, s.sums.pair, neuron, j, r)
               : single_activation<Rows, kRows>(p, deciding_bias, s.sums.single, neuron, j, r);
      const float score = fabsf(v) * (params.scale == nullptr ? 1.0f : params.scale[neuron]);
      s.decided[j][r] = v;
      s.active[j][r] = r < p.rows && !(score < epsilon);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      compact_tile(s, n);
    } else if (row_counted < p.rows) {
      for (int j = 0; j < n; ++j) my_count += s.active[j][row_counted] ? 1 : 0;
    }
    __syncthreads();
    const int kept = s.kept;
    if (params.gate_decides) {
      const typename Rows::Matrix weights[1] = {p.up};
      Rows::template dot_products<1, kRows>(weights, s.kept_neurons, kept, p.x, p.rows, p.d,
                                            s.sums.single);
      Rows::prefetch(p.down_t, s.kept_neurons, kept, p.d);
      __syncthreads();
    }
    for (int slot = threadIdx.x; slot < kept * kRows; slot += kThreads) {
      const int k = slot / kRows, r = slot % kRows, j = s.source[k];
      float a = 0.0f;
      if (s.active[j][r]) {
        a = s.decided[j][r];
        if (params.gate_decides)
          a *= dot_total<1, kRows>(s.sums.single, k, 0, r) + bias_at(p.up_bias, s.kept_neurons[k]);
      }
      s.values[k][r] = a;
    }
    __syncthreads();
    Rows::template scaled_sum<kRows>(p.down_t, s.kept_neurons, s.values, kept, p.rows, p.d,
                                     first > begin, partial, s.sums.scratch);
    __syncthreads();  // the next tile writes what this one reads
    first += kTile;
  } while (first < end);
  if (row_counted >= 0 && row_counted < p.rows)
    params.block_counts[blockIdx.x * kMaxRows + row_counted] = my_count;
}

void threshold_mlp(const Mlp& mlp, Plan plan, const float* scale, const float* epsilon,
                   int32_t* counts, float* workspace, void* stream) {
  const int64_t blocks = persistent_blocks("threshold_mlp", mlp.f);
  for (int64_t first = 0; first < mlp.rows; first += kMaxRows) {
    const int64_t n = std::min(kMaxRows, mlp.rows - first);
    int32_t* const block_counts = block_counts_in(workspace, blocks, n, mlp.d);
    dispatch_mlp("threshold_mlp", mlp, workspace, n, [&]<typename Rows, int kRows>() {
      launch("threshold_mlp", threshold_mlp_kernel<Rows, kRows>, blocks, kThreads, stream,
             ThresholdMlpParams<Rows>{mlp_params<Rows>(mlp, first, n, workspace), scale, epsilon,
                                      block_counts,
                                      plan == Plan::kGate && static_cast<bool>(mlp.gate)});
      auto reduce = mlp_reduce_params<typename Rows::T>(mlp, first, n, blocks, workspace);
      reduce.block_counts = block_counts;
      reduce.counts = counts + first;
      launch_reduce("threshold_mlp", reduce, stream);
    });
  }
}

}  // namespace moyu::cuda
