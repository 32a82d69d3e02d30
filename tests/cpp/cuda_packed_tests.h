// Packed rows on CUDA: every operator against float64 on what the codes stand for.
#pragma once

#include "cuda_test_support.h"

namespace test {

// n packed rows of d columns, and the weights that they stand for.
struct Packed {
  int64_t n, d;
  int32_t bits, group;
  std::vector<uint8_t> bytes;
  std::vector<float> values;  // [n, d]
  double largest_scale = 0;

  Packed(int64_t n, int64_t d, int32_t bits, int32_t group, double deviation)
      : n(n), d(d), bits(bits), group(group) {
    const int64_t row_bytes = moyu::packed_row_bytes(d, bits, group);
    const int64_t blocks = moyu::packed_blocks(d), groups = 64 / group;
    bytes.assign(n * row_bytes, 0);
    values.resize(n * d);
    std::normal_distribution<double> normal(1.0, 0.1);
    for (int64_t i = 0; i < n; ++i) {
      uint8_t* const row = bytes.data() + i * row_bytes;
      auto* const scales = reinterpret_cast<uint16_t*>(row + blocks * 8 * bits);
      for (int64_t g = 0; g < blocks * groups; ++g) {
        const double step = 3.5 * deviation / (1 << bits) * normal(random_bits);
        const auto scale = rounded<__half>(step);
        const auto offset = rounded<__half>(-step * ((1 << bits) - 1) / 2 * normal(random_bits));
        std::memcpy(&scales[g], &scale, 2);
        std::memcpy(&scales[blocks * groups + g], &offset, 2);
        largest_scale = std::max(largest_scale, value_of(scale));
        for (int64_t e = g % groups * group; e < (g % groups + 1) * group; ++e) {
          const auto code = static_cast<uint32_t>(random_bits() % (1u << bits));
          put(row + g / groups * 8 * bits, e / 16, e % 16, code);
          const int64_t column = g / groups * 64 + e;
          if (column < d)
            values[i * d + column] = static_cast<float>(value_of(scale) * code + value_of(offset));
        }
      }
    }
  }

  // As moyu.h says.
  void put(uint8_t* block, int64_t t, int64_t w, uint32_t code) const {
    const auto nibble = [&] { block[2 * w + t / 2] |= (code & 15) << 4 * (t % 2); };
    const auto pair = [&](int at, uint32_t two) { block[at + w] |= two << 2 * t; };
    const auto top = [&](int at, uint32_t one) { block[at + 2 * t + w / 8] |= one << w % 8; };
    if (bits == 8) block[32 * (t / 2) + 2 * w + t % 2] = static_cast<uint8_t>(code);
    if (bits == 4 || bits == 5 || bits == 6) nibble();
    if (bits == 3) pair(0, code & 3), top(16, code >> 2);
    if (bits == 5) top(32, code >> 4);
    if (bits == 6) pair(32, code >> 4);
  }

  // What a sum of these rows times numbers of size 1 may be off by: what stands for a code of 0 is
  // 1024 or 17 * 128 steps, and is subtracted again.
  double allowed() const {
    return 0x1p-20 * std::sqrt(static_cast<double>(d)) * (1 + 2176 * largest_scale);
  }
};

template <typename T>
void unpack_case(int64_t n, int64_t d, int32_t bits, int32_t group) {
  const std::string what = std::string("unpack_rows ") + type_name<T>() + " bits " +
                           std::to_string(bits) + " group " + std::to_string(group) + " d " +
                           std::to_string(d);
  const Packed packed(n, d, bits, group, 0.1);
  Buffer<uint8_t> bytes(packed.bytes);
  Buffer<T> out(n * d);
  moyu::cuda::unpack_rows({bytes.data(), bits, group}, n, d, kDType<T>, out.data(), nullptr);
  const auto got = out.read(what);
  double worst = 0;
  for (int64_t i = 0; i < n * d; ++i) {
    const double want = packed.values[i];
    const double error = std::fabs(value_of(got[i]) - want) / (std::fabs(want) + 0x1p-14);
    worst = std::isnan(error) ? 1 : std::max(worst, error);
  }
  check(worst <= 1.01 * kUnit<T> + 0x1p-23, what + ": error " + std::to_string(worst));
}

template <typename T>
void packed_gemv_case(int64_t rows, int64_t d, int64_t f, int32_t bits, int32_t group, bool listed,
                      size_t x_misaligned = 0) {
  const std::string what = std::string("gather_gemv packed ") + type_name<T>() + " rows " +
                           std::to_string(rows) + " d " + std::to_string(d) + " f " +
                           std::to_string(f) + " bits " + std::to_string(bits) + " group " +
                           std::to_string(group);
  Problem<T, float> p(rows, d, f, false, true);
  const Packed packed(f, d, bits, group, 1 / std::sqrt(static_cast<double>(d)));
  p.up = packed.values;
  auto list = some_neurons(f, (f + 1) / 2);
  if (list.size() > 3) list[1] = -1;
  const int64_t capacity = listed ? static_cast<int64_t>(list.size()) : f;
  Buffer<T> x(p.x, x_misaligned), bias(p.up_bias);
  Buffer<uint8_t> weight(packed.bytes);
  Buffer<int32_t> indices(list), count(std::vector<int32_t>{static_cast<int32_t>(list.size())});
  Buffer<float> out(rows * capacity);
  const auto got = repeated(what, [&] {
    moyu::cuda::gather_gemv(x.data(), {weight.data(), bits, group}, bias.data(),
                            or_null(indices, listed), or_null(count, listed), out.data(), rows, d,
                            f, capacity, kDType<T>, nullptr);
    return out.read(what);
  });
  double worst = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < capacity; ++k) {
      const int64_t i = listed ? list[k] : k;
      const double want = i < 0 ? 0 : p.dot(p.up, p.up_bias, r, i);
      const double error = std::fabs(got[r * capacity + k] - want);
      worst = std::isnan(error) ? 1e9 : std::max(worst, error);
    }
  check(worst <= packed.allowed(), what + ": error " + std::to_string(worst) + ", allowed " +
                                       std::to_string(packed.allowed()));
}

