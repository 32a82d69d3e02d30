// The scratch of a call, carved in one place: from null it tells the size.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../moyu.h"

namespace moyu::cpu {

// Parts of one piece of memory, one behind the other.
class Carver {
 public:
  explicit Carver(float* base) : next_(base) {}
  size_t floats() const { return used_; }

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

 private:
  float* next_;
  size_t used_ = 0;
};

inline int64_t threads_at_most() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Floats of one input row: widened to float32, or in words with six floats for each of a multiple
// of 8 blocks.
inline int64_t input_floats(int64_t d) {
  const int64_t packed = (packed_blocks(d) + 8) * (kPackedBlock / 2 + 6);
  return packed > d ? packed : d;
}

class Scratch : public Carver {
 public:
  // For rows of hidden size d; with a shadow also for the scores and tiers of its f neurons.
  Scratch(float* base, int64_t rows, int64_t d, int64_t f = 0) : Carver(base) {
    const int64_t block = rows < kMaxRows ? rows : kMaxRows;
    input = take<float>(block * input_floats(d));
    accumulators = take<float>(threads_at_most() * block * d);
    if (f == 0) return;
    shadow_input = take<float>(block * shadow_blocks(d) * (kShadowBlock / 4 + 2));
    scores = take<float>(block * f);
    mask = take<uint8_t>(block * f);
    orders = take<uint32_t>(f);
    indices = take<int32_t>(f);
    estimated = take<int32_t>(f);
  }

  float* input;
  float* accumulators;  // [threads, rows, d]
  float* shadow_input = nullptr;
  float* scores = nullptr;
  uint8_t* mask = nullptr;
  uint32_t* orders = nullptr;
  int32_t *indices = nullptr, *estimated = nullptr;
};

// What `attend` keeps between its phases, for rows and their heads.
struct AttendScratch : Carver {
  AttendScratch(float* base, const Attention& a, int64_t rows) : Carver(base) {
    const int64_t queries = a.heads * a.head_dim, keys = a.kv_heads * a.head_dim;
    const int64_t width = queries > a.d ? queries : a.d;
    x = take<float>(rows * width);
    plain = take<float>(rows * width);
    packed = take<float>(rows * input_floats(width));
    q = take<float>(rows * queries);
    k = take<float>(rows * keys);
    v = take<float>(rows * keys);
    partial = take<float>(threads_at_most() * rows * a.heads * (a.head_dim + 2));
    out = take<float>(rows * a.d);
  }

  float* x;       // T [rows, d], then [rows, heads * head_dim]: what is multiplied
  float* plain;   // the same as plain rows want it
  float* packed;  // the same as packed rows want it
  float *q, *k, *v;
  float* partial;  // [threads, rows, heads, head_dim + 2]: sums, their weight, its exponent
  float* out;      // [rows, d]
};

}  // namespace moyu::cpu
