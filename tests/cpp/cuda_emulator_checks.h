// Checks of the emulator itself: what it computes, and that it catches what it is there to catch.
#pragma once

#include "cuda_test_support.h"

namespace test {

using moyu::cuda::allow_next_kernel;
using moyu::cuda::wait_for_previous_kernel;

struct Probe {
  int32_t* out;
  int n;
};
struct ProbeShared {
  int32_t values[256];
};

// Rotates values through shared memory; without the barrier it is a race.
template <bool kBarrier>
void rotate_kernel(Probe p) {
  wait_for_previous_kernel();
  MOYU_SHARED(ProbeShared, s);
  s.values[threadIdx.x] = static_cast<int32_t>(threadIdx.x);
  if (kBarrier) __syncthreads();
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = s.values[(threadIdx.x + 1) % blockDim.x];
}

// Warp 0 hands each round's value to warp 1. Without the second barrier of a round it may be one
// round ahead, which only shows where a warp runs far ahead of another.
template <bool kBarrier>
void rounds_kernel(Probe p) {
  wait_for_previous_kernel();
  MOYU_SHARED(ProbeShared, s);
  int sum = 0;
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x < 32) s.values[threadIdx.x] = round;
    __syncthreads();
    if (threadIdx.x >= 32) {
      __ballot_sync(~0u, true);
      sum += (round + 1) * s.values[threadIdx.x - 32];
    }
    if (kBarrier) __syncthreads();
  }
  p.out[threadIdx.x] = sum;
}

inline void never_waits_kernel(Probe) {}
inline void lets_in_first_kernel(Probe) {
  allow_next_kernel();
  wait_for_previous_kernel();
}

inline void warp_kernel(Probe p) {
  wait_for_previous_kernel();
  const int lane = threadIdx.x % 32;
  int v = lane + 1;
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  const int up = __shfl_up_sync(~0u, lane, 3);
  const unsigned odd = __ballot_sync(~0u, lane % 2 == 1);
  const int seventh = __shfl_sync(~0u, lane * 10, 7);
  const bool good =
      v == 528 && up == (lane < 3 ? lane : lane - 3) && odd == 0xaaaaaaaau && seventh == 70;
  p.out[threadIdx.x] = good ? 1 : 0;
}

inline void half_barrier_kernel(Probe) {
  wait_for_previous_kernel();
  if (threadIdx.x < 32) __syncthreads();
}
inline void two_barriers_kernel(Probe) {
  wait_for_previous_kernel();
  if (threadIdx.x % 2 == 0)
    __syncthreads();
  else
    __syncthreads();
}
inline void lost_lane_kernel(Probe) {
  wait_for_previous_kernel();
  if (threadIdx.x != 5) __ballot_sync(~0u, true);
}
inline void misaligned_kernel(Probe p) {
  wait_for_previous_kernel();
  moyu::cuda::load_streaming(reinterpret_cast<const uint4*>(p.out + 1), false);
}
inline void write_past_end_kernel(Probe p) {
  wait_for_previous_kernel();
  if (threadIdx.x == 0) p.out[p.n] = 1;
}
template <int kValues>
void warp_sum_kernel(Probe p) {
  wait_for_previous_kernel();
  float v[kValues];
  for (int i = 0; i < kValues; ++i) v[i] = static_cast<float>(1000 * i + threadIdx.x);
  const float total = moyu::cuda::warp_sum(v);
  const int value = static_cast<int>(threadIdx.x) * kValues / 32;
  p.out[threadIdx.x] = total == static_cast<float>(32000 * value + 496) ? 1 : 0;
}

inline bool all_ones(const std::vector<int32_t>& v) {
  return std::all_of(v.begin(), v.end(), [](int32_t x) { return x == 1; });
}

template <int kValues>
void check_warp_sum() {
  Buffer<int32_t> out(32);
  moyu::cuda::launch("warp_sum", warp_sum_kernel<kValues>, 1, 32, nullptr, Probe{out.data(), 32});
  check(all_ones(out.read("warp_sum")), "warp_sum of " + std::to_string(kValues) + " values");
}