template <typename T>
void packed_gemv_t_case(int64_t rows, int64_t d, int64_t f, int32_t bits, int32_t group,
                        bool listed) {
  const std::string what = std::string("gather_gemv_t packed ") + type_name<T>() + " rows " +
                           std::to_string(rows) + " d " + std::to_string(d) + " f " +
                           std::to_string(f) + " bits " + std::to_string(bits) + " group " +
                           std::to_string(group);
  const Packed packed(f, d, bits, group, 1 / std::sqrt(static_cast<double>(d)));
  const auto list = some_neurons(f, (f + 1) / 2);
  const int64_t capacity = listed ? static_cast<int64_t>(list.size()) : f;
  const auto values = normal<float>(rows * capacity, 1);
  Buffer<float> v(values), workspace(moyu::cuda::workspace_floats(rows, d, f));
  Buffer<uint8_t> weight(packed.bytes);
  Buffer<T> out(rows * d);
  Buffer<int32_t> indices(list), count(std::vector<int32_t>{static_cast<int32_t>(list.size())});
  const auto got = repeated(what, [&] {
    moyu::cuda::gather_gemv_t(v.data(), {weight.data(), bits, group}, nullptr,
                              or_null(indices, listed), or_null(count, listed), out.data(), rows, d,
                              f, capacity, kDType<T>, workspace.data(), nullptr);
    workspace.read(what + " workspace");
    return out.read(what);
  });
  std::vector<double> a(rows * f, 0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < capacity; ++k)
      a[r * f + (listed ? list[k] : k)] = values[r * capacity + k];
  check_sum(got, a, packed.values, std::vector<T>{}, rows, d, f, what, 4e-5);
}

struct PackedFormats {
  int32_t in_bits, in_group, down_bits, down_group;
};

