// Kinds of rows: how a matrix lies in memory, in which form it wants the input, and the two loops
// over its rows. Every operator is written once over a kind. PlainRows<T> is one, rows of codes
// the other.
struct PackedRows {
  using Input = PackedInput;
  const uint8_t* base;
  int64_t d, stride;
  int32_t bits, group;

  PackedRows(const Matrix& m, int64_t d)
      : base(static_cast<const uint8_t*>(m.rows)), d(d),
        stride(m.rows ? packed_row_bytes(d, m.bits, m.group) : 0), bits(m.bits), group(m.group) {}

  static Input input(DType dtype, const void* x, int64_t rows, int64_t d, float* scratch) {
    return pack_input(dtype, x, rows, d, scratch);
  }

  explicit operator bool() const { return base != nullptr; }
  int64_t bytes() const { return stride; }
  const char* row(int64_t i) const { return reinterpret_cast<const char*>(base + i * stride); }

  MOYU_INLINE void dot(int64_t i, const Input& x, [[maybe_unused]] int64_t soon,
                       [[maybe_unused]] const char* also, float* out) const {
#if defined(MOYU_SIMD_PACKED)
    packed_dot(base + i * stride, bits, group, x, row(soon), also, out);
#else
    packed_dot(base + i * stride, bits, group, x, d, out);
#endif
  }

  template <bool kFetch, class Neuron>
  inline void accumulate(Neuron neuron, int64_t count, const float* values, int64_t rows,
                         float* acc) const {
    for (int64_t k = 0; k < count; k += kGroup) {
      const uint8_t* group_rows[kGroup];
      const char* ahead[kGroup];
      float padded[kGroup * kMaxRows];
      const float* own = values + k * rows;
      const int64_t n = std::min<int64_t>(kGroup, count - k);
      if (n < kGroup) {  // the last row again, times zero
        std::fill(padded, padded + kGroup * rows, 0.0f);
        std::copy(own, own + n * rows, padded);
        own = padded;
      }
      for (int64_t j = 0; j < kGroup; ++j) {
        group_rows[j] = base + neuron(k + std::min(j, n - 1)) * stride;
        ahead[j] = row(neuron(std::min(k + j + kGroup, count - 1)));
      }
#if defined(MOYU_SIMD_PACKED)
      packed_axpy(group_rows, bits, group, own, rows, d, kFetch ? ahead : nullptr, acc);
#else
      static_cast<void>(ahead);
      packed_axpy(group_rows, bits, group, own, rows, d, acc);
#endif
    }
  }
};

// Calls body with the Tag of the kind of rows that a matrix has.
template <class Body>
MOYU_INLINE void with_rows(const Matrix& matrix, DType dtype, Body body) {
  if (matrix.bits) return body(Tag<PackedRows>{});
  with_type(dtype, [&](auto tag) { body(Tag<PlainRows<typename decltype(tag)::type>>{}); });
}
