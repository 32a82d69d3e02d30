// What the kernel tests stand on: guarded buffers, random problems, and the float64 reference.
// The same source tests the kernels on the emulator (MOYU_CUDA_EMULATOR) and, built by nvcc, on a
// GPU. There MOYU_TEST_EXACT=1 allocates without guards, for compute-sanitizer to watch the ends.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/common.cuh"

namespace test {

inline int passed = 0, failed = 0;

inline void check(bool ok, const std::string& what) {
  ++(ok ? passed : failed);
  if (!ok) std::printf("FAILED: %s\n", what.c_str());
}

// Runs f and expects an exception that mentions `words`.
template <typename F>
void check_throws(F&& f, const std::string& words, const std::string& what) {
  try {
    f();
  } catch (const std::runtime_error& e) {
    const bool found = std::string(e.what()).find(words) != std::string::npos;
    return check(found, what + ": expected \"" + words + "\", got \"" + e.what() + "\"");
  }
  check(false, what + ": no exception");
}

// n elements in device memory between two guards of 256 bytes. Everything starts as 0xff bytes: a
// NaN, or -1; so an output that stays unwritten shows, and so does a read from a guard.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t n, size_t misaligned_by = 0) : n_(n), offset_(kGuard + misaligned_by) {
    const std::vector<char> ones(bytes(), '\xff');
#if defined(MOYU_CUDA_EMULATOR)
    memory_ = static_cast<char*>(operator new(bytes(), std::align_val_t{256}));
    std::memcpy(memory_, ones.data(), bytes());
#if defined(MOYU_FIBER_ASAN)
    __asan_poison_memory_region(memory_, offset_ * sizeof(T));
    __asan_poison_memory_region(memory_ + (offset_ + n_) * sizeof(T), kGuard * sizeof(T));
#endif
#else
    const char* exact = std::getenv("MOYU_TEST_EXACT");
    if (exact != nullptr && exact[0] == '1' && misaligned_by == 0) offset_ = 0;
    moyu::cuda::check(cudaMalloc(&memory_, bytes()), "cudaMalloc");
    moyu::cuda::check(cudaMemcpy(memory_, ones.data(), bytes(), cudaMemcpyDefault), "cudaMemcpy");
#endif
  }
  explicit Buffer(const std::vector<T>& values, size_t misaligned_by = 0)
      : Buffer(values.size(), misaligned_by) {
    if (n_ == 0) return;
#if defined(MOYU_CUDA_EMULATOR)
    std::memcpy(data(), values.data(), n_ * sizeof(T));
#else
    moyu::cuda::check(cudaMemcpy(data(), values.data(), n_ * sizeof(T), cudaMemcpyDefault),
                      "cudaMemcpy");
#endif
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
#if defined(MOYU_CUDA_EMULATOR)
#if defined(MOYU_FIBER_ASAN)
    __asan_unpoison_memory_region(memory_, bytes());
#endif
    operator delete(memory_, std::align_val_t{256});
#else
    cudaFree(memory_);
#endif
  }

  T* data() const { return reinterpret_cast<T*>(memory_) + offset_; }

  // The elements, and a failed check where a guard has been written to.
  std::vector<T> read(const std::string& what) const {
    const std::vector<T> all = read_with_guards(what);
    if (!guards_intact(all)) check(false, what + ": wrote outside of the buffer");
    return {all.begin() + offset_, all.begin() + offset_ + n_};
  }

  std::vector<T> read_with_guards([[maybe_unused]] const std::string& what) const {
    std::vector<T> all(offset_ + n_ + (offset_ > 0 ? kGuard : 0));
#if defined(MOYU_CUDA_EMULATOR)
#if defined(MOYU_FIBER_ASAN)
    __asan_unpoison_memory_region(memory_, bytes());
#endif
    std::memcpy(static_cast<void*>(all.data()), memory_, bytes());
#else
    moyu::cuda::check(cudaDeviceSynchronize(), what.c_str());
    moyu::cuda::check(cudaMemcpy(all.data(), memory_, bytes(), cudaMemcpyDefault), "cudaMemcpy");
#endif
    return all;
  }

  bool guards_intact(const std::vector<T>& all) const {
    const auto* raw = reinterpret_cast<const unsigned char*>(all.data());
    bool intact = true;
    for (size_t i = 0; i < all.size() * sizeof(T); ++i)
      if (i < offset_ * sizeof(T) || i >= (offset_ + n_) * sizeof(T)) intact &= raw[i] == 0xff;
    return intact;
  }

 private:
  static constexpr size_t kGuard = 256 / sizeof(T);
  size_t bytes() const { return (offset_ + n_ + (offset_ > 0 ? kGuard : 0)) * sizeof(T); }
  size_t n_, offset_;
  char* memory_ = nullptr;
};

