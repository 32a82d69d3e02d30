// The MLP over a set known in advance (the `given` plan): what is not in the set is not read.
#include "mlp.cuh"

namespace moyu::cuda {

template <typename T>
struct SparseMlpParams {
  MlpParams<T> mlp;
  ActiveSet set;
  int64_t capacity;  // entries that set.indices has room for
};

template <int kRows>
struct SparseMlpShared {
  union {  // one or the other, as the MLP is gated or not
    TileSums<2, kRows> pair;
    TileSums<1, kRows> single;
  } sums;
  float values[kTile][kRows];
  int32_t neurons[kTile];
  bool valid[kTile];
};

template <typename T, int kWidth, int kRows>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sparse_mlp_kernel(SparseMlpParams<T> params) {
  MOYU_SHARED(SparseMlpShared<kRows>, s);
  wait_for_previous_kernel();
  allow_next_kernel();
  const MlpParams<T>& p = params.mlp;
  const ActiveSet& set = params.set;
  const int count = clamped_count(set.count, params.capacity);
  const int begin = share_begin(count, blockIdx.x), end = share_begin(count, blockIdx.x + 1);
  float* const partial = p.partial + blockIdx.x * p.rows * p.d;
  int first = begin;
  do {  // once even for an empty share: the partial output is 0 then
    const int n = min(kTile, end - first);
    if (static_cast<int>(threadIdx.x) < n) {
      const int k = first + threadIdx.x;
      const int32_t neuron = set.indices == nullptr ? k : set.indices[k];
      s.valid[threadIdx.x] = neuron >= 0 && neuron < p.f;
      s.neurons[threadIdx.x] = s.valid[threadIdx.x] ? neuron : 0;
    }
    __syncthreads();
    if (p.gate != nullptr) {
      const T* const weights[2] = {p.gate, p.up};
      dot_products<2, T, kWidth, kRows>(weights, s.neurons, n, p.x, p.rows, p.d, s.sums.pair);
    } else {
      const T* const weights[1] = {p.up};
      dot_products<1, T, kWidth, kRows>(weights, s.neurons, n, p.x, p.rows, p.d, s.sums.single);
    }
    prefetch_rows(p.down_t, s.neurons, n, p.d);
    __syncthreads();
    for (int slot = threadIdx.x; slot < n * kRows; slot += kThreads) {
      const int j = slot / kRows, r = slot % kRows;
      const int64_t neuron = s.neurons[j];
      float a = 0.0f;
      if (r < p.rows && s.valid[j] && (set.mask == nullptr || set.mask[r * p.f + neuron] != 0))
        a = p.gate != nullptr
                ? gated_activation<T, kRows>(p, s.sums.pair, neuron, j, r)
                : single_activation<T, kRows>(p, p.up_bias, s.sums.single, neuron, j, r);
      s.values[j][r] = a;
    }
    __syncthreads();
    scaled_sum<T, kWidth, kRows>(p.down_t, s.neurons, s.values, n, p.rows, p.d, first > begin,
                                 partial);
    __syncthreads();  // the next tile writes what this one reads
    first += kTile;
  } while (first < end);
}

void sparse_mlp(const Mlp& mlp, const ActiveSet& set, int64_t capacity, float* workspace,
                void* stream) {
  const bool aligned = mlp_aligned(mlp, workspace);
  const int64_t blocks = persistent_blocks("sparse_mlp", mlp.f);
  for (int64_t first = 0; first < mlp.rows; first += kMaxRows) {
    const int64_t n = std::min(kMaxRows, mlp.rows - first);
    ActiveSet mine = set;
    if (set.mask != nullptr) mine.mask += first * mlp.f;
    dispatch(mlp.dtype, aligned, n, [&]<typename T, int kWidth, int kRows>() {
      launch("sparse_mlp", sparse_mlp_kernel<T, kWidth, kRows>, blocks, kThreads, stream,
             SparseMlpParams<T>{mlp_params<T>(mlp, first, n, workspace), mine,
                                set.indices == nullptr ? mlp.f : capacity});
      launch_reduce("sparse_mlp", mlp_reduce_params<T>(mlp, first, n, blocks, workspace), stream);
    });
  }
}

}  // namespace moyu::cuda
