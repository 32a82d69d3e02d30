// One layer's attention at decode, from the hidden states to the hidden states, in one team:
// norm | q, k, v | their norms, rotation, the cache | attention | o | norm, residual.

// The rows that are multiplied, in the forms that the matrices of a phase want.
template <class T>
struct Operand {
  typename PlainRows<T>::Input plain{};
  PackedRows::Input packed{};

  void set(const AttendScratch& s, std::initializer_list<const Linear*> layers, int64_t rows,
           int64_t width, DType dtype) {
    bool any_plain = false, any_packed = false;
    for (const Linear* layer : layers) (layer->weight.bits ? any_packed : any_plain) = true;
    if (any_plain) plain = PlainRows<T>::input(dtype, s.x, rows, width, s.plain);
    if (any_packed) packed = PackedRows::input(dtype, s.x, rows, width, s.packed);
  }
};

// This thread's part of out[r, i] = W_i . x[r] + bias_i, for n rows of W.
template <class T>
void multiply_part(const Linear& layer, int64_t n, int64_t width, const Operand<T>& x, int64_t rows,
                   DType dtype, float* out) {
  const Range mine = split(n, thread_id(), team_size());
  const auto dots = [&](const auto& weight, const auto& input) {
    float dot[kMaxRows];
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      weight.dot(i, input, std::min(i + 2, mine.end - 1), nullptr, dot);
      for (int64_t r = 0; r < rows; ++r) out[r * n + i] = dot[r] + bias_at(dtype, layer.bias, i);
    }
  };
  if (layer.weight.bits) {
    dots(PackedRows(layer.weight, width), x.packed);
  } else {
    dots(PlainRows<T>(layer.weight, width), x.plain);
  }
}

// Rotates the first n elements of a head: halves (a, b) become a cos - b sin, b cos + a sin.
inline void rotate(float* head, const float* cos, const float* sin, int64_t n) {
  const int64_t half = n / 2;
  for (int64_t j = 0; j < half; ++j) {
    const float a = head[j], b = head[j + half];
    head[j] = a * cos[j] - b * sin[j];
    head[j + half] = b * cos[j + half] + a * sin[j + half];
  }
}

// out[r * stride + k] = keys[k] . q[r] for K neighbouring keys and R queries.
template <int R, int K, class T>
MOYU_INLINE void dot_keys(const T* keys, const InputOf<T>* q, int64_t d, int64_t stride,
                          float* out) {
  Vec acc[K][R];
  for (int k = 0; k < K; ++k)
    for (int r = 0; r < R; ++r) acc[k][r] = zero();
  int64_t j = 0;
  for (; j + kLine<T> <= d; j += kLine<T>)
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) dot_line<T>(keys + k * d + j, q + r * d + j, &acc[k][r]);
  for (int k = 0; k < K; ++k)
    for (int r = 0; r < R; ++r) {
      float total = sum(acc[k][r]);
      for (int64_t i = j; i < d; ++i) total += to_float(keys[k * d + i]) * to_float(q[r * d + i]);
      out[r * stride + k] = total;
    }
}

constexpr int64_t kChunk = 64;      // keys whose scores are held at a time
constexpr int64_t kMaxQueries = 8;  // of one key head, at a time

// scores[g, k] of n <= kChunk keys for the queries of one key head.
template <class T>
MOYU_NOINLINE void score_keys(const T* keys, int64_t n, const InputOf<T>* q, int64_t queries,
                              int64_t d, float* scores) {
  int64_t g = 0;
  for (; g + 4 <= queries; g += 4)
    for (int64_t k = 0; k < n; ++k)
      dot_keys<4, 1>(keys + k * d, q + g * d, d, kChunk, scores + g * kChunk + k);
  for (; g < queries; ++g) {
    int64_t k = 0;
    for (; k + 4 <= n; k += 4)
      dot_keys<1, 4>(keys + k * d, q + g * d, d, kChunk, scores + g * kChunk + k);
    for (; k < n; ++k) dot_keys<1, 1>(keys + k * d, q + g * d, d, kChunk, scores + g * kChunk + k);
  }
}

