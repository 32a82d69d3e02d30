#include "isa_prelude.h"

#if defined(__aarch64__)
namespace moyu::cpu {
static bool runs_here() { return true; }  // part of the AArch64 baseline
}  // namespace moyu::cpu

#define MOYU_ISA neon
#define MOYU_SIMD_NEON 1
#include "isa_body.h"
#endif
