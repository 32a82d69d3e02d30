// The CUDA kernels against a float64 reference at ugly sizes. Two ways to build it, one source:
//   g++ -std=c++20 -O1 -DMOYU_CUDA_EMULATOR -I tests/cpp tests/cpp/test_cuda_kernels.cpp
//   nvcc -std=c++20 -x cu tests/cpp/test_cuda_kernels.cpp csrc/cuda/*.cu
// The first runs on the emulator, in several thread orders, and needs neither CUDA nor a GPU.
#include "cuda_packed_tests.h"
#include "cuda_shadow_tests.h"

#if defined(MOYU_CUDA_EMULATOR)
#include "../../csrc/cuda/gather_gemv.cu"
#include "../../csrc/cuda/gather_gemv_t.cu"
#include "../../csrc/cuda/shadow_mlp.cu"
#include "../../csrc/cuda/shadow_scores.cu"
#include "../../csrc/cuda/sparse_mlp.cu"
#include "../../csrc/cuda/threshold_compact.cu"
#include "../../csrc/cuda/threshold_mlp.cu"
#include "../../csrc/cuda/unpack_rows.cu"
#include "cuda_emulator_checks.h"
#endif

using namespace moyu;
using namespace test;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::string operator+(const std::string& s, int64_t v) { return s + std::to_string(v); }

Buffer<float> workspace_for(int64_t rows, int64_t d, int64_t f) {
  return Buffer<float>(cuda::workspace_floats(rows, d, f));
}

// ---- threshold_compact ----

void compact_case(const std::vector<float>& values, int64_t rows, float epsilon,
                  const std::string& what) {
  const int64_t f = static_cast<int64_t>(values.size()) / rows;
  Buffer<float> v(values), e(std::vector<float>{epsilon});
  Buffer<int32_t> indices(rows * f), count(rows);
  const auto got = repeated(what, [&] {
    cuda::threshold_compact(v.data(), rows, f, e.data(), indices.data(), count.data(), nullptr);
    auto all = indices.read(what);
    for (int32_t n : count.read(what)) all.push_back(n);
    return all;
  });
  std::vector<int32_t> expected(rows * f, 0);
  for (int64_t r = 0; r < rows; ++r) {
    int32_t n = 0;
    for (int64_t i = 0; i < f; ++i)
      if (!(values[r * f + i] < epsilon)) expected[r * f + n++] = static_cast<int32_t>(i);
    expected.push_back(n);
  }
  check(got == expected, what);
}

void test_threshold_compact() {
  for (int64_t f : {1, 19, 31, 32, 33, 111, 989, 1024, 4099, 65536, 65537, 70001})
    for (float epsilon : {-kInf, 0.3f, kInf}) {
      const int64_t rows = f < 5000 ? 3 : 1;
      compact_case(normal<float>(rows * f, 1), rows, epsilon,
                   std::string("threshold_compact f ") + f + " epsilon " + std::to_string(epsilon));
    }
  compact_case({1, kNan, -kInf, kInf, 0.5f, -0.0f, 0.0f, 0.25f}, 1, 0.5f, "threshold_compact NaN");
  compact_case({1, 0, kNan}, 1, kNan, "threshold_compact with a NaN as epsilon");
  compact_case({-1, 0.0f, -0.0f}, 1, 0.0f, "threshold_compact at zero");
}

// ---- gather_gemv and gather_gemv_t ----

// What a device-side count may hold, against how many entries must be used.
struct Count {
  int32_t stored;
  int64_t used;
};

