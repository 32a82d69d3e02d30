// qRIDA: a low-bit shadow of gate and up names the active neurons, then the exact MLP runs on them.

// Up to kMaxRows input rows in int8, block by block.
struct QuantizedInput {
  const int8_t* x;      // [rows, blocks, kShadowBlock], zeros behind d
  const float* scale;   // [rows, blocks]
  const float* offset;  // [rows, blocks]: scale * sum of x, the share of the codes' zero point
  int64_t rows, blocks;
};

// Rounds to nearest, ties to even, for abs(v) < 2^22: the FPU rounds at the last bit kept.
MOYU_INLINE float round_even(float v) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (v + kMagic) - kMagic;
}

template <class T>
inline QuantizedInput quantize_input(const T* x, int64_t rows, int64_t d, float* scratch) {
  const int64_t blocks = shadow_blocks(d);
  float* scale = scratch;
  float* offset = scale + rows * blocks;
  int8_t* q = reinterpret_cast<int8_t*>(offset + rows * blocks);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t n = std::min(kShadowBlock, d - b * kShadowBlock);
      const T* xb = x + r * d + b * kShadowBlock;
      int8_t* qb = q + (r * blocks + b) * kShadowBlock;
      float values[kShadowBlock], largest = 0.0f;
      for (int64_t j = 0; j < n; ++j) values[j] = to_float(xb[j]);
      bool finite = true;  // a NaN or an infinity makes the step NaN, and so every estimate
      for (int64_t j = 0; j < n; ++j) {
        finite &= std::fabs(values[j]) <= 3.4028235e38f;
        largest = std::max(largest, std::fabs(values[j]));
      }
      const float s = finite ? largest / 127.0f : NAN;
      int32_t sum = 0;
      for (int64_t j = 0; j < n; ++j) {
        // Where s is subnormal the quotient can be off, and over 127.
        const float code =
            s > 0.0f ? std::min(std::max(round_even(values[j] / s), -127.0f), 127.0f) : 0.0f;
        qb[j] = static_cast<int8_t>(code);
        sum += static_cast<int32_t>(code);
      }
      std::fill(qb + n, qb + kShadowBlock, int8_t(0));
      scale[r * blocks + b] = s;
      offset[r * blocks + b] = s * static_cast<float>(sum);
    }
  return {q, scale, offset, rows, blocks};
}

// Records are fetched this many ahead: the hardware stops at the end of a page, and without it the
// pass runs at half the speed (Xeon of 2023).
constexpr int64_t kRecordsAhead = 4;

// out[r] = estimate of w . x[r] for R rows from r0 on; fetches what lies `ahead` bytes further on.
template <int kBits, int R>
MOYU_INLINE void shadow_dot_rows(const uint8_t* codes, const Bf16* scales, int64_t ahead,
                                 const QuantizedInput& q, int64_t r0, float* out) {
  constexpr int64_t kBytes = 32 * kBits;
  constexpr float kZero = ((1 << kBits) - 1) * 0.5f;
  Vec acc[R], zero_point[R];
  float scale[R][kLanes], rest[R] = {};
  for (int r = 0; r < R; ++r) acc[r] = zero_point[r] = zero();
  for (int64_t first = 0; first < q.blocks; first += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, q.blocks - first);
    if (n == kLanes) {
      const Vec s = load(scales + first);
      for (int r = 0; r < R; ++r) {
        const int64_t at = (r0 + r) * q.blocks + first;
        store(scale[r], fma(s, load(q.scale + at), zero()));
        zero_point[r] = fma(s, load(q.offset + at), zero_point[r]);
      }
    } else {
      for (int64_t b = 0; b < n; ++b) {
        const float s = to_float(scales[first + b]);
        for (int r = 0; r < R; ++r) {
          const int64_t at = (r0 + r) * q.blocks + first + b;
          scale[r][b] = s * q.scale[at];
          rest[r] += s * q.offset[at];
        }
      }
    }
    for (int64_t b = 0; b < n; ++b) {
      const uint8_t* block = codes + (first + b) * kBytes;
      prefetch(block + ahead);
      if constexpr (kBits > 2) prefetch(block + ahead + 64);
      Bytes c[4];
      block_codes<kBits>(block, c);
      for (int r = 0; r < R; ++r) {
        const int8_t* x = q.x + ((r0 + r) * q.blocks + first + b) * kShadowBlock;
        IntVec total = dot64(int_zero(), c[0], x);
        for (int t = 1; t < 4; ++t) total = dot64(total, c[t], x + 64 * t);
        acc[r] = fma(to_vec(total), broadcast(scale[r][b]), acc[r]);
      }
    }
  }
  const Vec minus = broadcast(-kZero);
  for (int r = 0; r < R; ++r) out[r] = sum(fma(minus, zero_point[r], acc[r])) - kZero * rest[r];
}

