// Compare and compact, order kept: one launch, one block per row, one read of the values.
#include "compact.cuh"

namespace moyu::cuda {
namespace {

struct CompactParams {
  const float* values;   // [rows, f]
  const float* epsilon;  // [1]
  int32_t* indices;      // [rows, f]
  int32_t* count;        // [rows]
  int64_t f;
};

__global__ void __launch_bounds__(kCompactThreads) threshold_compact_kernel(CompactParams p) {
  MOYU_SHARED(CompactShared, s);
  wait_for_previous_kernel();
  allow_next_kernel();
  const float* const values = p.values + blockIdx.x * p.f;
  int32_t* const indices = p.indices + blockIdx.x * p.f;
  const float epsilon = *p.epsilon;
  const auto active = [&](int64_t i, int) { return !(values[i] < epsilon); };
  const int64_t found = compact(s, p.f, active, indices);
  for (int64_t i = found + threadIdx.x; i < p.f; i += kCompactThreads) indices[i] = 0;
  if (threadIdx.x == 0) p.count[blockIdx.x] = static_cast<int32_t>(found);
}

}  // namespace

void threshold_compact(const float* values, int64_t rows, int64_t f, const float* epsilon,
                       int32_t* indices, int32_t* count, void* stream) {
  if (rows == 0) return;
  launch("threshold_compact", threshold_compact_kernel, rows, kCompactThreads, stream,
         CompactParams{values, epsilon, indices, count, f});
}

}  // namespace moyu::cuda