// x[k] = exp(x[k] - most) for n <= kChunk; returns their sum. What lies behind n is overwritten.
inline float exponentials(float* x, int64_t n, float most) {
  for (int64_t k = n; k < kChunk && k % kLanes; ++k) x[k] = most;
  Vec total = zero();
  const Vec minus = broadcast(-most);
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    const Vec e = exp_of(add(load(x + k), minus));
    store(x + k, e);
    total = add(total, e);
  }
  float rest = sum(total);
  if (k < n) {
    store(x + k, exp_of(add(load(x + k), minus)));
    for (; k < n; ++k) rest += x[k];
  }
  return rest;
}

// Attention of one row's queries of one key head over n keys: sums [queries, d + 2] hold for each
// query sum_k e^(s_k - m) value_k, sum_k e^(s_k - m) and m, the largest score s_k.
template <class T>
void attend_keys(const Attention& a, const T* keys, const T* values, int64_t n, const InputOf<T>* q,
                 float* sums) {
  const int64_t d = a.head_dim, queries = a.heads / a.kv_heads;
  alignas(64) float scores[kMaxQueries * kChunk];
  for (int64_t g = 0; g < queries; ++g) {
    std::fill(sums + g * (d + 2), sums + g * (d + 2) + d + 1, 0.0f);
    sums[g * (d + 2) + d + 1] = -INFINITY;
  }
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t some = std::min(kChunk, n - begin);
    for (int64_t g0 = 0; g0 < queries; g0 += kMaxQueries) {
      const int64_t part = std::min(kMaxQueries, queries - g0);
      score_keys(keys + begin * d, some, q + g0 * d, part, d, scores);
      for (int64_t g = g0; g < g0 + part; ++g) {
        float* const s = scores + (g - g0) * kChunk;
        float* const out = sums + g * (d + 2);
        float most = out[d + 1];
        for (int64_t k = 0; k < some; ++k) {
          s[k] *= a.scale;
          if (a.softcap != 0.0f) s[k] = a.softcap * std::tanh(s[k] / a.softcap);
          most = std::max(most, s[k]);
        }
        if (most > out[d + 1]) {
          const float shrink = std::exp(out[d + 1] - most);  // 0 at first
          for (int64_t j = 0; j <= d; ++j) out[j] *= shrink;
          out[d + 1] = most;
        }
        out[d] += exponentials(s, some, most);
        plain_accumulate<true>(values + begin * d, [](int64_t k) { return k; }, some, s, 1, d, out);
      }
    }
  }
}

// x[0 .. d) = the weighted mean of the values, from the threads' sums of one row and head.
inline void merge_sums(const float* sums, int parts, int64_t stride, int64_t d, float* out) {
  float most = -INFINITY, weight = 0.0f;
  for (int p = 0; p < parts; ++p) most = std::max(most, sums[p * stride + d + 1]);
  std::fill(out, out + d, 0.0f);
  for (int p = 0; p < parts; ++p) {
    const float* own = sums + p * stride;
    // Without a key: an empty part. A score that is not finite makes everything NaN, as in torch.
    const float factor = own[d + 1] == -INFINITY ? 0.0f : std::exp(own[d + 1] - most);
    weight += factor * own[d];
    for (int64_t j = 0; j < d; ++j) out[j] += factor * own[j];
  }
  for (int64_t j = 0; j < d; ++j) out[j] /= weight;
}

