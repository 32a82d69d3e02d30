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

// Adds 1 to the mask of the k neurons with the largest scores.
inline void mark_top(const float* scores, int64_t f, int64_t k, uint32_t* scratch, uint8_t* mask) {
  if (k <= 0) return;
  int64_t ties = 0;
  const uint32_t kth = kth_order(scores, f, k, scratch, &ties);
  for (int64_t i = 0; i < f; ++i) {
    const uint32_t order = order_of(scores[i]);
    const bool tie = order == kth && ties > 0;
    ties -= tie;
    mask[i] = static_cast<uint8_t>(mask[i] + (order > kth || tie));
  }
}

// Marks a row's tiers in mask by its scores, whose signs do not matter.
inline void mark_row(const float* scores, int64_t f, const Tiers& tiers, uint32_t* scratch,
                     uint8_t* mask) {
  if (tiers.epsilon) {
    for (int64_t i = 0; i < f; ++i)
      mask[i] = std::fabs(scores[i]) < *tiers.epsilon ? uint8_t(0) : kExact;
    return;
  }
  std::fill(mask, mask + f, uint8_t(0));
  mark_top(scores, f, tiers.exact, scratch, mask);
  mark_top(scores, f, tiers.exact + tiers.estimated, scratch, mask);
}

struct Counts {
  int32_t exact = 0, estimated = 0;
};

inline Counts count_row(const uint8_t* mask, int64_t f) {
  Counts n;
  for (int64_t i = 0; i < f; ++i) {
    n.exact += mask[i] == kExact;
    n.estimated += mask[i] == kEstimated;
  }
  return n;
}

// exact = ascending neurons that some row computes exactly, estimated = those that others only
// estimate.
inline Counts unite(const uint8_t* mask, int64_t rows, int64_t f, int32_t* exact,
                    int32_t* estimated) {
  Counts n;
  for (int64_t i = 0; i < f; ++i) {
    uint8_t most = 0;
    for (int64_t r = 0; r < rows; ++r) most = std::max(most, mask[r * f + i]);
    exact[n.exact] = estimated[n.estimated] = static_cast<int32_t>(i);
    n.exact += most == kExact;
    n.estimated += most == kEstimated;
  }
  return n;
}
