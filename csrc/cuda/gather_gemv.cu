// Dot products of the listed weight rows (or all) with the input rows, on a persistent grid: each
// block takes an even share of the positions below the device-side count.
#include "rows.cuh"

namespace moyu::cuda {

template <typename Rows>
struct GatherGemvParams {
  using T = typename Rows::T;
  const T* x;                    // [rows, d]
  typename Rows::Matrix weight;  // [f, d]
  const T* bias;                 // [f] or null
  const int32_t* indices;        // [capacity], null: every row in order
  const int32_t* count;          // [1], null: capacity
  float* out;                    // [rows, capacity]
  int64_t d, f, capacity;
  int rows;
};

template <int kRows>
struct GatherGemvShared {
  TileSums<1, kRows> sums;
  int32_t neurons[kTile];
  bool valid[kTile];
};

template <typename Rows, int kRows>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    gather_gemv_kernel(GatherGemvParams<Rows> p) {
  MOYU_SHARED(GatherGemvShared<kRows>, s);
  if (p.indices == nullptr)
    prefetch_share(Rows::rows_of(p.weight), Rows::row_bytes(p.weight, p.d),
                   share_begin(p.capacity, blockIdx.x), share_begin(p.capacity, blockIdx.x + 1),
                   kPrefetchBytes);
  wait_for_previous_kernel();
  allow_next_kernel();
  const int count = clamped_count(p.count, p.capacity);
  const int end = share_begin(count, blockIdx.x + 1);
  const typename Rows::Matrix weights[1] = {p.weight};
  for (int first = share_begin(count, blockIdx.x); first < end; first += kTile) {
    const int n = min(kTile, end - first);
    if (static_cast<int>(threadIdx.x) < n) {
      const int32_t at = first + static_cast<int32_t>(threadIdx.x);
      const int32_t neuron = p.indices ? p.indices[at] : at;
      s.valid[threadIdx.x] = neuron >= 0 && neuron < p.f;
      s.neurons[threadIdx.x] = s.valid[threadIdx.x] ? neuron : 0;
    }
    __syncthreads();
    Rows::template dot_products<1, kRows>(weights, s.neurons, n, p.x, p.rows, p.d, s.sums);
    __syncthreads();
    for (int slot = threadIdx.x; slot < n * p.rows; slot += kThreads) {
      const int j = slot % n, r = slot / n;
      const float v = dot_total<1, kRows>(s.sums, j, 0, r) + bias_at(p.bias, s.neurons[j]);
      p.out[r * p.capacity + first + j] = s.valid[j] ? v : 0.0f;
    }
    __syncthreads();  // the next tile writes what this one reads
  }
  for (int r = 0; r < p.rows; ++r)
    for (int64_t k = count + int64_t{blockIdx.x} * kThreads + threadIdx.x; k < p.capacity;
         k += int64_t{gridDim.x} * kThreads)
      p.out[r * p.capacity + k] = 0.0f;
}

void gather_gemv(const void* x, const Matrix& weight, const void* bias, const int32_t* indices,
                 const int32_t* count, float* out, int64_t rows, int64_t d, int64_t f,
                 int64_t capacity, DType dtype, void* stream) {
  if (capacity == 0) return;
  const bool aligned = rows_aligned(dtype, d, x, weight.rows);
  const int64_t blocks = persistent_blocks("gather_gemv", capacity);
  for (int64_t first = 0; first < rows; first += kMaxRows) {
    const int64_t n = std::min(kMaxRows, rows - first);
    dispatch("gather_gemv", dtype, {&weight}, aligned, n, [&]<typename Rows, int kRows>() {
      using T = typename Rows::T;
      launch("gather_gemv", gather_gemv_kernel<Rows, kRows>, blocks, kThreads, stream,
             GatherGemvParams<Rows>{static_cast<const T*>(x) + first * d, Rows::matrix(weight, d),
                                    static_cast<const T*>(bias), indices, count,
                                    out + first * capacity, d, f, capacity, static_cast<int>(n)});
    });
  }
}

}  // namespace moyu::cuda
