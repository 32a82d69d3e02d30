// The scaled sum of the active rows of a neuron-major matrix: the down projection.

template <class T>
void gather_gemv_t_of(const float* values, const T* weight_t, const T* bias, const int32_t* indices,
                      int64_t count, T* out, int64_t rows, int64_t d, int64_t capacity,
                      float* workspace) {
  float* accumulators = accumulators_in(workspace, d);
  for (int64_t first = 0; first < rows; first += kMaxRows) {
    const int64_t block = std::min(kMaxRows, rows - first);
#pragma omp parallel num_threads(threads_for(count * d * int64_t(sizeof(T))))
    {
      const int parts = team_size(), part = thread_id();
      const Range mine = split(count, part, parts);
      float* acc = accumulators + part * block * d;
      std::fill(acc, acc + block * d, 0.0f);
      constexpr int64_t kTile = 64;  // values lie per row, the sums want them per neuron
      for (int64_t begin = mine.begin; begin < mine.end; begin += kTile) {
        const int64_t n = std::min(kTile, mine.end - begin);
        const int32_t* active = indices + begin;
        float tile[kTile * kMaxRows];
        for (int64_t k = 0; k < n; ++k)
          for (int64_t r = 0; r < block; ++r)
            tile[k * block + r] = values[(first + r) * capacity + begin + k];
        accumulate<true>(
            weight_t, [=](int64_t k) { return int64_t(active[k]); }, n, tile, block, d, acc);
      }
#pragma omp barrier
      reduce(accumulators, parts, block, d, split(d, part, parts, 16), bias, out + first * d);
    }
  }
}

void gather_gemv_t(const float* values, const void* weight_t, const void* bias,
                   const int32_t* indices, const int32_t* count, void* out, int64_t rows, int64_t d,
                   int64_t capacity, DType dtype, float* workspace) {
  with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    gather_gemv_t_of(values, static_cast<const T*>(weight_t), static_cast<const T*>(bias), indices,
                     *count, static_cast<T*>(out), rows, d, capacity, workspace);
  });
}
