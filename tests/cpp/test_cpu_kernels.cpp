// The CPU kernels against a float64 reference: every instruction set that runs here, at ugly sizes,
// with one thread and with several.
//   g++ -std=c++20 -O1 -fopenmp csrc/cpu/*.cpp tests/cpp/test_cpu_*.cpp -o test && ./test
#include "test_cpu_kernels.h"

#include <omp.h>

#include <list>
#include <stdexcept>

#include "cpu_test_support.h"

using namespace moyu;

namespace test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
const int64_t kSizes[][2] = {{1, 1},    {1, 989},   {989, 1},   {19, 111},
                             {111, 19}, {111, 989}, {989, 111}, {128, 64}};  // d, f
const int64_t kRows[] = {1, 2, 7, 13};

Buffer<float> workspace_for(int64_t rows, int64_t d) {
  return Buffer<float>(cpu::workspace_floats(rows, d));
}

// ---- threshold_compact ----

void compact_case(std::vector<float> values, int64_t rows, float epsilon, const std::string& isa) {
  const int64_t f = int64_t(values.size()) / rows;
  const std::string what = isa + " threshold_compact rows " + std::to_string(rows) + " f " +
                           std::to_string(f) + " epsilon " + std::to_string(epsilon);
  Buffer<float> v(values), e(std::vector<float>{epsilon});
  Buffer<int32_t> indices(rows * f), count(rows);
  cpu::threshold_compact(v.data(), rows, f, e.data(), indices.data(), count.data());
  std::vector<int32_t> expected(rows * f, 0), counts(rows, 0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < f; ++i)
      if (!(values[r * f + i] < epsilon)) expected[r * f + counts[r]++] = int32_t(i);
  check(indices.read(what) == expected && count.read(what) == counts, what);
}

void test_threshold_compact(const std::string& isa) {
  for (int64_t f : {1, 15, 16, 17, 19, 32, 33, 111, 989, 40001})
    for (float epsilon : {-kInf, 0.3f, kInf, kNan})
      compact_case(normal<float>(3 * f, 1), 3, epsilon, isa);
  std::vector<float> odd = normal<float>(111, 1);
  odd[0] = kNan;            // counts as active
  odd[5] = odd[6] = 0.25f;  // equal to epsilon: active
  odd[7] = std::nextafter(0.25f, 0.0f);
  odd[109] = kInf;
  odd[110] = -kInf;
  compact_case(odd, 1, 0.25f, isa);
  std::fill(odd.begin(), odd.end(), -0.0f);  // not below zero
  compact_case(odd, 1, 0.0f, isa);
}

// ---- rounding to the output's type ----

// One neuron with weights of 1 and a value that float16 or bfloat16 rounds in its own way; the bits
// that must come out in every column, in vectors and behind them.
template <class T>
void rounding_case(float value, uint16_t bits, const std::string& isa) {
  constexpr int64_t d = 37;
  const Buffer<T> weight(std::vector<T>(d, rounded<T>(1.0))), out(d);
  const Buffer<float> values(std::vector<float>{value}), workspace = workspace_for(1, d);
  const Buffer<int32_t> indices(std::vector<int32_t>{0}), count(std::vector<int32_t>{1});
  cpu::gather_gemv_t(values.data(), weight.data(), nullptr, indices.data(), count.data(),
                     out.data(), 1, d, 1, Format<T>::dtype, workspace.data());
  const std::string what = isa + " rounds " + std::to_string(value) + " to " + std::to_string(bits);
  bool right = true;
  for (T v : out.read(what)) right &= v.bits == bits;
  check(right, what);
}

template <class T>
void nan_case(uint32_t bits, const std::string& isa) {
  constexpr int64_t d = 37;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  const Buffer<T> weight(std::vector<T>(d, rounded<T>(1.0))), out(d);
  const Buffer<float> values(std::vector<float>{value}), workspace = workspace_for(1, d);
  const Buffer<int32_t> indices(std::vector<int32_t>{0}), count(std::vector<int32_t>{1});
  cpu::gather_gemv_t(values.data(), weight.data(), nullptr, indices.data(), count.data(),
                     out.data(), 1, d, 1, Format<T>::dtype, workspace.data());
  bool nan = true;
  for (T v : out.read(isa)) nan &= std::isnan(value_of(v));
  check(nan, isa + " a NaN stays one, whatever its bits: " + std::to_string(bits));
}

