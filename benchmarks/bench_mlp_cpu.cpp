// One MLP on the CPU kernels, by plan and density, without torch: what the kernels alone do.
//   bench_mlp_cpu [--geometry=llama-2-7b | --d=4096 --f=11008] [--dtype=bfloat16] [--rows=1]
//                 [--repetitions=30] [--csv=FILE] [any --benchmark_... flag]
// Before each timed call a buffer larger than the last-level cache is read, which empties the cache
// and samples the machine's read bandwidth. Calls of all cases are interleaved at random. Every
// case is checked in float64 first. Dense here is our own kernel over all neurons; the comparison
// with torch is `moyu bench mlp`.
#include <benchmark/benchmark.h>
#include <omp.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>

#include "../tests/cpp/cpu_test_support.h"

#ifndef MOYU_SOURCE_DIR
#define MOYU_SOURCE_DIR "."
#endif

using namespace moyu;
using test::Format, test::rounded, test::value_of;

namespace {

struct Options {
  std::string geometry = "llama-2-7b", dtype = "bfloat16", csv;
  int64_t d = 0, f = 0, rows = 1, repetitions = 30;
};

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  const double place = q * double(values.size() - 1);
  const auto low = size_t(place), high = std::min(low + 1, values.size() - 1);
  return values[low] + (place - double(low)) * (values[high] - values[low]);
}

int64_t last_level_cache() {
  int64_t largest = 32 << 20;
  for (int i = 0; i < 8; ++i) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/size");
    int64_t size = 0;
    char unit = ' ';
    if (file >> size >> unit) largest = std::max(largest, size << (unit == 'M' ? 20 : 10));
  }
  return largest;
}

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown";
}

std::string commit() {
  const std::string git =
      "git -C " MOYU_SOURCE_DIR " describe --always --dirty=+ --abbrev=12 --match= 2>/dev/null";
  std::string out;
  if (FILE* pipe = popen(git.c_str(), "r")) {
    for (int c; (c = std::fgetc(pipe)) != EOF && c != '\n';) out += char(c);
    pclose(pipe);
  }
  return out.empty() ? "unknown" : out;
}

// Reads a buffer larger than the last-level cache with all threads.
class Reader {
 public:
  Reader() : words_(size_t(last_level_cache() * 5 / 4 / 8), 1) {}
  void read() {
    const double start = now();
    uint64_t total = 0;
#pragma omp parallel reduction(^ : total)
    {
      const size_t n = words_.size() / 64, part = omp_get_thread_num(),
                   parts = omp_get_num_threads();
      uint64_t lanes[64] = {};
      for (size_t k = n * part / parts; k < n * (part + 1) / parts; ++k)
        for (size_t j = 0; j < 64; ++j) lanes[j] ^= words_[k * 64 + j];
      for (uint64_t lane : lanes) total ^= lane;
    }
    benchmark::DoNotOptimize(total);
    seconds_.push_back(now() - start);
  }
  double gbps() const { return double(words_.size() * 8) / quantile(seconds_, 0.5) / 1e9; }

 private:
  std::vector<uint64_t> words_;
  std::vector<double> seconds_;
};

// Matrices of normal numbers: one block of prime length, repeated, so that no two rows are equal.
template <class T>
class Filler {
 public:
  std::vector<T> draw(int64_t n, double deviation) {
    const std::vector<T> block = test::normal<T>(524287, deviation);
    std::vector<T> out;
    out.reserve(n);
    for (; int64_t(out.size()) < n; start_ = 0) {
      const size_t take = std::min(block.size() - start_, size_t(n) - out.size());
      out.insert(out.end(), block.begin() + start_, block.begin() + start_ + take);
      if (int64_t(out.size()) == n) {
        start_ += take;
        break;
      }
    }
    return out;
  }

 private:
  size_t start_ = 0;
};

struct Case {
  std::string plan;
  double density = 1;
  std::vector<int32_t> indices;  // given
  int32_t count = 0;
  float epsilon = 0;  // gate, product
  int64_t bytes = 0;
  double error = 0;
  std::vector<double> seconds;
};

