// Chooses the instruction set once, on first use: the best that this CPU runs, or the one that
// MOYU_FORCE_ISA names.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "scratch.h"

namespace moyu::cpu {
namespace {

// Best first.
const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &avx512_bf16_kernels, &avx512_vnni_kernels, &avx512_kernels, &avx2_kernels,
#elif defined(__aarch64__)
    &neon_kernels,
#endif
    &scalar_kernels};

const Kernels* find(const std::string& name) {
  std::string known;
  for (const Kernels* k : kAll) {
    if (name == k->name && k->runs_here()) return k;
    if (k->runs_here()) known += std::string(known.empty() ? "" : ", ") + k->name;
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is not one that this build has and this CPU runs; choose from " +
                              known);
}

const Kernels* choose() {
  if (const char* forced = std::getenv("MOYU_FORCE_ISA"); forced && *forced) {
    try {
      return find(forced);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("MOYU_FORCE_ISA: ") + error.what());
    }
  }
  for (const Kernels* k : kAll)
    if (k->runs_here()) return k;
  return &scalar_kernels;
}

// Atomic, since set_isa may be called while another thread runs an operator.
std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels = choose();
  return kernels;
}

const Kernels* current() { return chosen().load(std::memory_order_relaxed); }

}  // namespace

void threshold_compact(const float* values, int64_t rows, int64_t f, const float* epsilon,
                       int32_t* indices, int32_t* count) {
  current()->threshold_compact(values, rows, f, epsilon, indices, count);
}

void gather_gemv(const void* x, const Matrix& weight, const void* bias, const int32_t* indices,
                 const int32_t* count, float* out, int64_t rows, int64_t d, int64_t capacity,
                 DType dtype, float* workspace) {
  current()->gather_gemv(x, weight, bias, indices, count, out, rows, d, capacity, dtype, workspace);
}

void gather_gemv_t(const float* values, const Matrix& weight_t, const void* bias,
                   const int32_t* indices, const int32_t* count, void* out, int64_t rows, int64_t d,
                   int64_t capacity, DType dtype, float* workspace) {
  current()->gather_gemv_t(values, weight_t, bias, indices, count, out, rows, d, capacity, dtype,
                           workspace);
}

void unpack_rows(const Matrix& packed, int64_t n, int64_t d, DType dtype, void* out) {
  current()->unpack_rows(packed, n, d, dtype, out);
}

void sparse_mlp(const Mlp& mlp, const ActiveSet& set, float* workspace) {
  current()->sparse_mlp(mlp, set, workspace);
}

void threshold_mlp(const Mlp& mlp, Plan plan, const float* scale, const float* epsilon,
                   int32_t* counts, float* workspace) {
  current()->threshold_mlp(mlp, plan, scale, epsilon, counts, workspace);
}

void shadow_scores(const Mlp& mlp, const Shadow& shadow, float* scores, float* workspace) {
  current()->shadow_scores(mlp, shadow, scores, workspace);
}

void shadow_mlp(const Mlp& mlp, const Shadow& shadow, const Tiers& tiers, int32_t* counts,
                float* workspace) {
  current()->shadow_mlp(mlp, shadow, tiers, counts, workspace);
}

void attend(const Attention& attention, const StepRows& step, const KeyValues& cache, float* hidden,
            float* workspace) {
  current()->attend(attention, step, cache, hidden, workspace);
}

void norm_rows(const float* hidden, const RmsNorm& norm, int64_t rows, int64_t d, DType dtype,
               void* out) {
  current()->norm_rows(hidden, norm, rows, d, dtype, out);
}

void add_rows(const void* y, const RmsNorm& norm, float scale, int64_t rows, int64_t d, DType dtype,
              float* hidden) {
  current()->add_rows(y, norm, scale, rows, d, dtype, hidden);
}

size_t attend_workspace_floats(const Attention& attention, int64_t rows) {
  return AttendScratch(nullptr, attention, rows).floats();
}

size_t shadow_workspace_floats(int64_t rows, int64_t d, int64_t f) {
  return Scratch(nullptr, rows, d, f).floats();
}

size_t workspace_floats(int64_t rows, int64_t d) { return Scratch(nullptr, rows, d).floats(); }

const char* isa_name() { return current()->name; }

int isa_list(const char** names, int max) {
  int n = 0;
  for (const Kernels* k : kAll)
    if (k->runs_here() && n < max) names[n++] = k->name;
  return n;
}

void set_isa(const char* name) { chosen() = find(name); }

}  // namespace moyu::cpu