void test_rounding(const std::string& isa) {
  rounding_case<Half>(65519.0f, 0x7bff, isa);
  rounding_case<Half>(65520.0f, 0x7c00, isa);  // the first to be an infinity
  rounding_case<Half>(-1e30f, 0xfc00, isa);
  rounding_case<Half>(kInf, 0x7c00, isa);
  rounding_case<Half>(1 + 0x1p-11f, 0x3c00, isa);
  rounding_case<Half>(1 + 3 * 0x1p-11f, 0x3c02, isa);
  rounding_case<Half>(0x1.8p-24f, 0x0002, isa);
  rounding_case<Bf16>(1 + 0x1p-8f, 0x3f80, isa);
  rounding_case<Bf16>(1 + 3 * 0x1p-8f, 0x3f82, isa);
  rounding_case<Bf16>(3.4028235e38f, 0x7f80, isa);
  rounding_case<Bf16>(-kInf, 0xff80, isa);
  for (uint32_t bits : {0x7fc00000u, 0x7f800001u, 0x7fffffffu, 0xffffffffu}) {
    nan_case<Half>(bits, isa);
    nan_case<Bf16>(bits, isa);
  }
}

// ---- The other operators. A case is made once, with its expected result, and run on each
// ---- instruction set and number of threads.

// An active set in guarded memory: indices with capacity f (the rest stays -1), and count.
struct Set {
  std::vector<int32_t> neurons;
  Buffer<int32_t> indices, count;
  Set(int64_t f, int64_t active)
      : neurons(some_neurons(f, active)), indices(f), count(std::vector<int32_t>{int32_t(active)}) {
    std::copy(neurons.begin(), neurons.end(), indices.data());
  }
};

// gather_gemv over up, and gather_gemv_t over down_t with values of its own.
template <class T>
class GatherCase {
 public:
  GatherCase(const Problem<T>& p, int64_t active)
      : p_(p), set_(p.f, active), values_(normal<float>(p.rows * p.f, 1)) {
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t k = 0; k < p.f; ++k)
        dots_.push_back(k < active ? p.ups[r * p.f + set_.neurons[k]] : Exact{0, 0});
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t c = 0; c < p.d; ++c) {
        Sum sum;
        for (int64_t k = 0; k < active; ++k)
          sum.add(values_[r * p.f + k] * value_of(p.down_t[set_.neurons[k] * p.d + c]));
        if (!p.down_bias.empty()) sum.add(value_of(p.down_bias[c]));
        sums_.push_back(sum.exact());
      }
  }

  void run(const std::string& where, const Arguments<T>& a) const {
    const std::string what =
        where + p_.text() + " active " + std::to_string(set_.neurons.size()) + " gather_gemv";
    const int64_t capacity = p_.f;
    a.out.reset();
    const Buffer<float> workspace = workspace_for(p_.rows, p_.d), out(p_.rows * capacity);
    cpu::gather_gemv(a.mlp.x, a.mlp.up, a.mlp.up_bias, set_.indices.data(), set_.count.data(),
                     out.data(), p_.rows, p_.d, capacity, Format<T>::dtype, workspace.data());
    check_close(out.read(what), dots_, what);
    if (static_cast<int64_t>(set_.neurons.size()) == p_.f) {
      out.reset();
      cpu::gather_gemv(a.mlp.x, a.mlp.up, a.mlp.up_bias, nullptr, nullptr, out.data(), p_.rows,
                       p_.d, p_.f, Format<T>::dtype, workspace.data());
      check_close(out.read(what), dots_, what + " without indices");
    }
    const Buffer<float> values(values_);
    cpu::gather_gemv_t(values.data(), a.mlp.down_t, a.mlp.down_bias, set_.indices.data(),
                       set_.count.data(), a.mlp.out, p_.rows, p_.d, capacity, Format<T>::dtype,
                       workspace.data());
    check_close(a.out.read(what + "_t"), sums_, what + "_t");
    workspace.read(what + ": workspace");
  }

 private:
  const Problem<T>& p_;
  Set set_;
  std::vector<float> values_;
  std::vector<Exact> dots_, sums_;
};

