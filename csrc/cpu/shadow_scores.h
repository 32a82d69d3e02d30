// The estimate of every neuron's norm by a low-bit shadow of gate and up (qRIDA).

// Up to kMaxRows input rows in int8, block by block.
struct QuantizedInput {
  const int8_t* x;      // [rows, blocks, kShadowBlock], zeros behind d
  const float* scale;   // [rows, blocks]
  const float* offset;  // [rows, blocks]: scale * sum of x, the share of the codes' zero point
  int64_t rows, blocks;
};

inline QuantizedInput quantize_input(DType dtype, const void* x, int64_t rows, int64_t d,
                                     float* scratch) {
  const int64_t blocks = shadow_blocks(d);
  float* scale = scratch;
  float* offset = scale + rows * blocks;
  int8_t* q = reinterpret_cast<int8_t*>(offset + rows * blocks);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t n = std::min(kShadowBlock, d - b * kShadowBlock);
      int8_t* qb = q + (r * blocks + b) * kShadowBlock;
      float values[kShadowBlock], largest = 0.0f;
      to_floats(dtype, x, r * d + b * kShadowBlock, n, values);
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

// out[i] = act(h[i] + by * shift[i]); shift may be null where by is 0.
inline void activate_all(Activation kind, const float* h, float by, const float* shift, int64_t n,
                         float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = by == 0.0f ? h[i] : h[i] + by * shift[i];
  if (kind == Activation::kSilu) {
    for (int64_t i = 0; i < n; ++i) out[i] = out[i] / (1.0f + fast_exp(-out[i]));
  } else if (kind == Activation::kGeluTanh) {
    for (int64_t i = 0; i < n; ++i) {
      const float v = out[i];
      out[i] = v / (1.0f + fast_exp(-1.59576912160573073f * (v + 0.044715f * v * v * v)));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = activate(kind, out[i]);
  }
}

constexpr uint8_t kEstimated = 1, kExact = 2;
constexpr int64_t kScoreTile = 64;  // neurons whose activations are computed at once

// Marks the tiers of n neurons by a price: h are the estimates of what the activation is taken of,
// act their activations, u those of up where there is a gate; error, norms and mask are of these
// neurons too.
inline void mark_by_price(Activation kind, float price, const float* h, const float* act,
                          const float* u, const float* error, const float* up_error,
                          const float* norms, int64_t n, uint8_t* mask) {
  float above[kScoreTile], below[kScoreTile];
  activate_all(kind, h, 1.0f, error, n, above);
  activate_all(kind, h, -1.0f, error, n, below);
  const float more = u ? 2.0f : 1.0f;  // rows that an exact value takes beyond an estimate's
  for (int64_t i = 0; i < n; ++i) {
    const float c = norms[i] * norms[i], slope = 0.5f * (above[i] - below[i]);
    float size = act[i] * act[i] * c, lost = slope * slope * c;
    if (u) {
      const float wide = up_error[i] * up_error[i];
      lost = lost * (u[i] * u[i] + wide) + size * wide;
      size *= u[i] * u[i];
    }
    // A NaN is exact, so that it reaches the output.
    const bool estimate = size >= price;
    const bool skip = size < price && size + lost < (1.0f + more) * price;
    const bool keep = estimate && lost < more * price;
    mask[i] = keep ? kEstimated : skip ? uint8_t(0) : kExact;
  }
}

// scores[r * f + i] for i in mine, with the signs of the estimated a_i; with a price also the tiers
// in mask.
inline void score_part(const Mlp& mlp, const Shadow& shadow, const QuantizedInput& q, Range mine,
                       float* scores, const float* price = nullptr, uint8_t* mask = nullptr) {
  const int64_t blocks = q.blocks, f = mlp.f;
  const int64_t bytes = shadow_record_bytes(mlp.d, shadow.bits_gate, shadow.bits_up);
  const int64_t up_at = 32 * shadow.bits_gate * blocks;
  const int64_t scales_at = up_at + 32 * shadow.bits_up * blocks;
  const bool gated = shadow.bits_gate != 0;
  float g[kMaxRows][kScoreTile], u[kMaxRows][kScoreTile], estimate[kMaxRows], act[kScoreTile];
  for (int64_t begin = mine.begin; begin < mine.end; begin += kScoreTile) {
    const int64_t n = std::min(kScoreTile, mine.end - begin);
    for (int64_t k = 0; k < n; ++k) {
      const uint8_t* record = shadow.records + (begin + k) * bytes;
      const Bf16* scales = reinterpret_cast<const Bf16*>(record + scales_at);
      const int64_t ahead = kRecordsAhead * bytes;
      for (int64_t at = scales_at; at < bytes; at += 64) prefetch(record + ahead + at);
      if (gated) {
        shadow_dot(shadow.bits_gate, record, scales, ahead, q, estimate);
        const float bias = bias_at(mlp.dtype, mlp.gate_bias, begin + k);
        for (int64_t r = 0; r < q.rows; ++r) g[r][k] = estimate[r] + bias;
        scales += blocks;
      }
      shadow_dot(shadow.bits_up, record + up_at, scales, ahead, q, estimate);
      const float bias = bias_at(mlp.dtype, mlp.up_bias, begin + k);
      for (int64_t r = 0; r < q.rows; ++r) u[r][k] = estimate[r] + bias;
    }
    for (int64_t r = 0; r < q.rows; ++r) {
      float* out = scores + r * f + begin;
      const float* norms = shadow.norms + begin;
      const float* h = gated ? g[r] : u[r];
      activate_all(mlp.activation, h, 0.0f, nullptr, n, act);
      for (int64_t k = 0; k < n; ++k) out[k] = (gated ? act[k] * u[r][k] : act[k]) * norms[k];
      if (!price) continue;
      const float* up_error = shadow.up_error + begin;
      const float* error = gated ? shadow.gate_error + begin : up_error;
      mark_by_price(mlp.activation, *price, h, act, gated ? u[r] : nullptr, error, up_error, norms,
                    n, mask + r * f + begin);
    }
  }
}

void shadow_scores(const Mlp& mlp, const Shadow& shadow, float* scores, float* workspace) {
  const int64_t bytes = mlp.f * shadow_record_bytes(mlp.d, shadow.bits_gate, shadow.bits_up);
  const Scratch scratch(workspace, mlp.rows, mlp.d, mlp.f);
  for (int64_t first = 0; first < mlp.rows; first += kMaxRows) {
    const int64_t rows = std::min(kMaxRows, mlp.rows - first);
    const QuantizedInput q = quantize_input(mlp.dtype, at(mlp.dtype, mlp.x, first * mlp.d), rows,
                                            mlp.d, scratch.shadow_input);
    float* const out = scores + first * mlp.f;
#pragma omp parallel num_threads(threads_for(bytes))
    {
      const Range mine = split(mlp.f, thread_id(), team_size());
      score_part(mlp, shadow, q, mine, out);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = mine.begin; i < mine.end; ++i)
          out[r * mlp.f + i] = std::fabs(out[r * mlp.f + i]);
    }
  }
}