template <typename T>
constexpr moyu::DType kDType = std::is_same_v<T, float>    ? moyu::DType::kFloat32
                               : std::is_same_v<T, __half> ? moyu::DType::kFloat16
                                                           : moyu::DType::kBFloat16;
template <typename T>
constexpr double kUnit = std::is_same_v<T, float>    ? 0x1p-24
                         : std::is_same_v<T, __half> ? 0x1p-11
                                                     : 0x1p-8;
template <typename T>
const char* type_name() {
  return std::is_same_v<T, float> ? "float32" : std::is_same_v<T, __half> ? "float16" : "bfloat16";
}

inline double value_of(float v) { return v; }
inline double value_of(__half v) { return __half2float(v); }
inline double value_of(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
T rounded(double v) {
  if constexpr (std::is_same_v<T, float>) return static_cast<float>(v);
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(static_cast<float>(v));
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(static_cast<float>(v));
}

inline std::mt19937 random_bits{20240612};

template <typename T>
std::vector<T> normal(size_t n, double deviation) {
  std::normal_distribution<double> distribution(0.0, deviation);
  std::vector<T> out(n);
  for (T& v : out) v = rounded<T>(distribution(random_bits));
  return out;
}

// `count` ascending neurons out of f.
inline std::vector<int32_t> some_neurons(int64_t f, int64_t count) {
  std::vector<int32_t> all(f);
  for (int64_t i = 0; i < f; ++i) all[i] = static_cast<int32_t>(i);
  std::shuffle(all.begin(), all.end(), random_bits);
  std::sort(all.begin(), all.begin() + count);
  all.resize(count);
  return all;
}

inline double activated(moyu::Activation kind, double h) {
  switch (kind) {
    case moyu::Activation::kSilu: return h / (1 + std::exp(-h));
    case moyu::Activation::kGelu: return 0.5 * h * (1 + std::erf(h / std::sqrt(2.0)));
    case moyu::Activation::kGeluTanh:
      return 0.5 * h * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (h + 0.044715 * h * h * h)));
    case moyu::Activation::kRelu: return h > 0 ? h : 0;
    case moyu::Activation::kRelu2: return h > 0 ? h * h : 0;
  }
  return h;
}

// One MLP with random weights, and what float64 makes of it. W: what the weights are compared as,
// where they are packed not T.
template <typename T, typename W = T>
struct Problem {
  int64_t rows, d, f;
  bool gated, biased;
  moyu::Activation activation;
  std::vector<T> x, gate_bias, up_bias, down_bias;
  std::vector<W> gate, up, down_t;

  Problem(int64_t rows, int64_t d, int64_t f, bool gated = true, bool biased = false,
          moyu::Activation activation = moyu::Activation::kSilu)
      : rows(rows), d(d), f(f), gated(gated), biased(biased), activation(activation) {
    const double deviation = 1 / std::sqrt(static_cast<double>(d));
    x = normal<T>(rows * d, 1);
    if (gated) gate = normal<W>(f * d, deviation);
    up = normal<W>(f * d, deviation);
    down_t = normal<W>(f * d, deviation);
    if (!biased) return;
    if (gated) gate_bias = normal<T>(f, 0.3);
    up_bias = normal<T>(f, 0.3);
    down_bias = normal<T>(d, 0.3);
  }

