// The low-bit shadow on CUDA: codes are packed here by the words of moyu.h, estimates compared with
// float64 on the unpacked ones, and the MLP checked in the tiers that its scores name.
#pragma once

#include "cuda_packed_tests.h"

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
template <typename T, typename W>
std::vector<Estimate> estimates(const Quantised& q, const Problem<T, W>& p,
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

// What a row gets of a neuron.
enum class Tier { kNothing, kEstimated, kExact };

// Everything that the two operators take. The inverse is not that of the norms: so it shows.
template <typename T, typename W = T>
struct ShadowProblem {
  Problem<T, W> p;
  Quantised gate, up;
  std::vector<float> norms, inverse;
  OnDevice<T, W> device;
  Buffer<uint8_t> records;
  Buffer<float> device_norms, device_inverse, workspace;
  Buffer<int32_t> counts;
  moyu::Shadow shadow;
  double part = 4e-6;  // of check_sum

  // same: neurons with the shadow and the norm of neuron 0.
  ShadowProblem(const Problem<T, W>& problem, int bits_gate, int bits_up,
                const std::vector<int64_t>& same = {})
      : p(problem), gate(p.gated ? alike(draw_codes(p.f, p.d, bits_gate), p.f, same) : Quantised{}),
        up(alike(draw_codes(p.f, p.d, bits_up), p.f, same)), norms(alike(positive(p.f), 1, same)),
        inverse(positive(p.f)), device(p), records(pack_records(gate, up, p.d, p.f)),
        device_norms(norms), device_inverse(inverse),
        workspace(moyu::cuda::shadow_workspace_floats(p.rows, p.d, p.f)), counts(2 * p.rows) {
    shadow.records = records.data();
    shadow.norms = device_norms.data(), shadow.inverse = device_inverse.data();
    shadow.bits_gate = gate.bits, shadow.bits_up = up.bits;
  }

  template <typename Value>
  static std::vector<Value> alike(std::vector<Value> v, int64_t each,
                                  const std::vector<int64_t>& same) {
    for (int64_t i : same) std::copy_n(v.begin(), each, v.begin() + i * each);
    return v;
  }
  static Quantised alike(const Quantised& q, int64_t f, const std::vector<int64_t>& same) {
    const auto of_each = [&](const auto& v) { return static_cast<int64_t>(v.size()) / f; };
    return {q.bits, alike(q.codes, of_each(q.codes), same),
            alike(q.scales, of_each(q.scales), same)};
  }

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

  // With their signs, [rows, f].
  std::vector<Estimate> expected_scores() const {
    auto out = estimates(up, p, p.up_bias);
    if (p.gated) {
      const auto g = estimates(gate, p, p.gate_bias);
      for (size_t k = 0; k < out.size(); ++k) {
        const Estimate a = activated(p.activation, g[k]), u = out[k];
        out[k] = {a.value * u.value,
                  a.error * (std::fabs(u.value) + u.error) + u.error * std::fabs(a.value)};
      }
    } else {
      for (Estimate& e : out) e = activated(p.activation, e);
    }
    for (size_t k = 0; k < out.size(); ++k) {
      const double c = norms[k % p.f], value = out[k].value * c;
      out[k] = {value, out[k].error * c + 4 * 0x1p-24 * std::fabs(value)};
    }
    return out;
  }

  void check_scores(const std::vector<float>& got) const {
    const auto expected = expected_scores();
    double worst = 0;
    for (size_t k = 0; k < got.size(); ++k) {
      const double error =
          std::fabs(got[k] - std::fabs(expected[k].value)) / (expected[k].error + 1e-30);
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
    check(worst <= 1, text() + " scores: error " + std::to_string(worst) + " times the allowed");
  }

  // The MLP with its neurons in these tiers, [rows, f].
  void check_mlp(const std::vector<Tier>& of, const moyu::Tiers& tiers, const std::string& how) {
    const std::string what = text() + " " + how;
    const auto got = repeated(what, [&] {
      moyu::cuda::shadow_mlp(device.mlp, shadow, tiers, counts.data(), workspace.data(), nullptr);
      workspace.read(what + " workspace");
      return device.out.read(what);
    });
    std::vector<int32_t> wanted(2 * p.rows, 0);
    auto a = p.activations();
    std::vector<double> errors(a.size(), 0);
    const auto estimated =
        tiers.estimated > 0 ? expected_scores() : std::vector<Estimate>(a.size());
    for (size_t k = 0; k < a.size(); ++k) {
      wanted[k / p.f] += of[k] == Tier::kExact;
      if (of[k] == Tier::kNothing) a[k] = 0;
      if (of[k] != Tier::kEstimated) continue;
      ++wanted[p.rows + k / p.f];
      a[k] = estimated[k].value * inverse[k % p.f];
      errors[k] = estimated[k].error * inverse[k % p.f] + 2 * 0x1p-24 * std::fabs(a[k]);
    }
    check(counts.read(what) == wanted, what + ": counts");
    check_sum(got, a, p.down_t, p.down_bias, p.rows, p.d, p.f, what, part, errors);
  }

  // The largest scores of each row, of equals the lower index first; a NaN is the largest.
  void check_top(const std::vector<float>& scores, int64_t exact, int64_t estimated) {
    std::vector<Tier> of(scores.size(), Tier::kNothing);
    for (int64_t r = 0; r < p.rows; ++r) {
      std::vector<int64_t> order(p.f);
      for (int64_t i = 0; i < p.f; ++i) order[i] = i;
      const float* const mine = scores.data() + r * p.f;
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return std::isnan(mine[a]) ? !std::isnan(mine[b]) : mine[a] > mine[b];
      });
      for (int64_t n = 0; n < exact + estimated; ++n)
        of[r * p.f + order[n]] = n < exact ? Tier::kExact : Tier::kEstimated;
    }
    check_mlp(of, {nullptr, exact, estimated},
              "top " + std::to_string(exact) + " + " + std::to_string(estimated));
  }

  void check_tiers() {
    const auto got = scores();
    const int64_t third = (p.f + 2) / 3;
    check_top(got, third, third / 2);
    check_top(got, third, p.f - third);
    check_top(got, 0, p.f);
  }

  // edges: also nobody and everybody.
  void check_all(bool edges) {
    const auto got = scores();
    check_scores(got);
    const int64_t third = (p.f + 2) / 3;
    std::vector<std::pair<int64_t, int64_t>> tops = {{third, 0}, {third, (p.f - third + 1) / 2}};
    std::vector<float> epsilons = {got[random_bits() % got.size()]};
    if (edges) {
      tops.insert(tops.end(), {{0, 0}, {p.f, 0}, {0, 1}});
      epsilons.insert(epsilons.end(), {0.0f, INFINITY});
    }
    for (const auto& [exact, estimated] : tops) check_top(got, exact, estimated);
    for (float epsilon : epsilons) {
      std::vector<Tier> of;
      for (float v : got) of.push_back(v < epsilon ? Tier::kNothing : Tier::kExact);
      const Buffer<float> on_device(std::vector<float>{epsilon});
      check_mlp(of, {on_device.data(), 0, 0}, "epsilon " + std::to_string(epsilon));
    }
  }
};

