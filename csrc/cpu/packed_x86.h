// Rows of low-bit codes on x86: the dot product of one with the input, the scaled sum of a few, and
// their values. A weight is scale * code + offset, so that per group of columns
//   row . x       = scale * (codes . x) + offset * sum(x)
//   sum_n a_n w_n = sum_n (a_n scale_n) codes_n + sum_n a_n offset_n
// with x, or the a_n scale_n, in int16 steps of their own largest: the products are integers.

constexpr float kWordMax = 32767.0f;

// Up to kMaxRows input rows in int16, one step per block of 64; what lies behind d is zero.
struct PackedInput {
  const int16_t* x;    // [rows, blocks, 64]
  const float* scale;  // [2][rows, padded]: per group of 64, then of 32
  const float* sum;    // the same: step * sum of the words
  int64_t rows, blocks, padded;

  const float* of(const float* all, bool halves, int64_t r) const {
    return halves ? all + (rows + 2 * r) * padded : all + r * padded;
  }
};

inline PackedInput pack_input(DType dtype, const void* x, int64_t rows, int64_t d, float* scratch) {
  const int64_t blocks = packed_blocks(d), padded = (blocks + 7) / 8 * 8;
  float* scale = scratch;
  float* sum = scale + 3 * rows * padded;
  int16_t* words = reinterpret_cast<int16_t*>(sum + 3 * rows * padded);
  std::fill(scale, sum + 3 * rows * padded, 0.0f);
  const Words ones = pair_everywhere(0x00010001);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t n = std::min(kPackedBlock, d - b * kPackedBlock);
      alignas(32) float values[kPackedBlock];
      if (n < kPackedBlock) std::fill(values, values + kPackedBlock, 0.0f);
      to_floats(dtype, x, r * d + b * kPackedBlock, n, values);
      Vec8 largest = broadcast8(0.0f), finite = largest;  // finite stays 0 unless a value is not
      for (int j = 0; j < kPackedBlock; j += 8) {
        const Vec8 v = load8(values + j);
        largest = max8(largest, abs8(v));
        finite = fma8(v, broadcast8(0.0f), finite);
      }
      const float most = most8(largest);
      // A NaN or an infinity makes the step NaN, and so every product. Steps below 2^-126 are 0.
      const float step = most / kWordMax + sum8(finite), inverse = step >= 1.2e-38f ? 1 / step : 0;
      int16_t* out = words + (r * blocks + b) * kPackedBlock;
      Sums half[2] = {sums_zero(), sums_zero()};
      for (int j = 0; j < kPackedBlock; j += 16) {
        const Vec8 scale8 = broadcast8(inverse);
        // Saturating, where the rounded inverse carries the largest over 32767.
        const Words w = words_of(round8(mul8(load8(values + j), scale8)),
                                 round8(mul8(load8(values + j + 8), scale8)));
        store_words(out + j, w);
        half[j / 32] = multiply_pairs(half[j / 32], w, ones);
      }
      const float sums[2] = {sum8(to_vec8(half[0])), sum8(to_vec8(half[1]))};
      for (int h = 0; h < 2; ++h) {
        scale[rows * padded + r * 2 * padded + 2 * b + h] = step;
        sum[rows * padded + r * 2 * padded + 2 * b + h] = step * sums[h];
      }
      scale[r * padded + b] = step;
      sum[r * padded + b] = step * (sums[0] + sums[1]);
    }
  return {words, scale, sum, rows, blocks, padded};
}

// Eight of the n numbers from p on, zeros behind them.
MOYU_NOINLINE Vec8 load8_some(const Half* p, int64_t n) {
  Half some[8] = {};
  std::memcpy(some, p, static_cast<size_t>(n) * sizeof(Half));
  return load8(some);
}
MOYU_INLINE Vec8 load8_of(const Half* p, int64_t n) { return n >= 8 ? load8(p) : load8_some(p, n); }

