// Rows of low-bit codes without vectors of integers: a block's values first, then sums of floats.

using PackedInput = PlainRows<float>::Input;

inline PackedInput pack_input(DType dtype, const void* x, int64_t rows, int64_t d, float* scratch) {
  to_floats(dtype, x, 0, rows * d, scratch);
  return {scratch, rows};
}

// out[j] = the value at column 64 block + j, for j < 64.
inline void packed_values(const uint8_t* row, int32_t bits, int32_t group, int64_t d, int64_t block,
                          float* out) {
  const int64_t blocks = packed_blocks(d), groups = kPackedBlock / group;
  const uint8_t* codes = row + block * 8 * bits;
  const Half* scales = reinterpret_cast<const Half*>(row + blocks * 8 * bits) + block * groups;
  const Half* offsets = scales + blocks * groups;
  for (int t = 0; t < 4; ++t)
    for (int w = 0; w < 16; ++w) {
      int code;
      const int nibble = codes[2 * w + t / 2] >> 4 * (t % 2) & 15;
      const auto pair = [&](int from) { return codes[from + w] >> 2 * t & 3; };
      const auto top = [&](int from) { return codes[from + 2 * t + w / 8] >> w % 8 & 1; };
      switch (bits) {
        case 3: code = pair(0) | top(16) << 2; break;
        case 4: code = nibble; break;
        case 5: code = nibble | top(32) << 4; break;
        case 6: code = nibble | pair(32) << 4; break;
        default: code = codes[32 * (t / 2) + 2 * w + t % 2];
      }
      const int64_t g = 16 * t / group;
      out[16 * t + w] = to_float(scales[g]) * static_cast<float>(code) + to_float(offsets[g]);
    }
}

// out[r] = row . x[r].
inline void packed_dot(const uint8_t* row, int32_t bits, int32_t group, const PackedInput& x,
                       int64_t d, float* out) {
  std::fill(out, out + x.rows, 0.0f);
  for (int64_t b = 0; b < packed_blocks(d); ++b) {
    float w[kPackedBlock];
    packed_values(row, bits, group, d, b, w);
    const int64_t first = b * kPackedBlock, n = std::min(kPackedBlock, d - first);
    for (int64_t r = 0; r < x.rows; ++r) {
      Vec acc = zero();
      int64_t j = 0;
      for (; j + kLanes <= n; j += kLanes)
        acc = fma(load(w + j), load(x.x + r * d + first + j), acc);
      out[r] += sum(acc);
      for (; j < n; ++j) out[r] += w[j] * x.x[r * d + first + j];
    }
  }
}

// acc[r] += sum over n < kGroup of values[n * count + r] * rows[n], for r < count.
inline void packed_axpy(const uint8_t* const* rows, int32_t bits, int32_t group,
                        const float* values, int64_t count, int64_t d, float* acc) {
  for (int k = 0; k < kGroup; ++k)
    for (int64_t b = 0; b < packed_blocks(d); ++b) {
      float w[kPackedBlock];
      packed_values(rows[k], bits, group, d, b, w);
      const int64_t first = b * kPackedBlock, n = std::min(kPackedBlock, d - first);
      for (int64_t r = 0; r < count; ++r) {
        const float* own = w;
        axpy_rows<1, false, float>(&own, values + k * count + r, n, &own, acc + r * d + first);
      }
    }
}
