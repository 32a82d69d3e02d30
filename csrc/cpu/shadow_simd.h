// Integer vectors for the shadow: 64 codes at a time, and their products with int8 inputs.

#if defined(MOYU_SIMD_AVX512)

using Bytes = __m512i;  // 64 unsigned bytes
using IntVec = __m512i;
MOYU_INLINE IntVec int_zero() { return _mm512_setzero_si512(); }
MOYU_INLINE Vec to_vec(IntVec v) { return _mm512_cvtepi32_ps(v); }
#if defined(MOYU_SIMD_VNNI)
// The matrix by which GFNI moves a byte's bits from kFrom on to where kTo is: the row
// that makes bit i is its byte 7 - i.
template <int kFrom, int kWidth, int kTo>
constexpr long long moved_bits() {
  uint64_t rows = 0;
  for (int i = 0; i < kWidth; ++i) rows |= uint64_t{1} << (kFrom + i) << 8 * (7 - kTo - i);
  return static_cast<long long>(rows);
}
#endif
// Bits kShift .. kShift + kWidth - 1 of each byte of 64.
template <int kShift, int kWidth>
MOYU_INLINE Bytes field(const uint8_t* p) {
  const __m512i v = _mm512_loadu_si512(p);
#if defined(MOYU_SIMD_VNNI)
  return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64(moved_bits<kShift, kWidth, 0>()), 0);
#else
  return _mm512_and_si512(_mm512_srli_epi16(v, kShift), _mm512_set1_epi8((1 << kWidth) - 1));
#endif
}
// Bit kBit of 32 bytes, then bit kBit + 4 of the same bytes, each moved to bit kTo.
template <int kBit, int kTo>
MOYU_INLINE Bytes bit_plane(const uint8_t* p) {
  const __m512i v = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#if defined(MOYU_SIMD_VNNI)
  constexpr long long kLow = moved_bits<kBit, 1, kTo>(), kHigh = moved_bits<kBit + 4, 1, kTo>();
  return _mm512_gf2p8affine_epi64_epi8(
      v, _mm512_setr_epi64(kLow, kLow, kLow, kLow, kHigh, kHigh, kHigh, kHigh), 0);
#else
  const __m512i shift =
      _mm512_setr_epi64(kBit, kBit, kBit, kBit, kBit + 4, kBit + 4, kBit + 4, kBit + 4);
  const __m512i bit = _mm512_and_si512(_mm512_srlv_epi64(v, shift), _mm512_set1_epi8(1));
  return _mm512_slli_epi16(bit, kTo);
#endif
}
MOYU_INLINE Bytes both(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
MOYU_INLINE IntVec dot64(IntVec acc, Bytes codes, const int8_t* x) {
  const __m512i xv = _mm512_loadu_si512(x);
#if defined(MOYU_SIMD_VNNI)
  return _mm512_dpbusd_epi32(acc, codes, xv);
#else
  // Codes are at most 15, so that pairs fit int16 without saturation.
  const __m512i pairs = _mm512_maddubs_epi16(codes, xv);
  return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

#elif defined(MOYU_SIMD_AVX2)

struct Bytes {
  __m256i lo, hi;
};
using IntVec = __m256i;
MOYU_INLINE IntVec int_zero() { return _mm256_setzero_si256(); }
MOYU_INLINE Vec to_vec(IntVec v) { return _mm256_cvtepi32_ps(v); }
MOYU_INLINE __m256i load_bytes(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
template <int kShift, int kWidth>
MOYU_INLINE Bytes field(const uint8_t* p) {
  const __m256i m = _mm256_set1_epi8((1 << kWidth) - 1);
  return {_mm256_and_si256(_mm256_srli_epi16(load_bytes(p), kShift), m),
          _mm256_and_si256(_mm256_srli_epi16(load_bytes(p + 32), kShift), m)};
}
template <int kBit, int kTo>
MOYU_INLINE Bytes bit_plane(const uint8_t* p) {
  const __m256i v = load_bytes(p), one = _mm256_set1_epi8(1);
  return {_mm256_slli_epi16(_mm256_and_si256(_mm256_srli_epi16(v, kBit), one), kTo),
          _mm256_slli_epi16(_mm256_and_si256(_mm256_srli_epi16(v, kBit + 4), one), kTo)};
}
MOYU_INLINE Bytes both(Bytes a, Bytes b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
MOYU_INLINE IntVec dot64(IntVec acc, Bytes codes, const int8_t* x) {
  const __m256i* xv = reinterpret_cast<const __m256i*>(x);
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16(codes.lo, _mm256_loadu_si256(xv)),
                       _mm256_maddubs_epi16(codes.hi, _mm256_loadu_si256(xv + 1)));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#else

struct Bytes {
  uint8_t at[64];
};
struct IntVec {
  int32_t at[kLanes];
};
MOYU_INLINE IntVec int_zero() { return {}; }
MOYU_INLINE Vec to_vec(IntVec v) {
  float f[kLanes];
  for (int i = 0; i < kLanes; ++i) f[i] = static_cast<float>(v.at[i]);
  return load(f);
}
template <int kShift, int kWidth>
MOYU_INLINE Bytes field(const uint8_t* p) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.at[i] = (p[i] >> kShift) & ((1 << kWidth) - 1);
  return out;
}
template <int kBit, int kTo>
MOYU_INLINE Bytes bit_plane(const uint8_t* p) {
  Bytes out;
  for (int i = 0; i < 32; ++i) {
    out.at[i] = ((p[i] >> kBit) & 1) << kTo;
    out.at[i + 32] = ((p[i] >> (kBit + 4)) & 1) << kTo;
  }
  return out;
}
MOYU_INLINE Bytes both(Bytes a, Bytes b) {
  for (int i = 0; i < 64; ++i) a.at[i] |= b.at[i];
  return a;
}
MOYU_INLINE IntVec dot64(IntVec acc, Bytes codes, const int8_t* x) {
  for (int i = 0; i < 64; ++i) acc.at[i % kLanes] += int32_t(codes.at[i]) * x[i];
  return acc;
}

#endif

// The 256 codes of a block: c[t] holds elements 64t .. 64t + 63.
template <int kBits>
MOYU_INLINE void block_codes(const uint8_t* p, Bytes* c) {
  if constexpr (kBits == 4) {
    c[0] = field<0, 4>(p);
    c[1] = field<4, 4>(p);
    c[2] = field<0, 4>(p + 64);
    c[3] = field<4, 4>(p + 64);
  } else if constexpr (kBits == 1) {
    c[0] = bit_plane<0, 0>(p);
    c[1] = bit_plane<1, 0>(p);
    c[2] = bit_plane<2, 0>(p);
    c[3] = bit_plane<3, 0>(p);
  } else {
    c[0] = field<0, 2>(p);
    c[1] = field<2, 2>(p);
    c[2] = field<4, 2>(p);
    c[3] = field<6, 2>(p);
    if constexpr (kBits == 3) {
      c[0] = both(c[0], bit_plane<0, 2>(p + 64));
      c[1] = both(c[1], bit_plane<1, 2>(p + 64));
      c[2] = both(c[2], bit_plane<2, 2>(p + 64));
      c[3] = both(c[3], bit_plane<3, 2>(p + 64));
    }
  }
}
