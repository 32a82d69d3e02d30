// The low-bit shadow: estimates against float64 on codes packed here by the format's words in
// moyu.h, and the MLP over the neurons that it names.
#include <omp.h>

#include "cpu_test_support.h"
#include "test_cpu_kernels.h"

using namespace moyu;

namespace test {
namespace {

// Codes and scales of one matrix, [f, blocks * kShadowBlock] and [f, blocks].
struct Quantized {
  int bits;
  std::vector<int> codes;
  std::vector<Bf16> scales;
};

struct Records {
  int64_t d, f, blocks;
  Quantized gate, up;  // gate.bits is 0 without a gate
  std::vector<uint8_t> bytes;
};

Quantized draw(int64_t f, int64_t d, int64_t blocks, int bits) {
  Quantized q{bits, std::vector<int>(f * blocks * kShadowBlock, 0), {}};
  for (int64_t i = 0; i < f; ++i)
    for (int64_t j = 0; j < d; ++j)
      q.codes[i * blocks * kShadowBlock + j] = int(random_bits() % (1u << bits));
  for (double v : normal<float>(f * blocks, 1))
    q.scales.push_back(rounded<Bf16>((0.5 + std::fabs(v)) / std::sqrt(double(d))));
  return q;
}

// The bit `bit` of element e's code goes to the place that moyu.h names.
void put(uint8_t* block, int bits, int64_t e, int code) {
  const auto set = [&](int64_t byte, int64_t shift, int value) {
    block[byte] = uint8_t(block[byte] | (value << shift));
  };
  if (bits == 4) return set(64 * (e / 128) + e % 64, 4 * (e / 64 % 2), code);
  if (bits >= 2) set(e % 64, 2 * (e / 64), code & 3);
  if (bits != 2) set((bits == 3 ? 64 : 0) + e % 32, e / 64 + 4 * (e / 32 % 2), code >> (bits - 1));
}

Records make_records(int64_t d, int64_t f, int bits_gate, int bits_up) {
  const int64_t blocks = shadow_blocks(d), size = shadow_record_bytes(d, bits_gate, bits_up);
  Records r{d, f, blocks, {0, {}, {}}, draw(f, d, blocks, bits_up), {}};
  if (bits_gate) r.gate = draw(f, d, blocks, bits_gate);
  r.bytes.assign(f * size, 0);
  for (int64_t i = 0; i < f; ++i) {
    uint8_t* at = r.bytes.data() + i * size;
    for (const Quantized* q : {&r.gate, &r.up})
      for (int64_t b = 0; q->bits && b < blocks; ++b, at += 32 * q->bits)
        for (int64_t e = 0; e < kShadowBlock; ++e)
          put(at, q->bits, e, q->codes[(i * blocks + b) * kShadowBlock + e]);
    for (const Quantized* q : {&r.gate, &r.up})
      for (int64_t b = 0; q->bits && b < blocks; ++b, at += 2)
        std::memcpy(at, &q->scales[i * blocks + b], 2);
  }
  return r;
}

// Estimates of one matrix times x [rows, d], [rows, f]: x in int8 per block, then exact.
template <class T>
std::vector<Exact> estimates(const Quantized& q, const std::vector<T>& x,
                             const std::vector<T>& bias, int64_t rows, int64_t d, int64_t f) {
  const int64_t blocks = shadow_blocks(d);
  std::vector<Exact> out;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < f; ++i) {
      Sum sum;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = b * kShadowBlock, end = std::min(d, begin + kShadowBlock);
        float largest = 0;
        for (int64_t j = begin; j < end; ++j)
          largest = std::max(largest, std::fabs(float(value_of(x[r * d + j]))));
        const float step = largest / 127.0f;
        const double scale = value_of(q.scales[i * blocks + b]) * step;
        int64_t codes = 0, sum_x = 0;
        double squares = 0;
        for (int64_t j = begin; j < end; ++j) {
          const auto xq =
              step > 0 ? int64_t(std::nearbyint(float(value_of(x[r * d + j])) / step)) : 0;
          const int64_t product = q.codes[i * blocks * kShadowBlock + j] * xq;
          codes += product;
          squares += double(product * product);
          sum_x += xq;
        }
        // Two terms, since the kernel sums the codes and their zero point apart. Each is a product
        // of three or four rounded factors.
        for (double term : {double(codes), -0.5 * ((1 << q.bits) - 1) * double(sum_x)})
          sum.add(scale * term, 4 * kUnit * scale * term);
        // The lanes of a vector are exact integers, but their sum is one of up to 16 floats.
        sum.add(0, 4 * kUnit * scale * std::sqrt(squares));
      }
      if (!bias.empty()) sum.add(value_of(bias[i]));
      out.push_back(sum.exact());
    }
  return out;
}

