// Vectors of float32 and the loads that widen to them, one version per instruction set.
// Included by isa_body.h inside the instruction set's namespace.

struct Half {
  uint16_t bits;
};  // IEEE binary16
struct Bf16 {
  uint16_t bits;
};  // upper half of a binary32

MOYU_INLINE float to_float(float v) { return v; }

MOYU_INLINE float to_float(Bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

MOYU_INLINE float to_float(Half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t exponent = (v.bits >> 10) & 31u, fraction = v.bits & 1023u;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t bits =
      sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | (fraction << 13);
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// Rounding to nearest, ties to even, as torch's casts do.
MOYU_INLINE void from_float(float v, float* out) { *out = v; }

MOYU_INLINE void from_float(float v, Bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  out->bits =
      v != v ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

MOYU_INLINE void from_float(float v, Half* out) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = sign | 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    out->bits = sign | 0x7c00u;          // rounds to infinity
  } else if (magnitude < 0x38800000u) {  // subnormal: let the FPU round at 2^-24
    float f;
    std::memcpy(&f, &magnitude, sizeof f);
    f += 0.5f;  // ulp of [0.5, 1) is 2^-24
    uint32_t rounded;
    std::memcpy(&rounded, &f, sizeof rounded);
    out->bits = sign | static_cast<uint16_t>(rounded - 0x3f000000u);
  } else {
    const uint32_t odd = (magnitude >> 13) & 1u;
    out->bits = sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + odd) >> 13);
  }
}

// Rounds to nearest, ties to even, for abs(v) < 2^22: the FPU rounds at the last bit kept.
MOYU_INLINE float round_even(float v) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (v + kMagic) - kMagic;
}

#if defined(MOYU_SIMD_AVX512)

using Vec = __m512;
constexpr int kLanes = 16;
MOYU_INLINE Vec zero() { return _mm512_setzero_ps(); }
MOYU_INLINE Vec broadcast(float v) { return _mm512_set1_ps(v); }
MOYU_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
MOYU_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
MOYU_INLINE Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
MOYU_INLINE Vec times_power_of_2(Vec v, Vec n) { return _mm512_scalef_ps(v, n); }
MOYU_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
MOYU_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
MOYU_INLINE Vec load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MOYU_INLINE Vec load(const Bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
MOYU_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
MOYU_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }

#elif defined(MOYU_SIMD_AVX2)

using Vec = __m256;
constexpr int kLanes = 8;
MOYU_INLINE Vec zero() { return _mm256_setzero_ps(); }
MOYU_INLINE Vec broadcast(float v) { return _mm256_set1_ps(v); }
MOYU_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
MOYU_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
MOYU_INLINE Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
MOYU_INLINE Vec times_power_of_2(Vec v, Vec n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}
MOYU_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
MOYU_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
MOYU_INLINE Vec load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MOYU_INLINE Vec load(const Bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
MOYU_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
MOYU_INLINE float sum(Vec v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

#elif defined(MOYU_SIMD_NEON)

using Vec = float32x4_t;
constexpr int kLanes = 4;
MOYU_INLINE Vec zero() { return vdupq_n_f32(0.0f); }
MOYU_INLINE Vec broadcast(float v) { return vdupq_n_f32(v); }
MOYU_INLINE Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
MOYU_INLINE Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
MOYU_INLINE Vec larger(Vec a, Vec b) { return vmaxq_f32(a, b); }
MOYU_INLINE Vec times_power_of_2(Vec v, Vec n) {
  const int32x4_t biased = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
  return vmulq_f32(v, vreinterpretq_f32_s32(vshlq_n_s32(biased, 23)));
}
MOYU_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
MOYU_INLINE Vec load(const float* p) { return vld1q_f32(p); }
MOYU_INLINE Vec load(const Half* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
MOYU_INLINE Vec load(const Bf16* p) {
  const uint16x4_t raw = vld1_u16(reinterpret_cast<const uint16_t*>(p));
  return vreinterpretq_f32_u32(vshll_n_u16(raw, 16));
}
MOYU_INLINE void store(float* p, Vec v) { vst1q_f32(p, v); }
MOYU_INLINE float sum(Vec v) { return vaddvq_f32(v); }

#else

using Vec = float;
constexpr int kLanes = 1;
MOYU_INLINE Vec zero() { return 0.0f; }
MOYU_INLINE Vec broadcast(float v) { return v; }
MOYU_INLINE Vec add(Vec a, Vec b) { return a + b; }
MOYU_INLINE Vec mul(Vec a, Vec b) { return a * b; }
MOYU_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b where one is a NaN
MOYU_INLINE Vec times_power_of_2(Vec v, Vec n) { return v * std::exp2(n); }
MOYU_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
template <class T>
MOYU_INLINE Vec load(const T* p) {
  return to_float(*p);
}
MOYU_INLINE void store(float* p, Vec v) { *p = v; }
MOYU_INLINE float sum(Vec v) { return v; }

#endif

// e^x for x <= 0 within 2 ulp (a NaN stays one), flushed to some 1e-38 below -87: Cody and Waite's
// reduction to |r| <= ln(2) / 2, then the Taylor polynomial of degree 7.
MOYU_INLINE Vec exp_of(Vec x) {
  x = larger(broadcast(-87.0f), x);
  const Vec magic = broadcast(12582912.0f), minus_magic = broadcast(-12582912.0f);
  const Vec n = add(fma(x, broadcast(1.44269504088896341f), magic), minus_magic);
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.0f / 5040);
  p = fma(p, r, broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return times_power_of_2(p, n);
}

// The form in which a dot product with weights of type T wants the input row.
template <class T>
struct Input {
  using type = float;
};
#if defined(MOYU_SIMD_BF16_DOT)
template <>
struct Input<Bf16> {
  using type = Bf16;  // vdpbf16ps multiplies bf16 pairs into float32
};
#endif
