// Named ranges for Nsight Systems around the operators. Off unless MOYU_NVTX=1: then a range costs
// one test of a constant. Built without CUDA's nvtx3 headers it is always off.
#pragma once

#include <cstdlib>

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define MOYU_WITH_NVTX 1
#endif

namespace moyu::cuda {

class NvtxRange {
 public:
  explicit NvtxRange(const char* name) {
#if defined(MOYU_WITH_NVTX)
    if (wanted()) nvtxRangePushA(name);
#else
    (void)name;
#endif
  }
  ~NvtxRange() {
#if defined(MOYU_WITH_NVTX)
    if (wanted()) nvtxRangePop();
#endif
  }
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;

 private:
  static bool wanted() {
    static const bool on = [] {
      const char* value = std::getenv("MOYU_NVTX");
      return value != nullptr && value[0] == '1';
    }();
    return on;
  }
};

}  // namespace moyu::cuda
