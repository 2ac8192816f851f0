// Every interleaving of two threads in which the second acts as a whole at one moment of the first: the first
// runs one instruction at a time (the processor's trap flag), and at the k-th another thread does its part, for
// each k until the first has no more instructions.
//
//     support::step_through(prepare, stepped, other, holds);  // how often `holds()` was false
//
// Who needs a lock that the stepped thread has gets a moment, and goes on after it. For x86-64 Linux, and not for
// sanitizers, which would be stepped through as well: elsewhere nothing is done.
#pragma once

#include "threads.hpp"

#if defined(__x86_64__) && defined(__linux__) && !defined(LASTCALL_ASAN) && !defined(LASTCALL_TSAN)
#define LASTCALL_CAN_STEP 1
#include <ucontext.h>

#include <csignal>
#include <ctime>
#endif

namespace support {

#if defined(LASTCALL_CAN_STEP)

namespace stepping {

inline volatile long steps = 0;
inline volatile long wanted = 0;
inline std::atomic<bool> go{false};
inline std::atomic<bool> done{false};

inline void nap(long nanoseconds) noexcept {
  const timespec time{0, nanoseconds};
  ::nanosleep(&time, nullptr);
}

inline void after_each(int, siginfo_t*, void* context) {
  steps = steps + 1;
  if (steps != wanted) return;
  // The rest runs as usual.
  static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL] &= ~0x100L;
  go = true;
  for (int turn = 0; turn < 100 && !done; ++turn) nap(20'000);
}

// The red zone below the stack's pointer is the compiler's.
__attribute__((always_inline)) inline void begin() {
  asm volatile("subq $128, %%rsp; pushfq; orq $0x100, (%%rsp); popfq; addq $128, %%rsp" ::
                   : "memory", "cc");
}
__attribute__((always_inline)) inline void end() {
  asm volatile("subq $128, %%rsp; pushfq; andq $~0x100, (%%rsp); popfq; addq $128, %%rsp" ::
                   : "memory", "cc");
}

}  // namespace stepping

template <class Prepare, class Stepped, class Other, class Holds>
int step_through(Prepare prepare, Stepped stepped, Other other, Holds holds) {
  struct sigaction action {};
  struct sigaction before {};
  action.sa_sigaction = &stepping::after_each;
  action.sa_flags = SA_SIGINFO;
  ::sigaction(SIGTRAP, &action, &before);
  int bad = 0;
  for (long at = 1;; ++at) {
    prepare();
    stepping::go = stepping::done = false;
    stepping::steps = 0;
    stepping::wanted = at;
    std::thread second([&] {
      while (!stepping::go) stepping::nap(5000);
      other();
      stepping::done = true;
    });
    stepping::begin();
    stepped();
    stepping::end();
    const bool over = stepping::steps < at;
    stepping::wanted = 0;
    stepping::go = true;
    second.join();
    if (!holds()) ++bad;
    if (over || at == 20'000) break;
  }
  ::sigaction(SIGTRAP, &before, nullptr);
  return bad;
}

#else

template <class Prepare, class Stepped, class Other, class Holds>
int step_through(Prepare, Stepped, Other, Holds) {
  return 0;
}

#endif

}  // namespace support

#undef LASTCALL_CAN_STEP
