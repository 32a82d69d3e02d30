// Everything that an isa_*.cpp needs from outside, included before its target pragma: inline
// functions of the standard library must not be compiled for an instruction set that the
// machine may lack, since the linker keeps one copy of each for the whole program.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <initializer_list>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"
#include "scratch.h"

#define MOYU_INLINE inline __attribute__((always_inline))
#define MOYU_NOINLINE __attribute__((noinline))
#define MOYU_LAMBDA_INLINE __attribute__((always_inline))