// sparse_mlp over a list, or threshold_mlp where `plan` is given, against float64.
template <typename T>
void packed_mlp_case(int64_t rows, int64_t d, int64_t f, const PackedFormats& formats, bool gated,
                     int32_t up_bits, const moyu::Plan* plan) {
  const std::string what =
      std::string(plan ? "threshold_mlp" : "sparse_mlp") + " packed " + type_name<T>() + " rows " +
      std::to_string(rows) + " d " + std::to_string(d) + " f " + std::to_string(f) + " bits " +
      std::to_string(formats.in_bits) + " " + std::to_string(up_bits) + " " +
      std::to_string(formats.down_bits) + " groups " + std::to_string(formats.in_group) + " " +
      std::to_string(formats.down_group) + (gated ? " gated" : "");
  const double deviation = 1 / std::sqrt(static_cast<double>(d));
  Problem<T, float> p(rows, d, f, gated, true);
  const Packed gate(f, d, formats.in_bits, formats.in_group, deviation);
  const Packed up(f, d, up_bits, formats.in_group, deviation);
  const Packed down(f, d, formats.down_bits, formats.down_group, deviation);
  if (gated) p.gate = gate.values;
  p.up = up.values, p.down_t = down.values;
  Buffer<uint8_t> gate_bytes(gate.bytes), up_bytes(up.bytes), down_bytes(down.bytes);
  Buffer<T> x(p.x), gate_bias(p.gate_bias), up_bias(p.up_bias), down_bias(p.down_bias);
  Buffer<T> out(rows * d);
  Buffer<float> workspace(moyu::cuda::workspace_floats(rows, d, f));
  moyu::Mlp mlp;
  mlp.x = x.data();
  if (gated) mlp.gate = {gate_bytes.data(), formats.in_bits, formats.in_group};
  mlp.up = {up_bytes.data(), up_bits, formats.in_group};
  mlp.down_t = {down_bytes.data(), formats.down_bits, formats.down_group};
  mlp.gate_bias = or_null(gate_bias, gated);
  mlp.up_bias = up_bias.data(), mlp.down_bias = down_bias.data(), mlp.out = out.data();
  mlp.rows = rows, mlp.d = d, mlp.f = f, mlp.dtype = kDType<T>;

  const auto a = p.activations();
  std::vector<double> kept(a.size(), 0);
  const auto list = some_neurons(f, (f + 1) / 2);
  Buffer<int32_t> indices(list), count(std::vector<int32_t>{static_cast<int32_t>(list.size())});
  Buffer<int32_t> counts(rows);
  float threshold = 0;
  std::vector<int32_t> expected(rows, 0);
  if (plan != nullptr) {
    const auto scores = *plan == moyu::Plan::kGate ? p.gates() : a;
    std::vector<double> sorted(scores.size());
    for (size_t i = 0; i < scores.size(); ++i) sorted[i] = std::fabs(scores[i]);
    std::sort(sorted.begin(), sorted.end());
    size_t best = 1;  // the widest gap in the middle half: no rounding crosses it
    for (size_t i = std::max<size_t>(1, sorted.size() / 4); i < sorted.size() * 3 / 4; ++i)
      if (sorted[i] - sorted[i - 1] > sorted[best] - sorted[best - 1]) best = i;
    if (sorted.size() > 1) threshold = static_cast<float>((sorted[best] + sorted[best - 1]) / 2);
    for (size_t i = 0; i < scores.size(); ++i) {
      if (std::fabs(scores[i]) < threshold) continue;
      kept[i] = a[i];
      ++expected[i / f];
    }
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (const int32_t i : list) kept[r * f + i] = a[r * f + i];
  }
  Buffer<float> epsilon(std::vector<float>{threshold});
  const auto got = repeated(what, [&] {
    if (plan != nullptr) {
      moyu::cuda::threshold_mlp(mlp, *plan, nullptr, epsilon.data(), counts.data(),
                                workspace.data(), nullptr);
    } else {
      moyu::cuda::sparse_mlp(mlp, {indices.data(), count.data(), nullptr},
                             static_cast<int64_t>(list.size()), workspace.data(), nullptr);
    }
    workspace.read(what + " workspace");
    return out.read(what);
  });
  if (plan != nullptr) check(counts.read(what) == expected, what + ": counts");
  check_sum(got, kept, p.down_t, p.down_bias, rows, d, f, what,
            4e-5 + 4 * std::max(gate.allowed(), up.allowed()) / std::sqrt(static_cast<double>(d)));
}

template <typename T>
void test_packed_type() {
  for (const int32_t group : {32, 64}) {
    for (const int32_t bits : {3, 4, 5, 6, 8}) unpack_case<T>(5, 130, bits, group);
    for (const int32_t bits : {4, 8}) {
      packed_gemv_case<T>(1, 64, 19, bits, group, false);
      packed_gemv_case<T>(3, 111, 43, bits, group, true);
      packed_gemv_case<T>(1, 192, 17, bits, group, false, 1);
      packed_gemv_case<T>(8, 128, 16, bits, group, false);
      packed_gemv_t_case<T>(1, 111, 43, bits, group, true);
      packed_gemv_t_case<T>(3, 192, 40, bits, group, false);
      packed_gemv_t_case<T>(9, 64, 111, bits, group, true);
    }
  }
  packed_gemv_case<T>(1, 1, 1, 4, 64, false);
  packed_gemv_case<T>(1, 2312, 19, 4, 64, true);
  const moyu::Plan gate = moyu::Plan::kGate, product = moyu::Plan::kProduct;
  packed_mlp_case<T>(1, 128, 111, {4, 64, 4, 64}, true, 4, nullptr);
  packed_mlp_case<T>(1, 111, 43, {4, 32, 8, 32}, true, 4, nullptr);
  packed_mlp_case<T>(3, 64, 43, {8, 64, 4, 32}, true, 8, nullptr);
  packed_mlp_case<T>(2, 192, 40, {4, 64, 8, 64}, true, 8, nullptr);  // gate and up differ
  packed_mlp_case<T>(9, 64, 40, {8, 32, 8, 32}, false, 8, nullptr);
  packed_mlp_case<T>(1, 1, 1, {4, 64, 4, 64}, true, 4, nullptr);
  packed_mlp_case<T>(1, 640, 19, {4, 64, 4, 64}, true, 4, nullptr);
  packed_mlp_case<T>(1, 128, 111, {4, 64, 4, 64}, true, 4, &gate);
  packed_mlp_case<T>(3, 111, 43, {8, 32, 4, 64}, true, 8, &gate);
  packed_mlp_case<T>(1, 64, 43, {8, 64, 8, 32}, true, 8, &product);
  packed_mlp_case<T>(2, 111, 111, {4, 32, 4, 32}, true, 8, &product);
  packed_mlp_case<T>(1, 64, 43, {4, 64, 4, 64}, false, 4, &product);
}

}  // namespace test
