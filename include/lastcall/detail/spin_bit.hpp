// A lock of one bit in a 32-bit word whose other bits are state that the lock guards.
//
// Unlocking is a plain store, not a read-modify-write: nobody but the owner changes the word while it
// is locked, and a waiter leaves no mark in it. The price is that a waiter which has spun for long
// sleeps in steps instead of being woken. What the bit guards is a few loads and stores (one marking
// of a tree at most), never user code and never an allocation, so waiting is rare and short.
#pragma once

#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/futex.hpp>
#include <lastcall/detail/thread_cancellation.hpp>

#include <pthread.h>
#include <sched.h>

#include <bit>
#include <cstdint>

namespace lastcall::detail {

inline void pause_cpu() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ __volatile__("yield");
#endif
}

/// Waits a little longer at each turn: spins, then yields, then sleeps for up to a millisecond.
class Backoff {
 public:
  void pause() noexcept {
    if (turn_ < spins) {
      pause_cpu();
    } else if (turn_ < spins + yields) {
      ::sched_yield();
    } else {
      nap(turn_ < spins + yields + 10 ? 50'000 : 1'000'000);
    }
    ++turn_;
  }

 private:
  static constexpr unsigned spins = 40;
  static constexpr unsigned yields = 20;
  unsigned turn_ = 0;
};

inline constexpr std::uint32_t locked_bit = 1U << 1;

// The way of who found the word locked, or changed by somebody; out of line, so that the usual way is inlined.
[[gnu::noinline]] inline std::uint32_t lock_bit_patiently(Word& word, std::uint32_t seen) noexcept {
  Backoff backoff;
  for (;;) {
    if ((seen & locked_bit) != 0) {
      backoff.pause();
      seen = word.load(std::memory_order_relaxed);
    } else if (word.compare_exchange_weak(seen, seen | locked_bit, std::memory_order_acquire,
                                          std::memory_order_relaxed)) {
      return seen;  // acquire: as in lock_bit()
    }
  }
}

/// Locks and returns the state without the lock bit. `waited`, if given, becomes true when somebody
/// else held the lock.
[[gnu::always_inline]] inline std::uint32_t lock_bit(Word& word, bool* waited = nullptr) noexcept {
  std::uint32_t seen = word.load(std::memory_order_relaxed);
  // acquire: pairs with the release in unlock_bit().
  if ((seen & locked_bit) == 0 &&
      word.compare_exchange_strong(seen, seen | locked_bit, std::memory_order_acquire,
                                   std::memory_order_relaxed)) {
    return seen;
  }
  if (waited != nullptr) *waited = true;
  return lock_bit_patiently(word, seen);
}

/// For who must not wait for ever: false if another thread has the lock still when `deadline` passes. It
/// was stopped there by a debugger, or by a signal handler that hangs.
[[gnu::noinline]] inline bool lock_bit_until(Word& word, Clock::time_point deadline,
                                             std::uint32_t& state) noexcept {
  constexpr unsigned free_turns = 50;  // so many are waited for in any case
  std::uint32_t seen = word.load(std::memory_order_relaxed);
  Backoff backoff;
  for (unsigned turn = 0;; ++turn) {
    if ((seen & locked_bit) == 0) {
      // acquire: as in lock_bit().
      if (word.compare_exchange_weak(seen, seen | locked_bit, std::memory_order_acquire,
                                     std::memory_order_relaxed)) {
        state = seen;
        return true;
      }
      continue;
    }
    if (turn >= free_turns && Clock::now() >= deadline) return false;
    backoff.pause();
    seen = word.load(std::memory_order_relaxed);
  }
}

inline void unlock_bit(Word& word, std::uint32_t state) noexcept {
  word.store(state & ~locked_bit, std::memory_order_release);
}

/// A lock of its own, for what has no state word.
class SpinLock {
 public:
  void lock() noexcept { lock_bit(word_); }
  void unlock() noexcept { unlock_bit(word_, 0); }
  bool lock_until(Clock::time_point deadline) noexcept {
    std::uint32_t unused = 0;
    return lock_bit_until(word_, deadline, unused);
  }
  bool try_lock() noexcept {
    std::uint32_t seen = 0;
    return word_.compare_exchange_strong(seen, locked_bit, std::memory_order_acquire,
                                         std::memory_order_relaxed);
  }

 private:
  Word word_{0};
};

/// What no other live thread has, nor is 0: a thread's identity without a system call. The same in all shared
/// objects of the process, which the address of a thread_local is not.
using ThreadMark = std::uintptr_t;
inline ThreadMark this_thread_mark() noexcept {
  return std::bit_cast<ThreadMark>(::pthread_self());
}

/// A small number, handed out to threads in turn: spreads them over shards.
inline unsigned this_thread_number() noexcept {
  static std::atomic<unsigned> next{0};
  static thread_local const unsigned mine = next.fetch_add(1, std::memory_order_relaxed);
  return mine;
}

}  // namespace lastcall::detail