template <int kBits>
MOYU_INLINE void shadow_dot_bits(const uint8_t* codes, const Bf16* scales, int64_t ahead,
                                 const QuantizedInput& q, float* out) {
  int64_t r = 0;
  for (; r + 4 <= q.rows; r += 4) shadow_dot_rows<kBits, 4>(codes, scales, ahead, q, r, out + r);
  for (; r < q.rows; ++r) shadow_dot_rows<kBits, 1>(codes, scales, ahead, q, r, out + r);
}

inline void shadow_dot(int bits, const uint8_t* codes, const Bf16* scales, int64_t ahead,
                       const QuantizedInput& q, float* out) {
  switch (bits) {
    case 1: return shadow_dot_bits<1>(codes, scales, ahead, q, out);
    case 2: return shadow_dot_bits<2>(codes, scales, ahead, q, out);
    case 3: return shadow_dot_bits<3>(codes, scales, ahead, q, out);
    default: return shadow_dot_bits<4>(codes, scales, ahead, q, out);
  }
}

// exp by range reduction and a polynomial (relative error below 2e-7): a loop over it vectorises.
// Above 88 it is infinity, as expf's is above 88.7.
MOYU_INLINE float fast_exp(float exponent) {
  const float v = exponent < -87.0f ? -87.0f : exponent > 88.0f ? 88.0f : exponent;  // NaN stays
  const float n = round_even(v * 1.44269504088896341f);
  const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n == n ? n : 0.0f) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return exponent > 88.0f ? HUGE_VALF : p * power;
}

