// All that the kernels ask of the platform, for nvcc. tests/cpp/cuda_emulator.h supplies the same
// names on the host, so that the kernels' own source also runs where there is no GPU.
#pragma once

#ifdef MOYU_CUDA_EMULATOR
#include "cuda_emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

// A kernel's one shared struct; it must need no constructor.
#define MOYU_SHARED(type, name) __shared__ type name

namespace moyu::cuda {

// 16 bytes of weights, used once: they pass by the L1, which belongs to the input rows. Zeros where
// `wanted` is false: a predicate and not a branch, so that the loads around it stay together. Not
// ld.global.nc: a kernel that starts early lives while its predecessor may still write the weights.
__device__ __forceinline__ uint4 load_streaming(const uint4* p, bool wanted) {
  uint4 v = {0, 0, 0, 0};
  asm volatile(
      "{\n\t.reg .pred wanted;\n\t"
      "setp.ne.u32 wanted, %5, 0;\n\t"
      "@wanted ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(p), "r"(static_cast<unsigned>(wanted)));
  return v;
}

// 8 bytes of packed codes, the same way; kWide where the address is a multiple of 8, else of 4.
template <bool kWide>
__device__ __forceinline__ uint2 load_codes(const uint8_t* p) {
  uint2 v;
  if constexpr (kWide) {
    asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(p));
  } else {
    asm volatile(
        "ld.global.L1::no_allocate.L2::128B.u32 %0, [%2];\n\t"
        "ld.global.L1::no_allocate.L2::128B.u32 %1, [%2 + 4];"
        : "=r"(v.x), "=r"(v.y)
        : "l"(p));
  }
  return v;
}

// 4 bytes of them.
__device__ __forceinline__ uint32_t load_code_word(const uint8_t* p) {
  uint32_t v;
  asm volatile("ld.global.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// 2 bytes in the lower half.
__device__ __forceinline__ uint32_t load_short(const uint8_t* p) {
  uint16_t v;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}

// The scale at p, and above it the offset that lies `distance` bytes behind.
__device__ __forceinline__ uint32_t load_scale(const uint8_t* p, int64_t distance) {
  return load_short(p) | load_short(p + distance) << 16;
}

// c += a b on the tensor cores, by the whole warp: a 16x16, b 16x8, both of Half in pairs along the
// inner axis, c 16x8 in float32. Lane 4 g + q holds a[g], a[g + 8] at 2 q, 2 q + 1, then both at
// 2 q + 8, 2 q + 9; b[.][g] at the same places; c[g] and c[g + 8] at 2 q, 2 q + 1.
template <typename Half>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Half, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with a of unsigned and b of signed bytes, 16x32 and 32x8: a lane's words hold 4 q .. + 3 in
// the places of 2 q and 2 q + 1, 16 + 4 q .. + 3 in those of 2 q + 8 and 2 q + 9.
__device__ __forceinline__ void mma_bytes(int (&c)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two floats rounded to bfloat16, the first one in the lower half.
__device__ __forceinline__ uint32_t bfloat16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Programmatic dependent launch: a kernel may be resident before the one that it depends on has
// finished, so each one waits before its first access to global memory.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

inline void check(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // the exception tells it; torch's next check must not find it again
  throw std::runtime_error(std::string("moyu_ext: ") + op + ": CUDA: " + cudaGetErrorName(error) +
                           ": " + cudaGetErrorString(error));
}

constexpr int kMaxDevices = 64;

struct Device {
  int id, multiprocessors;
};

// The current device, asked once and remembered; throws where our machine code cannot run.
inline Device current_device(const char* op) {
  static std::atomic<int> known[kMaxDevices];  // multiprocessors, 0: not asked yet
  int id = 0;
  check(cudaGetDevice(&id), op);
  int multiprocessors = id < kMaxDevices ? known[id].load(std::memory_order_relaxed) : 0;
  if (multiprocessors == 0) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id), op);
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id), op);
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, id), op);
    if (major < 8)
      throw std::runtime_error(std::string("moyu_ext: ") + op + ": cuda:" + std::to_string(id) +
                               " has compute capability " + std::to_string(major) + "." +
                               std::to_string(minor) + "; 8.0 or newer is needed");
    if (id < kMaxDevices) known[id].store(multiprocessors, std::memory_order_relaxed);
  }
  return {id, multiprocessors};
}

// Whether kernels may start early on the device: where the code that runs there waits, which is a
// matter of what it was compiled for. PTX for 8.0 runs on a newer device, too, and does not wait.
inline bool dependent_launch(const char* op, int device, const void* kernel) {
  static std::atomic<int> known[kMaxDevices];  // 1: no, 2: yes, 0: not asked yet
  int answer = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (answer == 0) {
    cudaFuncAttributes code{};
    check(cudaFuncGetAttributes(&code, kernel), op);
    const char* pdl = std::getenv("MOYU_PDL");
    const bool off = pdl != nullptr && pdl[0] == '0';
    answer = code.ptxVersion >= 90 && !off ? 2 : 1;
    if (device < kMaxDevices) known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == 2;
}

// Queues kernel<<<blocks, threads, 0, stream>>>(params): the only place where a kernel starts.
template <typename Params>
void launch(const char* op, void (*kernel)(Params), int64_t blocks, int threads, void* stream,
            const Params& params) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  const int device = current_device(op).id;
  const void* const code = reinterpret_cast<const void*>(kernel);
  config.numAttrs = dependent_launch(op, device, code) ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), op);
}

}  // namespace moyu::cuda
#endif  // MOYU_CUDA_EMULATOR