template <class T>
void attend_of(const Attention& a, const StepRows& step, const KeyValues& cache, float* hidden,
               float* workspace) {
  const int64_t rows = step.rows, d = a.d, size = a.head_dim;
  const int64_t queries = a.heads * size, keys = a.kv_heads * size, shared = a.heads / a.kv_heads;
  const AttendScratch s(workspace, a, rows);
  const auto bytes = [&](const Linear& layer, int64_t n, int64_t width) {
    return n * (layer.weight.bits ? PackedRows(layer.weight, width).bytes()
                                  : width * int64_t(sizeof(T)));
  };
  const int64_t read =
      bytes(a.q, queries, d) + bytes(a.k, keys, d) + bytes(a.v, keys, d) + bytes(a.o, d, queries);
  int64_t begun = step.spent ? nanoseconds() : 0;
  const auto spent = [&](int phase) {  // by the first thread, behind a barrier
    if (!step.spent || thread_id() != 0) return;
    const int64_t now = nanoseconds();
    step.spent[phase] += now - begun;
    begun = now;
  };
  T* const x = reinterpret_cast<T*>(s.x);
  InputOf<T>* const q = reinterpret_cast<InputOf<T>*>(s.plain);
  norm_rows(hidden, a.before, rows, d, a.dtype, x);
  Operand<T> operand;
  operand.set(s, {&a.q, &a.k, &a.v}, rows, d, a.dtype);
#pragma omp parallel num_threads(threads_for(read))
  {
    const int parts = team_size(), part = thread_id();
    multiply_part(a.q, queries, d, operand, rows, a.dtype, s.q);
    multiply_part(a.k, keys, d, operand, rows, a.dtype, s.k);
    multiply_part(a.v, keys, d, operand, rows, a.dtype, s.v);
#pragma omp barrier
    spent(0);
    if (a.wide_norms) {
      const Range own = split(rows, part, parts);
      for (int64_t r = own.begin; r < own.end; ++r) {
        if (a.q_norm) rms_norm(s.q + r * queries, a.q_norm, queries, a.dtype);
        if (a.k_norm) rms_norm(s.k + r * keys, a.k_norm, keys, a.dtype);
      }
#pragma omp barrier
    }
    const int64_t heads = a.heads + a.kv_heads;
    const Range own = split(rows * heads, part, parts);
    for (int64_t i = own.begin; i < own.end; ++i) {
      const int64_t r = i / heads, h = i % heads;
      const int64_t sequence = r / step.length, token = r % step.length;
      const bool is_query = h < a.heads;
      float* const head =
          is_query ? s.q + (r * a.heads + h) * size : s.k + (r * a.kv_heads + h - a.heads) * size;
      const RmsNorm& norm = is_query ? a.q_norm : a.k_norm;
      if (norm && !a.wide_norms) rms_norm(head, norm, size, a.dtype);
      if (a.rotary) {
        const int64_t place = sequence * step.sequence_stride + token * step.rotated;
        rotate(head, step.cos + place, step.sin + place, step.rotated);
      }
      if (is_query) {
        for (int64_t j = 0; j < size; ++j) from_float(head[j], q + (r * a.heads + h) * size + j);
      } else {
        const int64_t k = h - a.heads;
        const int64_t to =
            sequence * cache.sequence_stride + k * cache.head_stride + (step.past + token) * size;
        from_floats(head, size, a.dtype, static_cast<T*>(cache.keys) + to);
        from_floats(s.v + (r * a.kv_heads + k) * size, size, a.dtype,
                    static_cast<T*>(cache.values) + to);
      }
    }
#pragma omp barrier
    const int64_t stride = rows * a.heads * (size + 2);  // of a thread's sums
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t end = step.past + r % step.length + 1, begin = step.first[r];
      const Range mine = split(end - begin, part, parts);
      for (int64_t k = 0; k < a.kv_heads; ++k) {
        const int64_t from = r / step.length * cache.sequence_stride + k * cache.head_stride +
                             (begin + mine.begin) * size;
        const int64_t head = r * a.heads + k * shared;
        attend_keys<T>(a, static_cast<const T*>(cache.keys) + from,
                       static_cast<const T*>(cache.values) + from, mine.end - mine.begin,
                       q + head * size, s.partial + part * stride + head * (size + 2));
      }
    }
#pragma omp barrier
    const Range merged = split(rows * a.heads, part, parts);
    for (int64_t i = merged.begin; i < merged.end; ++i) {
      merge_sums(s.partial + i * (size + 2), parts, stride, size, s.q + i * size);
      from_floats(s.q + i * size, size, a.dtype, x + i * size);
    }
#pragma omp barrier
    spent(1);
#pragma omp single
    operand.set(s, {&a.o}, rows, queries, a.dtype);
    multiply_part(a.o, d, queries, operand, rows, a.dtype, s.out);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* const out = s.out + r * d;
    if (a.after) rms_norm(out, a.after, d, a.dtype);
    for (int64_t j = 0; j < d; ++j) hidden[r * d + j] += a.residual_scale * out[j];
  }
  spent(2);
}

void attend(const Attention& a, const StepRows& step, const KeyValues& cache, float* hidden,
            float* workspace) {
  with_type(a.dtype, [&](auto tag) {
    attend_of<typename decltype(tag)::type>(a, step, cache, hidden, workspace);
  });
}
