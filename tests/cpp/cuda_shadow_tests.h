// The low-bit shadow on CUDA: codes are packed here by the words of moyu.h, estimates compared with
// float64 on the unpacked ones, and the MLP checked over the neurons that its scores name.
#pragma once

#include "cuda_test_support.h"

namespace test {

// Codes and scales of one matrix, [f, blocks * kShadowBlock] and [f, blocks].
struct Quantised {
  int bits = 0;
  std::vector<int> codes;
  std::vector<__nv_bfloat16> scales;
};

inline Quantised draw_codes(int64_t f, int64_t d, int bits) {
  const int64_t blocks = moyu::shadow_blocks(d), width = blocks * moyu::kShadowBlock;
  Quantised q{bits, std::vector<int>(f * width, 0), {}};
  for (int64_t i = 0; i < f; ++i)
    for (int64_t j = 0; j < d; ++j) q.codes[i * width + j] = random_bits() % (1u << bits);
  for (double v : normal<float>(f * blocks, 1))
    q.scales.push_back(
        rounded<__nv_bfloat16>((0.5 + std::fabs(v)) / std::sqrt(static_cast<double>(d))));
  return q;
}

// Puts the code of element e into its block.
inline void pack_code(uint8_t* block, int bits, int64_t e, int code) {
  const auto set = [&](int64_t byte, int64_t shift, int value) {
    block[byte] = static_cast<uint8_t>(block[byte] | value << shift);
  };
  if (bits == 4) return set(64 * (e / 128) + e % 64, 4 * (e / 64 % 2), code);
  if (bits >= 2) set(e % 64, 2 * (e / 64), code & 3);
  if (bits != 2) set((bits == 3 ? 64 : 0) + e % 32, e / 64 + 4 * (e / 32 % 2), code >> (bits - 1));
}

inline std::vector<uint8_t> pack_records(const Quantised& gate, const Quantised& up, int64_t d,
                                         int64_t f) {
  const int64_t blocks = moyu::shadow_blocks(d);
  const int64_t size = moyu::shadow_record_bytes(d, gate.bits, up.bits);
  std::vector<uint8_t> bytes(f * size, 0);
  for (int64_t i = 0; i < f; ++i) {
    uint8_t* at = bytes.data() + i * size;
    for (const Quantised* q : {&gate, &up})
      for (int64_t b = 0; q->bits != 0 && b < blocks; ++b, at += 32 * q->bits)
        for (int64_t e = 0; e < moyu::kShadowBlock; ++e)
          pack_code(at, q->bits, e, q->codes[(i * blocks + b) * moyu::kShadowBlock + e]);
    for (const Quantised* q : {&gate, &up})
      for (int64_t b = 0; q->bits != 0 && b < blocks; ++b, at += 2)
        std::memcpy(at, &q->scales[i * blocks + b], 2);
  }
  return bytes;
}

// A value and the error that float32 may make on the way to it.
struct Estimate {
  double value = 0, error = 0;
};

// One matrix times x [rows, d], [rows, f]: x in int8 per block, then exact.
template <typename T>
std::vector<Estimate> estimates(const Quantised& q, const Problem<T>& p,
                                const std::vector<T>& bias) {
  const int64_t blocks = moyu::shadow_blocks(p.d);
  std::vector<Estimate> out;
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t i = 0; i < p.f; ++i) {
      Estimate sum;
      double squares = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = b * moyu::kShadowBlock;
        const int64_t end = std::min(p.d, begin + moyu::kShadowBlock);
        float largest = 0;
        for (int64_t j = begin; j < end; ++j)
          largest = std::max(largest, static_cast<float>(std::fabs(value_of(p.x[r * p.d + j]))));
        const float step = largest / 127.0f;
        const double scale = value_of(q.scales[i * blocks + b]) * static_cast<double>(step);
        for (int64_t j = begin; j < end; ++j) {
          const auto v = static_cast<float>(value_of(p.x[r * p.d + j]));
          const double xq = step > 0 ? std::nearbyint(v / step) : 0;
          const double code = q.codes[i * blocks * moyu::kShadowBlock + j];
          const double zero = 0.5 * ((1 << q.bits) - 1);
          sum.value += scale * (code - zero) * xq;
          squares += scale * scale * (code * code + zero * zero) * xq * xq;
        }
      }
      // Codes and their zero point are summed apart, a block and quarter at a time.
      sum.error = 12 * 0x1p-24 * std::sqrt(squares * static_cast<double>(moyu::kShadowBlock));
      if (!bias.empty()) sum.value += value_of(bias[i]);
      sum.error += 4 * 0x1p-24 * std::fabs(sum.value);
      out.push_back(sum);
    }
  return out;
}

