// What a low-bit shadow of gate and up says of every neuron's norm: x in int8, dot products by the
// tensor cores on the packed codes. With a threshold, compared and compacted by the block that made them.
#include "shadow.cuh"
#include "tile.cuh"

namespace moyu::cuda {
namespace {

// ---- x to int8 ----

template <typename T>
struct QuantiseParams {
  const T* x;  // [rows, d]
  int8_t* out;
  float* step;
  float* offset;
  int64_t d, blocks, items;  // items: blocks of all rows
};

// One warp per row and 256 elements, 8 to a lane.
template <typename T>
__global__ void __launch_bounds__(kThreads) quantise_kernel(QuantiseParams<T> p) {
  constexpr int kEach = kShadowBlock / 32;
  wait_for_previous_kernel();
  allow_next_kernel();
  const int lane = threadIdx.x % 32;
  const int64_t item = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (item >= p.items) return;
  const int64_t row = item / p.blocks, first = item % p.blocks * kShadowBlock + lane * kEach;
  float v[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e)
    v[e] = first + e < p.d ? to_float(p.x[row * p.d + first + e]) : 0.0f;
  // Magnitudes order like their bits, infinity and NaN above all.
  int largest = 0;
#pragma unroll
  for (int e = 0; e < kEach; ++e)
    largest = max(largest, static_cast<int>(__float_as_uint(v[e]) & 0x7fffffffu));
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, offset));
  const float most = __uint_as_float(static_cast<unsigned>(largest));
  // A step of NaN makes every estimate NaN, which counts as active.
  const float step = largest < 0x7f800000 ? most / 127.0f : __uint_as_float(0x7fc00000u);
  int sum = 0;
  uint2 packed = {0, 0};
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    // Where step is subnormal v / step may exceed 127.
    const float code = step > 0.0f ? fminf(fmaxf(rintf(v[e] / step), -127.0f), 127.0f) : 0.0f;
    const int c = static_cast<int>(code);
    sum += c;
    (e < 4 ? packed.x : packed.y) |= (static_cast<unsigned>(c) & 0xffu) << (e % 4 * 8);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  *reinterpret_cast<uint2*>(p.out + item * kShadowBlock + lane * kEach) = packed;
  if (lane == 0) {
    p.step[item] = step;
    p.offset[item] = step * static_cast<float>(sum);
  }
}

// ---- the estimates ----

struct EstimateParams {
  const int8_t* x;    // [rows, blocks, kShadowBlock]
  const float* step;  // [rows, blocks]
  const float* offset;
  const uint8_t* records;
  const float* norms;
  const void* gate_bias;  // T [f] or null
  const void* up_bias;
  EstimateResult result;
  int64_t record_bytes, f;
  int blocks, bits_gate, bits_up, rows;
  DType dtype;
  Activation activation;
};

// A quarter's codes of one block as they are packed.
template <int kBits>
struct Codes {
  uint4 low;  // 1 bit: bits t; 2 and 3 bits: fields of 2 bits; 4 bits: nibbles of the first half
  uint4 top;  // 3 bits: bits t; 4 bits: nibbles of the second half
};

__device__ __forceinline__ uint4 shifted(const uint4& v, int by) {
  return {v.x >> by, v.y >> by, v.z >> by, v.w >> by};
}

template <int kBits>
__device__ __forceinline__ Codes<kBits> load_codes(const uint8_t* block, int quarter, bool wanted) {
  const auto load = [&](int at) {
    return load_streaming(reinterpret_cast<const uint4*>(block + at), wanted);
  };
  // Single bits: quarters 2 and 3 have the upper nibbles of the bytes of quarters 0 and 1.
  const int bit_at = 16 * (quarter % 2), bit_shift = 4 * (quarter / 2);
  if constexpr (kBits == 1) return {shifted(load(bit_at), bit_shift), {}};
  if constexpr (kBits == 2) return {load(16 * quarter), {}};
  if constexpr (kBits == 3) return {load(16 * quarter), shifted(load(64 + bit_at), bit_shift)};
  if constexpr (kBits == 4) return {load(16 * quarter), load(64 + 16 * quarter)};
}

