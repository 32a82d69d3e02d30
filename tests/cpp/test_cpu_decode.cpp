// One layer's attention and the norms around it against float64: every instruction set, at sizes that
// no vector divides.
#include <omp.h>

#include "cpu_test_support.h"
#include "test_cpu_kernels.h"

using namespace moyu;

namespace test {
namespace {

struct Shape {
  int64_t sequences, length, past, d, heads, kv_heads, size, rotated;
  bool wide, head_norms, biased;
  float softcap;
};
// Keys of one chunk and of several, one key head for all and one for each, a team with nothing to do.
const Shape kShapes[] = {{1, 1, 0, 24, 2, 2, 8, 8, false, false, false, 0},
                         {1, 1, 150, 40, 6, 2, 20, 12, false, true, false, 0},
                         {2, 3, 70, 33, 4, 1, 16, 16, true, true, true, 0},
                         {4, 2, 5, 64, 12, 1, 72, 72, false, true, true, 1.5f},
                         {8, 1, 64, 48, 3, 3, 64, 64, false, false, true, 0}};

using Row = std::vector<double>;

template <class T>
struct Layer {
  Shape s;
  int64_t rows = s.sequences * s.length, queries = s.heads * s.size, kept = s.kv_heads * s.size;
  int64_t places = s.past + s.length + 3;
  std::vector<float> hidden = normal<float>(rows * s.d, 1), cos, sin;
  std::vector<T> before = normal<T>(s.d, 1), after = normal<T>(s.d, 1);
  std::vector<T> q_norm = normal<T>(s.wide ? queries : s.size, 1);
  std::vector<T> k_norm = normal<T>(s.wide ? kept : s.size, 1);
  std::vector<T> q = weights(queries, s.d), k = weights(kept, s.d), v = weights(kept, s.d);
  std::vector<T> o = weights(s.d, queries), bias = normal<T>(queries + s.d, 0.3);
  std::vector<T> keys = normal<T>(s.sequences * places * kept, 1);
  std::vector<T> values = normal<T>(s.sequences * places * kept, 1);
  std::vector<int64_t> first;
  float scale = 0.4f, residual = 0.7f, eps = 1e-5f;

  explicit Layer(const Shape& shape) : s(shape) {
    for (int64_t i = 0; i < s.length * s.rotated; ++i) {
      const double angle = 0.37 * double(i % s.rotated) + double(i / s.rotated);
      cos.push_back(float(std::cos(angle)));
      sin.push_back(float(std::sin(angle)));
    }
    for (int64_t r = 0; r < rows; ++r) first.push_back(std::min(s.past, 5 * (r % 3)));
  }

  static std::vector<T> weights(int64_t n, int64_t d) {
    return normal<T>(n * d, 1 / std::sqrt(double(d)));
  }

  static Row normed(const Row& x, const std::vector<T>& weight, int64_t begin, double offset,
                    double eps) {
    double squares = 0;
    for (double e : x) squares += e * e;
    Row out(x.size());
    for (size_t j = 0; j < x.size(); ++j)
      out[j] = x[j] / std::sqrt(squares / double(x.size()) + eps) *
               (value_of(weight[begin + int64_t(j)]) + offset);
    return out;
  }

  Row product(const std::vector<T>& weight, const Row& x, int64_t n, int64_t bias_at) const {
    Row out(n);
    for (int64_t i = 0; i < n; ++i) {
      for (size_t j = 0; j < x.size(); ++j)
        out[i] += value_of(weight[i * int64_t(x.size()) + int64_t(j)]) * x[j];
      if (s.biased) out[i] += value_of(bias[bias_at + i]);
    }
    return out;
  }

  // Heads with their norms and positions.
  Row placed(Row x, const std::vector<T>& norm, int64_t heads, int64_t token) const {
    if (s.head_norms && s.wide) x = normed(x, norm, 0, 1, eps);
    for (int64_t h = 0; h < heads; ++h) {
      Row head(x.begin() + h * s.size, x.begin() + (h + 1) * s.size);
      if (s.head_norms && !s.wide) head = normed(head, norm, 0, 1, eps);
      const int64_t half = s.rotated / 2;
      for (int64_t j = 0; j < half; ++j) {
        const double a = head[j], b = head[j + half];
        const int64_t at = token * s.rotated + j;
        head[j] = a * cos[at] - b * sin[at];
        head[j + half] = b * cos[at + half] + a * sin[at + half];
      }
      std::copy(head.begin(), head.end(), x.begin() + h * s.size);
    }
    return x;
  }

