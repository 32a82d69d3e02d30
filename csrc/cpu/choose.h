// From scores to the active set: over a threshold, or the k largest.

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