template <typename T>
void gemv_case(int64_t rows, int64_t d, int64_t f, int64_t capacity, Count count, bool biased,
               size_t misaligned_by = 0) {
  const std::string what = std::string("gather_gemv ") + type_name<T>() + " rows " + rows + " d " +
                           d + " f " + f + " count " + count.stored;
  const Problem<T> p(rows, d, f, false, biased);
  auto list = some_neurons(f, capacity);
  if (capacity > 3) list[1] = -1, list[2] = static_cast<int32_t>(f), list[3] = 2147483647;
  Buffer<T> x(p.x, misaligned_by), weight(p.up, misaligned_by), bias(p.up_bias);
  Buffer<int32_t> indices(list), n(std::vector<int32_t>{count.stored});
  Buffer<float> out(rows * capacity);
  const auto got = repeated(what, [&] {
    cuda::gather_gemv(x.data(), weight.data(), or_null(bias, biased), indices.data(), n.data(),
                      out.data(), rows, d, f, capacity, kDType<T>, nullptr);
    return out.read(what);
  });
  double worst = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < capacity; ++k) {
      const bool used = k < count.used && list[k] >= 0 && list[k] < f;
      const double expected = used ? p.dot(p.up, p.up_bias, r, list[k]) : 0;
      const double error = std::fabs(got[r * capacity + k] - expected);
      worst = std::isnan(error) ? kInf : std::max(worst, used ? error : error * 1e9);
    }
  check(worst < 4e-6, what + ": error " + std::to_string(worst));
}

// Without indices: every row of the weight.
template <typename T>
void whole_gemv_case(int64_t rows, int64_t d, int64_t f, bool biased) {
  const std::string what = std::string("gather_gemv of all, ") + type_name<T>() + " rows " + rows +
                           " d " + d + " f " + f;
  const Problem<T> p(rows, d, f, false, biased);
  Buffer<T> x(p.x), weight(p.up), bias(p.up_bias);
  Buffer<float> out(rows * f);
  const auto got = repeated(what, [&] {
    cuda::gather_gemv(x.data(), weight.data(), or_null(bias, biased), nullptr, nullptr, out.data(),
                      rows, d, f, f, kDType<T>, nullptr);
    return out.read(what);
  });
  double worst = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < f; ++k) {
      const double error = std::fabs(got[r * f + k] - p.dot(p.up, p.up_bias, r, k));
      worst = std::isnan(error) ? kInf : std::max(worst, error);
    }
  check(worst < 4e-6, what + ": error " + std::to_string(worst));
}

template <typename T>
void gemv_t_case(int64_t rows, int64_t d, int64_t f, int64_t capacity, Count count, bool biased) {
  const std::string what = std::string("gather_gemv_t ") + type_name<T>() + " rows " + rows +
                           " d " + d + " f " + f + " count " + count.stored;
  const Problem<T> p(rows, d, f, false, biased);
  auto list = some_neurons(f, capacity);
  if (capacity > 3) list[1] = -1, list[2] = static_cast<int32_t>(f), list[3] = 2147483647;
  const auto values = normal<float>(rows * capacity, 1);
  Buffer<float> v(values), workspace = workspace_for(rows, d, f);
  Buffer<T> weight_t(p.down_t), bias(p.down_bias), out(rows * d);
  Buffer<int32_t> indices(list), n(std::vector<int32_t>{count.stored});
  const auto got = repeated(what, [&] {
    cuda::gather_gemv_t(v.data(), weight_t.data(), or_null(bias, biased), indices.data(), n.data(),
                        out.data(), rows, d, f, capacity, kDType<T>, workspace.data(), nullptr);
    workspace.read(what + " workspace");
    return out.read(what);
  });
  std::vector<double> a(rows * f, 0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < count.used; ++k)
      if (list[k] >= 0 && list[k] < f) a[r * f + list[k]] = values[r * capacity + k];
  check_sum(got, a, p.down_t, p.down_bias, rows, d, f, what);
}

template <typename T>
void test_gathers() {
  for (int64_t rows : {1, 2, 3, 5, 8, 11}) {
    gemv_case<T>(rows, 111, 19, 19, {19, 19}, rows % 2 == 1);
    whole_gemv_case<T>(rows, 111, 19, rows % 2 == 0);
    gemv_case<T>(rows, 128, 40, 33, {17, 17}, rows % 2 == 0);
    gemv_t_case<T>(rows, 111, 19, 19, {19, 19}, rows % 2 == 1);
    gemv_t_case<T>(rows, 128, 40, 33, {17, 17}, rows % 2 == 0);
  }
  for (auto [d, f] : {std::pair<int64_t, int64_t>{1, 1}, {19, 989}, {989, 19}, {2312, 111}}) {
    gemv_case<T>(1, d, f, f, {static_cast<int32_t>(f), f}, false);
    gemv_t_case<T>(2, d, f, f, {static_cast<int32_t>(f), f}, true);
  }
  for (Count count : {Count{0, 0}, {1, 1}, {-7, 0}, {2000000000, 64}, {65, 64}}) {
    gemv_case<T>(2, 64, 111, 64, count, true);
    gemv_t_case<T>(2, 64, 111, 64, count, true);
  }
  gemv_case<T>(3, 256, 40, 40, {40, 40}, false, 1);  // d fits, the addresses do not
}