inline void check_types() {
  bool half = true, bfloat = true;
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const auto b = static_cast<uint16_t>(bits);
    const float h = __half2float({b}), w = __bfloat162float({b});
    half &= std::isnan(h) || __float2half_rn(h).bits == b;
    bfloat &= std::isnan(w) || __float2bfloat16_rn(w).bits == b;
  }
  check(half, "float16 survives a round trip through float32");
  check(bfloat, "bfloat16 survives a round trip through float32");
  check(__float2half_rn(1 + 0x1p-11f).bits == 0x3c00 &&
            __float2half_rn(1 + 3 * 0x1p-11f).bits == 0x3c02 &&
            __float2half_rn(65519.0f).bits == 0x7bff && __float2half_rn(65520.0f).bits == 0x7c00 &&
            __float2half_rn(0x1p-25f).bits == 0 && __float2half_rn(0x1.8p-24f).bits == 2,
        "float16 rounds to nearest, ties to even");
  check(__float2bfloat16_rn(1 + 0x1p-8f).bits == 0x3f80 &&
            __float2bfloat16_rn(1 + 3 * 0x1p-8f).bits == 0x3f82,
        "bfloat16 rounds to nearest, ties to even");
}

inline void check_emulator() {
  using moyu::cuda::launch;
  check_types();
  Buffer<int32_t> out(128);
  const Probe probe{out.data(), 128};
  launch("warp", warp_kernel, 1, 128, nullptr, probe);
  check(all_ones(out.read("warp operations")), "shuffles and ballots");
  check_warp_sum<1>();
  check_warp_sum<4>();
  check_warp_sum<32>();

  std::vector<std::vector<int32_t>> racing, safe;
  for (auto order : {emulator::Order::kForward, emulator::Order::kBackward}) {
    emulator::config.order = order;
    Buffer<int32_t> a(128), b(128);
    launch("race", rotate_kernel<false>, 2, 64, nullptr, Probe{a.data(), 128});
    launch("no race", rotate_kernel<true>, 2, 64, nullptr, Probe{b.data(), 128});
    racing.push_back(a.read("race"));
    safe.push_back(b.read("no race"));
  }
  emulator::config.order = emulator::Order::kForward;
  check(!same_bits(racing[0], racing[1]), "a missing barrier shows when threads run backwards");
  check(same_bits(safe[0], safe[1]), "with its barrier the same kernel gives the same");

  emulator::config.order = emulator::Order::kGreedy;
  Buffer<int32_t> hurried(64), held(64);
  launch("a round ahead", rounds_kernel<false>, 1, 64, nullptr, Probe{hurried.data(), 64});
  launch("in step", rounds_kernel<true>, 1, 64, nullptr, Probe{held.data(), 64});
  emulator::config.order = emulator::Order::kForward;
  check(hurried.read("a round ahead")[63] != 8, "a missing barrier shows when a warp runs ahead");
  check(held.read("in step")[63] == 8, "with its barrier warps stay in step");

  const auto run = [&](auto kernel) {
    return [&, kernel] { launch("t", kernel, 1, 64, nullptr, probe); };
  };
  check_throws(run(half_barrier_kernel), "deadlock: 32 threads wait for __syncthreads",
               "a barrier that half of the threads reach");
  check_throws(run(two_barriers_kernel), "divergent barrier", "threads at different barriers");
  check_throws(run(lost_lane_kernel), "threads wait for __ballot_sync", "a ballot without a lane");
  check_throws(run(never_waits_kernel), "left without waiting", "a kernel that does not wait");
  check_throws(run(lets_in_first_kernel), "let in before", "the next kernel let in first");
  check_throws(run(misaligned_kernel), "misaligned", "a misaligned load");
  launch("warp", warp_kernel, 1, 128, nullptr, probe);
  check(all_ones(out.read("warp operations")), "the emulator works on after a failed launch");
#if !defined(MOYU_FIBER_ASAN)  // there the write itself is reported, and ends the program
  Buffer<int32_t> small(3);
  launch("past the end", write_past_end_kernel, 1, 32, nullptr, Probe{small.data(), 3});
  check(!small.guards_intact(small.read_with_guards("guards")),
        "a write past the end shows in the guard");
#endif
}

}  // namespace test