__device__ __forceinline__ unsigned word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// total[i] += the products of the fields t of kFieldBits bits in each byte with x[t], for t from
// kFirst on. Fields are not shifted down: the sums are, which is exact.
template <int kFieldBits, int kFields, int kFirst>
__device__ __forceinline__ void add_fields(const uint4& low_neuron, const uint4& high_neuron,
                                           const uint4 (&x)[4], int times, int (&total)[4]) {
#pragma unroll
  for (int t = 0; t < kFields; ++t) {
    const unsigned field = ((1u << kFieldBits) - 1) * 0x01010101u << (kFieldBits * t);
    int sums[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i += 2)
      mma_bytes(sums,
                {word(low_neuron, i) & field, word(high_neuron, i) & field,
                 word(low_neuron, i + 1) & field, word(high_neuron, i + 1) & field},
                {word(x[kFirst + t], i), word(x[kFirst + t], i + 1)});
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += times * (sums[i] >> (kFieldBits * t));
  }
}

template <int kBits>
__device__ __forceinline__ void add_codes(const Codes<kBits>& low_neuron,
                                          const Codes<kBits>& high_neuron, const uint4 (&x)[4],
                                          int (&total)[4]) {
  if constexpr (kBits == 1) add_fields<1, 4, 0>(low_neuron.low, high_neuron.low, x, 1, total);
  if constexpr (kBits == 2 || kBits == 3)
    add_fields<2, 4, 0>(low_neuron.low, high_neuron.low, x, 1, total);
  if constexpr (kBits == 3) add_fields<1, 4, 0>(low_neuron.top, high_neuron.top, x, 4, total);
  if constexpr (kBits == 4) {
    add_fields<4, 2, 0>(low_neuron.low, high_neuron.low, x, 1, total);
    add_fields<4, 2, 2>(low_neuron.top, high_neuron.top, x, 1, total);
  }
}

// Where a matrix's codes and scales begin in a neuron's record.
struct Place {
  int codes, scales;
};

