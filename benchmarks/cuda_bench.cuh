// What GPU benchmarks share: device memory, graphs and their timing, cuBLAS where it is found, the
// machine's bandwidth, and the rows of design.md's table.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <library_types.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../csrc/moyu_cuda.h"

namespace bench {

#define BENCH_CHECK(call)                                                \
  do {                                                                   \
    const cudaError_t bench_error = (call);                              \
    if (bench_error != cudaSuccess) {                                    \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, \
                   cudaGetErrorString(bench_error));                     \
      std::exit(1);                                                      \
    }                                                                    \
  } while (0)

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t n = 0) : n_(n) {
    if (n > 0) BENCH_CHECK(cudaMalloc(&data_, n * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    BENCH_CHECK(cudaMemcpy(data_, values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceArray(DeviceArray&& o) noexcept : data_(o.data_), n_(o.n_) { o.data_ = nullptr; }
  DeviceArray& operator=(DeviceArray&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(n_, o.n_);
    return *this;
  }
  ~DeviceArray() { cudaFree(data_); }
  T* get() const { return data_; }
  std::vector<T> read(size_t first, size_t n) const {
    std::vector<T> out(n);
    BENCH_CHECK(cudaMemcpy(out.data(), data_ + first, n * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }
  void poison() { BENCH_CHECK(cudaMemset(data_, 0xff, n_ * sizeof(T))); }

 private:
  T* data_ = nullptr;
  size_t n_ = 0;
};

// Times between two events on a stream.
class Timer {
 public:
  Timer() {
    BENCH_CHECK(cudaEventCreate(&begin_));
    BENCH_CHECK(cudaEventCreate(&end_));
  }
  Timer(const Timer&) = delete;
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  // Waits for the work's end; its time counts divided by `units`.
  template <typename Work>
  void time(cudaStream_t stream, double units, const Work& work) {
    BENCH_CHECK(cudaEventRecord(begin_, stream));
    work();
    BENCH_CHECK(cudaEventRecord(end_, stream));
    BENCH_CHECK(cudaEventSynchronize(end_));
    float ms = 0;
    BENCH_CHECK(cudaEventElapsedTime(&ms, begin_, end_));
    us_.push_back(ms * 1e3 / units);
  }
  double quantile(double q) {
    std::sort(us_.begin(), us_.end());
    return us_[static_cast<size_t>(q * (us_.size() - 1) + 0.5)];
  }

 private:
  cudaEvent_t begin_{}, end_{};
  std::vector<double> us_;
};

// A captured graph, and the times of its replays.
class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& work) {
    cudaGraph_t graph;
    work();  // loads kernels, which a capture may refuse
    BENCH_CHECK(cudaStreamSynchronize(stream));
    BENCH_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    work();
    BENCH_CHECK(cudaStreamEndCapture(stream, &graph));
    BENCH_CHECK(cudaGraphInstantiate(&executable_, graph, 0));
    BENCH_CHECK(cudaGraphDestroy(graph));
  }
  Graph(const Graph&) = delete;
  ~Graph() { cudaGraphExecDestroy(executable_); }
  void replay(cudaStream_t stream) const { BENCH_CHECK(cudaGraphLaunch(executable_, stream)); }
  // One replay, its time divided by `units`.
  void time(cudaStream_t stream, double units) {
    timer_.time(stream, units, [&] { replay(stream); });
  }
  double quantile(double q) { return timer_.quantile(q); }

 private:
  cudaGraphExec_t executable_ = nullptr;
  Timer timer_;
};

// cuBLAS through dlopen: the benchmark builds without it, and says so where it is not found.
// MOYU_CUBLAS names the library file.
class Cublas {
 public:
  explicit Cublas(cudaStream_t stream) {
    const char* chosen = std::getenv("MOYU_CUBLAS");
    for (const char* name : {chosen, "libcublas.so.13", "libcublas.so.12", "libcublas.so"})
      if (name != nullptr && library_ == nullptr) library_ = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) return;
    const auto find = [&](const char* name) { return dlsym(library_, name); };
    const auto create = reinterpret_cast<int (*)(void**)>(find("cublasCreate_v2"));
    const auto set_stream =
        reinterpret_cast<int (*)(void*, cudaStream_t)>(find("cublasSetStream_v2"));
    const auto set_workspace =
        reinterpret_cast<int (*)(void*, void*, size_t)>(find("cublasSetWorkspace_v2"));
    gemm_ = reinterpret_cast<Gemm>(find("cublasGemmEx"));
    workspace_ = DeviceArray<char>(kWorkspaceBytes);  // so that it captures without allocating
    if (create == nullptr || set_stream == nullptr || set_workspace == nullptr ||
        gemm_ == nullptr || create(&handle_) != 0 || set_stream(handle_, stream) != 0 ||
        set_workspace(handle_, workspace_.get(), kWorkspaceBytes) != 0) {
      std::fprintf(stderr, "cuBLAS was found but does not start; it is left out\n");
      gemm_ = nullptr;
    }
  }
  bool found() const { return gemm_ != nullptr; }

  // out [rows, n] = x [rows, k] . weight [n, k]^T, float32 inside, all of type `type`.
  void linear(const void* x, const void* weight, void* out, int64_t rows, int64_t n, int64_t k,
              cudaDataType type) const {
    constexpr int kNone = 0, kTransposed = 1, kFloat32Inside = 68, kDefaultAlgorithm = -1;
    const float one = 1, zero = 0;
    const int status = gemm_(handle_, kTransposed, kNone, static_cast<int>(n),
                             static_cast<int>(rows), static_cast<int>(k), &one, weight, type,
                             static_cast<int>(k), x, type, static_cast<int>(k), &zero, out, type,
                             static_cast<int>(n), kFloat32Inside, kDefaultAlgorithm);
    if (status == 0) return;
    std::fprintf(stderr, "cublasGemmEx failed with status %d\n", status);
    std::exit(1);
  }

 private:
  using Gemm = int (*)(void*, int, int, int, int, int, const void*, const void*, cudaDataType, int,
                       const void*, cudaDataType, int, const void*, void*, cudaDataType, int, int,
                       int);
  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;
  void* library_ = nullptr;
  void* handle_ = nullptr;
  Gemm gemm_ = nullptr;
  DeviceArray<char> workspace_;
};

// Copies between two buffers far larger than the L2; counts bytes read plus bytes written. Not in a
// graph: there the same copy was a fifth slower on an H100.
class CopyBandwidth {
 public:
  explicit CopyBandwidth(cudaStream_t stream) : from_(kBytes), to_(kBytes) {
    from_.poison();
    for (int i = 0; i < 2; ++i) copy(stream);
    BENCH_CHECK(cudaStreamSynchronize(stream));
  }
  void sample(cudaStream_t stream) {
    timer_.time(stream, 1, [&] { copy(stream); });
  }
  double gbps() { return 2.0 * kBytes / timer_.quantile(0.5) / 1e3; }

 private:
  void copy(cudaStream_t stream) const {
    BENCH_CHECK(cudaMemcpyAsync(to_.get(), from_.get(), kBytes, cudaMemcpyDeviceToDevice, stream));
  }
  static constexpr size_t kBytes = size_t{1} << 30;
  DeviceArray<char> from_, to_;
  Timer timer_;
};

// One line of the results table. Empty text where a figure does not apply.
struct Row {
  std::string name, dtype, geometry, method, plan, dense_impl;
  int64_t rows = 1;
  double density = 1, bytes = 0, speedup = 0, max_rel_err = 0;
};

class Table {
 public:
  Table(const std::string& file, std::string device, std::string commit)
      : device_(std::move(device)), commit_(std::move(commit)) {
    static const char* const header =
        "name,device,dtype,geometry,method,plan,rows,density,median_us,p20_us,p80_us,bytes,gbps,"
        "bandwidth_gbps,fraction_of_bandwidth,speedup_vs_dense,dense_impl,max_rel_err,torch,"
        "commit\n";
    std::printf("%s", header);
    if (file.empty()) return;
    file_ = std::fopen(file.c_str(), "a");
    if (file_ == nullptr) {
      std::fprintf(stderr, "cannot write %s\n", file.c_str());
      std::exit(1);
    }
    if (std::ftell(file_) == 0) std::fprintf(file_, "%s", header);
  }
  ~Table() {
    if (file_ != nullptr) std::fclose(file_);
  }
  void write(const Row& r, Graph& graph, double bandwidth) {
    const double median = graph.quantile(0.5), gbps = r.bytes / median / 1e3;
    char line[1024];
    std::snprintf(line, sizeof(line),
                  "%s,%s,%s,%s,%s,%s,%lld,%.4f,%.3f,%.3f,%.3f,%.0f,%.1f,%.1f,%.3f,%s,%s,%.2e,,%s\n",
                  r.name.c_str(), device_.c_str(), r.dtype.c_str(), r.geometry.c_str(),
                  r.method.c_str(), r.plan.c_str(), static_cast<long long>(r.rows), r.density,
                  median, graph.quantile(0.2), graph.quantile(0.8), r.bytes, gbps, bandwidth,
                  gbps / bandwidth,
                  r.speedup > 0 ? std::to_string(r.speedup).substr(0, 6).c_str() : "",
                  r.dense_impl.c_str(), r.max_rel_err, commit_.c_str());
    std::printf("%s", line);
    if (file_ != nullptr) std::fprintf(file_, "%s", line);
  }

 private:
  std::string device_, commit_;
  std::FILE* file_ = nullptr;
};

}  // namespace bench
