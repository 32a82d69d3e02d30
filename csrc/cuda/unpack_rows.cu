// Packed rows (format: moyu.h) as plain numbers, for prompts: cuBLAS multiplies with those.
#include "common.cuh"

namespace moyu::cuda {

struct UnpackParams {
  const uint8_t* packed;  // [n, row_bytes]
  void* out;              // T [n, d]
  int64_t n, d, row_bytes, blocks;
  int bits, group;
};

// Element 16 t + w of a block.
__device__ __forceinline__ int code_at(const uint8_t* block, int bits, int t, int w) {
  const auto nibble = [&] { return block[2 * w + t / 2] >> 4 * (t % 2) & 15; };
  const auto pair = [&](int at) { return block[at + w] >> 2 * t & 3; };
  const auto top = [&](int at) { return block[at + 2 * t + w / 8] >> w % 8 & 1; };
  switch (bits) {
    case 3: return pair(0) | top(16) << 2;
    case 4: return nibble();
    case 5: return nibble() | top(32) << 4;
    case 6: return nibble() | pair(32) << 4;
    default: return block[32 * (t / 2) + 2 * w + t % 2];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) unpack_rows_kernel(UnpackParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t blocks = p.blocks, groups = kPackedBlock / p.group;
  const int64_t columns = blocks * kPackedBlock;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.n * columns;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / columns, column = i % columns, block = column / kPackedBlock;
    if (column >= p.d) continue;
    const uint8_t* const at = p.packed + row * p.row_bytes;
    const int e = static_cast<int>(column % kPackedBlock);
    const int code = code_at(at + block * 8 * p.bits, p.bits, e / 16, e % 16);
    const auto* const scales = reinterpret_cast<const __half*>(at + blocks * 8 * p.bits);
    const int64_t group = block * groups + e / p.group;
    const float value = __half2float(scales[group]) * static_cast<float>(code) +
                        __half2float(scales[blocks * groups + group]);
    from_float(value, static_cast<T*>(p.out) + row * p.d + column);
  }
}

void unpack_rows(const Matrix& packed, int64_t n, int64_t d, DType dtype, void* out, void* stream) {
  if (n == 0) return;
  const UnpackParams params{static_cast<const uint8_t*>(packed.rows),
                            out,
                            n,
                            d,
                            packed_row_bytes(d, packed.bits, packed.group),
                            packed_blocks(d),
                            packed.bits,
                            packed.group};
  const int64_t items = n * packed_blocks(d) * kPackedBlock;
  const int64_t blocks = std::min((items + kThreads - 1) / kThreads,
                                  int64_t{16} * current_device("unpack_rows").multiprocessors);
  const auto go = [&](auto kernel) {
    launch("unpack_rows", kernel, blocks, kThreads, stream, params);
  };
  switch (dtype) {
    case DType::kFloat32: return go(unpack_rows_kernel<float>);
    case DType::kFloat16: return go(unpack_rows_kernel<__half>);
    case DType::kBFloat16: return go(unpack_rows_kernel<__nv_bfloat16>);
  }
}

}  // namespace moyu::cuda
