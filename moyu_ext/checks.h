// What every operator checks on the host before a kernel trusts it. Messages say which operator,
// which argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../csrc/moyu.h"

namespace moyu::op {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string describe(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << "] " << torch::headeronly::toString(t.scalar_type()) << " on "
      << (t.is_cpu()    ? "cpu"
          : t.is_cuda() ? "cuda"
                        : "another device");
  if (t.is_cuda()) out << ":" << t.get_device_index();
  if (!t.is_contiguous()) out << ", not contiguous";
  return out.str();
}

// Throws unless t has the shape (a negative extent matches any), the dtype, is contiguous and
// lies on like's device.
inline void expect(const char* op, const char* name, const Tensor& t, const Tensor& like,
                   ScalarType dtype, std::initializer_list<int64_t> shape) {
  bool good = t.scalar_type() == dtype && t.is_contiguous() && t.is_cpu() == like.is_cpu() &&
              t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index() &&
              t.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (int64_t extent : shape) {
    good = good && (extent < 0 || t.size(axis) == extent);
    ++axis;
  }
  if (good) return;
  std::ostringstream want;
  want << "[";
  axis = 0;
  for (int64_t extent : shape) {
    want << (axis++ ? ", " : "");
    if (extent < 0) {
      want << "any";
    } else {
      want << extent;
    }
  }
  want << "] " << torch::headeronly::toString(dtype) << " on " << (like.is_cpu() ? "cpu" : "cuda");
  if (like.is_cuda()) want << ":" << like.get_device_index();
  fail(op, name, " must be a contiguous ", want.str(), ", got ", describe(t));
}

inline void expect(const char* op, const char* name, const OptionalTensor& t, const Tensor& like,
                   ScalarType dtype, std::initializer_list<int64_t> shape) {
  if (t) expect(op, name, *t, like, dtype, shape);
}

inline const void* data(const Tensor& t) { return t.const_data_ptr(); }
inline const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
template <class T>
const T* data_as(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* data_as(const OptionalTensor& t) {
  return static_cast<const T*>(data(t));
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: fail(op, name, " must be float32, float16 or bfloat16, got ", describe(t));
  }
}

inline Activation activation_of(const char* op, const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu2") return Activation::kRelu2;
  fail(op, "activation must be silu, gelu, gelu_tanh, relu or relu2, got '", name, "'");
}

inline Plan plan_of(const char* op, const std::string& name) {
  if (name == "gate") return Plan::kGate;
  if (name == "product") return Plan::kProduct;
  fail(op, "plan must be gate or product, got '", name, "'");
}

// The rows of x, whose last axis must have d elements, at least one.
inline int64_t rows_of(const char* op, const Tensor& x, int64_t d) {
  if (x.dim() < 1 || x.size(x.dim() - 1) != d || !x.is_contiguous())
    fail(op, "x must be contiguous [..., ", d, "], got ", describe(x));
  if (d < 1) fail(op, "the last axis of x and of the weights must not be empty, got ", describe(x));
  return x.numel() / d;
}

inline void check_together(const char* op, const OptionalTensor& indices,
                           const OptionalTensor& count) {
  if (indices.has_value() != count.has_value())
    fail(op, "indices and count are given together or not at all");
}

// Checks a set that the host can look at: n of `capacity` indices into f neurons.
inline void check_count(const char* op, int32_t n, int64_t capacity) {
  if (n < 0 || n > capacity)
    fail(op, "count must lie in [0, ", capacity, "], the capacity of indices, got ", n);
}
inline void check_indices(const char* op, const int32_t* indices, int32_t n, int64_t f) {
  uint32_t largest = 0;  // a negative index is a large unsigned one
  for (int32_t k = 0; k < n; ++k) largest = std::max(largest, static_cast<uint32_t>(indices[k]));
  if (n > 0 && largest >= static_cast<uint64_t>(f))
    fail(op, "indices must lie in [0, ", f, "), got ", static_cast<int32_t>(largest));
}

inline bool is_packed(const Tensor& t) { return t.scalar_type() == ScalarType::Byte; }
inline bool is_packed(const OptionalTensor& t) { return t && is_packed(*t); }

// A matrix [n, d] on like's device: of dtype, or packed rows, whose length tells their format.
inline Matrix matrix_of(const char* op, const char* name, const Tensor& t, const Tensor& like,
                        ScalarType dtype, int64_t n, int64_t d) {
  if (!is_packed(t)) {
    expect(op, name, t, like, dtype, {n, d});
    return {data(t)};
  }
  expect(op, name, t, like, ScalarType::Byte, {n, -1});
  for (const int32_t bits : {3, 4, 5, 6, 8})
    for (const int32_t group : {32, 64})
      if (packed_row_bytes(d, bits, group) == t.size(1)) return {data(t), bits, group};
  fail(op, name, " has rows of ", t.size(1), " bytes, which packed rows of ", d,
       " columns have in no format (3, 4, 5, 6 or 8 bits in groups of 32 or 64)");
}

// The gather operators' sizes. shape: of the output.
struct Gather {
  Matrix weight;  // [f, d]
  int64_t rows = 1, d = 0, f = 0, capacity = 0;
  std::vector<int64_t> shape;
  ScalarType out_dtype = ScalarType::Float;
};

inline void check_list(const char* op, const OptionalTensor& indices, const OptionalTensor& count,
                       const Tensor& like) {
  expect(op, "indices", indices, like, ScalarType::Int, {-1});
  expect(op, "count", count, like, ScalarType::Int, {1});
  check_together(op, indices, count);
}

// Checks the arguments of gather_gemv.
inline Gather gemv_of(const char* op, const Tensor& x, const Tensor& weight,
                      const OptionalTensor& indices, const OptionalTensor& count,
                      const OptionalTensor& bias) {
  Gather g;
  dtype_of(op, "x", x);
  if (weight.dim() != 2) fail(op, "weight must be [f, d], got ", describe(weight));
  g.f = weight.size(0);
  g.d = is_packed(weight) && x.dim() ? x.size(x.dim() - 1) : weight.size(1);
  g.weight = matrix_of(op, "weight", weight, x, x.scalar_type(), g.f, g.d);
  g.rows = rows_of(op, x, g.d);
  expect(op, "bias", bias, x, x.scalar_type(), {g.f});
  check_list(op, indices, count, x);
  g.capacity = indices ? indices->numel() : g.f;
  g.shape.assign(x.sizes().begin(), x.sizes().end());
  g.shape.back() = g.capacity;
  return g;
}

// Checks the arguments of gather_gemv_t.
inline Gather gemv_t_of(const char* op, const Tensor& values, const Tensor& weight_t,
                        const OptionalTensor& indices, const OptionalTensor& count,
                        const OptionalTensor& bias, std::optional<int64_t> columns) {
  Gather g;
  if (weight_t.dim() != 2) fail(op, "weight_t must be [f, d], got ", describe(weight_t));
  if (is_packed(weight_t) && !columns)
    fail(op, "columns must say how many columns the packed rows of weight_t have");
  if (!is_packed(weight_t)) g.out_dtype = weight_t.scalar_type();
  if (is_packed(weight_t) && bias) g.out_dtype = bias->scalar_type();
  g.f = weight_t.size(0);
  g.d = columns ? *columns : weight_t.size(1);
  if (g.d < 1) fail(op, "columns must be at least 1, got ", g.d);
  g.weight = matrix_of(op, "weight_t", weight_t, values, g.out_dtype, g.f, g.d);
  expect(op, "bias", bias, values, g.out_dtype, {g.d});
  check_list(op, indices, count, values);
  g.capacity = indices ? indices->numel() : g.f;
  if (values.scalar_type() != ScalarType::Float || !values.is_contiguous() || values.dim() < 1 ||
      values.size(values.dim() - 1) != g.capacity)
    fail(op, "values must be contiguous float32 [..., ", g.capacity, "], got ", describe(values));
  g.shape.assign(values.sizes().begin(), values.sizes().end());
  g.shape.back() = g.d;
  for (size_t i = 0; i + 1 < g.shape.size(); ++i) g.rows *= g.shape[i];
  return g;
}

// Checks the arguments of unpack_rows.
inline Matrix unpacked_of(const char* op, const Tensor& packed, const Tensor& out) {
  dtype_of(op, "out", out);
  if (out.dim() != 2) fail(op, "out must be [n, d], got ", describe(out));
  if (!is_packed(packed)) fail(op, "packed must hold packed rows (uint8), got ", describe(packed));
  expect(op, "out", out, packed, out.scalar_type(), {out.size(0), out.size(1)});
  return matrix_of(op, "packed", packed, out, out.scalar_type(), out.size(0), out.size(1));
}

// Checks everything that the MLP operators share; the output is still to be set.
inline Mlp mlp_of(const char* op, const Tensor& x, const OptionalTensor& gate, const Tensor& up,
                  const Tensor& down_t, const OptionalTensor& gate_bias,
                  const OptionalTensor& up_bias, const OptionalTensor& down_bias,
                  const std::string& activation) {
  Mlp mlp;
  const bool packed = is_packed(up);
  mlp.dtype = packed ? dtype_of(op, "x", x) : dtype_of(op, "up", up);
  if (up.dim() != 2) fail(op, "up must be [f, d], got ", describe(up));
  mlp.f = up.size(0);
  mlp.d = packed ? (x.dim() ? x.size(x.dim() - 1) : 0) : up.size(1);
  if (is_packed(down_t) != packed || (gate && is_packed(gate) != packed))
    fail(op, "gate, up and down_t must all be packed rows, or none of them");
  const ScalarType dtype = packed ? x.scalar_type() : up.scalar_type();
  mlp.up = matrix_of(op, "up", up, x, dtype, mlp.f, mlp.d);
  if (gate) mlp.gate = matrix_of(op, "gate", *gate, x, dtype, mlp.f, mlp.d);
  mlp.down_t = matrix_of(op, "down_t", down_t, x, dtype, mlp.f, mlp.d);
  expect(op, "gate_bias", gate_bias, x, dtype, {mlp.f});
  expect(op, "up_bias", up_bias, x, dtype, {mlp.f});
  expect(op, "down_bias", down_bias, x, dtype, {mlp.d});
  if (gate_bias && !gate) fail(op, "gate_bias is given without a gate");
  mlp.rows = rows_of(op, x, mlp.d);
  if (x.scalar_type() != dtype)
    fail(op, "x must have the weights' dtype ", torch::headeronly::toString(dtype), ", got ",
         describe(x));
  mlp.x = data(x);
  mlp.gate_bias = data(gate_bias);
  mlp.up_bias = data(up_bias);
  mlp.down_bias = data(down_bias);
  mlp.activation = activation_of(op, activation);
  return mlp;
}

// The set of sparse_mlp; the host has not looked into it yet.
inline ActiveSet set_of(const char* op, const Mlp& mlp, const Tensor& x,
                        const OptionalTensor& indices, const OptionalTensor& count,
                        const OptionalTensor& mask) {
  check_list(op, indices, count, x);
  expect(op, "mask", mask, x, ScalarType::Byte, {mlp.rows, mlp.f});
  return {data_as<int32_t>(indices), data_as<int32_t>(count), data_as<uint8_t>(mask)};
}

// Checks the shadow of an MLP of f neurons with hidden size d.
inline Shadow shadow_of(const char* op, const Tensor& x, const Tensor& shadow, const Tensor& norms,
                        int64_t f, int64_t d, bool gated, int64_t bits_gate, int64_t bits_up,
                        const OptionalTensor& inverse = {}, const OptionalTensor& errors = {}) {
  if (bits_up < 1 || bits_up > 4) fail(op, "bits_up must be 1, 2, 3 or 4, got ", bits_up);
  if (gated ? bits_gate < 1 || bits_gate > 4 : bits_gate != 0)
    fail(op,
         gated ? "bits_gate must be 1, 2, 3 or 4, got "
               : "bits_gate must be 0 for an ungated MLP, got ",
         bits_gate);
  Shadow out;
  out.bits_gate = static_cast<int32_t>(bits_gate);
  out.bits_up = static_cast<int32_t>(bits_up);
  expect(op, "shadow", shadow, x, ScalarType::Byte,
         {f, shadow_record_bytes(d, out.bits_gate, out.bits_up)});
  expect(op, "norms", norms, x, ScalarType::Float, {f});
  out.records = data_as<uint8_t>(shadow);
  out.norms = data_as<float>(norms);
  expect(op, "inverse", inverse, x, ScalarType::Float, {f});
  out.inverse = data_as<float>(inverse);
  expect(op, "errors", errors, x, ScalarType::Float, {2, f});
  if (errors) {
    out.gate_error = data_as<float>(errors);
    out.up_error = out.gate_error + f;
  }
  return out;
}

// Checks how a shadow's scores choose; epsilon itself is checked by the device's own code.
inline Tiers tiers_of(const char* op, const Shadow& shadow, const OptionalTensor& epsilon,
                      int64_t exact, int64_t estimated, int64_t f) {
  if (!epsilon && (exact < 0 || exact > f))
    fail(op, "k must lie in [0, ", f, "] where no epsilon is given, got ", exact);
  if (estimated < 0 || (epsilon ? estimated > 0 : estimated > f - exact))
    fail(op, "estimated must lie in [0, ", epsilon ? 0 : f - exact,
         epsilon ? "] where epsilon is given, got " : "], the neurons that k leaves, got ",
         estimated);
  if (shadow.up_error && !epsilon) fail(op, "epsilon, the price, must be given with errors");
  if ((estimated > 0 || shadow.up_error) && !shadow.inverse)
    fail(op, "inverse must be given where neurons are estimated");
  return {data_as<float>(epsilon), exact, estimated};
}

// Checks the arguments of shadow_scores: x, the biases and the sizes of the MLP, and the shadow.
inline std::pair<Mlp, Shadow> scores_of(const char* op, const Tensor& x, const Tensor& shadow,
                                        const Tensor& norms, const OptionalTensor& gate_bias,
                                        const OptionalTensor& up_bias, bool gated,
                                        int64_t bits_gate, int64_t bits_up,
                                        const std::string& activation) {
  Mlp mlp;
  mlp.dtype = dtype_of(op, "x", x);
  mlp.f = norms.numel();
  mlp.d = x.dim() ? x.size(x.dim() - 1) : 0;
  mlp.rows = rows_of(op, x, mlp.d);
  const Shadow checked = shadow_of(op, x, shadow, norms, mlp.f, mlp.d, gated, bits_gate, bits_up);
  expect(op, "gate_bias", gate_bias, x, x.scalar_type(), {mlp.f});
  expect(op, "up_bias", up_bias, x, x.scalar_type(), {mlp.f});
  mlp.x = data(x);
  mlp.gate_bias = data(gate_bias);
  mlp.up_bias = data(up_bias);
  mlp.activation = activation_of(op, activation);
  return {mlp, checked};
}

}  // namespace moyu::op