template <class T>
void shadow_case(int64_t rows, int64_t d, int64_t f, int bits_gate, int bits_up, bool biased,
                 Activation activation, const std::string& isa) {
  const Problem<T> p(rows, d, f, bits_gate > 0, biased, activation);
  const std::string what =
      isa + " " + p.text() + " bits " + std::to_string(bits_gate) + "/" + std::to_string(bits_up);
  const Records records = make_records(d, f, bits_gate, bits_up);
  const Arguments<T> a(p);
  const Buffer<uint8_t> bytes(records.bytes);
  std::vector<float> norms;
  for (float v : normal<float>(f, 1)) norms.push_back(0.5f + std::fabs(v));
  const Buffer<float> guarded_norms(norms), scores(rows * f);
  const Buffer<float> workspace(cpu::shadow_workspace_floats(rows, d, f));
  const Buffer<int32_t> counts(2 * rows);
  std::vector<float> factors;  // any: what is estimated is score * inverse, whatever that is
  for (float v : normal<float>(f, 1)) factors.push_back(v);
  const Buffer<float> inverse(factors);
  const Shadow shadow{
      bytes.data(), guarded_norms.data(), inverse.data(), nullptr, nullptr, bits_gate, bits_up};

  cpu::shadow_scores(a.mlp, shadow, scores.data(), workspace.data());
  const std::vector<float> got = scores.read(what + " shadow_scores");
  const auto up = estimates(records.up, p.x, p.up_bias, rows, d, f);
  std::vector<Exact> expected, values;  // values: what stands for a_i where it is estimated
  const auto expect = [&](int64_t k, double a, double error) {
    const double c = norms[k % f], s = factors[k % f];
    expected.push_back({std::fabs(a) * c, c * (error + 16 * kUnit * std::fabs(a))});
    values.push_back({a * c * s, c * std::fabs(s) * (error + 18 * kUnit * std::fabs(a))});
  };
  if (bits_gate) {
    const auto gate = estimates(records.gate, p.x, p.gate_bias, rows, d, f);
    for (int64_t k = 0; k < rows * f; ++k) {
      const Exact g = activated(activation, gate[k]), &u = up[k];
      expect(k, g.value * u.value, g.error * std::fabs(u.value) + u.error * std::fabs(g.value));
    }
  } else {
    for (int64_t k = 0; k < rows * f; ++k) {
      const Exact u = activated(activation, up[k]);
      expect(k, u.value, u.error);
    }
  }
  check_close(got, expected, what + " shadow_scores");

  // The sets follow from the scores as they came out; ties go to the lower index.
  for (const auto& [k, more] :
       {std::pair{int64_t(0), int64_t(0)}, std::pair{(f + 2) / 3, int64_t(0)},
        std::pair{f, int64_t(0)}, std::pair{(f + 4) / 5, (f + 1) / 3}, std::pair{int64_t(0), f},
        std::pair{f / 2, f - f / 2}}) {
    std::vector<bool> active(rows * f, false);
    std::vector<Exact> rest(rows * f, Exact{0, 0});
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<int64_t> order(f);
      for (int64_t i = 0; i < f; ++i) order[i] = i;
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t i, int64_t j) { return got[r * f + i] > got[r * f + j]; });
      for (int64_t n = 0; n < k; ++n) active[r * f + order[n]] = true;
      for (int64_t n = k; n < k + more; ++n) rest[r * f + order[n]] = values[r * f + order[n]];
    }
    const std::string top =
        what + " shadow_mlp top " + std::to_string(k) + " and " + std::to_string(more);
    cpu::shadow_mlp(a.mlp, shadow, {nullptr, k, more}, counts.data(), workspace.data());
    std::vector<int32_t> sizes(2 * rows, int32_t(k));
    std::fill(sizes.begin() + rows, sizes.end(), int32_t(more));
    check(counts.read(top) == sizes, top + ": counts");
    check_close(a.out.read(top), p.output(active, rest), top);
  }
  const float epsilon = got[random_bits() % got.size()];
  std::vector<bool> active;
  std::vector<int32_t> wanted(2 * rows, 0);
  for (int64_t k = 0; k < rows * f; ++k) {
    active.push_back(!(got[k] < epsilon));
    wanted[k / f] += active[k];
  }
  const Buffer<float> eps(std::vector<float>{epsilon});
  cpu::shadow_mlp(a.mlp, shadow, {eps.data(), 0, 0}, counts.data(), workspace.data());
  check(counts.read(what) == wanted, what + " shadow_mlp threshold: counts");
  check_close(a.out.read(what), p.output(active), what + " shadow_mlp threshold");
  // By price: at one that lies in the widest gap between those at which some neuron changes tiers.
  std::vector<float> gate_errors, up_errors;
  for (float v : normal<float>(f, 0.3)) gate_errors.push_back(std::fabs(v));
  for (float v : normal<float>(f, 0.3)) up_errors.push_back(std::fabs(v));
  const Buffer<float> gate_error(gate_errors), up_error(up_errors);
  Shadow priced = shadow;
  priced.gate_error = gate_error.data();
  priced.up_error = up_error.data();
  std::vector<Exact> gates = up;
  if (bits_gate) gates = estimates(records.gate, p.x, p.gate_bias, rows, d, f);
  const double more = bits_gate ? 2 : 1;
  std::vector<double> sizes, losses, turns;
  for (int64_t k = 0; k < rows * f; ++k) {
    const double du = up_errors[k % f], dh = bits_gate ? gate_errors[k % f] : du,
                 h = gates[k].value;
    const double slope = 0.5 * (activated(activation, Exact{h + dh, 0}).value -
                                activated(activation, Exact{h - dh, 0}).value);
    const double act = activated(activation, gates[k]).value, c = norms[k % f];
    double size = act * act, lost = slope * slope;
    if (bits_gate) {
      lost = lost * (up[k].value * up[k].value + du * du) + size * du * du;
      size *= up[k].value * up[k].value;
    }
    sizes.push_back(size * c * c);
    losses.push_back(lost * c * c);
    for (double turn : {size, lost / more, (size + lost) / (1 + more)})
      turns.push_back(turn * c * c);
  }
  std::sort(turns.begin(), turns.end());
  size_t widest = turns.size() / 3;
  for (size_t i = widest; i + 1 < turns.size() * 4 / 5; ++i)
    if (turns[i + 1] * turns[widest] > turns[widest + 1] * turns[i]) widest = i;
  const double price = std::sqrt(turns[widest] * turns[widest + 1]);
  std::fill(active.begin(), active.end(), false);
  std::fill(wanted.begin(), wanted.end(), 0);
  std::vector<Exact> rest(rows * f, Exact{0, 0});
  for (int64_t k = 0; k < rows * f; ++k) {
    const bool known = sizes[k] >= price;
    active[k] = known ? losses[k] >= more * price : sizes[k] + losses[k] >= (1 + more) * price;
    if (known && !active[k]) rest[k] = values[k];
    wanted[k / f] += active[k];
    wanted[rows + k / f] += known && !active[k];
  }
  const Buffer<float> each(std::vector<float>{static_cast<float>(price)});
  const std::string at = what + " shadow_mlp by price";
  cpu::shadow_mlp(a.mlp, priced, {each.data(), 0, 0}, counts.data(), workspace.data());
  check(counts.read(at) == wanted, at + ": counts");
  check_close(a.out.read(at), p.output(active, rest), at);
  workspace.read(what + ": workspace");
}

