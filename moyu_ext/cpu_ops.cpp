// The operators on CPU tensors: checks, outputs, scratch, then the kernel of the same name.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <memory>
#include <tuple>
#include <vector>

#include "checks.h"

namespace moyu::op {
namespace {

// Scratch of the calling thread, kept between calls: a decode step makes no allocation.
float* scratch(size_t floats) {
  thread_local std::unique_ptr<float, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local size_t capacity = 0;
  const size_t bytes = (floats * sizeof(float) + 4095) / 4096 * 4096;
  if (bytes > capacity) {
    capacity = 0;  // until there is memory again: an allocation may fail, and later calls come
    memory.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
    if (!memory) throw std::bad_alloc();
    capacity = bytes;
  }
  return memory.get();
}

float* workspace(int64_t rows, int64_t d) { return scratch(cpu::workspace_floats(rows, d)); }

Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// On the host the set can be looked at, so that a wrong one raises instead of reading outside.
void check_set(const char* op, const Tensor& indices, const Tensor& count, int64_t f) {
  const int32_t n = *data_as<int32_t>(count);
  check_count(op, n, indices.numel());
  check_indices(op, data_as<int32_t>(indices), n, f);
}

std::tuple<Tensor, Tensor> threshold_compact_cpu(const Tensor& values, const Tensor& epsilon) {
  constexpr const char* op = "threshold_compact";
  if (values.dim() != 1 && values.dim() != 2)
    fail(op, "values must be [f] or [rows, f], got ", describe(values));
  const bool one = values.dim() == 1;
  const int64_t f = values.size(values.dim() - 1), rows = one ? 1 : values.size(0);
  if (one) {
    expect(op, "values", values, values, ScalarType::Float, {f});
  } else {
    expect(op, "values", values, values, ScalarType::Float, {rows, f});
  }
  if (epsilon.numel() != 1 || epsilon.scalar_type() != ScalarType::Float || !epsilon.is_cpu())
    fail(op, "epsilon must be one float32 on cpu, got ", describe(epsilon));
  Tensor indices =
      empty(values, one ? std::vector<int64_t>{f} : std::vector<int64_t>{rows, f}, ScalarType::Int);
  Tensor count = empty(values, {rows}, ScalarType::Int);
  cpu::threshold_compact(data_as<float>(values), rows, f, data_as<float>(epsilon),
                         static_cast<int32_t*>(indices.mutable_data_ptr()),
                         static_cast<int32_t*>(count.mutable_data_ptr()));
  return {indices, count};
}

Tensor gather_gemv_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& indices,
                       const OptionalTensor& count, const OptionalTensor& bias) {
  constexpr const char* op = "gather_gemv";
  const Gather g = gemv_of(op, x, weight, indices, count, bias);
  if (indices) check_set(op, *indices, *count, g.f);
  Tensor out = empty(x, g.shape, ScalarType::Float);
  cpu::gather_gemv(data(x), g.weight, data(bias), data_as<int32_t>(indices),
                   data_as<int32_t>(count), static_cast<float*>(out.mutable_data_ptr()), g.rows,
                   g.d, g.capacity, dtype_of(op, "x", x), workspace(g.rows, g.d));
  return out;
}

Tensor gather_gemv_t_cpu(const Tensor& values, const Tensor& weight_t,
                         const OptionalTensor& indices, const OptionalTensor& count,
                         const OptionalTensor& bias, std::optional<int64_t> columns) {
  constexpr const char* op = "gather_gemv_t";
  const Gather g = gemv_t_of(op, values, weight_t, indices, count, bias, columns);
  if (indices) check_set(op, *indices, *count, g.f);
  Tensor out = empty(values, g.shape, g.out_dtype);
  cpu::gather_gemv_t(data_as<float>(values), g.weight, data(bias), data_as<int32_t>(indices),
                     data_as<int32_t>(count), out.mutable_data_ptr(), g.rows, g.d, g.capacity,
                     dtype_of(op, "out", out), workspace(g.rows, g.d));
  return out;
}

void unpack_rows_cpu(const Tensor& packed, Tensor out) {
  constexpr const char* op = "unpack_rows";
  cpu::unpack_rows(unpacked_of(op, packed, out), out.size(0), out.size(1), dtype_of(op, "out", out),
                   out.mutable_data_ptr());
}

Tensor sparse_mlp_cpu(const Tensor& x, const OptionalTensor& gate, const Tensor& up,
                      const Tensor& down_t, const OptionalTensor& gate_bias,
                      const OptionalTensor& up_bias, const OptionalTensor& down_bias,
                      const OptionalTensor& indices, const OptionalTensor& count,
                      const OptionalTensor& mask, const std::string& activation) {
  constexpr const char* op = "sparse_mlp";
  Mlp mlp = mlp_of(op, x, gate, up, down_t, gate_bias, up_bias, down_bias, activation);
  const ActiveSet set = set_of(op, mlp, x, indices, count, mask);
  if (indices) check_set(op, *indices, *count, mlp.f);
  Tensor out = torch::stable::empty_like(x);
  mlp.out = out.mutable_data_ptr();
  cpu::sparse_mlp(mlp, set, workspace(mlp.rows, mlp.d));
  return out;
}

std::tuple<Tensor, Tensor> threshold_mlp_cpu(
    const Tensor& x, const OptionalTensor& gate, const Tensor& up, const Tensor& down_t,
    const OptionalTensor& gate_bias, const OptionalTensor& up_bias, const OptionalTensor& down_bias,
    const OptionalTensor& scale, const Tensor& epsilon, const std::string& activation,
    const std::string& plan) {
  constexpr const char* op = "threshold_mlp";
  Mlp mlp = mlp_of(op, x, gate, up, down_t, gate_bias, up_bias, down_bias, activation);
  expect(op, "scale", scale, x, ScalarType::Float, {mlp.f});
  if (epsilon.numel() != 1 || epsilon.scalar_type() != ScalarType::Float || !epsilon.is_cpu())
    fail(op, "epsilon must be one float32 on cpu, got ", describe(epsilon));
  Tensor out = torch::stable::empty_like(x);
  Tensor counts = empty(x, {mlp.rows}, ScalarType::Int);
  mlp.out = out.mutable_data_ptr();
  cpu::threshold_mlp(mlp, plan_of(op, plan), data_as<float>(scale), data_as<float>(epsilon),
                     static_cast<int32_t*>(counts.mutable_data_ptr()), workspace(mlp.rows, mlp.d));
  return {out, counts};
}

Tensor shadow_scores_cpu(const Tensor& x, const Tensor& shadow, const Tensor& norms,
                         const OptionalTensor& gate_bias, const OptionalTensor& up_bias, bool gated,
                         int64_t bits_gate, int64_t bits_up, const std::string& activation) {
  constexpr const char* op = "shadow_scores";
  const auto [mlp, checked] =
      scores_of(op, x, shadow, norms, gate_bias, up_bias, gated, bits_gate, bits_up, activation);
  Tensor scores = empty(x, {mlp.rows, mlp.f}, ScalarType::Float);
  cpu::shadow_scores(mlp, checked, static_cast<float*>(scores.mutable_data_ptr()),
                     scratch(cpu::shadow_workspace_floats(mlp.rows, mlp.d, mlp.f)));
  return scores;
}

std::tuple<Tensor, Tensor> shadow_mlp_cpu(
    const Tensor& x, const OptionalTensor& gate, const Tensor& up, const Tensor& down_t,
    const OptionalTensor& gate_bias, const OptionalTensor& up_bias, const OptionalTensor& down_bias,
    const Tensor& shadow, const Tensor& norms, const OptionalTensor& inverse,
    const OptionalTensor& errors, const OptionalTensor& epsilon, int64_t k, int64_t estimated,
    int64_t bits_gate, int64_t bits_up, const std::string& activation) {
  constexpr const char* op = "shadow_mlp";
  Mlp mlp = mlp_of(op, x, gate, up, down_t, gate_bias, up_bias, down_bias, activation);
  const Shadow checked = shadow_of(op, x, shadow, norms, mlp.f, mlp.d, gate.has_value(), bits_gate,
                                   bits_up, inverse, errors);
  if (epsilon &&
      (epsilon->numel() != 1 || epsilon->scalar_type() != ScalarType::Float || !epsilon->is_cpu()))
    fail(op, "epsilon must be one float32 on cpu, got ", describe(*epsilon));
  const Tiers tiers = tiers_of(op, checked, epsilon, k, estimated, mlp.f);
  Tensor out = torch::stable::empty_like(x);
  Tensor counts = empty(x, {2, mlp.rows}, ScalarType::Int);
  mlp.out = out.mutable_data_ptr();
  cpu::shadow_mlp(mlp, checked, tiers, static_cast<int32_t*>(counts.mutable_data_ptr()),
                  scratch(cpu::shadow_workspace_floats(mlp.rows, mlp.d, mlp.f)));
  return {out, counts};
}

}  // namespace
}  // namespace moyu::op

STABLE_TORCH_LIBRARY_IMPL(moyu_ext, CPU, m) {
  using namespace moyu::op;
  m.impl("threshold_compact", TORCH_BOX(&threshold_compact_cpu));
  m.impl("gather_gemv", TORCH_BOX(&gather_gemv_cpu));
  m.impl("gather_gemv_t", TORCH_BOX(&gather_gemv_t_cpu));
  m.impl("unpack_rows", TORCH_BOX(&unpack_rows_cpu));
  m.impl("sparse_mlp", TORCH_BOX(&sparse_mlp_cpu));
  m.impl("threshold_mlp", TORCH_BOX(&threshold_mlp_cpu));
  m.impl("shadow_scores", TORCH_BOX(&shadow_scores_cpu));
  m.impl("shadow_mlp", TORCH_BOX(&shadow_mlp_cpu));
}
