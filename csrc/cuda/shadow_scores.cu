// What a low-bit shadow of gate and up says of every neuron's norm: x in int8, dot products by dp4a
// on the packed codes. With a threshold, compared and compacted by the block that made them.
#include "shadow.cuh"

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

// A quarter's codes of one block as they are packed: fields that dp4a takes without a shift.
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

// Sum over t < kFields of the fields t of kFieldBits bits in each byte, times x[t].
template <int kFieldBits, int kFields>
__device__ __forceinline__ int fields_dot(const uint4& codes, const uint4* x) {
  int total = 0;
#pragma unroll
  for (int t = 0; t < kFields; ++t) {
    const unsigned field = ((1u << kFieldBits) - 1) * 0x01010101u << (kFieldBits * t);
    int part = dot4(codes.x & field, x[t].x, 0);
    part = dot4(codes.y & field, x[t].y, part);
    part = dot4(codes.z & field, x[t].z, part);
    part = dot4(codes.w & field, x[t].w, part);
    total += part >> (kFieldBits * t);  // exact: every field was that much too large
  }
  return total;
}

template <int kBits>
__device__ __forceinline__ int codes_dot(const Codes<kBits>& c, const uint4 (&x)[4]) {
  if constexpr (kBits == 1) return fields_dot<1, 4>(c.low, x);
  if constexpr (kBits == 2) return fields_dot<2, 4>(c.low, x);
  if constexpr (kBits == 3) return fields_dot<2, 4>(c.low, x) + 4 * fields_dot<1, 4>(c.top, x);
  if constexpr (kBits == 4) return fields_dot<4, 2>(c.low, x) + fields_dot<4, 2>(c.top, x + 2);
}

// Streams of codes that a warp reads at a time, as registers allow: gate's or up's of one neuron, a
// load of 16 bytes or two in flight for each.
template <int kRows>
inline constexpr int kStreams = kRows <= 2 ? 4 : 2;

// Where a matrix's codes and scales begin in a neuron's record.
struct Place {
  int codes, scales;
};

