// A look at the device's memory from the host, for checks that are asked for (MOYU_CHECK=1).
#include "../moyu_cuda.h"
#include "platform.cuh"

namespace moyu::cuda {

bool read_back(const int32_t* from, int64_t n, int32_t* to, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(queue, &status), "read_back");
  if (status != cudaStreamCaptureStatusNone) return false;
  check(cudaMemcpyAsync(to, from, n * sizeof(int32_t), cudaMemcpyDeviceToHost, queue), "read_back");
  check(cudaStreamSynchronize(queue), "read_back");
  return true;
}

}  // namespace moyu::cuda