template <class T>
class SparseCase {
 public:
  SparseCase(const Problem<T>& p, int64_t active, bool masked) : p_(p), set_(p.f, active) {
    if (masked)
      for (int64_t k = 0; k < p.rows * p.f; ++k) mask_.push_back(random_bits() % 2);
    std::vector<bool> on(p.rows * p.f, false);
    for (int64_t r = 0; r < p.rows; ++r)
      for (int32_t i : set_.neurons) on[r * p.f + i] = !masked || mask_[r * p.f + i];
    expected_ = p.output(on);
  }

  void run(const std::string& where, const Arguments<T>& a) const {
    const std::string what = where + p_.text() + " active " + std::to_string(set_.neurons.size()) +
                             (mask_.empty() ? "" : " masked") + " sparse_mlp";
    a.out.reset();
    const Buffer<uint8_t> mask(mask_);
    const Buffer<float> workspace = workspace_for(p_.rows, p_.d);
    const ActiveSet given{set_.indices.data(), set_.count.data(),
                          mask_.empty() ? nullptr : mask.data()};
    cpu::sparse_mlp(a.mlp, given, workspace.data());
    const std::vector<T> first = a.out.read(what);
    check_close(first, expected_, what);
    a.out.reset();
    cpu::sparse_mlp(a.mlp, given, workspace.data());
    check(same_bits(first, a.out.read(what)), what + ": the same bits in a second run");
    if (int64_t(set_.neurons.size()) == p_.f && mask_.empty()) {
      cpu::sparse_mlp(a.mlp, {}, workspace.data());
      check(same_bits(first, a.out.read(what)), what + ": no set means every neuron");
    }
    workspace.read(what + ": workspace");
  }

 private:
  const Problem<T>& p_;
  Set set_;
  std::vector<uint8_t> mask_;
  std::vector<Exact> expected_;
};

// About `fraction` of the scores lie below the threshold.
template <class T>
class ThresholdCase {
 public:
  ThresholdCase(const Problem<T>& p, Plan plan, double fraction, bool scaled)
      : p_(p), plan_(plan), counts_(p.rows, 0) {
    if (scaled)
      for (float v : normal<float>(p.f, 1)) scale_.push_back(0.5f + std::fabs(v));
    std::vector<double> scores;
    for (int64_t k = 0; k < p.rows * p.f; ++k)
      scores.push_back(std::fabs((plan == Plan::kGate ? p.gates : p.products)[k].value) *
                       (scaled ? scale_[k % p.f] : 1.0f));
    epsilon_ = fraction <= 0 ? 0.0f : fraction >= 1 ? kInf : between(scores, fraction);
    std::vector<bool> on;
    for (int64_t k = 0; k < p.rows * p.f; ++k) {
      on.push_back(!(scores[k] < epsilon_));
      counts_[k / p.f] += on[k];
    }
    expected_ = p.output(on);
  }

  void run(const std::string& where, const Arguments<T>& a) const {
    const std::string what = where + p_.text() + (plan_ == Plan::kGate ? " gate" : " product") +
                             (scale_.empty() ? "" : " scaled") + " epsilon " +
                             std::to_string(epsilon_) + " threshold_mlp";
    a.out.reset();
    const Buffer<float> scale(scale_), epsilon(std::vector<float>{epsilon_});
    const Buffer<float> workspace = workspace_for(p_.rows, p_.d);
    const Buffer<int32_t> counts(p_.rows);
    cpu::threshold_mlp(a.mlp, plan_, scale_.empty() ? nullptr : scale.data(), epsilon.data(),
                       counts.data(), workspace.data());
    check(counts.read(what) == counts_, what + ": counts");
    check_close(a.out.read(what), expected_, what);
    workspace.read(what + ": workspace");
  }

 private:
  // In the widest gap nearby, so that no score is within its error of the threshold.
  static float between(std::vector<double> scores, double fraction) {
    std::sort(scores.begin(), scores.end());
    const auto place = int64_t(fraction * double(scores.size()));
    double best = scores[place] / 2, width = -1;
    const int64_t end = std::min(place + 12, int64_t(scores.size()) - 1);
    for (int64_t k = std::max(place - 12, int64_t(0)); k < end; ++k)
      if (scores[k + 1] - scores[k] > width) {
        width = scores[k + 1] - scores[k];
        best = (scores[k] + scores[k + 1]) / 2;
      }
    return float(best);
  }

