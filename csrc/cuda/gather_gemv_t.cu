// Scaled sum of the listed neuron-major rows: each block sums an even share of the positions into
// a partial output of its own, and a second stage adds the partial outputs up.
#include "reduce.cuh"
#include "rows.cuh"

namespace moyu::cuda {

template <typename Rows>
struct GatherGemvTParams {
  const float* values;             // [rows, capacity]
  typename Rows::Matrix weight_t;  // [f, d]
  const int32_t* indices;          // [capacity], null: every row in order
  const int32_t* count;            // [1], null: capacity
  float* partial;                  // [blocks, rows, d]
  int64_t d, f, capacity;
  int rows;
};

template <typename Rows, int kRows>
struct GatherGemvTShared {
  float values[kTile][kRows];
  int32_t neurons[kTile];
  typename Rows::template Scratch<kRows> scratch;
};

template <typename Rows, int kRows>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    gather_gemv_t_kernel(GatherGemvTParams<Rows> p) {
  using Shared = GatherGemvTShared<Rows, kRows>;
  MOYU_SHARED(Shared, s);
  wait_for_previous_kernel();
  allow_next_kernel();
  const int count = clamped_count(p.count, p.capacity);
  const int begin = share_begin(count, blockIdx.x), end = share_begin(count, blockIdx.x + 1);
  float* const partial = p.partial + blockIdx.x * p.rows * p.d;
  int first = begin;
  do {  // once even for an empty share: the partial output is 0 then
    const int n = min(kTile, end - first);
    for (int slot = threadIdx.x; slot < n * kRows; slot += kThreads) {
      const int j = slot / kRows, r = slot % kRows;
      const int32_t neuron = p.indices ? p.indices[first + j] : first + j;
      const bool valid = neuron >= 0 && neuron < p.f;
      if (r == 0) s.neurons[j] = valid ? neuron : 0;
      s.values[j][r] = valid && r < p.rows ? p.values[r * p.capacity + first + j] : 0.0f;
    }
    __syncthreads();
    Rows::template scaled_sum<kRows>(p.weight_t, s.neurons, s.values, n, p.rows, p.d, first > begin,
                                     partial, s.scratch);
    __syncthreads();  // the next tile writes what this one reads
    first += kTile;
  } while (first < end);
}

void gather_gemv_t(const float* values, const Matrix& weight_t, const void* bias,
                   const int32_t* indices, const int32_t* count, void* out, int64_t rows, int64_t d,
                   int64_t f, int64_t capacity, DType dtype, float* workspace, void* stream) {
  const bool aligned = rows_aligned(dtype, d, weight_t.rows, workspace);
  const int64_t blocks = persistent_blocks("gather_gemv_t", capacity);
  for (int64_t first = 0; first < rows; first += kMaxRows) {
    const int64_t n = std::min(kMaxRows, rows - first);
    dispatch("gather_gemv_t", dtype, {&weight_t}, aligned, n, [&]<typename Rows, int kRows>() {
      using T = typename Rows::T;
      launch("gather_gemv_t", gather_gemv_t_kernel<Rows, kRows>, blocks, kThreads, stream,
             GatherGemvTParams<Rows>{values + first * capacity, Rows::matrix(weight_t, d), indices,
                                     count, workspace, d, f, capacity, static_cast<int>(n)});
      launch_reduce("gather_gemv_t",
                    ReduceParams<T>{workspace, nullptr, static_cast<const T*>(bias),
                                    static_cast<T*>(out) + first * d, nullptr, d,
                                    static_cast<int>(blocks), static_cast<int>(n)},
                    stream);
    });
  }
}

size_t workspace_floats(int64_t rows, int64_t d, int64_t f) {
  const int64_t blocks = persistent_blocks("workspace_floats", f);
  return blocks * (std::min(rows, kMaxRows) * d + kMaxRows);
}

}  // namespace moyu::cuda
