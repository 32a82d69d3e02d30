// qRIDA: a low-bit shadow of gate and up names each row's tiers, then the exact MLP runs on the
// first, and the second adds the shadow's own values.

// The rest of the exact tier (see NoRest): what the shadow's scores stand for.
struct Estimates {
  const uint8_t* mask;     // [rows, f]
  const float* scores;     // [rows, f], with signs
  const float* inverse;    // [f]
  const int32_t* neurons;  // ascending: estimated in some row and exact in none
  int64_t count, f;

  bool in_set(uint8_t mask) const { return mask == kExact; }
  float value(int64_t r, int64_t i) const {
    return mask[r * f + i] == kEstimated ? scores[r * f + i] * inverse[i] : 0.0f;
  }
  template <class Rows>
  void add(const Matrices<Rows>& m, int part, int parts, float* acc) const {
    constexpr int64_t kChunk = 256;  // whose values lie on the stack
    const Range mine = split(count, part, parts);
    for (int64_t k = mine.begin; k < mine.end; k += kChunk) {
      const int64_t n = std::min(kChunk, mine.end - k);
      float values[kChunk * kMaxRows];
      for (int64_t j = 0; j < n; ++j)
        for (int64_t r = 0; r < m.rows; ++r) values[j * m.rows + r] = value(r, neurons[k + j]);
      const auto neuron = [&](int64_t j) -> int64_t { return neurons[k + j]; };
      m.down_t.template accumulate<true>(neuron, n, values, m.rows, acc);
    }
  }
};

template <class Rows>
void shadow_mlp_of(const Mlp& mlp, const Shadow& shadow, const Tiers& tiers, int32_t* counts,
                   float* workspace) {
  const int64_t d = mlp.d, f = mlp.f;
  const int64_t bytes = f * shadow_record_bytes(d, shadow.bits_gate, shadow.bits_up);
  const float* const price = shadow.up_error ? tiers.epsilon : nullptr;
  const Scratch scratch(workspace, mlp.rows, d, f);
  for (int64_t first = 0; first < mlp.rows; first += kMaxRows) {
    const Matrices<Rows> m(mlp, first, scratch.input);
    const QuantizedInput q =
        quantize_input(mlp.dtype, at(mlp.dtype, mlp.x, first * d), m.rows, d, scratch.shadow_input);
    Counts count;
#pragma omp parallel num_threads(threads_for(bytes))
    {
      score_part(mlp, shadow, q, split(f, thread_id(), team_size()), scratch.scores, price,
                 scratch.mask);
#pragma omp barrier
#pragma omp single
      {
        for (int64_t r = 0; r < m.rows; ++r) {
          uint8_t* const mask = scratch.mask + r * f;
          if (!price) mark_row(scratch.scores + r * f, f, tiers, scratch.orders, mask);
          const Counts row = count_row(mask, f);
          counts[first + r] = row.exact;
          counts[mlp.rows + first + r] = row.estimated;
        }
        count = unite(scratch.mask, m.rows, f, scratch.indices, scratch.estimated);
      }  // the implied barrier shows counts and indices to the team
      const ActiveSet set{scratch.indices, nullptr, m.rows > 1 ? scratch.mask : nullptr};
      if (price || tiers.estimated > 0) {
        const Estimates rest{scratch.mask,      scratch.scores,  shadow.inverse,
                             scratch.estimated, count.estimated, f};
        given_part(m, first, set, count.exact, scratch.accumulators, rest);
      } else {
        given_part(m, first, set, count.exact, scratch.accumulators);
      }
    }
  }
}

void shadow_mlp(const Mlp& mlp, const Shadow& shadow, const Tiers& tiers, int32_t* counts,
                float* workspace) {
  with_rows(mlp.up, mlp.dtype, [&](auto tag) {
    shadow_mlp_of<typename decltype(tag)::type>(mlp, shadow, tiers, counts, workspace);
  });
}
