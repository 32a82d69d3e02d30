// The scaled sum of the active rows of a neuron-major matrix: the down projection.

template <class Rows>
void gather_gemv_t_of(const float* values, const Rows weight_t, const void* bias,
                      const int32_t* indices, int64_t count, void* out, int64_t rows,
                      int64_t capacity, DType dtype, float* workspace) {
  const int64_t d = weight_t.d;
  const Scratch scratch(workspace, rows, d);
  for (int64_t first = 0; first < rows; first += kMaxRows) {
    const int64_t block = std::min(kMaxRows, rows - first);
#pragma omp parallel num_threads(threads_for(count* weight_t.bytes()))
    {
      const int parts = team_size(), part = thread_id();
      const Range mine = split(count, part, parts);
      float* acc = scratch.accumulators + part * block * d;
      std::fill(acc, acc + block * d, 0.0f);
      constexpr int64_t kTile = 64;  // values lie per row, the sums want them per neuron
      for (int64_t begin = mine.begin; begin < mine.end; begin += kTile) {
        const int64_t n = std::min(kTile, mine.end - begin);
        const auto neuron = [=](int64_t k) {
          return indices ? int64_t{indices[begin + k]} : begin + k;
        };
        float tile[kTile * kMaxRows];
        for (int64_t k = 0; k < n; ++k)
          for (int64_t r = 0; r < block; ++r)
            tile[k * block + r] = values[(first + r) * capacity + begin + k];
        weight_t.template accumulate<true>(neuron, n, tile, block, acc);
      }
#pragma omp barrier
      reduce(scratch.accumulators, parts, block, d, split(d, part, parts, 16), dtype, bias,
             at(dtype, out, first * d));
    }
  }
}

void gather_gemv_t(const float* values, const Matrix& weight_t, const void* bias,
                   const int32_t* indices, const int32_t* count, void* out, int64_t rows, int64_t d,
                   int64_t capacity, DType dtype, float* workspace) {
  with_rows(weight_t, dtype, [&](auto tag) {
    using Rows = typename decltype(tag)::type;
    gather_gemv_t_of(values, Rows(weight_t, d), bias, indices, count ? *count : capacity, out, rows,
                     capacity, dtype, workspace);
  });
}
