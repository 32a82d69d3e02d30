// What each instruction set provides, and how the dispatcher finds it. Internal to csrc/cpu.
#pragma once

#include "../moyu.h"

namespace moyu::cpu {

struct Kernels {
  const char* name;
  bool (*runs_here)();
  decltype(&cpu::threshold_compact) threshold_compact;
  decltype(&cpu::gather_gemv) gather_gemv;
  decltype(&cpu::gather_gemv_t) gather_gemv_t;
  decltype(&cpu::unpack_rows) unpack_rows;
  decltype(&cpu::sparse_mlp) sparse_mlp;
  decltype(&cpu::threshold_mlp) threshold_mlp;
  decltype(&cpu::shadow_scores) shadow_scores;
  decltype(&cpu::shadow_mlp) shadow_mlp;
  decltype(&cpu::attend) attend;
  decltype(&cpu::norm_rows) norm_rows;
  decltype(&cpu::add_rows) add_rows;
};

// Each is defined in isa_<name>.cpp where the compiler targets that architecture.
extern const Kernels scalar_kernels, avx2_kernels, avx512_kernels, avx512_vnni_kernels,
    avx512_bf16_kernels, neon_kernels;

}  // namespace moyu::cpu
