// One MLP on the GPU: every plan of the sparse operators against cuBLAS, both in CUDA graphs.
// Each graph runs the MLPs of several layers, whose weights together exceed the L2 many times, so
// that nothing is found in it; replays of the graphs alternate, with copies in between that
// measure the memory's bandwidth. A row whose result is wrong is not written, and fails the run.
//
//   bench_mlp_cuda [--d 4096 --f 11008] [--dtype float16] [--rows 1] [--density 0.3288,0.5,1]
//                  [--plans given,gate,product] [--replays 200] [--csv FILE] [--commit HASH]
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <sstream>

#include "cuda_bench.cuh"

namespace {

using namespace bench;

struct Options {
  int64_t d = 4096, f = 11008, rows = 1, replays = 200;
  std::string dtype = "float16", csv, commit = "unknown", geometry;
  std::vector<double> densities = {0.3288, 0.5, 1.0};
  std::vector<std::string> plans = {"given", "gate", "product"};
};

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> out;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) out.push_back(part);
  return out;
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
    if (value.empty()) {
      std::fprintf(stderr, "%s needs a value\n", argv[i]);
      std::exit(2);
    }
    if (name == "--d") {
      o.d = std::stoll(value);
    } else if (name == "--f") {
      o.f = std::stoll(value);
    } else if (name == "--rows") {
      o.rows = std::stoll(value);
    } else if (name == "--replays") {
      o.replays = std::stoll(value);
    } else if (name == "--dtype") {
      o.dtype = value;
    } else if (name == "--csv") {
      o.csv = value;
    } else if (name == "--commit") {
      o.commit = value;
    } else if (name == "--plans") {
      o.plans = split(value);
    } else if (name == "--density") {
      o.densities.clear();
      for (const auto& part : split(value)) o.densities.push_back(std::stod(part));
    } else {
      std::fprintf(stderr, "unknown option %s\n", argv[i]);
      std::exit(2);
    }
  }
  o.geometry = std::to_string(o.d) + "x" + std::to_string(o.f);
  return o;
}

template <typename T>
struct Type;
template <>
struct Type<float> {
  static constexpr auto kOurs = moyu::DType::kFloat32;
  static constexpr auto kCublas = CUDA_R_32F;
  static constexpr double kUnit = 0x1p-24;
};
template <>
struct Type<__half> {
  static constexpr auto kOurs = moyu::DType::kFloat16;
  static constexpr auto kCublas = CUDA_R_16F;
  static constexpr double kUnit = 0x1p-11;
};
template <>
struct Type<__nv_bfloat16> {
  static constexpr auto kOurs = moyu::DType::kBFloat16;
  static constexpr auto kCublas = CUDA_R_16BF;
  static constexpr double kUnit = 0x1p-8;
};

// Pseudo-random values of the given deviation, a sum of four uniform ones: as good as normal here.
template <typename T>
__global__ void fill_kernel(T* out, int64_t n, float deviation, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t z = (i + seed) * 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    float sum = 0;
    for (int k = 0; k < 4; ++k) sum += static_cast<float>(z >> 16 * k & 0xffff) / 65536.0f - 0.5f;
    out[i] = T(sum * 1.7320508f * deviation);
  }
}

template <typename T>
__global__ void transpose_kernel(const T* in, T* out, int64_t rows, int64_t columns) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < rows * columns;
       i += int64_t{gridDim.x} * blockDim.x)
    out[i % columns * rows + i / columns] = in[i];
}

// What a dense user runs between the GEMMs: silu(gate) * up from one [rows, 2 f] or two [rows, f].
template <typename T>
__global__ void silu_mul_kernel(const T* gate, const T* up, T* out, int64_t rows, int64_t f,
                                int64_t stride) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < rows * f;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t r = i / f, c = i % f;
    const float g = static_cast<float>(gate[r * stride + c]);
    out[i] = T(g / (1.0f + expf(-g)) * static_cast<float>(up[r * stride + c]));
  }
}

