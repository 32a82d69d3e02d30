// The kinds of rows, and which one a call takes.
#pragma once

#include "packed_rows.cuh"
#include "plain_rows.cuh"

namespace moyu::cuda {

// Calls f<Rows, kRows>() with the kind of rows that a matrix has and the rows of x (rounded up) that
// one pass serves. aligned: whether plain rows may be read 16 bytes at a time.
template <typename F>
void dispatch(const char* op, DType dtype, std::initializer_list<const Matrix*> matrices,
              bool aligned, int64_t rows, F&& f) {
  bool packed = false;
  for (const Matrix* m : matrices) {
    if (!*m || m->bits == 0) continue;
    packed = true;
    if (m->bits != 4 && m->bits != 8)
      throw std::runtime_error(std::string("moyu_ext: ") + op + ": packed rows of " +
                               std::to_string(m->bits) +
                               " bits run on the CPU only; on cuda they have 4 or 8");
  }
  const auto typed = [&]<typename T>() {
    if (packed) {
      rows == 1 ? f.template operator()<PackedRows<T>, 1>()
                : f.template operator()<PackedRows<T>, 8>();
    } else if (aligned) {
      constexpr int kWidth = 16 / sizeof(T);
      if (rows == 1) return f.template operator()<PlainRows<T, kWidth>, 1>();
      if (rows == 2) return f.template operator()<PlainRows<T, kWidth>, 2>();
      if (rows <= 4) return f.template operator()<PlainRows<T, kWidth>, 4>();
      f.template operator()<PlainRows<T, kWidth>, 8>();
    } else {  // ugly sizes are rare: fewer kernels to build
      rows == 1 ? f.template operator()<PlainRows<T, 1>, 1>()
                : f.template operator()<PlainRows<T, 1>, 8>();
    }
  };
  switch (dtype) {
    case DType::kFloat32: return typed.template operator()<float>();
    case DType::kFloat16: return typed.template operator()<__half>();
    case DType::kBFloat16: return typed.template operator()<__nv_bfloat16>();
  }
}

}  // namespace moyu::cuda
