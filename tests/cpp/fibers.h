// Fibers for the CUDA emulator: one stack per GPU thread, switched by hand. Switching costs a few
// nanoseconds on x86-64; elsewhere ucontext does it. AddressSanitizer is told about every switch.
// For one translation unit: the x86-64 switch is defined right here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#define MOYU_FIBER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MOYU_FIBER_ASAN 1
#endif
#endif
#if defined(MOYU_FIBER_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && defined(__linux__) && !defined(MOYU_FIBER_UCONTEXT)
// Saves the callee-saved registers on this stack, and goes on where the other one was saved.
extern "C" void moyu_fiber_switch(void** save, void* load);
asm(R"(
.text
.weak moyu_fiber_switch
.type moyu_fiber_switch, @function
moyu_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size moyu_fiber_switch, .-moyu_fiber_switch
)");
#else
#define MOYU_FIBER_UCONTEXT_USED 1
#include <ucontext.h>
#endif

namespace emulator {

// A stack that runs `body` when it is switched to. All fibers belong to one scheduler, the
// caller of resume(); a fiber gives control back with pause(), and for good when body returns.
class Fiber {
 public:
  static constexpr size_t kStackBytes = 128 * 1024;

  // Forgets whatever ran here before and starts `body(argument)` at the next resume().
  void restart(void (*body)(void*), void* argument) {
    if (!stack_) stack_.reset(new (std::align_val_t{64}) char[kStackBytes]);
#if defined(MOYU_FIBER_ASAN)
    __asan_unpoison_memory_region(stack_.get(), kStackBytes);
    fake_stack_ = nullptr;
#endif
    body_ = body;
    argument_ = argument;
    finished_ = false;
#if defined(MOYU_FIBER_UCONTEXT_USED)
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, reinterpret_cast<void (*)()>(&Fiber::entry), 0);
#else
    // What moyu_fiber_switch pops: six registers, then the address it returns to. At a function's
    // first instruction the stack pointer is 8 below a multiple of 16.
    void** top = reinterpret_cast<void**>(stack_.get() + kStackBytes) - 2;
    *top = reinterpret_cast<void*>(&Fiber::entry);
    top -= 6;
    for (int i = 0; i < 6; ++i) top[i] = nullptr;
    stack_pointer_ = top;
#endif
  }

  // From the scheduler: runs the fiber until it pauses or finishes.
  void resume() {
    running() = this;
#if defined(MOYU_FIBER_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_.get(), kStackBytes);
#endif
#if defined(MOYU_FIBER_UCONTEXT_USED)
    swapcontext(&scheduler().context, &context_);
#else
    moyu_fiber_switch(&scheduler().stack_pointer, stack_pointer_);
#endif
#if defined(MOYU_FIBER_ASAN)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    running() = nullptr;
  }

  // From inside the fiber: back to the scheduler until the next resume().
  void pause() {
#if defined(MOYU_FIBER_ASAN)
    __sanitizer_start_switch_fiber(finished_ ? nullptr : &fake_stack_, scheduler().stack,
                                   scheduler().stack_bytes);
#endif
#if defined(MOYU_FIBER_UCONTEXT_USED)
    swapcontext(&context_, &scheduler().context);
#else
    moyu_fiber_switch(&stack_pointer_, scheduler().stack_pointer);
#endif
#if defined(MOYU_FIBER_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack_, &scheduler().stack, &scheduler().stack_bytes);
#endif
  }

  bool finished() const { return finished_; }

 private:
  struct Scheduler {
#if defined(MOYU_FIBER_UCONTEXT_USED)
    ucontext_t context;
#else
    void* stack_pointer;
#endif
    const void* stack;  // of the scheduler, for AddressSanitizer
    size_t stack_bytes;
  };
  struct FreeStack {
    void operator()(char* p) const { operator delete[](p, std::align_val_t{64}); }
  };

  static Scheduler& scheduler() {
    static Scheduler s{};
    return s;
  }
  static Fiber*& running() {
    static Fiber* fiber = nullptr;
    return fiber;
  }

  static void entry() {
    Fiber* const self = running();
#if defined(MOYU_FIBER_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler().stack, &scheduler().stack_bytes);
#endif
    self->body_(self->argument_);
    self->finished_ = true;
    self->pause();
    std::abort();  // nobody resumes a finished fiber
  }

  std::unique_ptr<char[], FreeStack> stack_;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool finished_ = true;
#if defined(MOYU_FIBER_UCONTEXT_USED)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
#if defined(MOYU_FIBER_ASAN)
  void* fake_stack_ = nullptr;
#endif
};

}  // namespace emulator