template <typename T>
struct Layer {
  DeviceArray<T> gate_up;  // gate [f, d], then up [f, d]
  DeviceArray<T> down_t;   // [f, d]
  DeviceArray<T> down;     // [d, f], as the dense baseline has it
  DeviceArray<int32_t> indices;
  DeviceArray<T> out;  // [rows, d]
};

template <typename T>
class MlpBench {
 public:
  MlpBench(const Options& o, cudaStream_t stream, Table& table)
      : o_(o), stream_(stream), table_(table), cublas_(stream), bandwidth_(stream) {
    int device = 0, l2 = 0;
    BENCH_CHECK(cudaGetDevice(&device));
    BENCH_CHECK(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device));
    const double smallest = *std::min_element(o.densities.begin(), o.densities.end());
    const double touched = 3.0 * o.d * o.f * sizeof(T) * std::max(smallest, 0.02);
    const int64_t layers = std::clamp<int64_t>(std::ceil(4.0 * l2 / touched), 4, 16);
    x_ = DeviceArray<T>(o.rows * o.d);
    fill(x_, o.rows * o.d, 1.0f);
    for (int64_t i = 0; i < layers; ++i) {
      Layer<T> layer{DeviceArray<T>(2 * o.f * o.d), DeviceArray<T>(o.f * o.d),
                     DeviceArray<T>(o.f * o.d), DeviceArray<int32_t>(o.f),
                     DeviceArray<T>(o.rows * o.d)};
      const float deviation = 1 / std::sqrt(static_cast<float>(o.d));
      fill(layer.gate_up, 2 * o.f * o.d, deviation);
      fill(layer.down_t, o.f * o.d, deviation);
      transpose_kernel<<<4096, 256, 0, stream>>>(layer.down_t.get(), layer.down.get(), o.f, o.d);
      layers_.push_back(std::move(layer));
    }
    hidden_ = DeviceArray<T>(o.rows * 2 * o.f);
    product_ = DeviceArray<T>(o.rows * o.f);
    workspace_ = DeviceArray<float>(moyu::cuda::workspace_floats(o.rows, o.d, o.f));
    counts_ = DeviceArray<int32_t>(o.rows);
    epsilon_ = DeviceArray<float>(1);
    count_ = DeviceArray<int32_t>(1);
    BENCH_CHECK(cudaStreamSynchronize(stream));
    reference();
  }

  void run() {
    for (double density : o_.densities)
      for (const auto& plan : o_.plans) bench(plan, density);
  }

 private:
  void fill(DeviceArray<T>& array, int64_t n, float deviation) {
    fill_kernel<<<4096, 256, 0, stream_>>>(array.get(), n, deviation, seed_);
    seed_ += n;
  }

  // float64 activations of the last layer, whose output is the one that is checked.
  void reference() {
    const Layer<T>& layer = layers_.back();
    const auto weights = layer.gate_up.read(0, 2 * o_.f * o_.d), x = x_.read(0, o_.rows * o_.d);
    down_ = layer.down_t.read(0, o_.f * o_.d);
    gates_.resize(o_.rows * o_.f);
    activations_.resize(o_.rows * o_.f);
    std::vector<double> xr(o_.d);
    for (int64_t r = 0; r < o_.rows; ++r) {
      for (int64_t c = 0; c < o_.d; ++c) xr[c] = static_cast<float>(x[r * o_.d + c]);
      for (int64_t i = 0; i < o_.f; ++i) {
        double g = 0, u = 0;
        for (int64_t c = 0; c < o_.d; ++c) {
          g += xr[c] * static_cast<float>(weights[i * o_.d + c]);
          u += xr[c] * static_cast<float>(weights[(o_.f + i) * o_.d + c]);
        }
        gates_[r * o_.f + i] = g / (1 + std::exp(-g));
        activations_[r * o_.f + i] = gates_[r * o_.f + i] * u;
      }
    }
  }

  // Largest error of the last layer's output over its largest value; active is [rows, f].
  double error(const std::vector<char>& active) const {
    const auto out = layers_.back().out.read(0, o_.rows * o_.d);
    double worst = 0, largest = 0;
    std::vector<double> sum(o_.d);
    for (int64_t r = 0; r < o_.rows; ++r) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t i = 0; i < o_.f; ++i) {
        if (!active[r * o_.f + i]) continue;
        const double a = activations_[r * o_.f + i];
        for (int64_t c = 0; c < o_.d; ++c) sum[c] += a * static_cast<float>(down_[i * o_.d + c]);
      }
      for (int64_t c = 0; c < o_.d; ++c) {
        const double e = std::fabs(static_cast<float>(out[r * o_.d + c]) - sum[c]);
        worst = std::isnan(e) ? INFINITY : std::max(worst, e);
        largest = std::max(largest, std::fabs(sum[c]));
      }
    }
    return largest > 0 ? worst / largest : worst;
  }

  moyu::Mlp mlp(const Layer<T>& layer) const {
    moyu::Mlp m;
    m.x = x_.get();
    m.gate = layer.gate_up.get();
    m.up = layer.gate_up.get() + o_.f * o_.d;
    m.down_t = layer.down_t.get();
    m.out = layer.out.get();
    m.rows = o_.rows;
    m.d = o_.d;
    m.f = o_.f;
    m.dtype = Type<T>::kOurs;
    return m;
  }

  // The dense MLPs of all layers: gate and up as two GEMMs or as one, or our own kernel.
  void dense(const std::string& impl) const {
    const int64_t rows = o_.rows, d = o_.d, f = o_.f;
    const bool fused = impl == "cublas-fused";
    for (const auto& layer : layers_) {
      if (impl == "moyu") {
        moyu::cuda::sparse_mlp(mlp(layer), {}, f, workspace_.get(), stream_);
        continue;
      }
      const T* const gate = layer.gate_up.get();
      T* const h = hidden_.get();
      if (fused) {
        cublas_.linear(x_.get(), gate, h, rows, 2 * f, d, Type<T>::kCublas);
      } else {
        cublas_.linear(x_.get(), gate, h, rows, f, d, Type<T>::kCublas);
        cublas_.linear(x_.get(), gate + f * d, h + rows * f, rows, f, d, Type<T>::kCublas);
      }
      silu_mul_kernel<<<static_cast<unsigned>((rows * f + 255) / 256), 256, 0, stream_>>>(
          h, fused ? h + f : h + rows * f, product_.get(), rows, f, fused ? 2 * f : f);
      cublas_.linear(product_.get(), layer.down.get(), layer.out.get(), rows, d, f,
                     Type<T>::kCublas);
    }
  }

  void sparse(const std::string& plan) const {
    for (const auto& layer : layers_) {
      if (plan == "given") {
        moyu::cuda::sparse_mlp(mlp(layer), {layer.indices.get(), count_.get(), nullptr}, o_.f,
                               workspace_.get(), stream_);
      } else {
        moyu::cuda::threshold_mlp(
            mlp(layer), plan == "gate" ? moyu::Plan::kGate : moyu::Plan::kProduct, nullptr,
            epsilon_.get(), counts_.get(), workspace_.get(), stream_);
      }
    }
  }

  // Sets the indices or the threshold for this density; returns who is active, [rows, f].
  std::vector<char> choose(const std::string& plan, double density) {
    std::vector<char> active(o_.rows * o_.f, 0);
    if (plan == "given") {
      const int32_t n = static_cast<int32_t>(std::llround(density * o_.f));
      std::mt19937 random(7);
      for (auto& layer : layers_) {
        std::vector<int32_t> list(o_.f);
        for (int64_t i = 0; i < o_.f; ++i) list[i] = static_cast<int32_t>(i);
        std::shuffle(list.begin(), list.end(), random);
        std::sort(list.begin(), list.begin() + n);
        layer.indices = DeviceArray<int32_t>(list);
        if (&layer == &layers_.back())
          for (int64_t r = 0; r < o_.rows; ++r)
            for (int32_t k = 0; k < n; ++k) active[r * o_.f + list[k]] = 1;
      }
      count_ = DeviceArray<int32_t>(std::vector<int32_t>{n});
      return active;
    }
    auto score = plan == "gate" ? gates_ : activations_;
    for (double& s : score) s = std::fabs(s);
    auto sorted = score;
    std::sort(sorted.begin(), sorted.end());
    // In the widest gap nearby: float32 and float64 scores then fall on the same side.
    const int64_t n = sorted.size(), centre = std::llround((1 - density) * n);
    double epsilon = 0;
    if (centre > 0) {
      int64_t best = std::min(centre, n - 1);
      for (int64_t i = std::max<int64_t>(1, centre - n / 500); i < std::min(n, centre + n / 500);
           ++i)
        if (sorted[i] - sorted[i - 1] > sorted[best] - sorted[best - 1]) best = i;
      epsilon = (sorted[best] + sorted[best - 1]) / 2;
    }
    epsilon_ = DeviceArray<float>(std::vector<float>{static_cast<float>(epsilon)});
    for (int64_t k = 0; k < n; ++k) active[k] = score[k] >= epsilon;
    return active;
  }

  void bench(const std::string& plan, double density) {
    const std::vector<char> active = choose(plan, density);
    const std::vector<char> everyone(active.size(), 1);
    int64_t used = 0, of_any_row = 0;
    for (int64_t i = 0; i < o_.f; ++i) {
      bool any = false;
      for (int64_t r = 0; r < o_.rows; ++r) {
        used += active[r * o_.f + i];
        any = any || active[r * o_.f + i];
      }
      of_any_row += any;
    }
    Graph sparse_graph(stream_, [&] { sparse(plan); });
    std::map<std::string, std::unique_ptr<Graph>> dense_graphs;
    const auto impls = cublas_.found() ? std::vector<std::string>{"cublas", "cublas-fused", "moyu"}
                                       : std::vector<std::string>{"moyu"};
    const double allowed = 2 * Type<T>::kUnit + 1e-5;
    bool good = true;
    const auto verify = [&](const std::string& what, Graph& graph, const std::vector<char>& set,
                            double limit) {
      layers_.back().out.poison();
      graph.replay(stream_);
      BENCH_CHECK(cudaStreamSynchronize(stream_));
      const double e = error(set);
      if (!(e <= limit)) {
        std::fprintf(stderr, "%s: error %.2e exceeds %.2e, no row is written\n", what.c_str(), e,
                     limit);
        good = false;
      }
      return e;
    };
    std::map<std::string, double> dense_errors;
    for (const auto& impl : impls) {
      dense_graphs[impl] = std::make_unique<Graph>(stream_, [&] { dense(impl); });
      // cuBLAS rounds gate, up and their product to T as well.
      dense_errors[impl] = verify("dense " + impl, *dense_graphs[impl], everyone, 4 * allowed);
    }
    const double sparse_error = verify("sparse " + plan, sparse_graph, active, allowed);
    failed_ = failed_ || !good;
    if (!good) return;

    const double layers = static_cast<double>(layers_.size());
    for (int64_t i = 0; i < o_.replays; ++i) {
      for (auto& [impl, graph] : dense_graphs) graph->time(stream_, layers);
      sparse_graph.time(stream_, layers);
      if (i % 8 == 0) bandwidth_.sample(stream_);
    }
    std::string best = impls.front();  // the best dense a user has, not ours
    for (const auto& impl : impls)
      if (impl != "moyu" && dense_graphs[impl]->quantile(0.5) < dense_graphs[best]->quantile(0.5))
        best = impl;
    const double dense_us = dense_graphs[best]->quantile(0.5);
    const double row_bytes = static_cast<double>(o_.d) * sizeof(T);
    Row row{"mlp", o_.dtype, o_.geometry, "dense", "dense", best, o_.rows};
    for (const auto& impl : impls) {
      row.method = "dense-" + impl;
      row.bytes = 3 * o_.f * row_bytes;
      row.speedup = dense_us / dense_graphs[impl]->quantile(0.5);
      row.max_rel_err = dense_errors[impl];
      table_.write(row, *dense_graphs[impl], bandwidth_.gbps());
    }
    row.method = plan == "given" ? "set" : "threshold";
    row.plan = plan;
    row.density = static_cast<double>(used) / static_cast<double>(active.size());
    const double always = plan == "given" ? 0 : plan == "gate" ? 1 : 2;
    row.bytes = (always * o_.f + (3 - always) * of_any_row) * row_bytes;
    row.speedup = dense_us / sparse_graph.quantile(0.5);
    row.max_rel_err = sparse_error;
    table_.write(row, sparse_graph, bandwidth_.gbps());
  }

 public:
  bool failed_ = false;

 private:
  const Options& o_;
  cudaStream_t stream_;
  Table& table_;
  Cublas cublas_;
  CopyBandwidth bandwidth_;
  uint64_t seed_ = 1;
  std::vector<Layer<T>> layers_;
  DeviceArray<T> x_, hidden_, product_;
  DeviceArray<float> workspace_, epsilon_;
  DeviceArray<int32_t> counts_, count_;
  std::vector<double> gates_, activations_;  // [rows, f], of the last layer
  std::vector<T> down_;
};

