// Sixteen codes at a time as 16-bit words, and eight floats: what packed rows are computed with on
// x86. The sets above AVX2 use 256 bits here too, since two cores of it outrun the memory.

using Vec8 = __m256;
using Words = __m256i;  // 16 words
using Sums = __m256i;   // 8 int32
MOYU_INLINE Vec8 broadcast8(float v) { return _mm256_set1_ps(v); }
MOYU_INLINE Vec8 load8(const float* p) { return _mm256_loadu_ps(p); }
MOYU_INLINE Vec8 load8(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MOYU_INLINE void store8(float* p, Vec8 v) { _mm256_storeu_ps(p, v); }
MOYU_INLINE Vec8 mul8(Vec8 a, Vec8 b) { return _mm256_mul_ps(a, b); }
MOYU_INLINE Vec8 add8(Vec8 a, Vec8 b) { return _mm256_add_ps(a, b); }
MOYU_INLINE Vec8 fma8(Vec8 a, Vec8 b, Vec8 c) { return _mm256_fmadd_ps(a, b, c); }
MOYU_INLINE Vec8 abs8(Vec8 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
MOYU_INLINE Vec8 max8(Vec8 a, Vec8 b) { return _mm256_max_ps(a, b); }
// numerator / v where v > 0, else 0.
MOYU_INLINE Vec8 over8(float numerator, Vec8 v) {
  const Vec8 positive = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GT_OQ);
  return _mm256_and_ps(positive, _mm256_div_ps(_mm256_set1_ps(numerator), v));
}
MOYU_INLINE float sum8(Vec8 v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}
MOYU_INLINE float most8(Vec8 v) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}
MOYU_INLINE Sums sums_zero() { return _mm256_setzero_si256(); }
MOYU_INLINE Sums sums_add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
// The words' values: 0..7 in first, 8..15 in second.
MOYU_INLINE void words_to_vec8(Words v, Vec8* first, Vec8* second) {
  *first = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(v)));
  *second = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(v, 1)));
}
MOYU_INLINE Vec8 to_vec8(Sums v) { return _mm256_cvtepi32_ps(v); }
MOYU_INLINE Sums round8(Vec8 v) { return _mm256_cvtps_epi32(v); }
// (low word of a, low word of b) in each lane.
MOYU_INLINE Sums word_pairs(Sums a, Sums b) {
  return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
}
MOYU_INLINE void store_sums(int32_t* p, Sums v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
}
MOYU_INLINE Words load_words(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
MOYU_INLINE void store_words(void* p, Words v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
MOYU_INLINE Words widen_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Bits kFrom .. kFrom + kWidth - 1 of each word, moved to bit kTo.
template <int kFrom, int kWidth, int kTo>
MOYU_INLINE Words word_bits(Words v) {
  constexpr int kMask = ((1 << kWidth) - 1) << kTo;
  if constexpr (kFrom > kTo) v = _mm256_srli_epi16(v, kFrom - kTo);
  if constexpr (kFrom < kTo) v = _mm256_slli_epi16(v, kTo - kFrom);
  if constexpr (kFrom + kWidth == 16 && kTo == 0) return v;
  return _mm256_and_si256(v, _mm256_set1_epi16(static_cast<int16_t>(kMask)));
}
// Bit w of the two bytes at p as bit kTo of word w.
template <int kTo>
MOYU_INLINE Words spread_bits(const uint8_t* p) {
  int16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  const __m256i own = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096,
                                        8192, 16384, INT16_MIN);
  const __m256i on = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(bits), own), own);
  return _mm256_and_si256(on, _mm256_set1_epi16(1 << kTo));
}
MOYU_INLINE Words both_words(Words a, Words b) { return _mm256_or_si256(a, b); }
// acc[i] += a[2i] b[2i] + a[2i + 1] b[2i + 1]
MOYU_INLINE Sums multiply_pairs(Sums acc, Words a, Words b) {
#if defined(MOYU_SIMD_VNNI)
  return _mm256_dpwssd_epi32(acc, a, b);
#else
  return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
#endif
}
// The numbers of a, then those of b, as words; saturating.
MOYU_INLINE Words words_of(Sums a, Sums b) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
}
MOYU_INLINE Words pair_everywhere(int32_t pair) { return _mm256_set1_epi32(pair); }
// The words of a and b by turns: 0..3 and 8..11 of each in low, the others in high.
MOYU_INLINE void interleave(Words a, Words b, Words* low, Words* high) {
  *low = _mm256_unpacklo_epi16(a, b);
  *high = _mm256_unpackhi_epi16(a, b);
}
// Sums over interleaved words, in the words' own order: 0..7 and 8..15.
MOYU_INLINE void in_order(Sums low, Sums high, Sums* first, Sums* second) {
  *first = _mm256_permute2x128_si256(low, high, 0x20);
  *second = _mm256_permute2x128_si256(low, high, 0x31);
}

// Codes of elements 16 kPart .. 16 kPart + 15 of a block of packed rows, see moyu.h.
template <int kBits, int kPart>
MOYU_INLINE Words codes16(const uint8_t* block) {
  if constexpr (kBits == 8) {
    return word_bits<8 * (kPart % 2), 8, 0>(load_words(block + 32 * (kPart / 2)));
  } else if constexpr (kBits == 3) {
    return both_words(word_bits<2 * kPart, 2, 0>(widen_bytes(block)),
                      spread_bits<2>(block + 16 + 2 * kPart));
  } else {
    const Words low = word_bits<4 * kPart, 4, 0>(load_words(block));
    if constexpr (kBits == 5) return both_words(low, spread_bits<4>(block + 32 + 2 * kPart));
    if constexpr (kBits == 6)
      return both_words(low, word_bits<2 * kPart, 2, 4>(widen_bytes(block + 32)));
    return low;
  }
}