inline Estimate activated(moyu::Activation kind, const Estimate& e) {
  const double value = activated(kind, e.value);
  const double above = activated(kind, e.value + e.error),
               below = activated(kind, e.value - e.error);
  return {value, std::max(std::fabs(above - value), std::fabs(below - value)) +
                     8 * 0x1p-24 * (std::fabs(e.value) + e.error)};  // 1 + erf(h) cancels
}

// Everything that the two operators take.
template <typename T>
struct ShadowProblem {
  Problem<T> p;
  Quantised gate, up;
  std::vector<float> norms;
  OnDevice<T> device;
  Buffer<uint8_t> records;
  Buffer<float> device_norms, workspace;
  Buffer<int32_t> counts;
  moyu::Shadow shadow;

  ShadowProblem(const Problem<T>& problem, int bits_gate, int bits_up)
      : p(problem), gate(p.gated ? draw_codes(p.f, p.d, bits_gate) : Quantised{}),
        up(draw_codes(p.f, p.d, bits_up)), norms(positive(p.f)), device(p),
        records(pack_records(gate, up, p.d, p.f)), device_norms(norms),
        workspace(moyu::cuda::shadow_workspace_floats(p.rows, p.d, p.f)), counts(p.rows),
        shadow{records.data(), device_norms.data(), gate.bits, up.bits} {}

  static std::vector<float> positive(int64_t f) {
    std::vector<float> out;
    for (float v : normal<float>(f, 1)) out.push_back(0.5f + std::fabs(v));
    return out;
  }

  std::string text() const {
    return std::string("shadow ") + type_name<T>() + " rows " + std::to_string(p.rows) + " d " +
           std::to_string(p.d) + " f " + std::to_string(p.f) + " bits " +
           std::to_string(gate.bits) + "/" + std::to_string(up.bits) + (p.biased ? " biased" : "");
  }

  std::vector<float> scores() {
    Buffer<float> out(p.rows * p.f);
    return repeated(text() + " scores", [&] {
      moyu::cuda::shadow_scores(device.mlp, shadow, out.data(), workspace.data(), nullptr);
      workspace.read(text() + " workspace");
      return out.read(text() + " scores");
    });
  }

  void check_scores(const std::vector<float>& got) const {
    const auto u = estimates(up, p, p.up_bias);
    auto expected = u;
    if (p.gated) {
      const auto g = estimates(gate, p, p.gate_bias);
      for (size_t k = 0; k < u.size(); ++k) {
        const Estimate a = activated(p.activation, g[k]);
        expected[k] = {a.value * u[k].value, a.error * (std::fabs(u[k].value) + u[k].error) +
                                                 u[k].error * std::fabs(a.value)};
      }
    } else {
      for (Estimate& e : expected) e = activated(p.activation, e);
    }
    double worst = 0;
    for (size_t k = 0; k < got.size(); ++k) {
      const double c = norms[k % p.f], right = std::fabs(expected[k].value) * c;
      const double error =
          std::fabs(got[k] - right) / (expected[k].error * c + 4 * 0x1p-24 * right + 1e-30);
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
    check(worst <= 1, text() + " scores: error " + std::to_string(worst) + " times the allowed");
  }

  // The MLP with a threshold (epsilon not null) or the top k, against the active neurons.
  void check_mlp(const std::vector<char>& active, const float* epsilon, int64_t k,
                 const std::string& how) {
    const std::string what = text() + " " + how;
    const auto got = repeated(what, [&] {
      moyu::cuda::shadow_mlp(device.mlp, shadow, epsilon, k, counts.data(), workspace.data(),
                             nullptr);
      workspace.read(what + " workspace");
      return device.out.read(what);
    });
    std::vector<int32_t> wanted(p.rows, 0);
    auto kept = p.activations();
    for (size_t i = 0; i < kept.size(); ++i) {
      wanted[i / p.f] += active[i];
      if (!active[i]) kept[i] = 0;
    }
    check(counts.read(what) == wanted, what + ": counts");
    check_sum(got, kept, p.down_t, p.down_bias, p.rows, p.d, p.f, what);
  }

  // The k largest of each row, of equals the lower index; a NaN is the largest.
  std::vector<char> top(const std::vector<float>& scores, int64_t k) const {
    std::vector<char> active(scores.size(), 0);
    for (int64_t r = 0; r < p.rows; ++r) {
      std::vector<int64_t> order(p.f);
      for (int64_t i = 0; i < p.f; ++i) order[i] = i;
      const float* const mine = scores.data() + r * p.f;
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return std::isnan(mine[a]) ? !std::isnan(mine[b]) : mine[a] > mine[b];
      });
      for (int64_t n = 0; n < k; ++n) active[r * p.f + order[n]] = 1;
    }
    return active;
  }

  // edges: also nobody and everybody.
  void check_all(bool edges) {
    const auto got = scores();
    check_scores(got);
    std::vector<int64_t> ks = {(p.f + 2) / 3};
    std::vector<float> epsilons = {got[random_bits() % got.size()]};
    if (edges) {
      ks.insert(ks.end(), {0, p.f});
      epsilons.insert(epsilons.end(), {0.0f, INFINITY});
    }
    for (int64_t k : ks) check_mlp(top(got, k), nullptr, k, "top " + std::to_string(k));
    for (float epsilon : epsilons) {
      std::vector<char> active;
      for (float v : got) active.push_back(!(v < epsilon));
      const Buffer<float> on_device(std::vector<float>{epsilon});
      check_mlp(active, on_device.data(), 0, "epsilon " + std::to_string(epsilon));
    }
  }
};

