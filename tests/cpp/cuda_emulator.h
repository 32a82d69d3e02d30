// Runs the CUDA kernels' own source on the CPU, with plain C++ and no CUDA toolkit: a block's
// threads are fibers, a warp operation is a rendezvous of 32 lanes, a block's barrier one of all
// its threads. What a GPU does with a mistake (hang, or read garbage) is an exception here:
//   * threads that wait for each other at different places, or for threads that have left:
//     "deadlock", with who waits where;
//   * a misaligned 16-byte load; a shared struct over 48 KB;
//   * a thread that leaves, or lets the next kernel start, without having waited for the previous
//     kernel.
// Shared memory starts as NaN patterns. The order in which threads and blocks run can be turned
// around, shuffled, or greedy, when each warp runs as far as it can before the next one starts: a
// result that changes with it has a race.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_types.h"
#include "fibers.h"

inline dim3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0}, blockDim, gridDim;

namespace emulator {

enum class Order { kForward, kBackward, kShuffled, kGreedy };

struct Config {
  int multiprocessors = 3;
  Order order = Order::kForward;
  unsigned seed = 1;
};
inline Config config;
inline int64_t launches = 0, switches = 0;  // what has been run, for the curious

// Where a thread waits: the operation and the line that called it.
struct Site {
  const char* what;
  const char* file;
  int line;
  bool operator==(const Site& o) const {
    return line == o.line && std::strcmp(what, o.what) == 0 && std::strcmp(file, o.file) == 0;
  }
  std::string text() const {
    std::string name(file);
    return std::string(what) + " at " + name.substr(name.find_last_of('/') + 1) + ":" +
           std::to_string(line);
  }
};

struct Thread {
  enum State { kReady, kAtBarrier, kAtWarp, kLeft };
  Fiber fiber;
  State state = kReady;
  Site site{};
  unsigned index = 0;
  uint64_t value = 0;  // brought to a warp operation
  int from = 0;        // the lane whose value this one wants
  uint64_t* result = nullptr;
  bool waited = false;  // for the previous kernel
};

class Block {
 public:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  // Runs all threads of one block to their end.
  void run(unsigned threads, const std::function<void()>& kernel, std::mt19937& random) {
    if (threads_.size() < threads) threads_.resize(threads);
    kernel_ = &kernel;
    count_ = threads;
    shared_.reset();
    shared_bytes_ = 0;
    at_barrier_ = left_ = 0;
    error_.clear();
    at_warp_.assign((threads + 31) / 32, 0);
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    if (config.order == Order::kBackward) std::reverse(order.begin(), order.end());
    if (config.order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
    for (unsigned i = 0; i < threads; ++i) {
      threads_[i].index = i;
      threads_[i].state = Thread::kReady;
      threads_[i].waited = false;
      threads_[i].fiber.restart(&Block::thread_main, this);
    }
    const size_t turn = config.order == Order::kGreedy ? 32 : threads;
    while (left_ < count_) {
      bool ran = false;
      for (size_t first = 0; first < order.size(); first += turn)
        while (run_ready(order, first, std::min(first + turn, order.size()))) {
          ran = true;
          if (config.order != Order::kGreedy) break;
        }
      if (!ran) throw std::runtime_error(deadlock());
    }
  }

  Thread& self() { return *self_; }

  void barrier(Site site) {
    for (unsigned i = 0; i < count_ && at_barrier_ > 0; ++i)
      if (threads_[i].state == Thread::kAtBarrier && !(threads_[i].site == site))
        fail("divergent barrier: thread " + std::to_string(i) + " waits for " +
             threads_[i].site.text() + ", thread " + std::to_string(self_->index) + " for " +
             site.text());
      else if (threads_[i].state == Thread::kAtBarrier)
        break;  // one is enough: each compared itself when it came
    self_->site = site;
    self_->state = Thread::kAtBarrier;
    if (++at_barrier_ == count_) {
      at_barrier_ = 0;
      for (unsigned i = 0; i < count_; ++i) threads_[i].state = Thread::kReady;
    }
    wait();
  }

  // All lanes bring a value; each gets the value of lane `from`.
  uint64_t exchange(unsigned mask, uint64_t value, int from, Site site) {
    uint64_t result = 0;
    rendezvous(mask, value, from, &result, site, false);
    return result;
  }
  // All lanes bring a flag; each gets all of them.
  unsigned ballot(unsigned mask, bool flag, Site site) {
    uint64_t result = 0;
    rendezvous(mask, flag ? 1 : 0, 0, &result, site, true);
    return static_cast<unsigned>(result);
  }

  template <typename T>
  T& shared() {
    static_assert(sizeof(T) <= 48 * 1024, "static shared memory of a block is at most 48 KB");
    if (!shared_) {
      shared_bytes_ = sizeof(T);
      shared_.reset(static_cast<char*>(operator new(sizeof(T), std::align_val_t{64})));
      std::memset(shared_.get(), 0xff, sizeof(T));
    }
    if (shared_bytes_ != sizeof(T)) fail("a kernel has one shared struct, this one has two");
    return *reinterpret_cast<T*>(shared_.get());
  }

  // Ends the launch, from inside a thread.
  [[noreturn]] static void fail(const std::string& message) { throw std::runtime_error(message); }

 private:
  // An exception must not leave the fiber that it was thrown on: run() throws it again.
  static void thread_main(void* block) {
    Block* const self = static_cast<Block*>(block);
    try {
      (*self->kernel_)();
    } catch (const std::runtime_error& e) {
      self->error_ = e.what();
    }
    if (self->error_.empty() && !self->self_->waited)
      self->error_ = "thread " + std::to_string(self->self_->index) +
                     " left without waiting for the previous kernel";
    self->self_->state = Thread::kLeft;
    ++self->left_;
  }

  // Each thread of order[first, last) that is ready goes on to where it waits next.
  bool run_ready(const std::vector<unsigned>& order, size_t first, size_t last) {
    bool ran = false;
    for (size_t k = first; k < last; ++k) {
      Thread& t = threads_[order[k]];
      if (t.state != Thread::kReady) continue;
      ran = true;
      self_ = &t;
      threadIdx.x = order[k];
      ++switches;
      t.fiber.resume();
      if (!error_.empty()) throw std::runtime_error(error_);
    }
    return ran;
  }

  void wait() {
    Thread* const me = self_;
    me->fiber.pause();
    self_ = me;
  }

  void rendezvous(unsigned mask, uint64_t value, int from, uint64_t* result, Site site,
                  bool is_ballot) {
    const unsigned warp = self_->index / 32;
    if (mask != 0xffffffffu || (warp + 1) * 32 > count_)
      fail(site.text() + ": the emulator knows full warps only");
    Thread* const lanes = &threads_[warp * 32];
    for (int i = 0; i < 32; ++i)
      if (lanes[i].state == Thread::kAtWarp && !(lanes[i].site == site))
        fail("divergent warp: lane " + std::to_string(i) + " waits for " + lanes[i].site.text() +
             ", lane " + std::to_string(self_->index % 32) + " for " + site.text());
      else if (lanes[i].state == Thread::kAtWarp)
        break;
    self_->site = site;
    self_->state = Thread::kAtWarp;
    self_->value = value;
    self_->from = from;
    self_->result = result;
    if (++at_warp_[warp] == 32) {
      at_warp_[warp] = 0;
      uint64_t flags = 0;
      for (int i = 0; i < 32; ++i) flags |= (lanes[i].value & 1) << i;
      for (int i = 0; i < 32; ++i) {
        *lanes[i].result = is_ballot ? flags : lanes[lanes[i].from & 31].value;
        lanes[i].state = Thread::kReady;
      }
    }
    wait();
  }

  std::string deadlock() const {
    std::map<std::string, int> waiting;
    for (unsigned i = 0; i < count_; ++i)
      if (threads_[i].state != Thread::kLeft) ++waiting[threads_[i].site.text()];
    std::string message = "deadlock:";
    for (const auto& [where, n] : waiting)
      message += " " + std::to_string(n) + " threads wait for " + where + ";";
    return message + " " + std::to_string(left_) + " of " + std::to_string(count_) + " have left";
  }

  struct FreeShared {
    void operator()(char* p) const { operator delete(p, std::align_val_t{64}); }
  };

  std::vector<Thread> threads_;  // kept from block to block for their stacks
  const std::function<void()>* kernel_ = nullptr;
  unsigned count_ = 0, at_barrier_ = 0, left_ = 0;
  std::vector<unsigned> at_warp_;
  std::unique_ptr<char, FreeShared> shared_;
  size_t shared_bytes_ = 0;
  std::string error_;
  Thread* self_ = nullptr;
};

// kernel() on `blocks` blocks of `threads` threads, one block after the other.
inline void run(const char* op, int64_t blocks, int threads, const std::function<void()>& kernel) {
  static Block block;
  static std::mt19937 random;
  random.seed(config.seed);
  ++launches;
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (config.order == Order::kBackward) std::reverse(order.begin(), order.end());
  if (config.order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
  Block::current() = &block;
  for (unsigned b : order) {
    blockIdx = {b, 0, 0};
    try {
      block.run(threads, kernel, random);
    } catch (const std::runtime_error& e) {
      throw std::runtime_error(std::string(op) + ", block " + std::to_string(b) + ": " + e.what());
    }
  }
}

// What the lanes of each warp bring to a matrix product: a, then b.
inline uint32_t mma_words[32][32][6];

inline float bits_to_float(uint64_t v) { return __uint_as_float(static_cast<uint32_t>(v)); }

}  // namespace emulator

#define MOYU_SHARED(type, name) type& name = emulator::Block::current()->shared<type>()

// The call's own place, through default arguments.
#define MOYU_SITE(what) \
  emulator::Site { what, file, line }
#define MOYU_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(MOYU_CALLER) {
  emulator::Block::current()->barrier(MOYU_SITE("__syncthreads"));
}
inline void __syncwarp(MOYU_CALLER) {
  emulator::Block::current()->ballot(0xffffffffu, true, MOYU_SITE("__syncwarp"));
}
inline unsigned __ballot_sync(unsigned mask, bool flag, MOYU_CALLER) {
  return emulator::Block::current()->ballot(mask, flag, MOYU_SITE("__ballot_sync"));
}
inline float __shfl_xor_sync(unsigned mask, float v, int lane_mask, MOYU_CALLER) {
  return emulator::bits_to_float(emulator::Block::current()->exchange(
      mask, __float_as_uint(v), (threadIdx.x & 31) ^ lane_mask, MOYU_SITE("__shfl_xor_sync")));
}
inline int __shfl_xor_sync(unsigned mask, int v, int lane_mask, MOYU_CALLER) {
  return static_cast<int>(emulator::Block::current()->exchange(mask, static_cast<uint32_t>(v),
                                                               (threadIdx.x & 31) ^ lane_mask,
                                                               MOYU_SITE("__shfl_xor_sync")));
}
inline float __shfl_sync(unsigned mask, float v, int from, MOYU_CALLER) {
  return emulator::bits_to_float(emulator::Block::current()->exchange(
      mask, __float_as_uint(v), from & 31, MOYU_SITE("__shfl_sync")));
}
inline int __shfl_sync(unsigned mask, int v, int from, MOYU_CALLER) {
  return static_cast<int>(emulator::Block::current()->exchange(
      mask, static_cast<uint32_t>(v), from & 31, MOYU_SITE("__shfl_sync")));
}
inline int __shfl_up_sync(unsigned mask, int v, unsigned delta, MOYU_CALLER) {
  const int lane = threadIdx.x & 31;
  return static_cast<int>(emulator::Block::current()->exchange(
      mask, static_cast<uint32_t>(v), lane < static_cast<int>(delta) ? lane : lane - delta,
      MOYU_SITE("__shfl_up_sync")));
}

// The rest of csrc/cuda/platform.cuh.
namespace moyu::cuda {

inline uint4 load_streaming(const uint4* p, bool wanted) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0)
    emulator::Block::fail("misaligned address of a 16-byte load");
  return wanted ? *p : uint4{0, 0, 0, 0};
}
template <bool kWide>
inline uint2 load_codes(const uint8_t* p) {
  if (reinterpret_cast<uintptr_t>(p) % (kWide ? 8 : 4) != 0)
    emulator::Block::fail("misaligned address of an 8-byte load");
  uint2 v;
  std::memcpy(&v, p, 8);
  return v;
}
inline uint32_t load_code_word(const uint8_t* p) {
  if (reinterpret_cast<uintptr_t>(p) % 4 != 0)
    emulator::Block::fail("misaligned address of a 4-byte load");
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}
inline uint32_t load_short(const uint8_t* p) {
  if (reinterpret_cast<uintptr_t>(p) % 2 != 0)
    emulator::Block::fail("misaligned address of a 2-byte load");
  uint16_t v;
  std::memcpy(&v, p, 2);
  return v;
}
inline uint32_t load_scale(const uint8_t* p, int64_t distance) {
  return load_short(p) | load_short(p + distance) << 16;
}
inline uint32_t bfloat16_pair(float low, float high) {
  return __float2bfloat16_rn(low).bits | uint32_t{__float2bfloat16_rn(high).bits} << 16;
}
// Calls work(lanes' words, g, q) where all lanes have brought theirs.
template <typename Work>
inline void mma_together(const uint32_t (&a)[4], const uint32_t (&b)[2], Work&& work,
                         const char* file, int line) {
  auto& lanes = emulator::mma_words[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) lanes[lane][i] = a[i];
  for (int i = 0; i < 2; ++i) lanes[lane][4 + i] = b[i];
  emulator::Block::current()->ballot(0xffffffffu, true, MOYU_SITE("mma"));
  work(lanes, lane / 4, lane % 4);
  // Nobody brings the next words before all have read these.
  emulator::Block::current()->ballot(0xffffffffu, true, MOYU_SITE("mma, read"));
}
template <typename Half>
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MOYU_CALLER) {
  mma_together(
      a, b,
      [&](const auto& lanes, int g, int q) {
        const auto number = [&](int from, int word, int k) {
          const auto bits = static_cast<uint16_t>(lanes[from][word] >> 16 * (k % 2));
          if constexpr (std::is_same_v<Half, __half>) return __half2float({bits});
          return __bfloat162float({bits});
        };
        for (int i = 0; i < 4; ++i)  // c[g + 8 * (i / 2)][2 q + i % 2]
          for (int k = 0; k < 16; ++k)
            c[i] += number(4 * g + k % 8 / 2, k / 8 * 2 + i / 2, k) *
                    number(4 * (2 * q + i % 2) + k % 8 / 2, 4 + k / 8, k);
      },
      file, line);
}
inline void mma_bytes(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MOYU_CALLER) {
  mma_together(
      a, b,
      [&](const auto& lanes, int g, int q) {
        const auto byte = [&](int from, int word, int k) {
          return lanes[from][word] >> 8 * (k % 4) & 0xff;
        };
        for (int i = 0; i < 4; ++i)
          for (int k = 0; k < 32; ++k)
            c[i] += static_cast<int>(byte(4 * g + k % 16 / 4, k / 16 * 2 + i / 2, k)) *
                    static_cast<int8_t>(byte(4 * (2 * q + i % 2) + k % 16 / 4, 4 + k / 16, k));
      },
      file, line);
}
inline void prefetch_l2(const void*) {}
inline void wait_for_previous_kernel() { emulator::Block::current()->self().waited = true; }
inline void allow_next_kernel() {
  if (!emulator::Block::current()->self().waited)
    emulator::Block::fail("the next kernel is let in before the previous one is waited for");
}

struct Device {
  int id, multiprocessors;
};
inline Device current_device(const char*) { return {0, emulator::config.multiprocessors}; }

template <typename Params>
void launch(const char* op, void (*kernel)(Params), int64_t blocks, int threads, void*,
            const Params& params) {
  if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024)
    throw std::runtime_error(std::string(op) + ": invalid launch configuration");
  emulator::run(op, blocks, threads, [&] { kernel(params); });
}

}  // namespace moyu::cuda