// Into sums, matrices from `first_matrix` on: dot products of a tile's n neurons, whose records begin
// at `records`, with all rows. As for packed rows: 16 neurons at a time, a warp an even share of the
// blocks, lane 4 g + q the neurons g and g + 8, quarter q, and of the sums the rows 2 q and 2 q + 1.
template <int kBits, int kSome, int kMatrices, int kRows>
__device__ __forceinline__ void shadow_dots(const EstimateParams& p, const uint8_t* records,
                                            const Place (&places)[kSome], int first_matrix, int n,
                                            TileSums<kMatrices, kRows>& sums) {
  constexpr float kZero = ((1 << kBits) - 1) * 0.5f;
  constexpr int kAhead = kBits <= 2 ? 2 : 1;  // blocks whose loads are in flight together
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int begin = p.blocks * warp / kWarps, end = p.blocks * (warp + 1) / kWarps;
  for (int j0 = 0; j0 < n; j0 += 16) {
    bool wanted[2];
    const uint8_t* record[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      wanted[h] = j0 + g + 8 * h < n;
      record[h] = records + min(j0 + g + 8 * h, n - 1) * p.record_bytes;
    }
    float acc[kSome][4] = {};
    for (int block0 = begin; block0 < end; block0 += kAhead) {
      Codes<kBits> codes[kAhead][kSome][2];
      uint32_t scale[kAhead][kSome][2];
#pragma unroll
      for (int b = 0; b < kAhead; ++b)
#pragma unroll
        for (int m = 0; m < kSome; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            codes[b][m][h] =
                load_codes<kBits>(record[h] + places[m].codes + (block0 + b) * 32 * kBits, q,
                                  wanted[h] && block0 + b < end);
#pragma unroll
      for (int b = 0; b < kAhead; ++b)
#pragma unroll
        for (int m = 0; m < kSome; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            scale[b][m][h] =
                load_short(record[h] + places[m].scales + 2 * min(block0 + b, p.blocks - 1));
#pragma unroll
      for (int b = 0; b < kAhead; ++b) {
        const int block = block0 + b;
        if (block >= end) break;
        uint4 x[4] = {};
        if (g < p.rows) {
          const auto* const words =
              reinterpret_cast<const uint4*>(p.x + (g * p.blocks + block) * kShadowBlock + 16 * q);
#pragma unroll
          for (int t = 0; t < 4; ++t) x[t] = words[4 * t];
        }
        float step[2], zero[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int in = min(2 * q + e, p.rows - 1) * p.blocks + block;
          step[e] = p.step[in];
          zero[e] = kZero * p.offset[in];
        }
#pragma unroll
        for (int m = 0; m < kSome; ++m) {
          int total[4] = {};
          add_codes<kBits>(codes[b][m][0], codes[b][m][1], x, total);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            acc[m][i] += __uint_as_float(scale[b][m][i / 2] << 16) *
                         (step[i % 2] * static_cast<float>(total[i]) - zero[i % 2]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kSome; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = 2 * q + i % 2;
        if (r < kRows && wanted[i / 2])
          sums[warp][j0 + g + i / 2 * 8][first_matrix + m][r] = acc[m][i];
      }
  }
}

template <int kSome, int kMatrices, int kRows>
__device__ __forceinline__ void shadow_dots(const EstimateParams& p, int bits,
                                            const uint8_t* records, const Place (&places)[kSome],
                                            int first_matrix, int n,
                                            TileSums<kMatrices, kRows>& sums) {
  switch (bits) {
    case 1: return shadow_dots<1>(p, records, places, first_matrix, n, sums);
    case 2: return shadow_dots<2>(p, records, places, first_matrix, n, sums);
    case 3: return shadow_dots<3>(p, records, places, first_matrix, n, sums);
    default: return shadow_dots<4>(p, records, places, first_matrix, n, sums);
  }
}

__device__ __forceinline__ float any_bias_at(DType dtype, const void* bias, int64_t i) {
  switch (dtype) {
    case DType::kFloat32: return bias_at(static_cast<const float*>(bias), i);
    case DType::kFloat16: return bias_at(static_cast<const __half*>(bias), i);
    default: return bias_at(static_cast<const __nv_bfloat16*>(bias), i);
  }
}

template <int kRows>
struct EstimateShared {
  TileSums<2, kRows> sums;
  bool active[kTile][kRows];
};

// kBits: of gate and up, or 0 where they differ or there is no gate.
template <int kBits, int kRows>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    shadow_scores_kernel(EstimateParams p) {
  MOYU_SHARED(EstimateShared<kRows>, s);
  const EstimateResult& out = p.result;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int begin = share_begin(p.f, blockIdx.x), end = share_begin(p.f, blockIdx.x + 1);
  prefetch_share(p.records, p.record_bytes, begin, end, (end - begin) * p.record_bytes);
  wait_for_previous_kernel();
  allow_next_kernel();
  const bool gated = p.bits_gate != 0;
  const int up_at = 32 * p.bits_gate * p.blocks, scales_at = up_at + 32 * p.bits_up * p.blocks;
  const Place both[2] = {{0, scales_at}, {up_at, scales_at + (gated ? 2 * p.blocks : 0)}};
  const Place gate_only[1] = {both[0]}, up_only[1] = {both[1]};
  const float epsilon = out.epsilon == nullptr ? 0.0f : *out.epsilon;
  const int row_counted = static_cast<int>(threadIdx.x) - 32;  // warp 1 counts, a row a lane
  int kept = 0, my_count = 0;
  for (int first = begin; first < end; first += kTile) {
    const int n = min(kTile, end - first);
    const uint8_t* const records = p.records + first * p.record_bytes;
    if constexpr (kBits != 0) {
      shadow_dots<kBits>(p, records, both, 0, n, s.sums);
    } else {
      if (gated) shadow_dots(p, p.bits_gate, records, gate_only, 0, n, s.sums);
      shadow_dots(p, p.bits_up, records, up_only, 1, n, s.sums);
    }
    __syncthreads();
    for (int slot = threadIdx.x; slot < n * kRows; slot += kThreads) {
      const int j = slot / kRows, r = slot % kRows;
      bool active = false;
      if (r < p.rows) {
        const int64_t neuron = first + j;
        const float up =
            dot_total<2, kRows>(s.sums, j, 1, r) + any_bias_at(p.dtype, p.up_bias, neuron);
        float a;
        if (gated) {
          const float gate =
              dot_total<2, kRows>(s.sums, j, 0, r) + any_bias_at(p.dtype, p.gate_bias, neuron);
          a = activate(p.activation, gate) * up;
        } else {
          a = activate(p.activation, up);
        }
        const float norm = p.norms[neuron], score = fabsf(a) * norm;
        active = !(score < epsilon);
        if (out.scores != nullptr) out.scores[r * p.f + neuron] = out.signs ? a * norm : score;
      }
      s.active[j][r] = active;
    }
    __syncthreads();
    if (out.epsilon == nullptr) continue;
    if (warp == 0) {
      for (int j0 = 0; j0 < n; j0 += 32) {
        const int j = j0 + lane;
        const bool any = j < n && any_row<kRows>(s.active[j]);
        const unsigned bits = __ballot_sync(kAllLanes, any);
        if (any) out.indices[begin + kept + __popc(bits & ((1u << lane) - 1))] = first + j;
        kept += __popc(bits);
      }
    } else if (row_counted < p.rows) {
      for (int j = 0; j < n; ++j) my_count += s.active[j][row_counted] ? 1 : 0;
    }
    if (out.mask != nullptr)
      for (int slot = threadIdx.x; slot < n * p.rows; slot += kThreads)
        out.mask[slot / n * p.f + first + slot % n] = s.active[slot % n][slot / n] ? 1 : 0;
    __syncthreads();  // the next tile writes s.active again
  }
  if (out.epsilon == nullptr) return;
  if (threadIdx.x == 0) out.piece_counts[blockIdx.x] = kept;
  if (row_counted >= 0 && row_counted < p.rows) {
    out.block_counts[blockIdx.x * kMaxRows + row_counted] = my_count;
    if (blockIdx.x == 0) out.estimated[row_counted] = 0;
  }
}

template <typename T>
void launch_quantise(const char* op, const Mlp& mlp, int64_t first, int64_t rows,
                     const ShadowScratch& scratch, void* stream) {
  const int64_t blocks = shadow_blocks(mlp.d), items = rows * blocks;
  launch(op, quantise_kernel<T>, (items + kWarps - 1) / kWarps, kThreads, stream,
         QuantiseParams<T>{static_cast<const T*>(mlp.x) + first * mlp.d, scratch.x, scratch.step,
                           scratch.offset, mlp.d, blocks, items});
}

}  // namespace

void launch_estimate(const char* op, const Mlp& mlp, int64_t first, int64_t rows,
                     const Shadow& shadow, const ShadowScratch& scratch,
                     const EstimateResult& result, void* stream) {
  switch (mlp.dtype) {
    case DType::kFloat32: launch_quantise<float>(op, mlp, first, rows, scratch, stream); break;
    case DType::kFloat16: launch_quantise<__half>(op, mlp, first, rows, scratch, stream); break;
    default: launch_quantise<__nv_bfloat16>(op, mlp, first, rows, scratch, stream); break;
  }
  const EstimateParams params{scratch.x,
                              scratch.step,
                              scratch.offset,
                              shadow.records,
                              shadow.norms,
                              mlp.gate_bias,
                              mlp.up_bias,
                              result,
                              shadow_record_bytes(mlp.d, shadow.bits_gate, shadow.bits_up),
                              mlp.f,
                              static_cast<int>(shadow_blocks(mlp.d)),
                              shadow.bits_gate,
                              shadow.bits_up,
                              static_cast<int>(rows),
                              mlp.dtype,
                              mlp.activation};
  const int64_t blocks = persistent_blocks(op, mlp.f);
  const auto go = [&]<int kRows>() {
    const auto with = [&](auto kernel) { launch(op, kernel, blocks, kThreads, stream, params); };
    switch (shadow.bits_gate == shadow.bits_up ? shadow.bits_up : 0) {
      case 1: return with(shadow_scores_kernel<1, kRows>);
      case 2: return with(shadow_scores_kernel<2, kRows>);
      case 3: return with(shadow_scores_kernel<3, kRows>);
      case 4: return with(shadow_scores_kernel<4, kRows>);
      default: return with(shadow_scores_kernel<0, kRows>);
    }
  };
  rows == 1 ? go.template operator()<1>() : go.template operator()<8>();
}

void shadow_scores(const Mlp& mlp, const Shadow& shadow, float* scores, float* workspace,
                   void* stream) {
  for (int64_t first = 0; first < mlp.rows; first += kMaxRows) {
    const int64_t n = std::min(kMaxRows, mlp.rows - first);
    EstimateResult result;
    result.scores = scores + first * mlp.f;
    launch_estimate("shadow_scores", mlp, first, n, shadow,
                    shadow_scratch(workspace, n, mlp.d, mlp.f), result, stream);
  }
}

}  // namespace moyu::cuda