// Where the codes, scales and offsets of a row lie.
struct PackedRow {
  const uint8_t* codes;
  int64_t blocks, block_bytes, per_block;  // groups of 32 or 64 columns: 2 or 1 a block

  PackedRow(const uint8_t* row, int32_t bits, int32_t group, int64_t blocks)
      : codes(row), blocks(blocks), block_bytes(8 * bits), per_block(kPackedBlock / group) {}
  int64_t groups() const { return blocks * per_block; }
  const Half* scales() const { return reinterpret_cast<const Half*>(codes + blocks * block_bytes); }
  const Half* offsets() const { return scales() + groups(); }
  int64_t bytes() const { return blocks * (block_bytes + 4 * per_block); }
};

// Calls body with the number of bits.
template <class Body>
MOYU_INLINE void with_bits(int32_t bits, Body body) {
  switch (bits) {
    case 3: return body(Number<3>{});
    case 4: return body(Number<4>{});
    case 5: return body(Number<5>{});
    case 6: return body(Number<6>{});
    default: return body(Number<8>{});
  }
}

// out[r] = row . x[r0 + r] for R rows, fetching the lines of two rows needed soon.
template <int kBits, int R>
MOYU_INLINE void packed_dot_rows(const PackedRow& row, const PackedInput& x, int64_t r0,
                                 const char* ahead, const char* ahead2, float* out) {
  constexpr int64_t kBytes = 8 * kBits;
  const bool halves = row.per_block == 2;
  Vec8 acc[R], offsets[R];
  const float *step[R], *sum[R];
  for (int r = 0; r < R; ++r) {
    acc[r] = offsets[r] = broadcast8(0.0f);
    step[r] = x.of(x.scale, halves, r0 + r);
    sum[r] = x.of(x.sum, halves, r0 + r);
  }
  float scale[R][16];
  for (int64_t first = 0; first < row.blocks; first += 8) {
    for (int64_t g = 0; g < row.per_block; ++g) {
      const int64_t at = first * row.per_block + 8 * g, left = row.groups() - at;
      if (left <= 0) break;
      const Vec8 s = load8_of(row.scales() + at, left), m = load8_of(row.offsets() + at, left);
      for (int r = 0; r < R; ++r) {
        store8(scale[r] + 8 * g, mul8(s, load8(step[r] + at)));
        offsets[r] = fma8(m, load8(sum[r] + at), offsets[r]);
      }
    }
    const int64_t n = std::min<int64_t>(8, row.blocks - first);
    for (int64_t b = 0; b < n; ++b) {
      const uint8_t* block = row.codes + (first + b) * kBytes;
      if (kBytes != 32 || b % 2 == 0) {  // a line at a time
        prefetch(ahead + (first + b) * kBytes);
        if (ahead2) prefetch(ahead2 + (first + b) * kBytes);
      }
      const Words c0 = codes16<kBits, 0>(block), c1 = codes16<kBits, 1>(block);
      const Words c2 = codes16<kBits, 2>(block), c3 = codes16<kBits, 3>(block);
      for (int r = 0; r < R; ++r) {
        const int16_t* w = x.x + ((r0 + r) * x.blocks + first + b) * kPackedBlock;
        const Sums one =
            multiply_pairs(multiply_pairs(sums_zero(), c0, load_words(w)), c1, load_words(w + 16));
        const Sums two = multiply_pairs(multiply_pairs(sums_zero(), c2, load_words(w + 32)), c3,
                                        load_words(w + 48));
        if (halves) {
          acc[r] = fma8(to_vec8(one), broadcast8(scale[r][2 * b]), acc[r]);
          acc[r] = fma8(to_vec8(two), broadcast8(scale[r][2 * b + 1]), acc[r]);
        } else {
          acc[r] = fma8(to_vec8(sums_add(one, two)), broadcast8(scale[r][b]), acc[r]);
        }
      }
    }
  }
  for (int64_t at = row.blocks * kBytes; at < row.bytes(); at += 64) {
    prefetch(ahead + at);
    if (ahead2) prefetch(ahead2 + at);
  }
  for (int r = 0; r < R; ++r) out[r] = sum8(add8(acc[r], offsets[r]));
}

