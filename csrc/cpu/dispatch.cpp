// Chooses the instruction set once, on first use: the best that this CPU runs, or the one that
// MOYU_FORCE_ISA names.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

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
  current()->compact(values, rows, f, epsilon, indices, count);
}

void gather_gemv(const void* x, const void* weight, const void* bias, const int32_t* indices,
                 const int32_t* count, float* out, int64_t rows, int64_t d, int64_t capacity,
                 DType dtype, float* workspace) {
  current()->gemv(x, weight, bias, indices, count, out, rows, d, capacity, dtype, workspace);
}

void gather_gemv_t(const float* values, const void* weight_t, const void* bias,
                   const int32_t* indices, const int32_t* count, void* out, int64_t rows, int64_t d,
                   int64_t capacity, DType dtype, float* workspace) {
  current()->gemv_t(values, weight_t, bias, indices, count, out, rows, d, capacity, dtype,
                    workspace);
}

void sparse_mlp(const Mlp& mlp, const ActiveSet& set, float* workspace) {
  current()->mlp(mlp, set, workspace);
}

void threshold_mlp(const Mlp& mlp, Plan plan, const float* scale, const float* epsilon,
                   int32_t* counts, float* workspace) {
  current()->mlp_threshold(mlp, plan, scale, epsilon, counts, workspace);
}

void shadow_scores(const Mlp& mlp, const Shadow& shadow, float* scores, float* workspace) {
  current()->scores(mlp, shadow, scores, workspace);
}

void shadow_mlp(const Mlp& mlp, const Shadow& shadow, const float* epsilon, int64_t k,
                int32_t* counts, float* workspace) {
  current()->mlp_shadow(mlp, shadow, epsilon, k, counts, workspace);
}

// Behind the MLP's own scratch: the quantised input (a byte an element, two floats a block), the
// scores and mask of a block of rows, and the indices.
size_t shadow_workspace_floats(int64_t rows, int64_t d, int64_t f) {
  const int64_t block = rows < kMaxRows ? rows : kMaxRows, blocks = shadow_blocks(d);
  return workspace_floats(rows, d) + 16 +
         static_cast<size_t>(block * blocks * (kShadowBlock / 4 + 2) + 2 * block * (f + 16) + f +
                             32);
}

size_t workspace_floats(int64_t rows, int64_t d) {
#ifdef _OPENMP
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  const int64_t block = rows < kMaxRows ? rows : kMaxRows;
  return static_cast<size_t>((kMaxRows + threads * block) * d);
}

const char* isa_name() { return current()->name; }

int isa_list(const char** names, int max) {
  int n = 0;
  for (const Kernels* k : kAll)
    if (k->runs_here() && n < max) names[n++] = k->name;
  return n;
}

void set_isa(const char* name) { chosen() = find(name); }

}  // namespace moyu::cpu
