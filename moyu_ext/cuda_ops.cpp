// The operators on CUDA tensors: checks, outputs and scratch from torch's allocator, torch's
// current stream, then the launcher of the same name. Nothing here waits for the GPU, so indices
// and count are not looked at: the kernels clamp them (moyu_cuda.h). MOYU_CHECK=1 in the environment
// makes every call wait and look, so that a wrong set raises as it does on the CPU.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <limits>
#include <tuple>
#include <vector>

#include "../csrc/cuda/nvtx.h"
#include "../csrc/moyu_cuda.h"
#include "checks.h"

namespace moyu::op {
namespace {

using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// Lives in libtorch_cuda, which a CPU build of torch does not have: linking it would keep the
// whole extension from loading there.
CurrentStream find_current_stream() {
  constexpr const char* name = "aoti_torch_get_current_cuda_stream";
  void* found = dlsym(RTLD_DEFAULT, name);
  if (found == nullptr) {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library != nullptr) found = dlsym(library, name);
  }
  return reinterpret_cast<CurrentStream>(found);
}

// Makes the tensor's device current for as long as it lives, and knows torch's stream there.
class Gpu {
 public:
  Gpu(const char* op, const char* name, const Tensor& like)
      : range_(op), guard_(index_of(op, name, like)) {
    static const CurrentStream current_stream = find_current_stream();
    if (current_stream == nullptr)
      fail(op, "torch ", MOYU_TORCH_BUILT_WITH,
           " at build time, but the running torch has no CUDA stream to offer; install a CUDA "
           "build of torch");
    if (current_stream(like.get_device_index(), &stream_) != 0)
      fail(op, "torch does not tell its current stream on cuda:", like.get_device_index());
  }
  void* stream() const { return stream_; }