  const Problem<T>& p_;
  Plan plan_;
  std::vector<float> scale_;
  float epsilon_;
  std::vector<int32_t> counts_;
  std::vector<Exact> expected_;
};

template <class T>
void test_mlps(const std::vector<std::string>& isas) {
  const Activation activations[] = {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh,
                                    Activation::kRelu, Activation::kRelu2};
  int turn = 0;
  for (const auto& size : kSizes)
    for (int64_t rows : kRows) {
      const int64_t d = size[0], f = size[1];
      const bool gated = turn % 4 != 3, biased = turn % 3 == 1;
      const Problem<T> p(rows, d, f, gated, biased, activations[turn % 5]);
      ++turn;
      const Arguments<T> a(p);
      std::list<GatherCase<T>> gathers;
      std::list<SparseCase<T>> sparse;
      std::list<ThresholdCase<T>> thresholds;
      for (int64_t active : {int64_t(0), (f + 2) / 3, f}) {
        gathers.emplace_back(p, active);
        sparse.emplace_back(p, active, false);
      }
      sparse.emplace_back(p, (f + 1) / 2, true);
      for (double fraction : {0.0, 0.6, 1.0}) {
        thresholds.emplace_back(p, Plan::kGate, fraction, rows == 2);
        thresholds.emplace_back(p, Plan::kProduct, fraction, true);
      }
      for (const std::string& isa : isas)
        for (int threads : {1, 3}) {
          if (threads > 1 && d * f < 100000) continue;  // too little work for a second thread
          cpu::set_isa(isa.c_str());
          omp_set_num_threads(threads);
          const std::string where = isa + ", " + std::to_string(threads) + " threads, ";
          for (const auto& c : gathers) c.run(where, a);
          for (const auto& c : sparse) c.run(where, a);
          for (const auto& c : thresholds) c.run(where, a);
        }
    }
}

void test_nan_and_extremes(const std::string& isa) {
  Problem<float> p(1, 33, 20);
  p.x[7] = kNan;
  Arguments<float> a(p);
  const Buffer<float> workspace = workspace_for(1, 33), eps(std::vector<float>{1e9f});
  const Buffer<int32_t> counts(1);
  cpu::threshold_mlp(a.mlp, Plan::kProduct, nullptr, eps.data(), counts.data(), workspace.data());
  bool all_nan = true;
  for (float v : a.out.read(isa + " NaN")) all_nan &= std::isnan(v);
  check(all_nan && counts.read(isa)[0] == 20, isa + ": a NaN input reaches every output");

  // Half subnormals in, and sums that only float32 can hold on the way.
  Problem<Half> tiny(2, 64, 48);
  for (Half& v : tiny.down_t) v = rounded<Half>(value_of(v) * 1e-6);
  SparseCase<Half>(tiny, 48, false).run(isa + " subnormal ", Arguments<Half>(tiny));
}

void test_instruction_sets() {
  try {
    cpu::set_isa("sse9000");
    check(false, "an unknown instruction set throws");
  } catch (const std::invalid_argument& error) {
    check(std::string(error.what()).find("scalar") != std::string::npos,
          "the message names those that there are");
  }
}

}  // namespace

std::vector<std::string> instruction_sets() {
  const char* names[8];
  const int n = cpu::isa_list(names, 8);
  return {names, names + n};
}

}  // namespace test

int main() {
  const std::vector<std::string> isas = test::instruction_sets();
  test::test_instruction_sets();
  for (const std::string& isa : isas) {
    cpu::set_isa(isa.c_str());
    for (int threads : {1, 3}) {
      omp_set_num_threads(threads);
      test::test_threshold_compact(isa);
      test::test_rounding(isa);
      test::test_nan_and_extremes(isa);
    }
  }
  test::test_mlps<float>(isas);
  test::test_mlps<test::Half>(isas);
  test::test_mlps<test::Bf16>(isas);
  test::test_shadow(isas);
  test::test_decode(isas);
  std::string names;
  for (const std::string& isa : isas) names += " " + isa;
  std::printf("instruction sets:%s\n%d passed, %d failed\n", names.c_str(), test::passed,
              test::failed);
  return test::failed ? 1 : 0;
}