template <typename T>
void shadow_case(const Problem<T>& p, int bits_gate, int bits_up, bool edges = false) {
  ShadowProblem<T>(p, bits_gate, bits_up).check_all(edges);
}

// Many equal scores: all but every third neuron have the same shadow, or the estimates are all 0.
inline void test_shadow_ties() {
  for (int64_t rows : {1, 3}) {
    for (bool zeros : {false, true}) {
      const Problem<float> p(rows, 64, 331, true, false,
                             zeros ? moyu::Activation::kRelu : moyu::Activation::kSilu);
      std::vector<int64_t> same;
      for (int64_t i = 1; i < p.f; ++i)
        if (i % 3 != 0) same.push_back(i);
      ShadowProblem<float> s(p, 2, 2, same);
      const Buffer<uint8_t> nothing(
          std::vector<uint8_t>(p.f * moyu::shadow_record_bytes(p.d, 2, 2), 0));
      if (zeros) {
        for (auto* q : {&s.gate, &s.up})
          q->scales.assign(q->scales.size(), rounded<__nv_bfloat16>(0));
        s.shadow.records = nothing.data();
      }
      const auto got = s.scores();
      for (int64_t k : {1, 110, 111, 330}) s.check_top(got, k, 0);
      for (int64_t exact : {0, 110})
        for (int64_t estimated : {1, 131}) s.check_top(got, exact, estimated);
    }
  }
}

