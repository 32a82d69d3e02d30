#include "isa_prelude.h"

namespace moyu::cpu {
static bool runs_here() { return true; }
}  // namespace moyu::cpu

#define MOYU_ISA scalar
#define MOYU_SIMD_SCALAR 1
#include "isa_body.h"