  int64_t place(int64_t sequence, int64_t head, int64_t at) const {
    return ((sequence * s.kv_heads + head) * places + at) * s.size;
  }

  // What each row gets, in float64, with keys and values as they lie in the cache.
  std::vector<Row> expected() {
    std::vector<Row> all_q;
    for (int64_t r = 0; r < rows; ++r) {
      const Row x =
          normed(Row(hidden.begin() + r * s.d, hidden.begin() + (r + 1) * s.d), before, 0, 0, eps);
      const int64_t sequence = r / s.length, token = r % s.length;
      all_q.push_back(placed(product(q, x, queries, 0), q_norm, s.heads, token));
      const Row new_k = placed(product(k, x, kept, 0), k_norm, s.kv_heads, token);
      const Row new_v = product(v, x, kept, 0);
      for (int64_t h = 0; h < s.kv_heads; ++h)
        for (int64_t j = 0; j < s.size; ++j) {
          const int64_t to = place(sequence, h, s.past + token) + j;
          keys[to] = rounded<T>(new_k[h * s.size + j]);
          values[to] = rounded<T>(new_v[h * s.size + j]);
        }
    }
    std::vector<Row> out;
    for (int64_t r = 0; r < rows; ++r) {
      Row context(queries);
      for (int64_t h = 0; h < s.heads; ++h) {
        const int64_t own = h / (s.heads / s.kv_heads), end = s.past + r % s.length + 1;
        Row scores;
        for (int64_t at = first[r]; at < end; ++at) {
          double score = 0;
          for (int64_t j = 0; j < s.size; ++j)
            score += all_q[r][h * s.size + j] * value_of(keys[place(r / s.length, own, at) + j]);
          score *= scale;
          scores.push_back(s.softcap != 0 ? s.softcap * std::tanh(score / s.softcap) : score);
        }
        const double most = *std::max_element(scores.begin(), scores.end());
        double total = 0;
        for (double& score : scores) total += score = std::exp(score - most);
        for (size_t i = 0; i < scores.size(); ++i)
          for (int64_t j = 0; j < s.size; ++j)
            context[h * s.size + j] +=
                scores[i] / total *
                value_of(values[place(r / s.length, own, first[r] + int64_t(i)) + j]);
      }
      out.push_back(normed(product(o, context, s.d, queries), after, 0, 1, eps));
    }
    return out;
  }