// out[r] = row . x[r], fetching the lines of two rows needed soon.
MOYU_NOINLINE void packed_dot(const uint8_t* row, int32_t bits, int32_t group, const PackedInput& x,
                              const char* ahead, const char* ahead2, float* out) {
  const PackedRow packed(row, bits, group, x.blocks);
  with_bits(bits, [&](auto b) MOYU_LAMBDA_INLINE {
    int64_t r = 0;
    for (; r + 4 <= x.rows; r += 4)
      packed_dot_rows<b.value, 4>(packed, x, r, ahead, ahead2, out + r);
    for (; r < x.rows; ++r) packed_dot_rows<b.value, 1>(packed, x, r, ahead, ahead2, out + r);
  });
}

// The codes of one block of kGroup rows.
struct PackedTile {
  int16_t codes[kGroup][kPackedBlock];
};

MOYU_NOINLINE void read_tile(const uint8_t* const* rows, int32_t bits, int64_t block,
                             PackedTile* tile) {
  with_bits(bits, [&](auto b) MOYU_LAMBDA_INLINE {
    for (int n = 0; n < kGroup; ++n) {
      const uint8_t* codes = rows[n] + block * 8 * b.value;
      store_words(tile->codes[n], codes16<b.value, 0>(codes));
      store_words(tile->codes[n] + 16, codes16<b.value, 1>(codes));
      store_words(tile->codes[n] + 32, codes16<b.value, 2>(codes));
      store_words(tile->codes[n] + 48, codes16<b.value, 3>(codes));
    }
  });
}

// Two rows' coefficients a_n scale_n in a word each, in int16 steps of the largest of kGroup rows,
// and the sum of a_n offset_n: for 8 blocks of up to two groups.
struct PackedCoefficients {
  int32_t pairs[kGroup / 2][16];
  float step[16], offset[16];
};

MOYU_INLINE void coefficients(const uint8_t* const* rows, int32_t bits, int32_t group,
                              const float* values, int64_t stride, int64_t blocks, int64_t first,
                              PackedCoefficients* out) {
  const PackedRow shape(nullptr, bits, group, blocks);
  for (int64_t g = 0; g < shape.per_block; ++g) {
    const int64_t at = first * shape.per_block + 8 * g, left = shape.groups() - at;
    if (left <= 0) break;
    Vec8 largest = broadcast8(0.0f), sum = largest, finite = largest, c[kGroup];
    for (int n = 0; n < kGroup; ++n) {
      const PackedRow row(rows[n], bits, group, blocks);
      const Vec8 a = broadcast8(values[n * stride]);
      sum = fma8(a, load8_of(row.offsets() + at, left), sum);
      c[n] = mul8(a, load8_of(row.scales() + at, left));
      largest = max8(largest, abs8(c[n]));
      finite = fma8(c[n], broadcast8(0.0f), finite);  // stays 0 unless a value is not finite
    }
    const Vec8 inverse = over8(kWordMax, largest);
    for (int n = 0; n < kGroup; n += 2)
      store_sums(out->pairs[n / 2] + 8 * g,
                 word_pairs(round8(mul8(c[n], inverse)), round8(mul8(c[n + 1], inverse))));
    store8(out->step + 8 * g, fma8(largest, broadcast8(1.0f / kWordMax), finite));
    store8(out->offset + 8 * g, sum);
  }
}

// The codes of block `block` of two rows by turns, elements 16t .. 16t + 15: those of lanes 0..3 and
// 8..11 in low, the others in high (as `interleave` has them).
template <int kBits>
struct RowPair {
  Words low, high, low2, high2;
  const uint8_t *a, *b;

