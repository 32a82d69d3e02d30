// The MLP over a set known in advance: gate, up and down touch the active rows only.

// The matrices of one MLP in their element type, and up to kMaxRows input rows.
template <class T>
struct Matrices {
  const T *gate, *up, *down_t, *gate_bias, *up_bias;
  const InputOf<T>* x;
  int64_t rows, d;
  Activation activation;

  Matrices(const Mlp& mlp, int64_t first, float* workspace)
      : gate(static_cast<const T*>(mlp.gate)), up(static_cast<const T*>(mlp.up)),
        down_t(static_cast<const T*>(mlp.down_t)), gate_bias(static_cast<const T*>(mlp.gate_bias)),
        up_bias(static_cast<const T*>(mlp.up_bias)), rows(std::min(kMaxRows, mlp.rows - first)),
        d(mlp.d), activation(mlp.activation) {
    x = prepare_input(static_cast<const T*>(mlp.x) + first * d, rows * d, workspace);
  }
};

// a[r] = act(gate_i . x[r]) * (up_i . x[r]), or act(up_i . x[r]) without a gate. On the way it
// fetches the same matrices' rows of neuron `soon`, and the row down_i where kDown.
template <bool kDown, class T>
MOYU_INLINE void neuron_activation(const Matrices<T>& m, int64_t i, int64_t soon, float* a) {
  const T *const row = m.up + i * m.d, *const ahead = m.up + soon * m.d;
  const T* const down = kDown ? m.down_t + i * m.d : nullptr;
  if (m.gate) {
    float h[kMaxRows];
    dot(m.gate + i * m.d, m.x, m.rows, m.d, m.gate + soon * m.d, down, h);
    dot<T>(row, m.x, m.rows, m.d, ahead, nullptr, a);
    for (int64_t r = 0; r < m.rows; ++r)
      a[r] =
          activate(m.activation, h[r] + bias_at(m.gate_bias, i)) * (a[r] + bias_at(m.up_bias, i));
  } else {
    dot(row, m.x, m.rows, m.d, ahead, down, a);
    for (int64_t r = 0; r < m.rows; ++r)
      a[r] = activate(m.activation, a[r] + bias_at(m.up_bias, i));
  }
}

// One thread's part of the MLP of m's rows over a set, whose mask is of these rows; every thread of
// the team calls it with the same arguments. accumulators: rows * d floats per thread.
template <class T>
inline void given_part(const Mlp& mlp, const Matrices<T>& m, int64_t first, const ActiveSet& set,
                       int64_t count, float* accumulators) {
  const int64_t d = m.d;
  const int parts = team_size(), part = thread_id();
  const Range mine = split(count, part, parts);
  const auto neuron = [&](int64_t k) { return set.indices ? int64_t(set.indices[k]) : k; };
  float* acc = accumulators + part * m.rows * d;
  std::fill(acc, acc + m.rows * d, 0.0f);
  for (int64_t k = mine.begin; k < mine.end; k += kGroup) {
    const int64_t n = std::min<int64_t>(kGroup, mine.end - k);
    float a[kGroup * kMaxRows];
    for (int64_t j = 0; j < n; ++j) {
      const int64_t i = neuron(k + j);
      float* const aj = a + j * m.rows;
      neuron_activation<true>(m, i, neuron(std::min(k + j + 2, mine.end - 1)), aj);
      if (set.mask)
        for (int64_t r = 0; r < m.rows; ++r)
          if (!set.mask[r * mlp.f + i]) aj[r] = 0.0f;
    }
    const auto in_group = [&](int64_t j) { return neuron(k + j); };
    accumulate<false>(m.down_t, in_group, n, a, m.rows, d, acc);
  }
#pragma omp barrier
  reduce(accumulators, parts, m.rows, d, split(d, part, parts, 16),
         static_cast<const T*>(mlp.down_bias), static_cast<T*>(mlp.out) + first * d);
}

template <class T>
void sparse_mlp_of(const Mlp& mlp, const ActiveSet& set, float* workspace) {
  const int64_t count = set.count ? *set.count : mlp.f;
  const int64_t bytes = count * mlp.d * (mlp.gate ? 3 : 2) * int64_t(sizeof(T));
  float* accumulators = accumulators_in(workspace, mlp.d);
  for (int64_t first = 0; first < mlp.rows; first += kMaxRows) {
    const Matrices<T> m(mlp, first, workspace);
    ActiveSet part = set;
    if (set.mask) part.mask += first * mlp.f;
#pragma omp parallel num_threads(threads_for(bytes))
    given_part(mlp, m, first, part, count, accumulators);
  }
}

void sparse_mlp(const Mlp& mlp, const ActiveSet& set, float* workspace) {
  with_type(mlp.dtype,
            [&](auto tag) { sparse_mlp_of<typename decltype(tag)::type>(mlp, set, workspace); });
}