// Row 0 has an infinity: no estimate of it is a number. Row 1 is so large that exp of a gate would
// overflow, row 2 so small that its step is subnormal: what is right there is known to half a step.
void special_case(const std::string& isa) {
  constexpr int64_t rows = 3, d = 257, f = 40;
  const Problem<float> p(rows, d, f, true, false, Activation::kSilu);
  std::vector<float> x = p.x;
  x[3] = std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < d; ++j) {
    x[d + j] *= 1e4f;
    x[2 * d + j] = (j % 2 ? -190 : 190) * 0x1p-149f;
  }
  const Records records = make_records(d, f, 2, 2);
  const Buffer<uint8_t> bytes(records.bytes);
  const Buffer<float> norms(std::vector<float>(f, 1.0f)), scores(rows * f), given(x);
  const Buffer<float> workspace(cpu::shadow_workspace_floats(rows, d, f));
  const Arguments<float> a(p);
  Mlp mlp = a.mlp;
  mlp.x = given.data();
  cpu::shadow_scores(mlp, {bytes.data(), norms.data(), nullptr, nullptr, nullptr, 2, 2},
                     scores.data(), workspace.data());
  const auto got = scores.read(isa + " special");
  bool nan = true, large = true, small = true;
  const std::vector<float> middle(x.begin() + d, x.begin() + 2 * d);
  const auto gate = estimates(records.gate, middle, {}, 1, d, f);
  const auto up = estimates(records.up, middle, {}, 1, d, f);
  int beyond = 0;
  for (int64_t i = 0; i < f; ++i) {
    nan &= std::isnan(got[i]);
    const double g = gate[i].value, u = std::fabs(up[i].value);
    beyond += g < -100;
    const double right = g > 0 ? g * u : 0;  // silu is the identity or nothing out there
    const double allowed = gate[i].error * u + up[i].error * std::fabs(g) + 1e-5 * right + 1e-6 * u;
    large &= std::fabs(g) < 100 || std::fabs(got[f + i] - right) <= allowed;
    small &= std::isfinite(got[2 * f + i]);
  }
  check(nan, isa + " an infinity in x makes every estimate of its row a NaN");
  check(large && beyond > 0, isa + " gates whose exp would overflow");
  check(small, isa + " a subnormal step");
  const Buffer<int32_t> counts(2 * rows);
  const Buffer<float> eps(std::vector<float>{1e30f});
  cpu::shadow_mlp(mlp, {bytes.data(), norms.data(), nullptr, nullptr, nullptr, 2, 2},
                  {eps.data(), 0, 0}, counts.data(), workspace.data());
  check(counts.read(isa)[0] == f && counts.read(isa)[2] == 0, isa + " a NaN estimate is active");
}

}  // namespace

void test_shadow(const std::vector<std::string>& isas) {
  const int64_t sizes[][3] = {{1, 1, 1}, {1, 19, 111}, {13, 111, 19}, {2, 257, 300}, {7, 989, 65}};
  for (const std::string& isa : isas) {
    cpu::set_isa(isa.c_str());
    for (int threads : {1, 3}) {
      omp_set_num_threads(threads);
      const std::string where = isa + ", " + std::to_string(threads) + " threads,";
      special_case(where);
      for (const auto& [rows, d, f] : sizes)
        for (int bits = 1; bits <= 4; ++bits) {
          shadow_case<float>(rows, d, f, bits, 5 - bits, false, Activation::kSilu, where);
          shadow_case<Bf16>(rows, d, f, bits, bits, true, Activation::kGelu, where);
          shadow_case<Half>(rows, d, f, 0, bits, bits % 2 == 0, Activation::kRelu, where);
        }
    }
  }
}

}  // namespace test
