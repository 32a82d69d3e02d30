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

// A kernel's one shared struct; it must need no constructor.
#define MOYU_SHARED(type, name) __shared__ type name

namespace moyu::cuda {

// 16 bytes of weights, used once: they pass by the L1, which belongs to the input rows. Zeros where
// `wanted` is false: a predicate and not a branch, so that the loads around it stay together.
__device__ __forceinline__ uint4 load_streaming(const uint4* p, bool wanted) {
  uint4 v = {0, 0, 0, 0};
  asm volatile(
      "{\n\t.reg .pred wanted;\n\t"
      "setp.ne.u32 wanted, %5, 0;\n\t"
      "@wanted ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(p), "r"(static_cast<unsigned>(wanted)));
  return v;
}

__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// c + the sum over four bytes of a, unsigned, times those of b, signed.
__device__ __forceinline__ int dot4(unsigned a, unsigned b, int c) {
  int sum;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
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
