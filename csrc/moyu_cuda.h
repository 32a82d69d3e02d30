// The CUDA half of the kernel API; meaning, shapes and types are those of moyu.h's namespace cpu.
// Every pointer is device memory of the current device. Work is queued on `stream` (a
// cudaStream_t) and nothing waits for it; nothing is allocated, and the grid follows from the
// sizes alone, so that a CUDA graph replays with another count, other indices or another epsilon.
// The host cannot see what the device holds without waiting: a count outside [0, capacity] is
// clamped, and an index outside [0, f) is a neuron that gives 0. Packed rows may have 4 or 8 bits.
// Errors: std::runtime_error with the operator's name and what CUDA said.
#pragma once

#include "moyu.h"

namespace moyu::cuda {

void threshold_compact(const float* values, int64_t rows, int64_t f, const float* epsilon,
                       int32_t* indices /* [rows, f] */, int32_t* count /* [rows] */, void* stream);

void gather_gemv(const void* x /* T [rows, d] */, const Matrix& weight /* [f, d] */,
                 const void* bias /* T [f] or null */,
                 const int32_t* indices /* [capacity] or null */,
                 const int32_t* count /* [1] or null */, float* out /* [rows, capacity] */,
                 int64_t rows, int64_t d, int64_t f, int64_t capacity, DType dtype, void* stream);

void gather_gemv_t(const float* values /* [rows, capacity] */, const Matrix& weight_t /* [f, d] */,
                   const void* bias /* T [d] or null */,
                   const int32_t* indices /* [capacity] or null */,
                   const int32_t* count /* [1] or null */, void* out /* T [rows, d] */,
                   int64_t rows, int64_t d, int64_t f, int64_t capacity, DType dtype,
                   float* workspace, void* stream);

void unpack_rows(const Matrix& packed /* [n, d], of any bits */, int64_t n, int64_t d, DType dtype,
                 void* out /* T [n, d] */, void* stream);

void sparse_mlp(const Mlp& mlp, const ActiveSet& set, int64_t capacity /* of set.indices */,
                float* workspace, void* stream);

void threshold_mlp(const Mlp& mlp, Plan plan, const float* scale /* [f] or null: 1 */,
                   const float* epsilon /* [1] */, int32_t* counts /* [rows] */, float* workspace,
                   void* stream);

// shadow.records must start on 16 bytes. Both need shadow_workspace_floats of scratch.
void shadow_scores(const Mlp& mlp, const Shadow& shadow, float* scores /* [rows, f] */,
                   float* workspace, void* stream);

void shadow_mlp(const Mlp& mlp, const Shadow& shadow, const Tiers& tiers,
                int32_t* counts /* [2, rows] */, float* workspace, void* stream);

// Copies n words to the host and waits for that; false, with nothing done, while the stream is being
// captured in a graph. Only for checks that are asked for: no operator needs it.
bool read_back(const int32_t* from, int64_t n, int32_t* to, void* stream);

// Floats of scratch that the calls above need for these sizes on the current device. Two calls
// may share one workspace only if they are on one stream.
size_t workspace_floats(int64_t rows, int64_t d, int64_t f);
size_t shadow_workspace_floats(int64_t rows, int64_t d, int64_t f);

}  // namespace moyu::cuda
