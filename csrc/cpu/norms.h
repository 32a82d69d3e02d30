// RMS norms, and the residual they stand beside.

// 1 / sqrt(mean(x^2) + eps)
inline float rms_factor(const float* x, int64_t n, float eps) {
  Vec squares = zero();
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec v = load(x + j);
    squares = fma(v, v, squares);
  }
  float total = sum(squares);
  for (; j < n; ++j) total += x[j] * x[j];
  return 1.0f / std::sqrt(total / static_cast<float>(n) + eps);
}

// x = norm(x), in place.
inline void rms_norm(float* x, const RmsNorm& norm, int64_t n, DType dtype) {
  const float factor = rms_factor(x, n, norm.eps);
  with_type(dtype, [&](auto tag) {
    const auto* weight = static_cast<const typename decltype(tag)::type*>(norm.weight);
    const Vec scale = broadcast(factor), offset = broadcast(norm.offset);
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes)
      store(x + j, mul(mul(load(x + j), scale), add(load(weight + j), offset)));
    for (; j < n; ++j) x[j] = x[j] * factor * (to_float(weight[j]) + norm.offset);
  });
}

void norm_rows(const float* hidden, const RmsNorm& norm, int64_t rows, int64_t d, DType dtype,
               void* out) {
  constexpr int64_t kPart = 256;
  float part[kPart];
  with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* weight = static_cast<const T*>(norm.weight);
    for (int64_t r = 0; r < rows; ++r) {
      const float* x = hidden + r * d;
      const float factor = norm ? rms_factor(x, d, norm.eps) : 1.0f;
      for (int64_t begin = 0; begin < d; begin += kPart) {
        const int64_t n = std::min(kPart, d - begin);
        for (int64_t j = 0; j < n; ++j) {
          const float by = norm ? factor * (to_float(weight[begin + j]) + norm.offset) : 1.0f;
          part[j] = x[begin + j] * by;
        }
        from_floats(part, n, dtype, static_cast<T*>(out) + r * d + begin);
      }
    }
  });
}

void add_rows(const void* y, const RmsNorm& norm, float scale, int64_t rows, int64_t d, DType dtype,
              float* hidden) {
  with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* weight = static_cast<const T*>(norm.weight);
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = static_cast<const T*>(y) + r * d;
      float factor = scale;
      if (norm) {
        float squares = 0.0f;
        for (int64_t j = 0; j < d; ++j) squares += to_float(from[j]) * to_float(from[j]);
        factor *= 1.0f / std::sqrt(squares / static_cast<float>(d) + norm.eps);
      }
      for (int64_t j = 0; j < d; ++j) {
        const float by = norm ? factor * (to_float(weight[j]) + norm.offset) : factor;
        hidden[r * d + j] += to_float(from[j]) * by;
      }
    }
  });
}
