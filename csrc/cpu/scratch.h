// The scratch of a call, carved in one place: from null it tells the size.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../moyu.h"

namespace moyu::cpu {

class Scratch {
 public:
  // For rows of hidden size d; with a shadow also for the scores of its f neurons.
  Scratch(float* base, int64_t rows, int64_t d, int64_t f = 0) : next_(base) {
#ifdef _OPENMP
    const int64_t threads = omp_get_max_threads();
#else
    const int64_t threads = 1;
#endif
    const int64_t block = rows < kMaxRows ? rows : kMaxRows;
    // Widened to float32, or in words with six floats for each of a multiple of 8 blocks.
    const int64_t packed = packed_blocks(d) + 8;
    input = take<float>(
        block * (packed * (kPackedBlock / 2 + 6) > d ? packed * (kPackedBlock / 2 + 6) : d));
    accumulators = take<float>(threads * block * d);
    if (f == 0) return;
    shadow_input = take<float>(block * shadow_blocks(d) * (kShadowBlock / 4 + 2));
    scores = take<float>(block * f);
    mask = take<uint8_t>(block * f);
    orders = take<uint32_t>(f);
    indices = take<int32_t>(f);
  }

  size_t floats() const { return used_; }

  float* input;
  float* accumulators;  // [threads, rows, d]
  float* shadow_input = nullptr;
  float* scores = nullptr;
  uint8_t* mask = nullptr;
  uint32_t* orders = nullptr;
  int32_t* indices = nullptr;

 private:
  // n elements, from a cache line's beginning if the base is one.
  template <class T>
  T* take(int64_t n) {
    const size_t floats = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 16;
    used_ += floats;
    if (!next_) return nullptr;
    T* const here = reinterpret_cast<T*>(next_);
    next_ += floats;
    return here;
  }

  float* next_;
  size_t used_ = 0;
};

}  // namespace moyu::cpu
