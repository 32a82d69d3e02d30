#include "decode_step.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../csrc/moyu.h"

namespace py = pybind11;

namespace moyu {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, bits, group, address of the bias)
using LinearTuple = std::tuple<uintptr_t, int32_t, int32_t, uintptr_t>;
// (address, eps, offset)
using NormTuple = std::tuple<uintptr_t, float, float>;
// (address of indices, count, mask)
using SetTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t>;
// (tokens in the cache, first place of each row, cos, sin, rotated, elements between sequences)
using KindTuple = std::tuple<int64_t, std::vector<int64_t>, uintptr_t, uintptr_t, int64_t, int64_t>;

Linear linear(const py::dict& d, const char* key) {
  const auto [weight, bits, group, bias] = d[key].cast<LinearTuple>();
  return {Matrix(at<void>(weight), bits, group), at<void>(bias)};
}

RmsNorm norm_of(const NormTuple& norm) {
  return {at<void>(std::get<0>(norm)), std::get<1>(norm), std::get<2>(norm)};
}
RmsNorm norm(const py::dict& d, const char* key) { return norm_of(d[key].cast<NormTuple>()); }

// Memory that only grows, aligned to pages.
class Memory {
 public:
  float* at_least(size_t floats) {
    const size_t bytes = (floats * sizeof(float) + 4095) / 4096 * 4096;
    if (bytes > bytes_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
      bytes_ = memory_ ? bytes : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<float, decltype(&std::free)> memory_{nullptr, &std::free};
  size_t bytes_ = 0;
};

struct Layer {
  Attention attention;
  RmsNorm before, after;  // of the MLP
  size_t kind = 0;        // which of a step's kinds of cache it has
  KeyValues cache;
  std::string plan;  // "outside", "given", "gate", "product" or "shadow"
  Mlp mlp;
  ActiveSet set;
  const float *scale = nullptr, *epsilon = nullptr;
  Shadow shadow;
  Tiers tiers;
  // Counters for the report, or null.
  int64_t *active = nullptr, *estimated = nullptr, *tokens = nullptr;
};

class DecodeStep {
 public:
  DecodeStep(int32_t dtype, int64_t d, const NormTuple& last)
      : dtype_(static_cast<DType>(dtype)), d_(d), last_(norm_of(last)) {}

  void add_layer(const py::dict& attention, const py::dict& mlp) {
    Layer layer;
    Attention& a = layer.attention;
    a.before = norm(attention, "before");
    a.after = norm(attention, "after");
    a.q_norm = norm(attention, "q_norm");
    a.k_norm = norm(attention, "k_norm");
    a.wide_norms = attention["wide_norms"].cast<bool>();
    a.rotary = attention["rotary"].cast<bool>();
    a.q = linear(attention, "q");
    a.k = linear(attention, "k");
    a.v = linear(attention, "v");
    a.o = linear(attention, "o");
    a.d = d_;
    a.heads = attention["heads"].cast<int64_t>();
    a.kv_heads = attention["kv_heads"].cast<int64_t>();
    a.head_dim = attention["head_dim"].cast<int64_t>();
    a.scale = attention["scale"].cast<float>();
    a.softcap = attention["softcap"].cast<float>();
    a.residual_scale = attention["residual_scale"].cast<float>();
    a.dtype = dtype_;
    layer.kind = attention["kind"].cast<size_t>();
    layer.before = norm(mlp, "before");
    layer.after = norm(mlp, "after");
    layer.plan = mlp["plan"].cast<std::string>();
    if (layer.plan != "outside") {
      Mlp& m = layer.mlp;
      const Linear gate = linear(mlp, "gate"), up = linear(mlp, "up"), down = linear(mlp, "down_t");
      m.gate = gate.weight;
      m.up = up.weight;
      m.down_t = down.weight;
      m.gate_bias = gate.bias;
      m.up_bias = up.bias;
      m.down_bias = down.bias;
      m.d = d_;
      m.f = mlp["f"].cast<int64_t>();
      m.dtype = dtype_;
      m.activation = static_cast<Activation>(mlp["activation"].cast<int32_t>());
      layer.scale = at<float>(mlp["scale"].cast<uintptr_t>());
      layer.epsilon = at<float>(mlp["epsilon"].cast<uintptr_t>());
      layer.active = at<int64_t>(mlp["active"].cast<uintptr_t>());
      layer.estimated = at<int64_t>(mlp["estimated_count"].cast<uintptr_t>());
      layer.tokens = at<int64_t>(mlp["tokens"].cast<uintptr_t>());
    }
    if (layer.plan == "shadow") {
      layer.shadow = {at<uint8_t>(mlp["records"].cast<uintptr_t>()),
                      layer.scale,
                      at<float>(mlp["inverse"].cast<uintptr_t>()),
                      at<float>(mlp["gate_error"].cast<uintptr_t>()),
                      at<float>(mlp["up_error"].cast<uintptr_t>()),
                      mlp["bits_gate"].cast<int32_t>(),
                      mlp["bits_up"].cast<int32_t>()};
      layer.tiers = {layer.epsilon, mlp["k"].cast<int64_t>(), mlp["estimated"].cast<int64_t>()};
    }
    layers_.push_back(layer);
  }

  void set_cache(size_t i, uintptr_t keys, uintptr_t values, int64_t sequence_stride,
                 int64_t head_stride) {
    layers_.at(i).cache = {at<void>(keys), at<void>(values), sequence_stride, head_stride};
  }

  // The sets of layers whose plan is "given"; of all neurons where the addresses are 0.
  void set_sets(const std::vector<SetTuple>& sets) {
    if (sets.size() != layers_.size()) throw std::invalid_argument("one set per layer");
    for (size_t i = 0; i < sets.size(); ++i)
      layers_[i].set = {at<int32_t>(std::get<0>(sets[i])), at<int32_t>(std::get<1>(sets[i])),
                        at<uint8_t>(std::get<2>(sets[i]))};
  }

  // Starts a step: x T [rows, d]. The output T [rows, d], behind the last norm, comes to out, and
  // the input of an MLP that is computed outside (all of them are, where `outside`) to mlp_x.
  // Returns that layer's index, or -1 where the step is complete.
  int64_t start(uintptr_t x, uintptr_t out, uintptr_t mlp_x, int64_t rows, int64_t length,
                const std::vector<KindTuple>& kinds, bool outside) {
    if (rows < 1 || rows > kMaxRows) throw std::invalid_argument("1 to 8 rows");
    outside_ = outside;
    out_ = at<void>(out);
    mlp_x_ = at<void>(mlp_x);
    first_.clear();
    steps_.clear();
    for (const auto& kind : kinds) first_.push_back(std::get<1>(kind));
    for (size_t i = 0; i < kinds.size(); ++i) {
      const auto& [past, first, cos, sin, rotated, stride] = kinds[i];
      if (static_cast<int64_t>(first.size()) != rows)
        throw std::invalid_argument("one first place per row");
      steps_.push_back({rows, length, past, first_[i].data(), at<float>(cos), at<float>(sin),
                        rotated, stride, timed_ ? spent_ : nullptr});
    }
    for (const Layer& layer : layers_)
      if (layer.kind >= kinds.size()) throw std::invalid_argument("a kind of cache is missing");
    const py::gil_scoped_release release;
    rows_ = rows;
    hidden_.resize(static_cast<size_t>(rows * d_));
    std::fill(hidden_.begin(), hidden_.end(), 0.0f);
    cpu::add_rows(at<void>(x), {}, 1.0f, rows, d_, dtype_, hidden_.data());
    next_ = 0;
    const auto begun = now();
    const int64_t layer = run();
    spent_[4] += now() - begun;
    return layer;
  }

  // Nanoseconds of the steps since: q, k, v; attention; o; MLPs; all. None before it was called.
  std::vector<int64_t> spent() {
    timed_ = true;
    std::vector<int64_t> before(spent_, spent_ + 5);
    std::fill(spent_, spent_ + 5, 0);
    return before;
  }

  // Goes on behind an MLP computed outside, y T [rows, d].
  int64_t resume(uintptr_t y) {
    const py::gil_scoped_release release;
    const Layer& layer = layers_.at(next_++);
    cpu::add_rows(at<void>(y), layer.after, layer.attention.residual_scale, rows_, d_, dtype_,
                  hidden_.data());
    return run();
  }

 private:
  static int64_t now() {
    return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
  }

  int64_t run() {
    const size_t bytes = dtype_ == DType::kFloat32 ? 4 : 2;
    x_.resize(static_cast<size_t>(rows_ * d_) * bytes);
    y_.resize(x_.size());
    for (; next_ < layers_.size(); ++next_) {
      Layer& layer = layers_[next_];
      cpu::attend(layer.attention, steps_[layer.kind], layer.cache, hidden_.data(),
                  memory_.at_least(cpu::attend_workspace_floats(layer.attention, rows_)));
      const bool outside = outside_ || layer.plan == "outside";
      cpu::norm_rows(hidden_.data(), layer.before, rows_, d_, dtype_, outside ? mlp_x_ : x_.data());
      if (outside) return static_cast<int64_t>(next_);
      const auto begun = timed_ ? now() : 0;
      multiply(layer);
      if (timed_) spent_[3] += now() - begun;
      cpu::add_rows(y_.data(), layer.after, layer.attention.residual_scale, rows_, d_, dtype_,
                    hidden_.data());
    }
    cpu::norm_rows(hidden_.data(), last_, rows_, d_, dtype_, out_);
    return -1;
  }

  void multiply(Layer& layer) {
    Mlp& mlp = layer.mlp;
    mlp.x = x_.data();
    mlp.out = y_.data();
    mlp.rows = rows_;
    int32_t counts[2 * kMaxRows] = {};
    const size_t floats = layer.plan == "shadow" ? cpu::shadow_workspace_floats(rows_, d_, mlp.f)
                                                 : cpu::workspace_floats(rows_, d_);
    float* const workspace = memory_.at_least(floats);
    if (layer.plan == "given") {
      cpu::sparse_mlp(mlp, layer.set, workspace);
      std::fill(counts, counts + rows_, static_cast<int32_t>(mlp.f));
    } else if (layer.plan == "shadow") {
      cpu::shadow_mlp(mlp, layer.shadow, layer.tiers, counts, workspace);
    } else {
      const Plan plan = layer.plan == "gate" ? Plan::kGate : Plan::kProduct;
      cpu::threshold_mlp(mlp, plan, layer.scale, layer.epsilon, counts, workspace);
    }
    if (!layer.active) return;
    for (int64_t r = 0; r < rows_; ++r) {
      *layer.active += counts[r];
      *layer.estimated += counts[rows_ + r];
    }
    *layer.tokens += rows_;
  }

  DType dtype_;
  int64_t d_, rows_ = 0;
  RmsNorm last_;
  std::vector<Layer> layers_;
  size_t next_ = 0;
  bool outside_ = false, timed_ = false;
  int64_t spent_[5] = {};
  void *out_ = nullptr, *mlp_x_ = nullptr;
  std::vector<StepRows> steps_;
  std::vector<std::vector<int64_t>> first_;
  std::vector<float> hidden_;
  std::vector<char> x_, y_;
  Memory memory_;
};

}  // namespace

void bind_decode_step(py::module_& m) {
  py::class_<DecodeStep>(m, "DecodeStep", "One decode step of a stack of decoder layers.")
      .def(py::init<int32_t, int64_t, NormTuple>(), py::arg("dtype"), py::arg("d"), py::arg("last"))
      .def("add_layer", &DecodeStep::add_layer, py::arg("attention"), py::arg("mlp"))
      .def("set_cache", &DecodeStep::set_cache, py::arg("layer"), py::arg("keys"),
           py::arg("values"), py::arg("sequence_stride"), py::arg("head_stride"))
      .def("set_sets", &DecodeStep::set_sets, py::arg("sets"))
      .def("start", &DecodeStep::start, py::arg("x"), py::arg("out"), py::arg("mlp_x"),
           py::arg("rows"), py::arg("length"), py::arg("kinds"), py::arg("outside"))
      .def("spent", &DecodeStep::spent)
      .def("resume", &DecodeStep::resume, py::arg("y"));
}

}  // namespace moyu
