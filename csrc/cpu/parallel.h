// Threads: the caller's OpenMP runtime, which is torch's own, and a static split of the work, so
// that a result depends on the thread count alone and is the same from run to run.

MOYU_INLINE int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

MOYU_INLINE int thread_id() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

MOYU_INLINE int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// A team costs a few microseconds; below this many bytes a thread it does not pay.
constexpr int64_t kBytesPerThread = 128 * 1024;

inline int threads_for(int64_t bytes) {
  return static_cast<int>(
      std::clamp<int64_t>(bytes / kBytesPerThread, 1, static_cast<int64_t>(max_threads())));
}

inline int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

struct Range {
  int64_t begin, end;
};

// Part `part` of `parts` of [0, n), cut at multiples of `grain`.
inline Range split(int64_t n, int part, int parts, int64_t grain = 1) {
  const int64_t grains = (n + grain - 1) / grain;
  return {std::min(n, grains * part / parts * grain),
          std::min(n, grains * (part + 1) / parts * grain)};
}
