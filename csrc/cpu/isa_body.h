// The one CPU source, compiled once per instruction set into the namespace MOYU_ISA.
// No include guard on purpose: each isa_*.cpp includes it once, behind its target pragma.
namespace moyu::cpu::MOYU_ISA {
namespace {
// In this order: each is written in the terms of those before it.
// clang-format off
#include "simd.h"
#include "parallel.h"
#include "threshold_compact.h"
#include "row_kernels.h"
#include "plain_rows.h"
#if defined(MOYU_SIMD_AVX512) || defined(MOYU_SIMD_AVX2)
#define MOYU_SIMD_PACKED 1
#include "packed_simd.h"
#include "packed_x86.h"
#else
#include "packed_plain.h"
#endif
#include "packed_rows.h"
#include "gather_gemv.h"
#include "gather_gemv_t.h"
#include "unpack_rows.h"
#include "sparse_mlp.h"
#include "threshold_mlp.h"
#include "shadow_simd.h"
#include "shadow_scores.h"
#include "choose.h"
#include "shadow_mlp.h"
#include "norms.h"
#include "attend.h"
// clang-format on
}  // namespace
}  // namespace moyu::cpu::MOYU_ISA

namespace moyu::cpu {
#define MOYU_CONCAT_(a, b) a##b
#define MOYU_CONCAT(a, b) MOYU_CONCAT_(a, b)
#define MOYU_STRING_(a) #a
#define MOYU_STRING(a) MOYU_STRING_(a)
extern const Kernels MOYU_CONCAT(MOYU_ISA, _kernels) = {MOYU_STRING(MOYU_ISA),
                                                        &runs_here,
                                                        &MOYU_ISA::threshold_compact,
                                                        &MOYU_ISA::gather_gemv,
                                                        &MOYU_ISA::gather_gemv_t,
                                                        &MOYU_ISA::unpack_rows,
                                                        &MOYU_ISA::sparse_mlp,
                                                        &MOYU_ISA::threshold_mlp,
                                                        &MOYU_ISA::shadow_scores,
                                                        &MOYU_ISA::shadow_mlp,
                                                        &MOYU_ISA::attend,
                                                        &MOYU_ISA::norm_rows,
                                                        &MOYU_ISA::add_rows};
}  // namespace moyu::cpu
