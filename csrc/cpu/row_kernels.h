// The two inner loops that plain rows are read with: the dot product of a weight row with a few
// input rows, and the scaled sum of a few weight rows. Both stream weights at memory speed.

template <class T>
using InputOf = typename Input<T>::type;

// Elements of T in a cache line, the step of both loops.
template <class T>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));

// Into the second-level cache: on a Xeon of 2023 this reads 4-6 % faster than into the first,
// whose sets the rows of three matrices at one column share.
MOYU_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// acc += w . x over one cache line of w.
template <class T>
MOYU_INLINE void dot_line(const T* w, const InputOf<T>* x, Vec* acc) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLine<T>; i += kLanes) *acc = fma(load(w + i), load(x + i), *acc);
}
#if defined(MOYU_SIMD_BF16_DOT)
template <>
MOYU_INLINE void dot_line<Bf16>(const Bf16* w, const Bf16* x, Vec* acc) {
  *acc = _mm512_dpbf16_ps(*acc, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_loadu_si512(w));
}
#endif

// out[r] = w . x[r] for R rows. While a line of w is used, the same line of `ahead` and `ahead2`
// (rows needed soon) is fetched, since the hardware prefetcher cannot guess gathered rows.
template <int R, class T>
MOYU_INLINE void dot_rows(const T* w, const InputOf<T>* x, int64_t d, const T* ahead,
                          const T* ahead2, float* out) {
  constexpr int kUnroll = R == 1 ? 4 : R == 2 ? 2 : 1;  // hides the latency of fma
  constexpr int64_t kStep = kUnroll * kLine<T>;
  Vec acc[R][kUnroll];
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < kUnroll; ++u) acc[r][u] = zero();
  int64_t j = 0;
  for (; j + kStep <= d; j += kStep) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = j + u * kLine<T>;
      prefetch(ahead + at);
      if (ahead2) prefetch(ahead2 + at);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) dot_line<T>(w + at, x + r * d + at, &acc[r][u]);
    }
  }
  for (int r = 0; r < R; ++r) {
    Vec total = acc[r][0];
    for (int u = 1; u < kUnroll; ++u) total = add(total, acc[r][u]);
    out[r] = sum(total);
  }
  for (; j < d; ++j)
    for (int r = 0; r < R; ++r) out[r] += to_float(w[j]) * to_float(x[r * d + j]);
}

// The same for any number of rows; behind the first block w comes from the cache.
template <class T>
MOYU_NOINLINE void plain_dot(const T* w, const InputOf<T>* x, int64_t rows, int64_t d,
                             const T* ahead, const T* ahead2, float* out) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) dot_rows<4>(w, x + r * d, d, ahead, ahead2, out + r);
  if (r + 2 <= rows) {
    dot_rows<2>(w, x + r * d, d, ahead, ahead2, out + r);
    r += 2;
  }
  if (r < rows) dot_rows<1>(w, x + r * d, d, ahead, ahead2, out + r);
}

// Neurons summed in one pass over the accumulators, to spare their loads and stores.
constexpr int kGroup = 8;

// acc += sum over n < N of scale[n] * w[n]; with kFetch the same lines of ahead[n] are fetched.
template <int N, bool kFetch, class T>
MOYU_NOINLINE void axpy_rows(const T* const* w, const float* scale, int64_t d,
                             const T* const* ahead, float* acc) {
  Vec s[N];
  for (int n = 0; n < N; ++n) s[n] = broadcast(scale[n]);
  int64_t j = 0;
  for (; j + kLine<T> <= d; j += kLine<T>) {
#pragma GCC unroll 16
    for (int64_t i = j; i < j + kLine<T>; i += kLanes) {
      Vec v = load(acc + i);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) v = fma(s[n], load(w[n] + i), v);
      store(acc + i, v);
    }
    if constexpr (kFetch)
      for (int n = 0; n < N; ++n) prefetch(ahead[n] + j);
  }
  for (; j < d; ++j)
    for (int n = 0; n < N; ++n) acc[j] += scale[n] * to_float(w[n][j]);
}