template <typename T>
void shadow_case(const Problem<T>& p, int bits_gate, int bits_up, bool edges = false) {
  ShadowProblem<T>(p, bits_gate, bits_up).check_all(edges);
}

// Many equal scores: records of all neurons are the same, or the estimates are all 0.
inline void test_shadow_ties() {
  for (int64_t rows : {1, 3}) {
    for (bool zeros : {false, true}) {
      const Problem<float> p(rows, 64, 331, true, false,
                             zeros ? moyu::Activation::kRelu : moyu::Activation::kSilu);
      ShadowProblem<float> s(p, 2, 2);
      const int64_t size = moyu::shadow_record_bytes(p.d, 2, 2);
      auto bytes = s.records.read("records");
      for (int64_t i = 1; i < p.f; ++i)  // every third neuron has a record of its own
        if (i % 3 != 0 || zeros) std::copy_n(bytes.begin(), size, bytes.begin() + i * size);
      if (zeros) std::fill(bytes.begin(), bytes.end(), uint8_t{0});
      const Buffer<uint8_t> records(bytes);
      const Buffer<float> norms(std::vector<float>(p.f, 1.0f));
      s.shadow.records = records.data();
      s.shadow.norms = norms.data();
      const auto got = s.scores();
      for (int64_t k : {1, 110, 111, 330})
        s.check_mlp(s.top(got, k), nullptr, k, zeros ? "all zero" : "ties");
    }
  }
}

// A row whose input is not finite: every estimate is NaN, so every neuron counts as active.
inline void test_shadow_nan() {
  Problem<float> p(2, 300, 43);
  p.x[299] = std::numeric_limits<float>::infinity();
  ShadowProblem<float> s(p, 2, 2);
  const auto got = s.scores();
  bool good = true;
  for (int64_t i = 0; i < p.f; ++i) good &= std::isnan(got[i]) && !std::isnan(got[p.f + i]);
  check(good, "shadow: an infinite input makes its row's scores NaN");
  const Buffer<float> epsilon(std::vector<float>{1e30f});
  moyu::cuda::shadow_mlp(s.device.mlp, s.shadow, epsilon.data(), 0, s.counts.data(),
                         s.workspace.data(), nullptr);
  check(s.counts.read("NaN") == std::vector<int32_t>{43, 0}, "shadow: NaN scores are active");
  moyu::cuda::shadow_mlp(s.device.mlp, s.shadow, nullptr, 7, s.counts.data(), s.workspace.data(),
                         nullptr);
  check(s.counts.read("NaN") == std::vector<int32_t>{7, 7}, "shadow: the top k of NaN scores");
}

// Inputs so small that the step is subnormal must not leave int8.
inline void test_shadow_subnormal() {
  Problem<float> p(1, 64, 11);
  for (float& v : p.x) v = 190 * 0x1p-149f;
  ShadowProblem<float> s(p, 2, 2);
  bool good = true;
  for (float v : s.scores()) good &= v >= 0 && v < 1e-30f;
  check(good, "shadow: subnormal inputs give tiny scores");
}

inline void test_shadow() {
  const int64_t sizes[][3] = {{1, 1, 1}, {1, 19, 111}, {11, 111, 19}, {2, 257, 60}, {4, 520, 33}};
  for (const auto& [rows, d, f] : sizes)
    for (int bits = 1; bits <= 4; ++bits) {
      shadow_case(Problem<float>(rows, d, f), bits, 5 - bits);
      shadow_case(Problem<__nv_bfloat16>(rows, d, f, true, true, moyu::Activation::kGelu), bits,
                  bits);
      shadow_case(Problem<__half>(rows, d, f, false, bits % 2 == 0, moyu::Activation::kRelu), 0,
                  bits);
    }
  for (int64_t rows = 1; rows <= 9; ++rows) shadow_case(Problem<__half>(rows, 64, 43), 2, 1, true);
  shadow_case(Problem<__half>(1, 2312, 19), 2, 2);  // several steps of a warp along d
  shadow_case(Problem<__half>(1, 16, 2200), 2, 2);  // several tiles of a block
  shadow_case(Problem<__half>(3, 16, 1100), 4, 2);
  test_shadow_ties();
  test_shadow_nan();
  test_shadow_subnormal();
}

}  // namespace test
