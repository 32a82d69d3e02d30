// Compare with the threshold and keep the ascending indices of what is not below it.

// Appends base + i for every i in [0, n) with !(values[i] < epsilon); returns how many. A vector
// store may write up to kLanes entries past the last one kept, but never past out + n.
MOYU_INLINE int64_t compact_block(const float* values, int64_t n, float epsilon, int32_t base,
                                  int32_t* out) {
  int64_t kept = 0, i = 0;
#if defined(MOYU_SIMD_AVX512)
  const __m512 eps = _mm512_set1_ps(epsilon);
  __m512i index =
      _mm512_add_epi32(_mm512_set1_epi32(base),
                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (; i + 16 <= n; i += 16) {
    const __mmask16 active = _mm512_cmp_ps_mask(_mm512_loadu_ps(values + i), eps, _CMP_NLT_UQ);
    // A register compress and a plain store: the masked memory form is slow on some CPUs.
    _mm512_storeu_si512(out + kept, _mm512_maskz_compress_epi32(active, index));
    kept += __builtin_popcount(active);
    index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
  }
#endif
  for (; i < n; ++i) {
    out[kept] = base + static_cast<int32_t>(i);
    kept += !(values[i] < epsilon);
  }
  return kept;
}

void threshold_compact(const float* values, int64_t rows, int64_t f, const float* epsilon,
                       int32_t* indices, int32_t* count) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * f * 8))
  for (int64_t r = 0; r < rows; ++r) {
    int32_t* out = indices + r * f;
    const int64_t kept = compact_block(values + r * f, f, *epsilon, 0, out);
    std::fill(out + kept, out + f, 0);
    count[r] = static_cast<int32_t>(kept);
  }
}