  double dot(const std::vector<W>& weight, const std::vector<T>& bias, int64_t r, int64_t i) const {
    double sum = bias.empty() ? 0 : value_of(bias[i]);
    for (int64_t c = 0; c < d; ++c) sum += value_of(weight[i * d + c]) * value_of(x[r * d + c]);
    return sum;
  }
  // act(gate . x) alone, and the whole activation, each [rows, f].
  std::vector<double> gates() const {
    std::vector<double> out(rows * f);
    for (int64_t k = 0; k < rows * f; ++k)
      out[k] = activated(
          activation, gated ? dot(gate, gate_bias, k / f, k % f) : dot(up, up_bias, k / f, k % f));
    return out;
  }
  std::vector<double> activations() const {
    std::vector<double> out = gates();
    if (gated)
      for (int64_t k = 0; k < rows * f; ++k) out[k] *= dot(up, up_bias, k / f, k % f);
    return out;
  }
};

// Compares out [rows, d] with sum over i of a[r, i] * weight_t[i] + bias, where a is 0 for neurons
// that are off. Allowed: the rounding to T, float32's error on sums of this size, and what a itself
// may be off by: errors [rows, f] or empty.
template <typename T, typename W>
void check_sum(const std::vector<T>& out, const std::vector<double>& a,
               const std::vector<W>& weight_t, const std::vector<T>& bias, int64_t rows, int64_t d,
               int64_t f, const std::string& what, double part = 4e-6,
               const std::vector<double>& errors = {}) {
  double worst = 0;
  int64_t at = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < d; ++c) {
      double sum = bias.empty() ? 0 : value_of(bias[c]), squares = 0, of_a = 0;
      for (int64_t i = 0; i < f; ++i) {
        const double w = value_of(weight_t[i * d + c]);
        if (!errors.empty()) of_a += errors[r * f + i] * std::fabs(w);
        if (a[r * f + i] == 0) continue;
        sum += a[r * f + i] * w;
        squares += (1 + a[r * f + i] * a[r * f + i]) * w * w;
      }
      const double allowed =
          kUnit<T> * std::fabs(sum) * 1.001 + part * std::sqrt(squares) + of_a + 0x1p-25;
      const double error = std::fabs(value_of(out[r * d + c]) - sum) / allowed;
      if (std::isnan(worst) || error <= worst) continue;
      worst = error;  // also a NaN, which then stays
      at = r * d + c;
    }
  check(worst <= 1, what + ": error " + std::to_string(worst) + " times the allowed, at element " +
                        std::to_string(at));
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Runs f several times, on the emulator in different thread and block orders, and checks that
// each run gives the same bits; returns the last result.
template <typename F>
auto repeated(const std::string& what, F&& f) {
  auto first = f();
#if defined(MOYU_CUDA_EMULATOR)
  for (auto order :
       {emulator::Order::kBackward, emulator::Order::kShuffled, emulator::Order::kGreedy}) {
    emulator::config.order = order;
    check(same_bits(first, f()), what + ": a race: the result depends on the order of threads");
  }
  emulator::config.order = emulator::Order::kForward;
#else
  check(same_bits(first, f()), what + ": the same bits in a second run");
#endif
  return first;
}

template <typename T>
const T* or_null(const Buffer<T>& buffer, bool present) {
  return present ? buffer.data() : nullptr;
}

// A problem's tensors in device memory, and the descriptor that the launchers take.
template <typename T, typename W = T>
struct OnDevice {
  Buffer<T> x, gate_bias, up_bias, down_bias, out;
  Buffer<W> gate, up, down_t;
  Buffer<float> workspace;
  moyu::Mlp mlp;

  // misaligned: of x, gate, up, down_t the one (1 to 4) that starts between two 16-byte words.
  explicit OnDevice(const Problem<T, W>& p, int misaligned = 0)
      : x(p.x, misaligned == 1), gate_bias(p.gate_bias), up_bias(p.up_bias), down_bias(p.down_bias),
        out(p.rows * p.d), gate(p.gate, misaligned == 2), up(p.up, misaligned == 3),
        down_t(p.down_t, misaligned == 4),
        workspace(moyu::cuda::workspace_floats(p.rows, p.d, p.f)) {
    mlp = {x.data(),
           or_null(gate, p.gated),
           up.data(),
           down_t.data(),
           or_null(gate_bias, p.gated && p.biased),
           or_null(up_bias, p.biased),
           or_null(down_bias, p.biased),
           out.data(),
           p.rows,
           p.d,
           p.f,
           kDType<T>,
           p.activation};
  }
  std::vector<T> read(const std::string& what) const {
    workspace.read(what + " workspace");
    return out.read(what);
  }
};

}  // namespace test
