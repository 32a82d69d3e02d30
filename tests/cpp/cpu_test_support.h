// What the CPU kernel tests stand on: guarded buffers, random problems, and the float64 reference
// with the error that float32 sums may have.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/moyu.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#endif

namespace test {

inline int passed = 0, failed = 0;

inline void check(bool ok, const std::string& what) {
  ++(ok ? passed : failed);
  if (!ok) std::printf("FAILED: %s\n", what.c_str());
}

// n elements between two guards of 256 bytes. All starts as 0xff bytes, which is NaN or -1: an
// output that stays unwritten shows, and so does an input that is read past its end.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n) : n_(n) {
    memory_ = static_cast<unsigned char*>(::operator new(bytes(), std::align_val_t{64}));
    std::memset(memory_, 0xff, bytes());
    poison();
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    std::copy(values.begin(), values.end(), data());
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    ASAN_UNPOISON_MEMORY_REGION(memory_, bytes());
    ::operator delete(memory_, std::align_val_t{64});
  }

  // As before anything was written.
  void reset() const { std::memset(data(), 0xff, n_ * sizeof(T)); }
  T* data() const { return reinterpret_cast<T*>(memory_ + kGuard); }

  // The elements; a failed check where a guard was written to.
  std::vector<T> read(const std::string& what) const {
    ASAN_UNPOISON_MEMORY_REGION(memory_, bytes());
    bool intact = true;
    for (size_t i = 0; i < kGuard; ++i)
      intact &= memory_[i] == 0xff && memory_[bytes() - 1 - i] == 0xff;
    if (!intact) check(false, what + ": wrote outside of the buffer");
    std::vector<T> out(data(), data() + n_);
    poison();
    return out;
  }

 private:
  static constexpr size_t kGuard = 256;
  size_t bytes() const { return n_ * sizeof(T) + 2 * kGuard; }
  void poison() const {
    ASAN_POISON_MEMORY_REGION(memory_, kGuard);
    ASAN_POISON_MEMORY_REGION(memory_ + kGuard + n_ * sizeof(T), kGuard);
  }
  size_t n_;
  unsigned char* memory_;
};

// ---- element types, converted here by arithmetic alone ----

struct Half {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};

// digits: of the significand; lowest: frexp's exponent of the smallest normal number.
template <class T>
struct Format;
template <>
struct Format<float> {
  static constexpr int digits = 24, lowest = -125;
  static constexpr moyu::DType dtype = moyu::DType::kFloat32;
  static constexpr const char* name = "float32";
};
template <>
struct Format<Half> {
  static constexpr int digits = 11, lowest = -13;
  static constexpr moyu::DType dtype = moyu::DType::kFloat16;
  static constexpr const char* name = "float16";
};
template <>
struct Format<Bf16> {
  static constexpr int digits = 8, lowest = -125;
  static constexpr moyu::DType dtype = moyu::DType::kBFloat16;
  static constexpr const char* name = "bfloat16";
};