// Of neurons that are only estimated gate and up are not read: they are not there.
inline void test_shadow_reads_of_down_alone() {
  constexpr int64_t kExact = 9;
  for (int64_t rows : {1, 3}) {
    const Problem<float> p(rows, 64, 43);
    ShadowProblem<float> s(p, 2, 2);
    for (int64_t i = 0; i < kExact; ++i) s.norms[i] *= 1e6f;  // the largest scores
    const auto first = [&](const std::vector<float>& weight) {
      return std::vector<float>(weight.begin(), weight.begin() + kExact * p.d);
    };
    const Buffer<float> norms(s.norms), gate(first(p.gate)), up(first(p.up));
    s.shadow.norms = norms.data();
    s.device.mlp.gate = gate.data(), s.device.mlp.up = up.data();
    s.check_top(s.scores(), kExact, 20);
  }
}

template <typename T>
void packed_tiers_case(int64_t rows, int64_t d, int64_t f, const PackedFormats& formats,
                       bool gated) {
  const double deviation = 1 / std::sqrt(static_cast<double>(d));
  const Packed gate(f, d, formats.in_bits, formats.in_group, deviation);
  const Packed up(f, d, formats.in_bits, formats.in_group, deviation);
  const Packed down(f, d, formats.down_bits, formats.down_group, deviation);
  Problem<T, float> p(rows, d, f, gated, true);
  p.up = up.values, p.down_t = down.values;
  if (gated) p.gate = gate.values;
  ShadowProblem<T, float> s(p, 2, 2);
  const Buffer<uint8_t> gate_bytes(gate.bytes), up_bytes(up.bytes), down_bytes(down.bytes);
  if (gated) s.device.mlp.gate = {gate_bytes.data(), gate.bits, gate.group};
  s.device.mlp.up = {up_bytes.data(), up.bits, up.group};
  s.device.mlp.down_t = {down_bytes.data(), down.bits, down.group};
  s.part = 4e-5 + 4 * std::max(gate.allowed(), up.allowed()) * deviation;
  s.check_tiers();
}

template <typename T>
void test_shadow_tiers() {
  for (int64_t rows : {1, 2, 8, 11})
    for (bool gated : {true, false})
      ShadowProblem<T>(Problem<T>(rows, 64, 43, gated, rows == 8), 2, 2).check_tiers();
  ShadowProblem<T>(Problem<T>(4, 19, 60), 3, 2).check_tiers();
  packed_tiers_case<T>(1, 64, 43, {4, 64, 4, 64}, true);
  packed_tiers_case<T>(1, 111, 19, {8, 32, 8, 32}, false);
  packed_tiers_case<T>(2, 64, 43, {4, 32, 8, 32}, false);
  packed_tiers_case<T>(8, 64, 19, {8, 64, 4, 64}, true);
  packed_tiers_case<T>(11, 64, 19, {4, 64, 4, 32}, true);
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
  const auto run = [&](const moyu::Tiers& tiers) {
    moyu::cuda::shadow_mlp(s.device.mlp, s.shadow, tiers, s.counts.data(), s.workspace.data(),
                           nullptr);
  };
  run({epsilon.data(), 0, 0});
  check(s.counts.read("NaN") == std::vector<int32_t>{43, 0, 0, 0}, "shadow: NaN scores are active");
  run({nullptr, 7, 0});
  check(s.counts.read("NaN") == std::vector<int32_t>{7, 7, 0, 0},
        "shadow: the top k of NaN scores");
  run({nullptr, 0, 1});
  const auto out = s.device.out.read("NaN");
  good = s.counts.read("NaN") == std::vector<int32_t>{0, 0, 1, 1};
  for (int64_t c = 0; c < p.d; ++c) good &= std::isnan(out[c]) && !std::isnan(out[p.d + c]);
  check(good, "shadow: a NaN estimate reaches its row's output and no other");
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
  test_shadow_tiers<float>();
  test_shadow_tiers<__half>();
  test_shadow_tiers<__nv_bfloat16>();
  test_shadow_ties();
  test_shadow_reads_of_down_alone();
  test_shadow_nan();
  test_shadow_subnormal();
}

}  // namespace test