template <class T>
class Bench {
 public:
  explicit Bench(const Options& o) : o_(o), rows_(o.rows), d_(o.d), f_(o.f) {
    Filler<T> filler;
    const double inner = 1 / std::sqrt(double(d_)), outer = 1 / std::sqrt(double(f_));
    x_ = test::normal<T>(rows_ * d_, 1);
    gate_ = filler.draw(f_ * d_, inner);
    up_ = filler.draw(f_ * d_, inner);
    down_t_ = filler.draw(f_ * d_, outer);
    out_.resize(rows_ * d_);
    counts_.resize(rows_);
    workspace_.resize(cpu::workspace_floats(rows_, d_));
    mlp_.x = x_.data();
    mlp_.gate = gate_.data();
    mlp_.up = up_.data();
    mlp_.down_t = down_t_.data();
    mlp_.out = out_.data();
    mlp_.rows = rows_;
    mlp_.d = d_;
    mlp_.f = f_;
    mlp_.dtype = Format<T>::dtype;
    activations();
    // One set for all rows, as for one sequence; `moyu bench mlp` gives each row its own.
    for (const char* plan : {"given", "gate", "product"})
      for (double density : {1.0, 0.5, 0.33, 0.1}) add(plan, density);
  }

  int run(int argc, char** argv) {
    for (Case& c : cases_) {
      verify(c);
      std::ostringstream name;
      name << c.plan << "/density:" << c.density;
      benchmark::RegisterBenchmark(name.str().c_str(),
                                   [this, &c](benchmark::State& state) {
                                     for (auto _ : state) {
                                       reader_.read();
                                       const double start = now();
                                       call(c);
                                       c.seconds.push_back(now() - start);
                                       state.SetIterationTime(c.seconds.back());
                                     }
                                     state.counters["GB/s"] =
                                         double(c.bytes) / c.seconds.back() / 1e9;
                                   })
          ->Iterations(1)
          ->Repetitions(int(o_.repetitions))
          ->UseManualTime()
          ->Unit(benchmark::kMicrosecond)
          ->ReportAggregatesOnly(true)
          ->ComputeStatistics("p20", [](const std::vector<double>& v) { return quantile(v, 0.2); })
          ->ComputeStatistics("p80", [](const std::vector<double>& v) { return quantile(v, 0.8); });
    }
    std::vector<char*> flags(argv, argv + argc);
    char interleave[] = "--benchmark_enable_random_interleaving=true";
    flags.push_back(interleave);
    int n = int(flags.size());
    benchmark::Initialize(&n, flags.data());
    if (benchmark::ReportUnrecognizedArguments(n, flags.data())) return 1;
    if (benchmark::RunSpecifiedBenchmarks() == 0) return 1;
    report();
    return 0;
  }

 private:
  void activations() {
    a_.resize(rows_ * f_);
    gates_.resize(rows_ * f_);
#pragma omp parallel for
    for (int64_t k = 0; k < rows_ * f_; ++k) {
      double g = 0, u = 0;
      for (int64_t c = 0; c < d_; ++c) {
        const double x = value_of(x_[k / f_ * d_ + c]);
        g += value_of(gate_[k % f_ * d_ + c]) * x;
        u += value_of(up_[k % f_ * d_ + c]) * x;
      }
      gates_[k] = test::activated(mlp_.activation, g);
      a_[k] = gates_[k] * u;
    }
  }