inline double value_of(float v) { return v; }
inline double value_of(Bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline double value_of(Half v) {
  const int exponent = (v.bits >> 10) & 31, fraction = v.bits & 1023;
  const double magnitude = exponent == 0    ? std::ldexp(fraction, -24)
                           : exponent == 31 ? (fraction ? NAN : INFINITY)
                                            : std::ldexp(1024 + fraction, exponent - 25);
  return v.bits & 0x8000 ? -magnitude : magnitude;
}

// The nearest T, ties to even; v within T's range.
template <class T>
T rounded(double v) {
  if constexpr (std::is_same_v<T, float>) return static_cast<float>(v);
  int exponent;
  std::frexp(v, &exponent);
  const double quantum = std::ldexp(1, std::max(exponent, Format<T>::lowest) - Format<T>::digits);
  const double nearest = std::nearbyint(v / quantum) * quantum;
  T out;
  if constexpr (std::is_same_v<T, Bf16>) {
    const float f = static_cast<float>(nearest);
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    out.bits = static_cast<uint16_t>(bits >> 16);
  }
  if constexpr (std::is_same_v<T, Half>) {
    const double a = std::fabs(nearest);
    std::frexp(a, &exponent);
    const int biased = a < std::ldexp(1, -14) ? 0 : exponent + 14;
    const double fraction = biased ? std::ldexp(a, 25 - biased) - 1024 : std::ldexp(a, 24);
    out.bits = static_cast<uint16_t>((std::signbit(v) << 15) | (biased << 10) | int(fraction));
  }
  return out;
}

inline std::mt19937 random_bits{20240612};

template <class T>
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

// ---- the reference ----

// A float64 value and the error that a float32 computation of it may have.
struct Exact {
  double value = 0, error = 0;
};

constexpr double kUnit = 0x1p-24;

// A sum of n rounded terms: each partial sum rounds once, and the errors add up like a random
// walk; 4 deviations of that, and as much of the terms' own errors.
struct Sum {
  double value = 0, squares = 0, errors = 0;
  int64_t n = 0;
  void add(double term, double error = 0) {
    value += term;
    squares += term * term;
    errors += error * error;
    ++n;
  }
  Exact exact() const {
    return {value, 4 * (kUnit * std::sqrt(n * squares) + std::sqrt(errors)) + 0x1p-120};
  }
};

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

// All five have slopes within 1.13, but for the square: 2 h. A few roundings on the way.
inline Exact activated(moyu::Activation kind, const Exact& h) {
  const double slope = kind == moyu::Activation::kRelu2 ? 2 * std::fabs(h.value) + h.error : 1.13;
  return {activated(kind, h.value), slope * h.error + 8 * kUnit * (std::fabs(h.value) + 1e-6)};
}

template <class T>
Exact dot(const std::vector<T>& weight, const std::vector<T>& bias, const std::vector<T>& x,
          int64_t i, int64_t r, int64_t d) {
  Sum sum;
  for (int64_t c = 0; c < d; ++c) sum.add(value_of(weight[i * d + c]) * value_of(x[r * d + c]));
  if (!bias.empty()) sum.add(value_of(bias[i]));
  return sum.exact();
}

// One MLP with random weights, the guarded copies that a kernel gets, and what float64 makes of it.
template <class T>
struct Problem {
  int64_t rows, d, f;
  bool gated;
  moyu::Activation activation;
  std::vector<T> x, gate, up, down_t, gate_bias, up_bias, down_bias;
  std::vector<Exact> ups, gates, products;  // [rows, f]: up . x + bias, act(gate . x), a(x)

  Problem(int64_t rows, int64_t d, int64_t f, bool gated = true, bool biased = false,
          moyu::Activation activation = moyu::Activation::kSilu)
      : rows(rows), d(d), f(f), gated(gated), activation(activation) {
    const double deviation = 1 / std::sqrt(double(d));
    x = normal<T>(rows * d, 1);
    if (gated) gate = normal<T>(f * d, deviation);
    up = normal<T>(f * d, deviation);
    down_t = normal<T>(f * d, deviation);
    if (biased) {
      if (gated) gate_bias = normal<T>(f, 0.3);
      up_bias = normal<T>(f, 0.3);
      down_bias = normal<T>(d, 0.3);
    }
    for (int64_t k = 0; k < rows * f; ++k) {
      const Exact u = dot(up, up_bias, x, k % f, k / f, d);
      const Exact h = gated ? dot(gate, gate_bias, x, k % f, k / f, d) : u;
      const Exact g = activated(activation, h);
      ups.push_back(u);
      gates.push_back(g);
      products.push_back(!gated
                             ? g
                             : Exact{g.value * u.value,
                                     g.error * std::fabs(u.value) + u.error * std::fabs(g.value) +
                                         2 * kUnit * std::fabs(g.value * u.value)});
    }
  }

  std::string text() const {
    return std::string(Format<T>::name) + " rows " + std::to_string(rows) + " d " +
           std::to_string(d) + " f " + std::to_string(f) + (gated ? " gated" : " ungated") +
           (up_bias.empty() ? "" : " biased");
  }

  // sum over the active i of a_i(x) down_i + bias, [rows, d]; active: [rows, f]. rest: the values
  // of a_i in the place of those not active, [rows, f], or none.
  std::vector<Exact> output(const std::vector<bool>& active,
                            const std::vector<Exact>& rest = {}) const {
    std::vector<Exact> out;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < d; ++c) {
        Sum sum;
        for (int64_t i = 0; i < f; ++i) {
          if (!active[r * f + i] && rest.empty()) continue;
          const double w = value_of(down_t[i * d + c]);
          const Exact& a = active[r * f + i] ? products[r * f + i] : rest[r * f + i];
          sum.add(a.value * w, a.error * w);
        }
        if (!down_bias.empty()) sum.add(value_of(down_bias[c]));
        out.push_back(sum.exact());
      }
    return out;
  }
};

// The kernel's arguments in guarded memory.
template <class T>
struct Arguments {
  Buffer<T> x, gate, up, down_t, gate_bias, up_bias, down_bias, out;
  moyu::Mlp mlp;

  explicit Arguments(const Problem<T>& p)
      : x(p.x), gate(p.gate), up(p.up), down_t(p.down_t), gate_bias(p.gate_bias),
        up_bias(p.up_bias), down_bias(p.down_bias), out(p.rows * p.d) {
    const bool biased = !p.up_bias.empty();
    mlp.x = x.data();
    mlp.gate = p.gated ? gate.data() : nullptr;
    mlp.up = up.data();
    mlp.down_t = down_t.data();
    mlp.gate_bias = biased && p.gated ? gate_bias.data() : nullptr;
    mlp.up_bias = biased ? up_bias.data() : nullptr;
    mlp.down_bias = biased ? down_bias.data() : nullptr;
    mlp.out = out.data();
    mlp.rows = p.rows;
    mlp.d = p.d;
    mlp.f = p.f;
    mlp.dtype = Format<T>::dtype;
    mlp.activation = p.activation;
  }
};

// One check: every element within its error, plus the rounding to T.
template <class T>
void check_close(const std::vector<T>& got, const std::vector<Exact>& exact,
                 const std::string& what) {
  double worst = 0;
  size_t at = 0;
  for (size_t k = 0; k < exact.size(); ++k) {
    const double half_step = std::ldexp(1.001, -Format<T>::digits);
    const double smallest = std::ldexp(1, Format<T>::lowest - Format<T>::digits);
    const double allowed = half_step * std::fabs(exact[k].value) + smallest + exact[k].error;
    const double error = std::fabs(value_of(got[k]) - exact[k].value) / allowed;
    if (error <= worst) continue;
    worst = error;  // also where it is a NaN
    at = k;
    if (std::isnan(error)) break;
  }
  check(got.size() == exact.size() && worst <= 1, what + ": error " + std::to_string(worst) +
                                                      " times the allowed, at element " +
                                                      std::to_string(at));
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace test
