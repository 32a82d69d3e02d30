// The MLP whose active set follows from a threshold on the way. A thread owns its neurons from
// the first projection to the last, so one barrier is all it takes.

// Neurons whose deciding projections run before the survivors' remaining rows are fetched.
constexpr int64_t kTile = 32;

// a[k] *= up_i . x for i = neurons[k], where the row has not switched it off already.
template <class Rows>
MOYU_INLINE void multiply_up(const Matrices<Rows>& m, const int64_t* neurons, int64_t count,
                             float* a) {
  for (int64_t k = 0; k < count; ++k) {
    const int64_t i = neurons[k], soon = neurons[std::min(k + 2, count - 1)];
    float u[kMaxRows];
    m.up.dot(i, m.x, soon, m.down_t.row(i), u);
    for (int64_t r = 0; r < m.rows; ++r) {
      float& ar = a[k * m.rows + r];
      if (ar != 0.0f) ar *= u[r] + m.up_bias(i);
    }
  }
}

template <class Rows>
void threshold_mlp_of(const Mlp& mlp, Plan plan, const float* scale, float epsilon, int32_t* counts,
                      float* workspace) {
  const int64_t d = mlp.d, f = mlp.f;
  const bool gate_decides = plan == Plan::kGate && mlp.gate;
  const Scratch scratch(workspace, mlp.rows, d);
  float* const accumulators = scratch.accumulators;
  for (int64_t first = 0; first < mlp.rows; first += kMaxRows) {
    const Matrices<Rows> m(mlp, first, scratch.input);
    int32_t* const active = counts + first;
    std::fill(active, active + m.rows, 0);
#pragma omp parallel num_threads(threads_for(m.bytes(f)))
    {
      const int parts = team_size(), part = thread_id();
      const Range mine = split(f, part, parts);
      float* acc = accumulators + part * m.rows * d;
      std::fill(acc, acc + m.rows * d, 0.0f);
      int32_t my_active[kMaxRows] = {};
      for (int64_t begin = mine.begin; begin < mine.end; begin += kTile) {
        const int64_t end = std::min(begin + kTile, mine.end);
        float a[kTile * kMaxRows];
        int64_t neurons[kTile], n = 0;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t soon = std::min(i + 2, mine.end - 1);
          float* const ai = a + n * m.rows;
          if (gate_decides) {
            m.gate.dot(i, m.x, soon, nullptr, ai);
            for (int64_t r = 0; r < m.rows; ++r)
              ai[r] = activate(mlp.activation, ai[r] + m.gate_bias(i));
          } else {
            neuron_activation<false>(m, i, soon, ai);
          }
          bool any = false;
          for (int64_t r = 0; r < m.rows; ++r) {
            if (std::fabs(ai[r]) * (scale ? scale[i] : 1.0f) < epsilon) {
              ai[r] = 0.0f;
            } else {
              any = true;
              ++my_active[r];
            }
          }
          if (any) neurons[n++] = i;
        }
        const auto neuron = [&](int64_t k) { return neurons[k]; };
        if (gate_decides) {
          multiply_up(m, neurons, n, a);
          m.down_t.template accumulate<false>(neuron, n, a, m.rows, acc);
        } else {
          m.down_t.template accumulate<true>(neuron, n, a, m.rows, acc);
        }
      }
#pragma omp critical(moyu_counts)
      for (int64_t r = 0; r < m.rows; ++r) active[r] += my_active[r];
#pragma omp barrier
      reduce(accumulators, parts, m.rows, d, split(d, part, parts, 16), mlp.dtype, mlp.down_bias,
             at(mlp.dtype, mlp.out, first * d));
    }
  }
}

void threshold_mlp(const Mlp& mlp, Plan plan, const float* scale, const float* epsilon,
                   int32_t* counts, float* workspace) {
  with_rows(mlp.up, mlp.dtype, [&](auto tag) {
    threshold_mlp_of<typename decltype(tag)::type>(mlp, plan, scale, *epsilon, counts, workspace);
  });
}
