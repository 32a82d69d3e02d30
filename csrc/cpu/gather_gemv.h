// Dot products of the active rows of a weight matrix (all of them where indices is null) with the
// input.

template <class T>
void gather_gemv_of(const T* x, const T* weight, const T* bias, const int32_t* indices,
                    int64_t count, float* out, int64_t rows, int64_t d, int64_t capacity,
                    float* workspace) {
  for (int64_t first = 0; first < rows; first += kMaxRows) {
    const int64_t block = std::min(kMaxRows, rows - first);
    const InputOf<T>* input = prepare_input(x + first * d, block * d, workspace);
    float* block_out = out + first * capacity;
#pragma omp parallel num_threads(threads_for(count * d * int64_t(sizeof(T))))
    {
      const Range mine = split(count, thread_id(), team_size());
      const auto neuron = [=](int64_t k) { return indices ? int64_t{indices[k]} : k; };
      float dots[kMaxRows];
      for (int64_t k = mine.begin; k < mine.end; ++k) {
        const T* row = weight + neuron(k) * d;
        const T* ahead = weight + neuron(std::min(k + 2, mine.end - 1)) * d;
        dot<T>(row, input, block, d, ahead, nullptr, dots);
        for (int64_t r = 0; r < block; ++r)
          block_out[r * capacity + k] = dots[r] + bias_at(bias, neuron(k));
      }
    }
    for (int64_t r = 0; r < block; ++r)
      std::fill(block_out + r * capacity + count, block_out + (r + 1) * capacity, 0.0f);
  }
}

void gather_gemv(const void* x, const void* weight, const void* bias, const int32_t* indices,
                 const int32_t* count, float* out, int64_t rows, int64_t d, int64_t capacity,
                 DType dtype, float* workspace) {
  with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    gather_gemv_of(static_cast<const T*>(x), static_cast<const T*>(weight),
                   static_cast<const T*>(bias), indices, count ? *count : capacity, out, rows, d,
                   capacity, workspace);
  });
}
