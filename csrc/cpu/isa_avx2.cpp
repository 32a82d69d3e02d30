#include "isa_prelude.h"

#if defined(__x86_64__)
namespace moyu::cpu {
static bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
}  // namespace moyu::cpu

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define MOYU_ISA avx2
#define MOYU_SIMD_AVX2 1
#include "isa_body.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