  MOYU_INLINE RowPair(const uint8_t* a_codes, const uint8_t* b_codes) : a(a_codes), b(b_codes) {
    if constexpr (kBits != 3) interleave(load_words(a), load_words(b), &low, &high);
    if constexpr (kBits == 8) interleave(load_words(a + 32), load_words(b + 32), &low2, &high2);
    if constexpr (kBits == 6) interleave(widen_bytes(a + 32), widen_bytes(b + 32), &low2, &high2);
  }

  template <int t>
  MOYU_INLINE void codes(Words* even, Words* odd) const {
    if constexpr (kBits == 8) {
      *even = word_bits<8 * (t % 2), 8, 0>(t < 2 ? low : low2);
      *odd = word_bits<8 * (t % 2), 8, 0>(t < 2 ? high : high2);
    } else if constexpr (kBits == 4 || kBits == 6) {
      *even = word_bits<4 * t, 4, 0>(low);
      *odd = word_bits<4 * t, 4, 0>(high);
      if constexpr (kBits == 6) {
        *even = both_words(*even, word_bits<2 * t, 2, 4>(low2));
        *odd = both_words(*odd, word_bits<2 * t, 2, 4>(high2));
      }
    } else {
      interleave(codes16<kBits, t>(a), codes16<kBits, t>(b), even, odd);
    }
  }
};

// Elements 16t .. 16t + 15 of interleaved words of 4 or 8 bits, times kCodeFactor: a mask alone where
// the products still fit.
template <int kBits, int t>
MOYU_INLINE Words masked_codes(Words words) {
  if constexpr (kBits == 8) return word_bits<8 * (t % 2), 8, 0>(words);
  if constexpr (kBits == 4 && t == 3) return word_bits<12, 4, 0>(words);
  return word_bits<4 * t, 4, 4 * t>(words);
}
template <int kBits, int t>
constexpr float kCodeFactor = kBits == 4 && t == 1   ? 16.0f
                              : kBits == 4 && t == 2 ? 256.0f
                                                     : 1.0f;

// to[0 .. 15] += step * sum over n < kGroup of pairs[n] * codes + offset.
template <int kBits, int t>
MOYU_INLINE void axpy_words(const Words* low_words, const Words* high_words,
                            const PackedCoefficients& own, int64_t g, float* to) {
  Sums low = sums_zero(), high = low, one, two;
#pragma GCC unroll 4
  for (int k = 0; k < kGroup / 2; ++k) {
    const Words pair = pair_everywhere(own.pairs[k][g]);
    low = multiply_pairs(low, masked_codes<kBits, t>(low_words[k]), pair);
    high = multiply_pairs(high, masked_codes<kBits, t>(high_words[k]), pair);
  }
  in_order(low, high, &one, &two);
  const Vec8 s = broadcast8(own.step[g] * (1.0f / kCodeFactor<kBits, t>));
  const Vec8 m = broadcast8(own.offset[g]);
  store8(to, fma8(to_vec8(one), s, add8(load8(to), m)));
  store8(to + 8, fma8(to_vec8(two), s, add8(load8(to + 8), m)));
}

// The same for a block of 64 columns: groups g and g2 of its halves.
template <int kBits>
MOYU_INLINE void axpy_block(const uint8_t* const* rows, int64_t at, const PackedCoefficients& own,
                            int64_t g, int64_t g2, float* to) {
  Words low[kGroup / 2], high[kGroup / 2];
  const auto read = [&](int64_t from) MOYU_LAMBDA_INLINE {
#pragma GCC unroll 4
    for (int k = 0; k < kGroup / 2; ++k)
      interleave(load_words(rows[2 * k] + from), load_words(rows[2 * k + 1] + from), low + k,
                 high + k);
  };
  read(at);
  axpy_words<kBits, 0>(low, high, own, g, to);
  axpy_words<kBits, 1>(low, high, own, g, to + 16);
  if constexpr (kBits == 8) read(at + 32);
  axpy_words<kBits, 2>(low, high, own, g2, to + 32);
  axpy_words<kBits, 3>(low, high, own, g2, to + 48);
}