  void add(const std::string& plan, double density) {
    Case c;
    c.plan = plan;
    c.indices.resize(f_);
    if (plan == "given") {
      const auto chosen =
          test::some_neurons(f_, std::max<int64_t>(1, std::llround(density * double(f_))));
      std::copy(chosen.begin(), chosen.end(), c.indices.begin());
      c.count = int32_t(chosen.size());
      c.density = double(c.count) / double(f_);
    } else {
      std::vector<double> scores;
      for (double v : plan == "gate" ? gates_ : a_) scores.push_back(std::fabs(v));
      c.epsilon = density < 1 ? float(widest_gap(scores, 1 - density)) : 0.0f;
      int64_t active = 0;
      for (double s : scores) active += !(s < c.epsilon);
      c.density = double(active) / double(scores.size());
    }
    const double before = plan == "given" ? 0 : plan == "gate" ? 1 : 2;
    // Rows of one run share most of what they read; bytes are those of the union.
    double read = 0;
    for (int64_t i = 0; i < f_; ++i) {
      bool any = false;
      for (int64_t r = 0; r < rows_; ++r) any |= active(c, r, i);
      read += before + (3 - before) * any;
    }
    c.bytes = int64_t(read) * d_ * int64_t(sizeof(T));
    cases_.push_back(std::move(c));
  }

  // A threshold near the quantile, in the widest gap around it: no score is moved across it.
  static double widest_gap(std::vector<double> scores, double fraction) {
    std::sort(scores.begin(), scores.end());
    const auto place = int64_t(fraction * double(scores.size() - 1));
    double best = scores[place], width = -1;
    for (int64_t k = std::max<int64_t>(0, place - 16);
         k < std::min<int64_t>(place + 16, int64_t(scores.size()) - 1); ++k)
      if (scores[k + 1] - scores[k] > width) {
        width = scores[k + 1] - scores[k];
        best = (scores[k] + scores[k + 1]) / 2;
      }
    return best;
  }

  bool active(const Case& c, int64_t r, int64_t i) const {
    if (c.plan == "given")
      return std::binary_search(c.indices.begin(), c.indices.begin() + c.count, int32_t(i));
    return !(std::fabs((c.plan == "gate" ? gates_ : a_)[r * f_ + i]) < c.epsilon);
  }

  void call(const Case& c) {
    if (c.plan == "given") {
      cpu::sparse_mlp(mlp_, {c.indices.data(), &c.count, nullptr}, workspace_.data());
    } else {
      cpu::threshold_mlp(mlp_, c.plan == "gate" ? Plan::kGate : Plan::kProduct, nullptr, &c.epsilon,
                         counts_.data(), workspace_.data());
    }
  }

  void verify(Case& c) {
    std::memset(out_.data(), 0xff, out_.size() * sizeof(out_[0]));  // NaN: all is to be written
    call(c);
    double largest = 0, worst = 0;
    std::vector<double> exact(rows_ * d_, 0.0);
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t i = 0; i < f_; ++i)
        if (active(c, r, i))
          for (int64_t j = 0; j < d_; ++j)
            exact[r * d_ + j] += a_[r * f_ + i] * value_of(down_t_[i * d_ + j]);
    for (size_t k = 0; k < exact.size(); ++k) {
      largest = std::max(largest, std::fabs(exact[k]));
      const double error = std::fabs(value_of(out_[k]) - exact[k]);
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
    c.error = worst / largest;
    const double allowed =
        std::ldexp(1, 1 - Format<T>::digits) + 4 * test::kUnit * std::sqrt(double(d_ + f_));
    if (!(c.error <= allowed)) {
      std::cerr << c.plan << " at density " << c.density << ": relative error " << c.error
                << ", allowed " << allowed << "; nothing is measured\n";
      std::exit(1);
    }
  }

  void report() {
    const double bandwidth = reader_.gbps(), dense = quantile(cases_[0].seconds, 0.5);
    const std::string device = cpu_name(), head = commit();
    std::ostringstream rows;
    std::printf("\n%s, %d threads, %s, reads %.1f GB/s\n", device.c_str(), omp_get_max_threads(),
                cpu::isa_name(), bandwidth);
    for (const Case& c : cases_) {
      if (c.seconds.size() < 2) continue;
      const double median = quantile(c.seconds, 0.5), gbps = double(c.bytes) / median / 1e9;
      std::printf("%-8s density %.3f  %9.1f us  %5.1f GB/s  %3.0f%% of bandwidth  %5.2fx\n",
                  c.plan.c_str(), c.density, median * 1e6, gbps, 100 * gbps / bandwidth,
                  dense / median);
      rows << "mlp," << device << ',' << o_.dtype << ',' << o_.geometry << ','
           << (c.plan == "given" ? "sparse_mlp" : "threshold_mlp") << ',' << c.plan << ',' << rows_
           << ',' << c.density << ',' << median * 1e6 << ',' << quantile(c.seconds, 0.2) * 1e6
           << ',' << quantile(c.seconds, 0.8) * 1e6 << ',' << c.bytes << ',' << gbps << ','
           << bandwidth << ',' << gbps / bandwidth << ',' << dense / median
           << ",sparse_mlp over all neurons," << c.error << ",none," << head << '\n';
    }
    if (!o_.csv.empty()) append(rows.str());
  }