// ---- sparse_mlp ----

enum class Set { kAll, kHalf, kNone, kOne, kTooMany, kOverCapacity, kBadIndices };

template <typename T>
void sparse_case(const Problem<T>& p, Set kind, bool masked, int misaligned = 0) {
  const int64_t f = p.f;
  const std::string what =
      std::string("sparse_mlp ") + type_name<T>() + " rows " + p.rows + " d " + p.d + " f " + f +
      " set " + static_cast<int>(kind) + (p.gated ? " gated" : "") + (p.biased ? " biased" : "") +
      (masked ? " masked" : "") + " activation " + static_cast<int>(p.activation);
  const int64_t used = kind == Set::kNone                                 ? 0
                       : kind == Set::kOne                                ? 1
                       : kind == Set::kHalf || kind == Set::kOverCapacity ? f / 2
                                                                          : f;
  auto list = some_neurons(f, used);
  // A buffer of just the size needed is fine too, and nothing behind it may be read.
  const int64_t capacity = kind == Set::kHalf || kind == Set::kOverCapacity ? used : f;
  list.resize(capacity, 0);
  if (kind == Set::kBadIndices) list[0] = -5, list[f - 1] = static_cast<int32_t>(f);
  std::vector<uint8_t> mask(p.rows * f, 1);
  for (auto& m : mask) m = !masked || random_bits() % 3 != 0;
  const int32_t stored = kind == Set::kTooMany        ? 2000000000
                         : kind == Set::kOverCapacity ? static_cast<int32_t>(used + 1)
                                                      : static_cast<int32_t>(used);
  OnDevice<T> device(p, misaligned);
  Buffer<int32_t> indices(list), count(std::vector<int32_t>{stored});
  Buffer<uint8_t> row_mask(mask);
  ActiveSet set{indices.data(), count.data(), or_null(row_mask, masked)};
  if (kind == Set::kAll) set.indices = nullptr, set.count = nullptr;
  const auto got = repeated(what, [&] {
    cuda::sparse_mlp(device.mlp, set, capacity, device.workspace.data(), nullptr);
    return device.read(what);
  });
  const auto a = p.activations();
  std::vector<double> kept(a.size(), 0);
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t k = 0; k < used; ++k)
      if (const int32_t i = list[k]; i >= 0 && i < f && mask[r * f + i])
        kept[r * f + i] = a[r * f + i];
  check_sum(got, kept, p.down_t, p.down_bias, p.rows, p.d, f, what);
}

template <typename T>
void test_sparse_mlp() {
  for (int64_t rows = 1; rows <= 9; ++rows)
    sparse_case(Problem<T>(rows, rows % 2 == 0 ? 111 : 128, 43, rows % 3 != 0, rows % 4 < 2),
                Set::kHalf, rows > 1);
  for (auto kind :
       {Set::kAll, Set::kNone, Set::kOne, Set::kTooMany, Set::kOverCapacity, Set::kBadIndices}) {
    sparse_case(Problem<T>(1, 64, 111, true, true), kind, false);
    sparse_case(Problem<T>(3, 19, 70, false, false), kind, true);
  }
  for (auto [d, f] : {std::pair<int64_t, int64_t>{1, 1}, {19, 989}, {989, 19}, {2312, 40}})
    sparse_case(Problem<T>(1, d, f), Set::kAll, false);
  for (int misaligned = 1; misaligned <= 4; ++misaligned)
    sparse_case(Problem<T>(2, 128, 43, true), Set::kHalf, false, misaligned);
  for (auto activation :
       {Activation::kGelu, Activation::kGeluTanh, Activation::kRelu, Activation::kRelu2}) {
    sparse_case(Problem<T>(2, 64, 43, true, true, activation), Set::kHalf, false);
    sparse_case(Problem<T>(1, 33, 43, false, true, activation), Set::kHalf, false);
  }
}