  void run(const std::string& isa) {
    const std::string what = isa + " attend " + Format<T>::name + " heads " +
                             std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " of " +
                             std::to_string(s.size) + ", " + std::to_string(rows) +
                             " rows behind " + std::to_string(s.past);
    const Buffer<float> h(hidden), c(cos), sn(sin);
    const Buffer<T> b(before), a2(after), qn(q_norm), kn(k_norm), wq(q), wk(k), wv(v), wo(o),
        bi(bias);
    const Buffer<T> ks(keys), vs(values);
    const Buffer<int64_t> begins(first);
    Attention a;
    a.before = {b.data(), eps, 0};
    a.after = {a2.data(), eps, 1};
    if (s.head_norms) a.q_norm = {qn.data(), eps, 1}, a.k_norm = {kn.data(), eps, 1};
    a.wide_norms = s.wide;
    const T* own_bias = s.biased ? bi.data() : nullptr;
    a.q = {wq.data(), own_bias};
    a.k = {wk.data(), own_bias};
    a.v = {wv.data(), own_bias};
    a.o = {wo.data(), s.biased ? bi.data() + queries : nullptr};
    a.d = s.d, a.heads = s.heads, a.kv_heads = s.kv_heads, a.head_dim = s.size;
    a.scale = scale, a.softcap = s.softcap, a.residual_scale = residual;
    a.dtype = Format<T>::dtype;
    StepRows step;
    step.rows = rows, step.length = s.length, step.past = s.past, step.first = begins.data();
    step.cos = c.data(), step.sin = sn.data(), step.rotated = s.rotated;
    const KeyValues cache{ks.data(), vs.data(), s.kv_heads * places * s.size, places * s.size};
    const Buffer<float> workspace(cpu::attend_workspace_floats(a, rows));
    cpu::attend(a, step, cache, h.data(), workspace.data());
    workspace.read(what);

    const std::vector<Row> want = expected();
    const std::vector<float> got = h.read(what);
    // Rounded to T on the way: x, q, keys, values, the context. A score's error is relative to it.
    const double step_of_t = std::ldexp(1, -Format<T>::digits), allowed = 40 * step_of_t + 1e-5;
    for (int64_t r = 0; r < rows; ++r) {
      double error = 0, size = 0;
      for (int64_t j = 0; j < s.d; ++j) {
        const double exact = residual * want[r][j];
        const double difference = got[r * s.d + j] - double(hidden[r * s.d + j]) - exact;
        error += difference * difference;
        size += exact * exact;
      }
      check(std::sqrt(error / size) <= allowed,
            what + " row " + std::to_string(r) + ": relative error " +
                std::to_string(std::sqrt(error / size)) + ", allowed " + std::to_string(allowed));
    }
    const std::vector<T> got_k = ks.read(what), got_v = vs.read(what);
    double worst = 0;
    for (size_t i = 0; i < keys.size(); ++i) {
      worst = std::max(worst, std::fabs(value_of(got_k[i]) - value_of(keys[i])) /
                                  (std::fabs(value_of(keys[i])) + 1));
      worst = std::max(worst, std::fabs(value_of(got_v[i]) - value_of(values[i])) /
                                  (std::fabs(value_of(values[i])) + 1));
    }
    check(worst <= 16 * step_of_t + 1e-6, what + ": the cache, error " + std::to_string(worst));
  }
};

template <class T>
void norms_case(int64_t rows, int64_t d, bool with_norm, const std::string& isa) {
  const std::string what = isa + " norms " + Format<T>::name + " d " + std::to_string(d);
  const std::vector<float> x = normal<float>(rows * d, 2);
  const std::vector<T> weight = normal<T>(d, 1), y = normal<T>(rows * d, 1);
  const Buffer<float> hidden(x);
  const Buffer<T> w(weight), b(y), out(rows * d);
  const RmsNorm norm = with_norm ? RmsNorm{w.data(), 1e-5f, 1.0f} : RmsNorm{};
  cpu::norm_rows(hidden.data(), norm, rows, d, Format<T>::dtype, out.data());
  cpu::add_rows(b.data(), norm, 0.5f, rows, d, Format<T>::dtype, hidden.data());
  std::vector<Exact> normed, added;
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0, of_y = 0;
    for (int64_t j = 0; j < d; ++j) {
      squares += double(x[r * d + j]) * x[r * d + j];
      of_y += value_of(y[r * d + j]) * value_of(y[r * d + j]);
    }
    for (int64_t j = 0; j < d; ++j) {
      const double by = with_norm ? value_of(weight[j]) + 1 : 1;
      const double factor = with_norm ? 1 / std::sqrt(squares / double(d) + 1e-5) : 1;
      const double factor_y = with_norm ? 1 / std::sqrt(of_y / double(d) + 1e-5) : 1;
      const double sums = kUnit * (8 + std::sqrt(double(d)));  // of the squares, and a few products
      const double n = x[r * d + j] * factor * by,
                   add = 0.5 * value_of(y[r * d + j]) * factor_y * by;
      normed.push_back({n, sums * std::fabs(n)});
      added.push_back({x[r * d + j] + add, sums * (std::fabs(add) + std::fabs(x[r * d + j]))});
    }
  }
  check_close(out.read(what), normed, what);
  check_close(hidden.read(what), added, what + " added");
}

template <class T>
void test_type(const std::string& isa) {
  for (const Shape& shape : kShapes) Layer<T>(shape).run(isa);
  for (int64_t d : {1, 19, 300, 1024})
    for (bool with_norm : {false, true}) norms_case<T>(3, d, with_norm, isa);
}

}  // namespace

void test_decode(const std::vector<std::string>& isas) {
  for (const std::string& isa : isas) {
    cpu::set_isa(isa.c_str());
    for (int threads : {1, 3}) {
      omp_set_num_threads(threads);
      const std::string where = isa + ", " + std::to_string(threads) + " threads";
      test_type<float>(where);
      test_type<Half>(where);
      test_type<Bf16>(where);
    }
  }
}

}  // namespace test