// sums[(k * kMatrices + m) * kRows + r] = this lane's part of the dot product of neuron k's matrix
// m with row r. `records` begins with neuron 0 of n.
template <int kBits, int kMatrices, int kRows>
__device__ __forceinline__ void shadow_dots(const EstimateParams& p, const uint8_t* records,
                                            const Place (&places)[kMatrices], int n,
                                            float (&sums)[kStreams<kRows> * kRows]) {
  constexpr float kZero = ((1 << kBits) - 1) * 0.5f;
#pragma unroll kRows == 1 && kBits <= 2 ? 2 : 1
  for (int at = threadIdx.x % 32; at < kQuarters * p.blocks; at += 32) {
    const int block = at / kQuarters, quarter = at % kQuarters;
    Codes<kBits> c[kStreams<kRows>];
    float scale[kStreams<kRows>];
#pragma unroll
    for (int i = 0; i < kStreams<kRows>; ++i) {
      const int k = i / kMatrices;
      const uint8_t* const record = records + min(k, n - 1) * p.record_bytes;
      const Place& place = places[i % kMatrices];
      c[i] = load_codes<kBits>(record + place.codes + block * (32 * kBits), quarter, k < n);
      scale[i] = to_float(reinterpret_cast<const __nv_bfloat16*>(record + place.scales)[block]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int in = min(r, p.rows - 1) * p.blocks + block;
      const auto* const words =
          reinterpret_cast<const uint4*>(p.x + in * kShadowBlock + 16 * quarter);
      const uint4 x[4] = {words[0], words[4], words[8], words[12]};
      const float step = p.step[in], zero = quarter == 0 ? kZero * p.offset[in] : 0.0f;
#pragma unroll
      for (int i = 0; i < kStreams<kRows>; ++i)
        sums[i * kRows + r] += scale[i] * (step * static_cast<float>(codes_dot(c[i], x)) - zero);
    }
  }
}

// The dot products of up to kStreams / kMatrices neurons with all rows; that of (k, m, r) is
// returned to lane ((k * kMatrices + m) * kRows + r) * 32 / (kStreams * kRows).
template <int kMatrices, int kRows>
__device__ __forceinline__ float estimate(const EstimateParams& p, int bits, const uint8_t* records,
                                          const Place (&places)[kMatrices], int n) {
  float sums[kStreams<kRows> * kRows] = {};
  switch (bits) {
    case 1: shadow_dots<1, kMatrices, kRows>(p, records, places, n, sums); break;
    case 2: shadow_dots<2, kMatrices, kRows>(p, records, places, n, sums); break;
    case 3: shadow_dots<3, kMatrices, kRows>(p, records, places, n, sums); break;
    default: shadow_dots<4, kMatrices, kRows>(p, records, places, n, sums); break;
  }
  return warp_sum(sums);
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
  bool active[kTile][kRows];
};

template <int kRows>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    shadow_scores_kernel(EstimateParams p) {
  MOYU_SHARED(EstimateShared<kRows>, s);
  constexpr int kLanes = 32 / (kStreams<kRows> * kRows);  // of which one has a dot product
  const EstimateResult& out = p.result;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int begin = share_begin(p.f, blockIdx.x), end = share_begin(p.f, blockIdx.x + 1);
  wait_for_previous_kernel();
  allow_next_kernel();
  const bool gated = p.bits_gate != 0;
  // Gate and up in one pass, where they have one format and there are registers for both.
  const bool together = kRows <= 2 && p.bits_gate == p.bits_up;
  const int up_at = 32 * p.bits_gate * p.blocks, scales_at = up_at + 32 * p.bits_up * p.blocks;
  const Place both[2] = {{0, scales_at}, {up_at, scales_at + (gated ? 2 * p.blocks : 0)}};
  const Place gate_only[1] = {both[0]}, up_only[1] = {both[1]};
  // Neurons at a time, and the one of them and the row that this lane completes.
  const int batch = together ? kStreams<kRows> / 2 : kStreams<kRows>;
  const int k = lane / kLanes / kRows / (together ? 2 : 1), r = lane / kLanes % kRows;
  const bool completes = lane % kLanes == 0 && (!together || lane / kLanes / kRows % 2 == 0);
  const float epsilon = out.epsilon == nullptr ? 0.0f : *out.epsilon;
  const int row_counted = static_cast<int>(threadIdx.x) - 32;  // warp 1 counts, a row a lane
  int kept = 0, my_count = 0;
  for (int first = begin; first < end; first += kTile) {
    const int n = min(kTile, end - first);
    const int my_end = n * (warp + 1) / kWarps;
    for (int j0 = n * warp / kWarps; j0 < my_end; j0 += batch) {
      const int m = min(batch, my_end - j0), j = j0 + k;
      const uint8_t* const records = p.records + (first + j0) * p.record_bytes;
      float gate = 0.0f, up;
      if (together) {
        if constexpr (kRows <= 2) gate = estimate<2, kRows>(p, p.bits_up, records, both, m);
        up = __shfl_xor_sync(kAllLanes, gate, kRows * kLanes);
      } else {
        if (gated) gate = estimate<1, kRows>(p, p.bits_gate, records, gate_only, m);
        up = estimate<1, kRows>(p, p.bits_up, records, up_only, m);
      }
      if (!completes || k >= m) continue;
      bool active = false;
      if (r < p.rows) {
        const int64_t neuron = first + j;
        up += any_bias_at(p.dtype, p.up_bias, neuron);
        gate += any_bias_at(p.dtype, p.gate_bias, neuron);
        const float a = gated ? activate(p.activation, gate) * up : activate(p.activation, up);
        const float score = fabsf(a) * p.norms[neuron];
        active = !(score < epsilon);
        if (out.scores != nullptr) out.scores[r * p.f + neuron] = score;
      }
      s.active[j][r] = active;
    }
    if (out.epsilon == nullptr) continue;
    __syncthreads();
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
  if (row_counted >= 0 && row_counted < p.rows)
    out.block_counts[blockIdx.x * kMaxRows + row_counted] = my_count;
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
  const auto go = [&](auto kernel) { launch(op, kernel, blocks, kThreads, stream, params); };
  if (rows == 1) {
    go(shadow_scores_kernel<1>);
  } else if (rows == 2) {
    go(shadow_scores_kernel<2>);
  } else if (rows <= 4) {
    go(shadow_scores_kernel<4>);
  } else {
    go(shadow_scores_kernel<8>);
  }
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