// ---- threshold_mlp ----

// An epsilon that lies in the widest gap near the wanted density, so that the float32 scores fall
// on the same side of it as the float64 ones.
float epsilon_between(std::vector<double> scores, double density) {
  std::sort(scores.begin(), scores.end());
  const int64_t n = scores.size();
  const int64_t centre = std::clamp<int64_t>(std::llround((1 - density) * n), 1, n - 1);
  int64_t best = centre;
  for (int64_t i = std::max<int64_t>(1, centre - n / 10); i < std::min(n, centre + n / 10 + 1); ++i)
    if (scores[i] - scores[i - 1] > scores[best] - scores[best - 1]) best = i;
  return static_cast<float>((scores[best] + scores[best - 1]) / 2);
}

template <typename T>
void threshold_case(const Problem<T>& p, Plan plan, double density, bool scaled) {
  const std::string what = std::string("threshold_mlp ") + type_name<T>() + " rows " + p.rows +
                           " d " + p.d + " f " + p.f + " plan " + static_cast<int>(plan) +
                           " density " + std::to_string(density) + (p.gated ? " gated" : "") +
                           (p.biased ? " biased" : "") + (scaled ? " scaled" : "");
  std::vector<float> scale(p.f, 1.0f);
  for (auto& s : scale)
    if (scaled) s = 0.5f + static_cast<float>(random_bits() % 1000) / 1000;
  const auto a = p.activations();
  auto score = plan == Plan::kGate ? p.gates() : a;
  for (int64_t k = 0; k < p.rows * p.f; ++k) score[k] = std::fabs(score[k]) * scale[k % p.f];
  const float epsilon = density == 1 ? 0.0f : density == 0 ? kInf : epsilon_between(score, density);

  std::vector<double> kept(a.size(), 0);
  std::vector<int32_t> expected(p.rows, 0);
  for (int64_t k = 0; k < p.rows * p.f; ++k) {
    if (score[k] < epsilon) continue;
    kept[k] = a[k];
    ++expected[k / p.f];
  }
  OnDevice<T> device(p);
  Buffer<float> c(scale), e(std::vector<float>{epsilon});
  Buffer<int32_t> counts(p.rows);
  const auto got = repeated(what, [&] {
    cuda::threshold_mlp(device.mlp, plan, or_null(c, scaled), e.data(), counts.data(),
                        device.workspace.data(), nullptr);
    return device.read(what);
  });
  check(counts.read(what) == expected, what + ": counts");
  check_sum(got, kept, p.down_t, p.down_bias, p.rows, p.d, p.f, what);

  // A row alone gives the same bits as the row among others.
  if (p.rows == 1 || p.rows > kMaxRows) return;
  std::vector<T> alone;
  for (int64_t r = 0; r < p.rows; ++r) {
    Mlp one = device.mlp;
    one.rows = 1;
    one.x = device.x.data() + r * p.d;
    one.out = device.out.data() + r * p.d;
    Buffer<float> workspace = workspace_for(1, p.d, p.f);
    if (p.d * sizeof(T) % 16 != 0) break;  // the two may then take different widths
    cuda::threshold_mlp(one, plan, or_null(c, scaled), e.data(), counts.data() + r,
                        workspace.data(), nullptr);
    const auto now = device.out.read(what);
    alone.insert(alone.end(), now.begin() + r * p.d, now.begin() + (r + 1) * p.d);
  }
  if (!alone.empty()) check(same_bits(alone, got), what + ": a row depends on the others");
}

