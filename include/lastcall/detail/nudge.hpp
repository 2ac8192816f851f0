// Saying a thing again until it has been heard.
//
// A canceller that has to get a thread out of something which knows nothing of tokens (a user's
// condition variable, a blocking system call) can't always tell whether its wake-up came before the
// thread went to sleep. Nor may it wait to find out: it may hold a lock that the thread needs. So it
// tries once itself, and if in doubt leaves the matter to the timer thread, which tries again at each
// tick (1 ms) until an attempt is certain to have been heard, or the thread is out. Nobody is
// woken for nothing as long as nobody cancels.
//
// A Nudge is made by the thread that may have to be nudged, before it blocks: then the canceller
// allocates nothing. It is not on that thread's stack, since a child forked meanwhile inherits the
// timers, but not the stacks: there the attempt is not made.
#pragma once

#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/futex.hpp>
#include <lastcall/detail/timer_service.hpp>

#include <sched.h>
#include <sys/types.h>
#include <unistd.h>

#include <ctime>
#include <memory>

namespace lastcall::detail {

class Nudge : private TimerLink {
 public:
  /// True: it was heard for certain, no more attempts are needed. Must not block.
  using Attempt = bool (*)(void* target) noexcept;

  /// May throw std::bad_alloc.
  static std::unique_ptr<Nudge> make(Attempt attempt, void* target) {
    static_cast<void>(TimerService::instance());  // so that start() allocates nothing
    return std::unique_ptr<Nudge>(new Nudge(attempt, target));
  }
  Nudge(const Nudge&) = delete;
  Nudge& operator=(const Nudge&) = delete;
  ~Nudge() { stop(); }

  /// Tries now, and if that is not certain to be enough, again and again. At most once in its life, by
  /// the canceller.
  void start() noexcept {
    for (int turn = 0; turn < eager_turns; ++turn) {
      if (attempt_(target_)) return;
      ::sched_yield();
    }
    process_ = ::getpid();
    started_ = true;
    if (arm_or_not()) return;
    // There is no thread to be had for the timers. Then for a while the canceller does it: far longer
    // than it takes the other from deciding to sleep to sleeping, unless that is stopped in between.
    started_ = false;
    const Clock::time_point end = Clock::now() + std::chrono::milliseconds(100);
    const timespec nap{0, 200'000};
    while (!attempt_(target_) && Clock::now() < end) ::nanosleep(&nap, nullptr);
  }

  /// By the nudged thread, when start() has returned or will never be called: no attempt is being made
  /// when it returns, nor will be.
  void stop() noexcept {
    if (!started_) return;
    started_ = false;
    // acq_rel: an attempt that begins after this sees it; one that began before is waited for, and so
    // is its arming of the next.
    if ((state_.fetch_or(leaving, std::memory_order_acq_rel) & held) != 0) await_attempt();
    if (!TimerService::instance().disarm(this)) await_attempt();
  }

 private:
  static constexpr std::uint32_t held = 1;     // the timer thread has it
  static constexpr std::uint32_t leaving = 2;  // no more attempts
  // Mostly the thread is on its way into its sleep, or out of it, and soon through.
  static constexpr int eager_turns = 4;

  Nudge(Attempt attempt, void* target) noexcept : attempt_(attempt), target_(target) {
    hold = [](TimerLink* link) noexcept {
      // Under the timers' lock, which disarm() takes too.
      static_cast<Nudge*>(link)->state_.fetch_or(held, std::memory_order_acq_rel);
    };
    due = [](TimerLink* link) noexcept { static_cast<Nudge*>(link)->try_again(); };
  }

  void try_again() noexcept {
    const bool wanted =
        (state_.load(std::memory_order_acquire) & leaving) == 0 && process_ == ::getpid();
    if (wanted && !attempt_(target_)) arm_or_not();
    Word* const state = &state_;
    // release: this attempt happens before stop() returns. After it the Nudge may be gone.
    if ((state->fetch_and(~held, std::memory_order_acq_rel) & leaving) != 0) futex_wake_all(state);
  }

  bool arm_or_not() noexcept {
    LASTCALL_TRY {
      TimerService::instance().arm(this, Clock::now());  // now is past: the next tick
      return true;
    }
    LASTCALL_CATCH(...) {}
    return false;
  }

  void await_attempt() noexcept {
    for (;;) {
      const std::uint32_t state = state_.load(std::memory_order_acquire);
      if ((state & held) == 0) return;
      futex_wait(state_, state);
    }
  }

  const Attempt attempt_;
  void* const target_;
  Word state_{0};
  pid_t process_ = 0;
  bool started_ = false;
};

}  // namespace lastcall::detail