// acc += sum over n < kGroup of values[n] * rows[n], for one row of input.
template <int kBits>
MOYU_INLINE void packed_axpy_one(const uint8_t* const* rows, int32_t group, const float* values,
                                 int64_t d, const char* const* ahead, float* acc) {
  constexpr int64_t kBytes = 8 * kBits;
  const int64_t blocks = packed_blocks(d), per_block = kPackedBlock / group;
  PackedCoefficients own;
  for (int64_t first = 0; first < blocks; first += 8) {
    coefficients(rows, kBits, group, values, 1, blocks, first, &own);
    const int64_t n = std::min<int64_t>(8, blocks - first);
    for (int64_t b = 0; b < n; ++b) {
      const int64_t at = (first + b) * kBytes, begin = (first + b) * kPackedBlock;
      if (ahead && (kBytes != 32 || b % 2 == 0))  // a line at a time
        for (int k = 0; k < kGroup; ++k) prefetch(ahead[k] + at);
      if constexpr (kBits == 4 || kBits == 8) {
        if (d - begin >= kPackedBlock) {
          const int64_t g = b * per_block;
          axpy_block<kBits>(rows, at, own, g, g + per_block - 1, acc + begin);
          continue;
        }
      }
      Sums low[4], high[4];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) low[t] = high[t] = sums_zero();
      const int64_t g = b * per_block, g2 = g + per_block - 1;
#pragma GCC unroll 4
      for (int k = 0; k < kGroup / 2; ++k) {
        const RowPair<kBits> pair(rows[2 * k] + at, rows[2 * k + 1] + at);
        const Words one = pair_everywhere(own.pairs[k][g]), two = pair_everywhere(own.pairs[k][g2]);
        Words even, odd;
        pair.template codes<0>(&even, &odd);
        low[0] = multiply_pairs(low[0], even, one);
        high[0] = multiply_pairs(high[0], odd, one);
        pair.template codes<1>(&even, &odd);
        low[1] = multiply_pairs(low[1], even, one);
        high[1] = multiply_pairs(high[1], odd, one);
        pair.template codes<2>(&even, &odd);
        low[2] = multiply_pairs(low[2], even, two);
        high[2] = multiply_pairs(high[2], odd, two);
        pair.template codes<3>(&even, &odd);
        low[3] = multiply_pairs(low[3], even, two);
        high[3] = multiply_pairs(high[3], odd, two);
      }
      float* to = acc + begin;
      float last[kPackedBlock];
      const int64_t left = d - begin;
      if (left < kPackedBlock) {
        std::fill(last, last + kPackedBlock, 0.0f);
        std::copy(to, to + left, last);
        to = last;
      }
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        Sums one, two;
        in_order(low[t], high[t], &one, &two);
        const int64_t own_group = t < 2 ? g : g2;
        const Vec8 s = broadcast8(own.step[own_group]), m = broadcast8(own.offset[own_group]);
        store8(to + 16 * t, fma8(to_vec8(one), s, add8(load8(to + 16 * t), m)));
        store8(to + 16 * t + 8, fma8(to_vec8(two), s, add8(load8(to + 16 * t + 8), m)));
      }
      if (left < kPackedBlock) std::copy(last, last + left, acc + begin);
    }
  }
}

