// What each instruction set provides, and how the dispatcher finds it. Internal to csrc/cpu.
#pragma once

#include "../moyu.h"

namespace moyu::cpu {

struct Kernels {
  const char* name;
  bool (*runs_here)();
  decltype(&threshold_compact) compact;
  decltype(&gather_gemv) gemv;
  decltype(&gather_gemv_t) gemv_t;
  decltype(&sparse_mlp) mlp;
  decltype(&threshold_mlp) mlp_threshold;
  decltype(&shadow_scores) scores;
  decltype(&shadow_mlp) mlp_shadow;
};

// Each is defined in isa_<name>.cpp where the compiler targets that architecture.
extern const Kernels scalar_kernels, avx2_kernels, avx512_kernels, avx512_vnni_kernels,
    avx512_bf16_kernels, neon_kernels;

}  // namespace moyu::cpu
