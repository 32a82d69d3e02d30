// Packed rows as plain ones, for what many rows of input are multiplied with.

void unpack_rows(const Matrix& packed, int64_t n, int64_t d, DType dtype, void* out) {
  const int64_t stride = packed_row_bytes(d, packed.bits, packed.group);
#pragma omp parallel num_threads(threads_for(n * d * 4))
  {
    const Range mine = split(n, thread_id(), team_size());
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const uint8_t* row = static_cast<const uint8_t*>(packed.rows) + i * stride;
      for (int64_t b = 0; b < packed_blocks(d); ++b) {
        float values[kPackedBlock];
        packed_values(row, packed.bits, packed.group, d, b, values);
        const int64_t first = b * kPackedBlock;
        from_floats(values, std::min(kPackedBlock, d - first), dtype,
                    at(dtype, out, i * d + first));
      }
    }
  }
}
