// Rows of plain numbers as a kind of rows, see packed_rows.h for the other.

// Rows of T.
template <class T>
struct PlainRows {
  struct Input {
    const InputOf<T>* x;
    int64_t rows;
  };
  const T* base;
  int64_t d;

  PlainRows(const Matrix& m, int64_t d) : base(static_cast<const T*>(m.rows)), d(d) {}

  // The input rows themselves, or widened to float32 in scratch.
  static Input input(DType dtype, const void* x, int64_t rows, int64_t d, float* scratch) {
    if constexpr (sizeof(InputOf<T>) == sizeof(T)) {
      return {static_cast<const InputOf<T>*>(x), rows};
    } else {
      to_floats(dtype, x, 0, rows * d, scratch);
      return {scratch, rows};
    }
  }

  explicit operator bool() const { return base != nullptr; }
  int64_t bytes() const { return d * int64_t(sizeof(T)); }
  const char* row(int64_t i) const { return reinterpret_cast<const char*>(base + i * d); }

  // out[r] = row i . x[r], fetching row `soon` and what lies from `also` on, as long as a row.
  MOYU_INLINE void dot(int64_t i, const Input& x, int64_t soon, const char* also,
                       float* out) const {
    plain_dot(base + i * d, x.x, x.rows, d, base + soon * d, reinterpret_cast<const T*>(also), out);
  }

  // acc[r] += sum over k < count of values[k * rows + r] * row neuron(k). kFetch: the rows are not
  // in the cache yet.
  template <bool kFetch, class Neuron>
  MOYU_INLINE void accumulate(Neuron neuron, int64_t count, const float* values, int64_t rows,
                              float* acc) const {
    plain_accumulate<kFetch>(base, neuron, count, values, rows, d, acc);
  }
};
