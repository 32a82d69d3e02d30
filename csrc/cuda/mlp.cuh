// What the fused MLPs share. One launch does everything up to the output sum: a block takes an
// even share of the neurons through gate, up, activation and down, so that between the
// projections there is a barrier of a block, not of the grid; reduce.cuh does the rest.
#pragma once

#include "reduce.cuh"
#include "rows.cuh"

namespace moyu::cuda {

template <typename Rows>
struct MlpParams {
  using T = typename Rows::T;
  using Matrix = typename Rows::Matrix;
  const T* x;          // [rows, d]
  Matrix gate;         // [f, d] or none
  Matrix up;           // [f, d]
  Matrix down_t;       // [f, d]
  const T* gate_bias;  // [f] or null
  const T* up_bias;    // [f] or null
  float* partial;      // [blocks, rows, d]
  int64_t d, f;
  int rows;
  Activation activation;
};

template <typename Rows>
MlpParams<Rows> mlp_params(const Mlp& mlp, int64_t first, int64_t rows, float* workspace) {
  using T = typename Rows::T;
  return {static_cast<const T*>(mlp.x) + first * mlp.d,
          Rows::matrix(mlp.gate, mlp.d),
          Rows::matrix(mlp.up, mlp.d),
          Rows::matrix(mlp.down_t, mlp.d),
          static_cast<const T*>(mlp.gate_bias),
          static_cast<const T*>(mlp.up_bias),
          workspace,
          mlp.d,
          mlp.f,
          static_cast<int>(rows),
          mlp.activation};
}

// Calls f<Rows, kRows>() for an MLP.
template <typename F>
void dispatch_mlp(const char* op, const Mlp& mlp, const float* workspace, int64_t rows, F&& f) {
  const bool aligned =
      rows_aligned(mlp.dtype, mlp.d, mlp.x, mlp.gate.rows, mlp.up.rows, mlp.down_t.rows, workspace);
  dispatch(op, mlp.dtype, {&mlp.gate, &mlp.up, &mlp.down_t}, aligned, rows, f);
}

// act(gate . x) * (up . x) of a gated MLP's slot (j, r).
template <typename Rows, int kRows>
__device__ __forceinline__ float gated_activation(const MlpParams<Rows>& p,
                                                  const TileSums<2, kRows>& sums, int64_t neuron,
                                                  int j, int r) {
  const float g = dot_total<2, kRows>(sums, j, 0, r) + bias_at(p.gate_bias, neuron);
  const float u = dot_total<2, kRows>(sums, j, 1, r) + bias_at(p.up_bias, neuron);
  return activate(p.activation, g) * u;
}

// act(weight . x) of a slot: the gate alone, or an ungated MLP's only projection.
template <typename Rows, int kRows>
__device__ __forceinline__ float single_activation(const MlpParams<Rows>& p,
                                                   const typename Rows::T* bias,
                                                   const TileSums<1, kRows>& sums, int64_t neuron,
                                                   int j, int r) {
  return activate(p.activation, dot_total<1, kRows>(sums, j, 0, r) + bias_at(bias, neuron));
}

template <typename T>
ReduceParams<T> mlp_reduce_params(const Mlp& mlp, int64_t first, int64_t rows, int64_t blocks,
                                  const float* workspace) {
  return {workspace,
          nullptr,
          static_cast<const T*>(mlp.down_bias),
          static_cast<T*>(mlp.out) + first * mlp.d,
          nullptr,
          mlp.d,
          static_cast<int>(blocks),
          static_cast<int>(rows)};
}

}  // namespace moyu::cuda
