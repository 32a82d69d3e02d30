// qRIDA: a low-bit shadow of gate and up names the active neurons, then the exact MLP runs on them.

template <class Rows>
void shadow_mlp_of(const Mlp& mlp, const Shadow& shadow, const float* epsilon, int64_t k,
                   int32_t* counts, float* workspace) {
  const int64_t d = mlp.d, f = mlp.f;
  const int64_t bytes = f * shadow_record_bytes(d, shadow.bits_gate, shadow.bits_up);
  const Scratch scratch(workspace, mlp.rows, d, f);
  for (int64_t first = 0; first < mlp.rows; first += kMaxRows) {
    const Matrices<Rows> m(mlp, first, scratch.input);
    const QuantizedInput q =
        quantize_input(mlp.dtype, at(mlp.dtype, mlp.x, first * d), m.rows, d, scratch.shadow_input);
    int32_t count = 0;
#pragma omp parallel num_threads(threads_for(bytes))
    {
      score_part(mlp, shadow, q, split(f, thread_id(), team_size()), scratch.scores);
#pragma omp barrier
#pragma omp single
      {
        for (int64_t r = 0; r < m.rows; ++r)
          counts[first + r] =
              mark_row(scratch.scores + r * f, f, epsilon, k, scratch.orders, scratch.mask + r * f);
        count = unite(scratch.mask, m.rows, f, scratch.indices);
      }  // the implied barrier shows count and indices to the team
      const ActiveSet set{scratch.indices, nullptr, m.rows > 1 ? scratch.mask : nullptr};
      given_part(m, first, set, count, scratch.accumulators);
    }
  }
}

void shadow_mlp(const Mlp& mlp, const Shadow& shadow, const float* epsilon, int64_t k,
                int32_t* counts, float* workspace) {
  with_rows(mlp.up, mlp.dtype, [&](auto tag) {
    shadow_mlp_of<typename decltype(tag)::type>(mlp, shadow, epsilon, k, counts, workspace);
  });
}