template <typename T>
void test_threshold_mlp() {
  for (Plan plan : {Plan::kGate, Plan::kProduct}) {
    for (int64_t rows = 1; rows <= 9; ++rows)
      threshold_case(Problem<T>(rows, rows % 2 == 0 ? 111 : 128, 43, rows % 3 != 0, rows % 4 < 2),
                     plan, 0.3, rows > 4);
    for (double density : {0.0, 0.1, 0.6, 1.0}) {
      threshold_case(Problem<T>(1, 64, 989, true, true), plan, density, true);
      threshold_case(Problem<T>(2, 19, 111, false, false), plan, density, false);
    }
    threshold_case(Problem<T>(1, 1, 1), plan, 1, false);
    threshold_case(Problem<T>(1, 2312, 19), plan, 0.5, false);
    threshold_case(Problem<T>(2, 64, 111, true, true, Activation::kRelu), plan, 0.3, true);
  }
}

// A NaN in the input is never filtered out: it reaches every output of its row, and only that.
void test_nan_reaches_the_output() {
  Problem<float> p(2, 64, 43);
  p.x[3] = kNan;
  OnDevice<float> device(p);
  Buffer<float> e(std::vector<float>{1e30f});
  Buffer<int32_t> counts(2);
  for (Plan plan : {Plan::kGate, Plan::kProduct}) {
    cuda::threshold_mlp(device.mlp, plan, nullptr, e.data(), counts.data(), device.workspace.data(),
                        nullptr);
    const auto out = device.read("NaN");
    bool good = counts.read("NaN") == std::vector<int32_t>{43, 0};
    for (int64_t c = 0; c < 64; ++c) good &= std::isnan(out[c]) && out[64 + c] == 0;
    check(good, "a NaN reaches its row's output and no other");
  }
}

template <typename T>
void test_type() {
  test_gathers<T>();
  test_sparse_mlp<T>();
  test_threshold_mlp<T>();
}

void test_everything() {
#if defined(MOYU_CUDA_EMULATOR)
  check_emulator();
  test_threshold_compact();
  test_type<float>();
  test_type<__half>();
  test_type<__nv_bfloat16>();
  test_packed_type<float>();
  test_packed_type<__half>();
  test_packed_type<__nv_bfloat16>();
  test_shadow();
  emulator::config.multiprocessors = 1;  // several tiles a block
  sparse_case(Problem<__half>(2, 64, 300), Set::kHalf, true);
  threshold_case(Problem<__half>(2, 64, 300), Plan::kGate, 0.4, false);
  threshold_case(Problem<float>(5, 64, 300), Plan::kProduct, 0.4, true);
  gemv_case<__half>(2, 64, 300, 290, {280, 280}, true);
  gemv_t_case<__half>(2, 64, 300, 290, {280, 280}, true);
  shadow_case(Problem<__half>(3, 64, 300), 2, 1);
  emulator::config.multiprocessors = 20;  // many partial outputs, then blocks without a share
  sparse_case(Problem<__half>(2, 64, 111, true, true), Set::kAll, true);
  threshold_case(Problem<__half>(2, 64, 111), Plan::kGate, 0.5, false);
  gemv_t_case<__half>(2, 64, 111, 90, {90, 90}, false);
  sparse_case(Problem<__half>(1, 64, 111), Set::kOne, false);
  threshold_case(Problem<__half>(1, 64, 43), Plan::kProduct, 0.1, false);
  gemv_t_case<__half>(1, 64, 111, 90, {7, 7}, true);
  shadow_case(Problem<__half>(1, 64, 111), 2, 2);
  shadow_case(Problem<float>(2, 64, 19), 1, 3);
  emulator::config.multiprocessors = 600;  // more than kMaxBlocks blocks would be asked for
  shadow_case(Problem<__half>(1, 16, 1300), 2, 2);
  emulator::config.multiprocessors = 3;
#else
  test_threshold_compact();
  test_type<__half>();
  test_packed_type<__half>();
  test_shadow();
  const char* brief = std::getenv("MOYU_TEST_BRIEF");  // under compute-sanitizer, which is slow
  if (brief == nullptr || brief[0] != '1') {
    test_type<float>();
    test_type<__nv_bfloat16>();
    test_packed_type<float>();
    test_packed_type<__nv_bfloat16>();
  }
#endif
  test_nan_reaches_the_output();
}

}  // namespace

int main() {
  try {
    test_everything();
  } catch (const std::exception& e) {
    check(false, e.what());
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