// acc[r] += sum over n < kGroup of values[n * count + r] * rows[n], for r < count; ahead: rows to
// fetch, or null.
MOYU_NOINLINE void packed_axpy(const uint8_t* const* rows, int32_t bits, int32_t group,
                               const float* values, int64_t count, int64_t d,
                               const char* const* ahead, float* acc) {
  const int64_t blocks = packed_blocks(d), per_block = kPackedBlock / group;
  const int64_t bytes = packed_row_bytes(d, bits, group);
  if (count == 1)
    with_bits(bits, [&](auto b) MOYU_LAMBDA_INLINE {
      packed_axpy_one<b.value>(rows, group, values, d, ahead, acc);
    });
  PackedCoefficients factors[kMaxRows];
  PackedTile tile;
  for (int64_t first = count == 1 ? blocks : 0; first < blocks; first += 8) {
    for (int64_t r = 0; r < count; ++r)
      coefficients(rows, bits, group, values + r, count, blocks, first, factors + r);
    const int64_t n = std::min<int64_t>(8, blocks - first);
    for (int64_t b = 0; b < n; ++b) {
      read_tile(rows, bits, first + b, &tile);
      if (ahead)
        for (int k = 0; k < kGroup; ++k) prefetch(ahead[k] + (first + b) * 8 * bits);
      for (int t = 0; t < 4; ++t) {
        const int64_t g = b * per_block + 16 * t / group;
        const int64_t begin = (first + b) * kPackedBlock + 16 * t, left = d - begin;
        if (left <= 0) break;
        Words even[kGroup / 2], odd[kGroup / 2];
#pragma GCC unroll 4
        for (int k = 0; k < kGroup / 2; ++k)
          interleave(load_words(tile.codes[2 * k] + 16 * t),
                     load_words(tile.codes[2 * k + 1] + 16 * t), even + k, odd + k);
        for (int64_t r = 0; r < count; ++r) {
          const PackedCoefficients& own = factors[r];
          Sums low = sums_zero(), high = low, one, two;
#pragma GCC unroll 4
          for (int k = 0; k < kGroup / 2; ++k) {
            const Words pair = pair_everywhere(own.pairs[k][g]);
            low = multiply_pairs(low, even[k], pair);
            high = multiply_pairs(high, odd[k], pair);
          }
          in_order(low, high, &one, &two);
          const Vec8 s = broadcast8(own.step[g]), m = broadcast8(own.offset[g]);
          float* to = acc + r * d + begin;
          if (left >= 16) {
            store8(to, fma8(to_vec8(one), s, add8(load8(to), m)));
            store8(to + 8, fma8(to_vec8(two), s, add8(load8(to + 8), m)));
          } else {
            float last[16];
            store8(last, fma8(to_vec8(one), s, m));
            store8(last + 8, fma8(to_vec8(two), s, m));
            for (int64_t j = 0; j < left; ++j) to[j] += last[j];
          }
        }
      }
    }
  }
  if (ahead)
    for (int k = 0; k < kGroup; ++k)
      for (int64_t at = blocks * 8 * bits; at < bytes; at += 64) prefetch(ahead[k] + at);
}

// out[j] = the value at column 64 block + j, for j < 64.
MOYU_NOINLINE void packed_values(const uint8_t* packed, int32_t bits, int32_t group, int64_t d,
                                 int64_t block, float* out) {
  const PackedRow row(packed, bits, group, packed_blocks(d));
  Words words[4];
  with_bits(bits, [&](auto b) MOYU_LAMBDA_INLINE {
    const uint8_t* codes = packed + block * 8 * b.value;
    words[0] = codes16<b.value, 0>(codes);
    words[1] = codes16<b.value, 1>(codes);
    words[2] = codes16<b.value, 2>(codes);
    words[3] = codes16<b.value, 3>(codes);
  });
  for (int t = 0; t < 4; ++t) {
    const int64_t g = block * row.per_block + 16 * t / group;
    const Vec8 s = broadcast8(to_float(row.scales()[g]));
    const Vec8 m = broadcast8(to_float(row.offsets()[g]));
    Vec8 first, second;
    words_to_vec8(words[t], &first, &second);
    store8(out + 16 * t, fma8(first, s, m));
    store8(out + 16 * t + 8, fma8(second, s, m));
  }
}
