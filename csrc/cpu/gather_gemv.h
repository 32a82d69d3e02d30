// Dot products of the active rows of a weight matrix (all of them where indices is null) with the
// input.

template <class Rows>
void gather_gemv_of(const void* x, const Rows weight, const void* bias, const int32_t* indices,
                    int64_t count, float* out, int64_t rows, int64_t capacity, DType dtype,
                    float* workspace) {
  const int64_t d = weight.d;
  const Scratch scratch(workspace, rows, d);
  for (int64_t first = 0; first < rows; first += kMaxRows) {
    const int64_t block = std::min(kMaxRows, rows - first);
    const auto input = Rows::input(dtype, at(dtype, x, first * d), block, d, scratch.input);
    float* block_out = out + first * capacity;
#pragma omp parallel num_threads(threads_for(count* weight.bytes()))
    {
      const Range mine = split(count, thread_id(), team_size());
      const auto neuron = [=](int64_t k) { return indices ? int64_t{indices[k]} : k; };
      float dots[kMaxRows];
      for (int64_t k = mine.begin; k < mine.end; ++k) {
        weight.dot(neuron(k), input, neuron(std::min(k + 2, mine.end - 1)), nullptr, dots);
        for (int64_t r = 0; r < block; ++r)
          block_out[r * capacity + k] = dots[r] + bias_at(dtype, bias, neuron(k));
      }
    }
    for (int64_t r = 0; r < block; ++r)
      std::fill(block_out + r * capacity + count, block_out + (r + 1) * capacity, 0.0f);
  }
}

void gather_gemv(const void* x, const Matrix& weight, const void* bias, const int32_t* indices,
                 const int32_t* count, float* out, int64_t rows, int64_t d, int64_t capacity,
                 DType dtype, float* workspace) {
  with_rows(weight, dtype, [&](auto tag) {
    using Rows = typename decltype(tag)::type;
    gather_gemv_of(x, Rows(weight, d), bias, indices, count ? *count : capacity, out, rows,
                   capacity, dtype, workspace);
  });
}