// threshold_compact alone, on scores that lie in the L2 as they do behind the kernel that made them.
void bench_compact(const Options& o, cudaStream_t stream, Table& table) {
  constexpr int kCalls = 32;
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(0, 1);
  std::vector<float> values(o.f);
  for (float& v : values) v = uniform(random);
  const float epsilon = 0.6712f;
  DeviceArray<float> v(values), e(std::vector<float>{epsilon});
  DeviceArray<int32_t> indices(o.f), count(1);
  indices.poison();
  Graph graph(stream, [&] {
    for (int i = 0; i < kCalls; ++i)
      moyu::cuda::threshold_compact(v.get(), 1, o.f, e.get(), indices.get(), count.get(), stream);
  });
  graph.replay(stream);
  BENCH_CHECK(cudaStreamSynchronize(stream));
  std::vector<int32_t> expected;
  for (int64_t i = 0; i < o.f; ++i)
    if (!(values[i] < epsilon)) expected.push_back(static_cast<int32_t>(i));
  const size_t n = expected.size();
  expected.resize(o.f, 0);
  if (indices.read(0, o.f) != expected || count.read(0, 1)[0] != static_cast<int32_t>(n)) {
    std::fprintf(stderr, "threshold_compact: wrong indices, no row is written\n");
    std::exit(1);
  }
  CopyBandwidth bandwidth(stream);
  for (int64_t i = 0; i < o.replays; ++i) {
    graph.time(stream, kCalls);
    if (i % 8 == 0) bandwidth.sample(stream);
  }
  Row row{"threshold_compact", "float32", std::to_string(o.f), "", "", ""};
  row.density = static_cast<double>(n) / static_cast<double>(o.f);
  row.bytes = 8.0 * o.f;
  table.write(row, graph, bandwidth.gbps());
}

template <typename T>
int run(const Options& o, cudaStream_t stream, Table& table) {
  MlpBench<T> bench(o, stream, table);
  bench.run();
  return bench.failed_ ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  const Options o = parse(argc, argv);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "bench_mlp_cuda: no CUDA device; nothing is measured\n");
    return 3;
  }
  cudaDeviceProp properties{};
  BENCH_CHECK(cudaGetDeviceProperties(&properties, 0));
  cudaStream_t stream;
  BENCH_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  Table table(o.csv, properties.name, o.commit);
  bench_compact(o, stream, table);
  if (o.dtype == "float32") return run<float>(o, stream, table);
  if (o.dtype == "float16") return run<__half>(o, stream, table);
  if (o.dtype == "bfloat16") return run<__nv_bfloat16>(o, stream, table);
  std::fprintf(stderr, "--dtype must be float32, float16 or bfloat16, got %s\n", o.dtype.c_str());
  return 2;
}
