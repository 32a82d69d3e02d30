#include "isa_prelude.h"

#if defined(__x86_64__)
namespace moyu::cpu {
static bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("f16c");
}
}  // namespace moyu::cpu

#ifdef __clang__
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx2,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx2,f16c")
#endif
#define MOYU_ISA avx512
#define MOYU_SIMD_AVX512 1
#include "isa_body.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