  // As moyu_ext.benchmarking.rows does: the old content and the rows, moved into place at once.
  void append(const std::string& rows) const {
    std::ostringstream old;
    if (std::ifstream file{o_.csv}) old << file.rdbuf();
    if (old.str().empty())
      old << "name,device,dtype,geometry,method,plan,rows,density,median_us,p20_us,p80_us,bytes,"
             "gbps,bandwidth_gbps,fraction_of_bandwidth,speedup_vs_dense,dense_impl,max_rel_err,"
             "torch,commit\n";
    const std::string temporary = o_.csv + ".tmp";
    std::ofstream(temporary) << old.str() << rows;
    std::filesystem::rename(temporary, o_.csv);
  }

  Options o_;
  int64_t rows_, d_, f_;
  std::vector<T> x_, gate_, up_, down_t_, out_;
  std::vector<double> a_, gates_;
  std::vector<int32_t> counts_;
  std::vector<float> workspace_;
  std::vector<Case> cases_;
  Mlp mlp_;
  Reader reader_;
};

const std::map<std::string, std::pair<int64_t, int64_t>> kGeometries = {
    {"llama-2-7b", {4096, 11008}}, {"llama-3-8b", {4096, 14336}}, {"llama-3.2-1b", {2048, 8192}}};

// Takes our own flags out of argv.
bool parse(int* argc, char** argv, Options* o) {
  const std::map<std::string, std::string*> texts = {
      {"--geometry=", &o->geometry}, {"--dtype=", &o->dtype}, {"--csv=", &o->csv}};
  const std::map<std::string, int64_t*> numbers = {
      {"--d=", &o->d}, {"--f=", &o->f}, {"--rows=", &o->rows}, {"--repetitions=", &o->repetitions}};
  int kept = 1;
  for (int i = 1; i < *argc; ++i) {
    const std::string flag = argv[i];
    bool ours = false;
    for (const auto& [name, target] : texts)
      if (flag.rfind(name, 0) == 0) ours = true, *target = flag.substr(name.size());
    for (const auto& [name, target] : numbers)
      if (flag.rfind(name, 0) == 0) ours = true, *target = std::atoll(flag.c_str() + name.size());
    if (!ours) argv[kept++] = argv[i];
  }
  *argc = kept;
  if (o->d > 0 && o->f > 0) {
    o->geometry = std::to_string(o->d) + "x" + std::to_string(o->f);
  } else if (const auto found = kGeometries.find(o->geometry); found != kGeometries.end()) {
    std::tie(o->d, o->f) = found->second;
  } else {
    std::cerr << "--geometry=" << o->geometry << ": expected llama-2-7b, llama-3-8b or "
              << "llama-3.2-1b, or both --d and --f\n";
    return false;
  }
  if (o->rows < 1 || o->repetitions < 2) {
    std::cerr << "--rows must be at least 1 and --repetitions at least 2\n";
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  if (!parse(&argc, argv, &options)) return 2;
  if (options.dtype == "bfloat16") return Bench<test::Bf16>(options).run(argc, argv);
  if (options.dtype == "float16") return Bench<test::Half>(options).run(argc, argv);
  if (options.dtype == "float32") return Bench<float>(options).run(argc, argv);
  std::cerr << "--dtype=" << options.dtype << ": expected bfloat16, float16 or float32\n";
  return 2;
}