// acc[r] += sum over k < count of values[k * rows + r] * weight_t[neuron(k)]. kFetch: the rows
// are not in the cache yet, so each group fetches the next one's.
template <bool kFetch, class T, class Neuron>
inline void plain_accumulate(const T* weight_t, Neuron neuron, int64_t count, const float* values,
                             int64_t rows, int64_t d, float* acc) {
  int64_t k = 0;
  for (; k + kGroup <= count; k += kGroup) {
    const T *group[kGroup], *ahead[kGroup];
    for (int n = 0; n < kGroup; ++n) {
      group[n] = weight_t + neuron(k + n) * d;
      ahead[n] = weight_t + neuron(std::min(k + n + kGroup, count - 1)) * d;
    }
    for (int64_t r = 0; r < rows; ++r) {
      float scale[kGroup];
      for (int n = 0; n < kGroup; ++n) scale[n] = values[(k + n) * rows + r];
      if (kFetch && r == 0) {
        axpy_rows<kGroup, true>(group, scale, d, ahead, acc);
      } else {
        axpy_rows<kGroup, false>(group, scale, d, ahead, acc + r * d);
      }
    }
  }
  for (; k < count; ++k) {
    const T* row = weight_t + neuron(k) * d;
    for (int64_t r = 0; r < rows; ++r)
      axpy_rows<1, false>(&row, values + k * rows + r, d, &row, acc + r * d);
  }
}

// Element i of an array of dtype, of which kernels read few: biases, inputs once.
MOYU_INLINE float element(DType dtype, const void* p, int64_t i) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(p)[i];
    case DType::kFloat16: return to_float(static_cast<const Half*>(p)[i]);
    case DType::kBFloat16: return to_float(static_cast<const Bf16*>(p)[i]);
  }
  return 0.0f;
}

MOYU_INLINE float bias_at(DType dtype, const void* bias, int64_t i) {
  return bias ? element(dtype, bias, i) : 0.0f;
}

template <class T>
struct Tag {
  using type = T;
};
template <int n>
struct Number {
  static constexpr int value = n;
};

// Calls body with the Tag of the element type that dtype names.
template <class Body>
MOYU_INLINE void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32: return body(Tag<float>{});
    case DType::kFloat16: return body(Tag<Half>{});
    case DType::kBFloat16: return body(Tag<Bf16>{});
  }
}

// out[j] = element first + j, for j < n.
inline void to_floats(DType dtype, const void* p, int64_t first, int64_t n, float* out) {
  with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* from = static_cast<const T*>(p) + first;
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) store(out + j, load(from + j));
    for (; j < n; ++j) out[j] = to_float(from[j]);
  });
}

// out[j] = p[j] rounded to dtype, for j < n.
inline void from_floats(const float* p, int64_t n, DType dtype, void* out) {
  with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t j = 0; j < n; ++j) from_float(p[j], static_cast<T*>(out) + j);
  });
}

inline const void* at(DType dtype, const void* p, int64_t i) {
  return static_cast<const char*>(p) + i * (dtype == DType::kFloat32 ? 4 : 2);
}
inline void* at(DType dtype, void* p, int64_t i) {
  return static_cast<char*>(p) + i * (dtype == DType::kFloat32 ? 4 : 2);
}

// out[r] = sum of the threads' accumulators + bias, for columns [begin, end); every thread calls
// it with its own columns once all accumulators are complete.
inline void reduce(const float* acc, int parts, int64_t rows, int64_t d, Range columns, DType dtype,
                   const void* bias, void* out) {
  with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = columns.begin; j < columns.end; ++j) {
        float total = 0.0f;
        for (int p = 0; p < parts; ++p) total += acc[(p * rows + r) * d + j];
        if (bias) total += to_float(static_cast<const T*>(bias)[j]);
        from_float(total, static_cast<T*>(out) + r * d + j);
      }
  });
}

inline float activate(Activation kind, float h) {
  switch (kind) {
    case Activation::kSilu: return h / (1.0f + std::exp(-h));
    // Not 1 + erf and 1 + tanh, which cancel where h is far below zero.
    case Activation::kGelu: return 0.5f * h * std::erfc(h * -0.70710678118654752f);
    case Activation::kGeluTanh:
      return h / (1.0f + std::exp(-1.59576912160573073f * (h + 0.044715f * h * h * h)));
    // Written so that a NaN passes through, as it does in torch.
    case Activation::kRelu: return h < 0.0f ? 0.0f : h;
    case Activation::kRelu2: return h < 0.0f ? 0.0f : h * h;
  }
  return h;
}