inline void activate_all(Activation kind, float* h, int64_t n) {
  if (kind == Activation::kSilu) {
    for (int64_t i = 0; i < n; ++i) h[i] = h[i] / (1.0f + fast_exp(-h[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) h[i] = activate(kind, h[i]);
  }
}

// scores[r * f + i] for i in mine.
template <class T>
inline void score_part(const Mlp& mlp, const Shadow& shadow, const QuantizedInput& q, Range mine,
                       float* scores) {
  constexpr int64_t kTile = 64;  // the activation is computed for a tile at a time
  const int64_t blocks = q.blocks, f = mlp.f;
  const int64_t bytes = shadow_record_bytes(mlp.d, shadow.bits_gate, shadow.bits_up);
  const int64_t up_at = 32 * shadow.bits_gate * blocks;
  const int64_t scales_at = up_at + 32 * shadow.bits_up * blocks;
  const T* gate_bias = static_cast<const T*>(mlp.gate_bias);
  const T* up_bias = static_cast<const T*>(mlp.up_bias);
  float g[kMaxRows][kTile], u[kMaxRows][kTile], estimate[kMaxRows];
  for (int64_t begin = mine.begin; begin < mine.end; begin += kTile) {
    const int64_t n = std::min(kTile, mine.end - begin);
    for (int64_t k = 0; k < n; ++k) {
      const uint8_t* record = shadow.records + (begin + k) * bytes;
      const Bf16* scales = reinterpret_cast<const Bf16*>(record + scales_at);
      const int64_t ahead = kRecordsAhead * bytes;
      for (int64_t at = scales_at; at < bytes; at += 64) prefetch(record + ahead + at);
      if (shadow.bits_gate) {
        shadow_dot(shadow.bits_gate, record, scales, ahead, q, estimate);
        const float bias = bias_at(gate_bias, begin + k);
        for (int64_t r = 0; r < q.rows; ++r) g[r][k] = estimate[r] + bias;
        scales += blocks;
      }
      shadow_dot(shadow.bits_up, record + up_at, scales, ahead, q, estimate);
      const float bias = bias_at(up_bias, begin + k);
      for (int64_t r = 0; r < q.rows; ++r) u[r][k] = estimate[r] + bias;
    }
    for (int64_t r = 0; r < q.rows; ++r) {
      float* out = scores + r * f + begin;
      const float* norms = shadow.norms + begin;
      if (shadow.bits_gate) {
        activate_all(mlp.activation, g[r], n);
        for (int64_t k = 0; k < n; ++k) out[k] = std::fabs(g[r][k] * u[r][k]) * norms[k];
      } else {
        activate_all(mlp.activation, u[r], n);
        for (int64_t k = 0; k < n; ++k) out[k] = std::fabs(u[r][k]) * norms[k];
      }
    }
  }
}

// Non-negative floats order like their bits; a NaN counts as the largest.
MOYU_INLINE uint32_t order_of(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits & 0x7fffffffu;
}

// The k-th largest order among scores, 1 <= k <= f, and how many with exactly that order are kept:
// a histogram of the leading bits finds its bin, a selection inside the bin finds it.
inline uint32_t kth_order(const float* scores, int64_t f, int64_t k, uint32_t* scratch,
                          int64_t* ties) {
  constexpr int kShift = 20;
  int32_t histogram[1 << (31 - kShift)] = {};
  for (int64_t i = 0; i < f; ++i) ++histogram[order_of(scores[i]) >> kShift];
  int64_t above = 0, bin = (1 << (31 - kShift)) - 1;
  while (above + histogram[bin] < k) above += histogram[bin--];
  int64_t n = 0;
  for (int64_t i = 0; i < f; ++i) {
    const uint32_t order = order_of(scores[i]);
    scratch[n] = order;
    n += (order >> kShift) == static_cast<uint32_t>(bin);
  }
  uint32_t* const wanted = scratch + (k - above - 1);
  std::nth_element(scratch, wanted, scratch + n, [](uint32_t a, uint32_t b) { return a > b; });
  const uint32_t kth = *wanted;
  *ties = k - above - std::count_if(scratch, scratch + n, [=](uint32_t o) { return o > kth; });
  return kth;
}

// Marks row's set in mask; returns its size.
inline int32_t mark_row(const float* scores, int64_t f, const float* epsilon, int64_t k,
                        uint32_t* scratch, uint8_t* mask) {
  if (epsilon) {
    int32_t active = 0;
    for (int64_t i = 0; i < f; ++i) active += mask[i] = !(scores[i] < *epsilon);
    return active;
  }
  if (k <= 0) {
    std::fill(mask, mask + f, uint8_t(0));
    return 0;
  }
  int64_t ties = 0;
  const uint32_t kth = kth_order(scores, f, k, scratch, &ties);
  for (int64_t i = 0; i < f; ++i) {
    const uint32_t order = order_of(scores[i]);
    const bool tie = order == kth && ties > 0;
    ties -= tie;
    mask[i] = order > kth || tie;
  }
  return static_cast<int32_t>(k);
}

// indices = ascending neurons that are active in some row; returns how many.
inline int32_t unite(const uint8_t* mask, int64_t rows, int64_t f, int32_t* indices) {
  int32_t n = 0;
  for (int64_t i = 0; i < f; ++i) {
    uint8_t any = 0;
    for (int64_t r = 0; r < rows; ++r) any |= mask[r * f + i];
    indices[n] = static_cast<int32_t>(i);
    n += any;
  }
  return n;
}

template <class P>
MOYU_INLINE P* aligned(float* p) {
  return reinterpret_cast<P*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64);
}

template <class T>
void shadow_scores_of(const Mlp& mlp, const Shadow& shadow, float* scores, float* workspace) {
  const int64_t bytes = mlp.f * shadow_record_bytes(mlp.d, shadow.bits_gate, shadow.bits_up);
  for (int64_t first = 0; first < mlp.rows; first += kMaxRows) {
    const int64_t rows = std::min(kMaxRows, mlp.rows - first);
    const QuantizedInput q = quantize_input(static_cast<const T*>(mlp.x) + first * mlp.d, rows,
                                            mlp.d, aligned<float>(workspace));
#pragma omp parallel num_threads(threads_for(bytes))
    score_part<T>(mlp, shadow, q, split(mlp.f, thread_id(), team_size()), scores + first * mlp.f);
  }
}

template <class T>
void shadow_mlp_of(const Mlp& mlp, const Shadow& shadow, const float* epsilon, int64_t k,
                   int32_t* counts, float* workspace) {
  const int64_t d = mlp.d, f = mlp.f;
  const int64_t bytes = f * shadow_record_bytes(d, shadow.bits_gate, shadow.bits_up);
  float* accumulators = accumulators_in(workspace, d);
  for (int64_t first = 0; first < mlp.rows; first += kMaxRows) {
    const Matrices<T> m(mlp, first, workspace);
    float* scores = aligned<float>(accumulators + max_threads() * m.rows * d);
    uint8_t* mask = reinterpret_cast<uint8_t*>(scores + m.rows * f);
    uint32_t* scratch = aligned<uint32_t>(scores + m.rows * f + (m.rows * f + 3) / 4);
    int32_t* indices = reinterpret_cast<int32_t*>(scratch);
    const QuantizedInput q = quantize_input(static_cast<const T*>(mlp.x) + first * d, m.rows, d,
                                            aligned<float>(reinterpret_cast<float*>(scratch) + f));
    int32_t count = 0;
#pragma omp parallel num_threads(threads_for(bytes))
    {
      score_part<T>(mlp, shadow, q, split(f, thread_id(), team_size()), scores);
#pragma omp barrier
#pragma omp single
      {
        for (int64_t r = 0; r < m.rows; ++r)
          counts[first + r] = mark_row(scores + r * f, f, epsilon, k, scratch, mask + r * f);
        count = unite(mask, m.rows, f, indices);
      }  // the implied barrier shows count and indices to the team
      const ActiveSet set{indices, nullptr, m.rows > 1 ? mask : nullptr};
      given_part(mlp, m, first, set, count, accumulators);
    }
  }
}

void shadow_scores(const Mlp& mlp, const Shadow& shadow, float* scores, float* workspace) {
  with_type(mlp.dtype, [&](auto tag) {
    shadow_scores_of<typename decltype(tag)::type>(mlp, shadow, scores, workspace);
  });
}

void shadow_mlp(const Mlp& mlp, const Shadow& shadow, const float* epsilon, int64_t k,
                int32_t* counts, float* workspace) {
  with_type(mlp.dtype, [&](auto tag) {
    shadow_mlp_of<typename decltype(tag)::type>(mlp, shadow, epsilon, k, counts, workspace);
  });
}
