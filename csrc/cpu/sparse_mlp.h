// The MLP over a set known in advance: gate, up and down touch the active rows only.

// The matrices of one MLP in their kind of rows, and up to kMaxRows input rows.
template <class Rows>
struct Matrices {
  const Rows gate, up, down_t;
  const Mlp& mlp;
  int64_t rows, d;
  typename Rows::Input x;

  Matrices(const Mlp& mlp, int64_t first, float* scratch)
      : gate(mlp.gate, mlp.d), up(mlp.up, mlp.d), down_t(mlp.down_t, mlp.d), mlp(mlp),
        rows(std::min(kMaxRows, mlp.rows - first)), d(mlp.d),
        x(Rows::input(mlp.dtype, at(mlp.dtype, mlp.x, first * d), rows, d, scratch)) {}

  // Bytes of n neurons in all matrices.
  int64_t bytes(int64_t n) const { return n * (gate.bytes() + up.bytes() + down_t.bytes()); }
  float gate_bias(int64_t i) const { return bias_at(mlp.dtype, mlp.gate_bias, i); }
  float up_bias(int64_t i) const { return bias_at(mlp.dtype, mlp.up_bias, i); }
};

// a[r] = act(gate_i . x[r]) * (up_i . x[r]), or act(up_i . x[r]) without a gate. On the way it
// fetches the same matrices' rows of neuron `soon`, and the row down_i where kDown.
template <bool kDown, class Rows>
MOYU_INLINE void neuron_activation(const Matrices<Rows>& m, int64_t i, int64_t soon, float* a) {
  const char* const down = kDown ? m.down_t.row(i) : nullptr;
  if (m.gate) {
    float h[kMaxRows];
    m.gate.dot(i, m.x, soon, down, h);
    m.up.dot(i, m.x, soon, nullptr, a);
    for (int64_t r = 0; r < m.rows; ++r)
      a[r] = activate(m.mlp.activation, h[r] + m.gate_bias(i)) * (a[r] + m.up_bias(i));
  } else {
    m.up.dot(i, m.x, soon, down, a);
    for (int64_t r = 0; r < m.rows; ++r) a[r] = activate(m.mlp.activation, a[r] + m.up_bias(i));
  }
}

// What a row gets of the neurons that are not in its set: nothing.
struct NoRest {
  bool in_set(uint8_t mask) const { return mask != 0; }
  float value(int64_t, int64_t) const { return 0.0f; }
  template <class Rows>
  void add(const Matrices<Rows>&, int, int, float*) const {}
};

// One thread's part of the MLP of m's rows over a set, whose mask is of these rows; every thread of
// the team calls it with the same arguments. accumulators: rows * d floats per thread.
template <class Rows, class Rest = NoRest>
inline void given_part(const Matrices<Rows>& m, int64_t first, const ActiveSet& set, int64_t count,
                       float* accumulators, const Rest& rest = {}) {
  const Mlp& mlp = m.mlp;
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
          if (!rest.in_set(set.mask[r * mlp.f + i])) aj[r] = rest.value(r, i);
    }
    const auto in_group = [&](int64_t j) { return neuron(k + j); };
    m.down_t.template accumulate<false>(in_group, n, a, m.rows, acc);
  }
  rest.add(m, part, parts, acc);
#pragma omp barrier
  reduce(accumulators, parts, m.rows, d, split(d, part, parts, 16), mlp.dtype, mlp.down_bias,
         at(mlp.dtype, mlp.out, first * d));
}

template <class Rows>
void sparse_mlp_of(const Mlp& mlp, const ActiveSet& set, float* workspace) {
  const int64_t count = set.count ? *set.count : mlp.f;
  const Scratch scratch(workspace, mlp.rows, mlp.d);
  for (int64_t first = 0; first < mlp.rows; first += kMaxRows) {
    const Matrices<Rows> m(mlp, first, scratch.input);
    ActiveSet part = set;
    if (set.mask) part.mask += first * mlp.f;
#pragma omp parallel num_threads(threads_for(m.bytes(count)))
    given_part(m, first, part, count, scratch.accumulators);
  }
}

void sparse_mlp(const Mlp& mlp, const ActiveSet& set, float* workspace) {
  with_rows(mlp.up, mlp.dtype,
            [&](auto tag) { sparse_mlp_of<typename decltype(tag)::type>(mlp, set, workspace); });
}