 private:
  static int32_t index_of(const char* op, const char* name, const Tensor& like) {
    if (!like.is_cuda()) fail(op, name, " must be on a cuda device, got ", describe(like));
    return like.get_device_index();
  }
  cuda::NvtxRange range_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// From torch's caching allocator: no cudaMalloc after the first call, and safe in graph capture.
Tensor workspace(const Tensor& like, int64_t rows, int64_t d, int64_t f) {
  return empty(like, {static_cast<int64_t>(cuda::workspace_floats(rows, d, f))}, ScalarType::Float);
}

template <class T>
T* output(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Kernels count neurons in 32 bits, a tile beyond the last one too, and read row 0 in the place of an
// index that is out of range.
constexpr int64_t kMostNeurons = std::numeric_limits<int32_t>::max() - 65536;

void check_sizes(const char* op, int64_t f, int64_t d) {
  if (f < 1 || f > kMostNeurons || d < 1)
    fail(op, "weights must be [f, d] with f in [1, ", kMostNeurons, "] and d >= 1, got [", f, ", ",
         d, "]");
}

// The same for the positions of a list.
void check_length(const char* op, const char* name, int64_t length) {
  if (length > kMostNeurons)
    fail(op, name, " may hold at most ", kMostNeurons, " per row, got ", length);
}

// Only with MOYU_CHECK=1, and not in a graph's capture.
void check_set(const char* op, const Tensor& indices, const Tensor& count, int64_t f,
               void* stream) {
  static const bool wanted = [] {
    const char* value = std::getenv("MOYU_CHECK");
    return value != nullptr && value[0] == '1';
  }();
  int32_t n = 0;
  if (!wanted || !cuda::read_back(data_as<int32_t>(count), 1, &n, stream)) return;
  check_count(op, n, indices.numel());
  std::vector<int32_t> list(n);
  cuda::read_back(data_as<int32_t>(indices), n, list.data(), stream);
  check_indices(op, list.data(), n, f);
}

void check_epsilon(const char* op, const Tensor& epsilon, const Tensor& like) {
  if (epsilon.numel() != 1 || epsilon.scalar_type() != ScalarType::Float || !epsilon.is_cuda() ||
      epsilon.get_device_index() != like.get_device_index())
    fail(op, "epsilon must be one float32 on cuda:", like.get_device_index(), ", got ",
         describe(epsilon));
}

std::tuple<Tensor, Tensor> threshold_compact_cuda(const Tensor& values, const Tensor& epsilon) {
  constexpr const char* op = "threshold_compact";
  const Gpu gpu(op, "values", values);
  if ((values.dim() != 1 && values.dim() != 2) || values.scalar_type() != ScalarType::Float ||
      !values.is_contiguous())
    fail(op, "values must be contiguous float32 [f] or [rows, f], got ", describe(values));
  const bool one = values.dim() == 1;
  const int64_t f = values.size(values.dim() - 1), rows = one ? 1 : values.size(0);
  check_epsilon(op, epsilon, values);
  check_length(op, "values", f);
  Tensor indices =
      empty(values, one ? std::vector<int64_t>{f} : std::vector<int64_t>{rows, f}, ScalarType::Int);
  Tensor count = empty(values, {rows}, ScalarType::Int);
  cuda::threshold_compact(data_as<float>(values), rows, f, data_as<float>(epsilon),
                          output<int32_t>(indices), output<int32_t>(count), gpu.stream());
  return {indices, count};
}

Tensor gather_gemv_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& indices,
                        const OptionalTensor& count, const OptionalTensor& bias) {
  constexpr const char* op = "gather_gemv";
  const Gpu gpu(op, "x", x);
  const Gather g = gemv_of(op, x, weight, indices, count, bias);
  check_sizes(op, g.f, g.d);
  check_length(op, "indices", g.capacity);
  if (indices) check_set(op, *indices, *count, g.f, gpu.stream());
  Tensor out = empty(x, g.shape, ScalarType::Float);
  cuda::gather_gemv(data(x), g.weight, data(bias), data_as<int32_t>(indices),
                    data_as<int32_t>(count), output<float>(out), g.rows, g.d, g.f, g.capacity,
                    dtype_of(op, "x", x), gpu.stream());
  return out;
}

Tensor gather_gemv_t_cuda(const Tensor& values, const Tensor& weight_t,
                          const OptionalTensor& indices, const OptionalTensor& count,
                          const OptionalTensor& bias, std::optional<int64_t> columns) {
  constexpr const char* op = "gather_gemv_t";
  const Gpu gpu(op, "values", values);
  const Gather g = gemv_t_of(op, values, weight_t, indices, count, bias, columns);
  check_sizes(op, g.f, g.d);
  check_length(op, "indices", g.capacity);
  if (indices) check_set(op, *indices, *count, g.f, gpu.stream());
  Tensor out = empty(values, g.shape, g.out_dtype);
  Tensor scratch = workspace(values, g.rows, g.d, g.capacity);
  cuda::gather_gemv_t(data_as<float>(values), g.weight, data(bias), data_as<int32_t>(indices),
                      data_as<int32_t>(count), out.mutable_data_ptr(), g.rows, g.d, g.f, g.capacity,
                      dtype_of(op, "out", out), output<float>(scratch), gpu.stream());
  return out;
}

void unpack_rows_cuda(const Tensor& packed, Tensor out) {
  constexpr const char* op = "unpack_rows";
  const Gpu gpu(op, "packed", packed);
  cuda::unpack_rows(unpacked_of(op, packed, out), out.size(0), out.size(1),
                    dtype_of(op, "out", out), out.mutable_data_ptr(), gpu.stream());
}

Tensor sparse_mlp_cuda(const Tensor& x, const OptionalTensor& gate, const Tensor& up,
                       const Tensor& down_t, const OptionalTensor& gate_bias,
                       const OptionalTensor& up_bias, const OptionalTensor& down_bias,
                       const OptionalTensor& indices, const OptionalTensor& count,
                       const OptionalTensor& mask, const std::string& activation) {
  constexpr const char* op = "sparse_mlp";
  const Gpu gpu(op, "x", x);
  Mlp mlp = mlp_of(op, x, gate, up, down_t, gate_bias, up_bias, down_bias, activation);
  check_sizes(op, mlp.f, mlp.d);
  const ActiveSet set = set_of(op, mlp, x, indices, count, mask);
  if (indices) check_length(op, "indices", indices->numel());
  if (indices) check_set(op, *indices, *count, mlp.f, gpu.stream());
  Tensor out = torch::stable::empty_like(x);
  Tensor scratch = workspace(x, mlp.rows, mlp.d, mlp.f);
  mlp.out = out.mutable_data_ptr();
  cuda::sparse_mlp(mlp, set, indices ? indices->numel() : mlp.f, output<float>(scratch),
                   gpu.stream());
  return out;
}

std::tuple<Tensor, Tensor> threshold_mlp_cuda(
    const Tensor& x, const OptionalTensor& gate, const Tensor& up, const Tensor& down_t,
    const OptionalTensor& gate_bias, const OptionalTensor& up_bias, const OptionalTensor& down_bias,
    const OptionalTensor& scale, const Tensor& epsilon, const std::string& activation,
    const std::string& plan) {
  constexpr const char* op = "threshold_mlp";
  const Gpu gpu(op, "x", x);
  Mlp mlp = mlp_of(op, x, gate, up, down_t, gate_bias, up_bias, down_bias, activation);
  check_sizes(op, mlp.f, mlp.d);
  expect(op, "scale", scale, x, ScalarType::Float, {mlp.f});
  check_epsilon(op, epsilon, x);
  Tensor out = torch::stable::empty_like(x);
  Tensor counts = empty(x, {mlp.rows}, ScalarType::Int);
  Tensor scratch = workspace(x, mlp.rows, mlp.d, mlp.f);
  mlp.out = out.mutable_data_ptr();
  cuda::threshold_mlp(mlp, plan_of(op, plan), data_as<float>(scale), data_as<float>(epsilon),
                      output<int32_t>(counts), output<float>(scratch), gpu.stream());
  return {out, counts};
}

// Checks what the shadow operators share beyond the CPU's checks.
void check_shadow(const char* op, const Tensor& shadow, int64_t f, int64_t d) {
  check_sizes(op, f, d);
  if (reinterpret_cast<uintptr_t>(shadow.const_data_ptr()) % 16 != 0)
    fail(op, "shadow must start on a multiple of 16 bytes; pass a copy (shadow.clone())");
}

Tensor shadow_workspace(const Tensor& like, const Mlp& mlp) {
  const size_t floats = cuda::shadow_workspace_floats(mlp.rows, mlp.d, mlp.f);
  return empty(like, {static_cast<int64_t>(floats)}, ScalarType::Float);
}

Tensor shadow_scores_cuda(const Tensor& x, const Tensor& shadow, const Tensor& norms,
                          const OptionalTensor& gate_bias, const OptionalTensor& up_bias,
                          bool gated, int64_t bits_gate, int64_t bits_up,
                          const std::string& activation) {
  constexpr const char* op = "shadow_scores";
  const Gpu gpu(op, "x", x);
  const auto [mlp, checked] =
      scores_of(op, x, shadow, norms, gate_bias, up_bias, gated, bits_gate, bits_up, activation);
  check_shadow(op, shadow, mlp.f, mlp.d);
  Tensor scores = empty(x, {mlp.rows, mlp.f}, ScalarType::Float);
  Tensor scratch = shadow_workspace(x, mlp);
  cuda::shadow_scores(mlp, checked, output<float>(scores), output<float>(scratch), gpu.stream());
  return scores;
}

std::tuple<Tensor, Tensor> shadow_mlp_cuda(
    const Tensor& x, const OptionalTensor& gate, const Tensor& up, const Tensor& down_t,
    const OptionalTensor& gate_bias, const OptionalTensor& up_bias, const OptionalTensor& down_bias,
    const Tensor& shadow, const Tensor& norms, const OptionalTensor& inverse,
    const OptionalTensor& errors, const OptionalTensor& epsilon, int64_t k, int64_t estimated,
    int64_t bits_gate, int64_t bits_up, const std::string& activation) {
  constexpr const char* op = "shadow_mlp";
  const Gpu gpu(op, "x", x);
  Mlp mlp = mlp_of(op, x, gate, up, down_t, gate_bias, up_bias, down_bias, activation);
  const Shadow checked = shadow_of(op, x, shadow, norms, mlp.f, mlp.d, gate.has_value(), bits_gate,
                                   bits_up, inverse, errors);
  check_shadow(op, shadow, mlp.f, mlp.d);
  if (errors) fail(op, "errors: tiers by price run on the CPU alone so far");
  if (epsilon) check_epsilon(op, *epsilon, x);
  const Tiers tiers = tiers_of(op, checked, epsilon, k, estimated, mlp.f);
  Tensor out = torch::stable::empty_like(x);
  Tensor counts = empty(x, {2, mlp.rows}, ScalarType::Int);
  Tensor scratch = shadow_workspace(x, mlp);
  mlp.out = out.mutable_data_ptr();
  cuda::shadow_mlp(mlp, checked, tiers, output<int32_t>(counts), output<float>(scratch),
                   gpu.stream());
  return {out, counts};
}

}  // namespace
}  // namespace moyu::op

STABLE_TORCH_LIBRARY_IMPL(moyu_ext, CUDA, m) {
  using namespace moyu::op;
  m.impl("threshold_compact", TORCH_BOX(&threshold_compact_cuda));
  m.impl("gather_gemv", TORCH_BOX(&gather_gemv_cuda));
  m.impl("gather_gemv_t", TORCH_BOX(&gather_gemv_t_cuda));
  m.impl("unpack_rows", TORCH_BOX(&unpack_rows_cuda));
  m.impl("sparse_mlp", TORCH_BOX(&sparse_mlp_cuda));
  m.impl("threshold_mlp", TORCH_BOX(&threshold_mlp_cuda));
  m.impl("shadow_scores", TORCH_BOX(&shadow_scores_cuda));
  m.impl("shadow_mlp", TORCH_BOX(&shadow_mlp_cuda));
}
