// Getting a thread out of what knows nothing of tokens: a user's condition variable, a blocking system
// call. What gets it out is an attempt (a notification, a signal), and who makes it can't always tell
// whether it came before the thread went to sleep, so it is made again until it has been heard.
//
//  * The canceller doesn't make the attempt. It may be the coordinator's signal thread, and neither a condition
//    variable nor the user's mutex is for that to touch; it may hold a lock that the thread needs, or
//    be about to run a callback that waits for the thread. It hands the nudge to a thread that is there
//    for nothing else and runs no user code: a push on a list and a wake-up. It does so where waiters are
//    woken, under the lane's lock, and before any callback is run (I8 of cancellation.hpp).
//  * The nudging thread tries at once, and then every millisecond until an attempt is certain to have been
//    heard, or the thread to be nudged is out. It sleeps while nobody is to be nudged.
//  * It is started by the first thread of a process that is about to block, which can throw if there is none
//    to be had, and stays. In a forked child it is gone; who blocks there starts another. The child
//    forgets who was to be nudged: that is on stacks which it hasn't got.
//  * A nudge is on the stack of the thread that blocks, which doesn't leave before the nudging thread has
//    let go of it.
//
// Every schedule of it is checked: tests/model/nudge.pml.
#pragma once

#include <lastcall/detail/cancel_tree.hpp>
#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/futex.hpp>
#include <lastcall/detail/posix.hpp>
#include <lastcall/detail/signal_pin.hpp>
#include <lastcall/detail/thread.hpp>
#include <lastcall/detail/throw_system_error.hpp>

#include <pthread.h>

#include <atomic>
#include <utility>

namespace lastcall::detail {

class Nudge : private CallbackLink {
 public:
  /// True: it was heard for certain, no more attempts are needed. Must not block.
  using Attempt = bool (*)(void* target) noexcept;

  /// By the thread that is going to block until `node` is cancelled. Throws std::system_error if there is
  /// no thread to be had for the nudging.
  Nudge(Node* node, Attempt attempt, void* target) : attempt_(attempt), target_(target) {
    ensure_thread();
    invoke = [](CallbackLink* link) noexcept { static_cast<Nudge*>(link)->cancel(); };
    stage.store(asleep, std::memory_order_relaxed);
    if (!attach(node, this, LinkKind::callback)) state_.store(cancelled, std::memory_order_relaxed);
  }
  Nudge(const Nudge&) = delete;
  Nudge& operator=(const Nudge&) = delete;
  ~Nudge() {
    // After this, which takes the lane's lock, nobody hands it on any more.
    remove_callback(this);
    if (is_handed_over_) await_release();
  }

  /// Before it blocks. False if it mustn't: cancelled. May throw, as the constructor.
  bool enter() {
    ensure_thread();  // whoever waits may have forked since
    // One word for both sides: either the canceller sees `blocking`, or this thread `cancelled`.
    return (state_.fetch_or(blocking, std::memory_order_acq_rel) & cancelled) == 0;
  }
  /// When it is out again. False: cancelled.
  bool leave() noexcept {
    return (state_.fetch_and(~blocking, std::memory_order_acq_rel) & cancelled) == 0;
  }

 private:
  static constexpr std::uint32_t blocking = 1;   // the thread is going to block, or does
  static constexpr std::uint32_t cancelled = 2;  // the waker has been here
  static constexpr std::uint32_t leaving = 4;    // the thread waits to be let go
  static constexpr std::uint32_t released = 8;   // the nudging thread is done with it

  // The waker, under the lane's lock.
  void cancel() noexcept {
    if ((state_.fetch_or(cancelled, std::memory_order_acq_rel) & blocking) == 0) return;
    is_handed_over_ = true;
    Nudge* first = handed_over.load(std::memory_order_relaxed);
    // release: the nudging thread finds it whole.
    do {
      next_ = first;
    } while (!handed_over.compare_exchange_weak(first, this, std::memory_order_release,
                                                std::memory_order_relaxed));
    ring();
  }

  void await_release() noexcept {
    std::uint32_t seen = state_.fetch_or(leaving, std::memory_order_acq_rel) | leaving;
    if ((seen & released) == 0) ring();
    while ((seen & released) == 0) {
      futex_wait(state_, seen);
      // acquire: the last attempt comes before what the thread does next.
      seen = state_.load(std::memory_order_acquire);
    }
  }

  // ---- the thread

  static constexpr std::uint32_t absent = 0;
  static constexpr std::uint32_t starting = 1;
  static constexpr std::uint32_t running = 2;

  static void ring() noexcept {
    // release: who sees that it was rung sees what for.
    doorbell.fetch_add(1, std::memory_order_release);
    futex_wake_one(&doorbell);
  }

  static void ensure_thread() {
    // acquire, here and below, and the release in start(): nothing but that it is there.
    while (thread_state.load(std::memory_order_acquire) != running) {
      if (!watches_forks.load(std::memory_order_acquire)) watch_forks();
      std::uint32_t seen = absent;
      if (thread_state.compare_exchange_strong(seen, starting, std::memory_order_acquire,
                                               std::memory_order_acquire)) {
        start();
      } else if (seen == starting) {
        futex_wait(thread_state, starting);
      }
    }
  }

  // Before anybody is `starting`, for whom a child would wait that hasn't got him. Twice does no harm.
  static void watch_forks() {
    pin_module_of(reinterpret_cast<const void*>(&thread_main));
    const int error = ::pthread_atfork(nullptr, nullptr, &become_child);
    if (error != 0) throw_system_error(error, "preparing the thread that wakes blocked calls");
    watches_forks.store(true, std::memory_order_release);
  }
  static void become_child() {
    handed_over.store(nullptr, std::memory_order_relaxed);
    thread_state.store(absent, std::memory_order_relaxed);
  }

  static void start() {
    int error = 0;
    {
      const BlockAllSignals quiet;
      pthread_t thread{};
      error = start_thread(thread, &thread_main, nullptr);
      if (error == 0) ::pthread_detach(thread);
    }
    thread_state.store(error == 0 ? running : absent, std::memory_order_release);
    futex_wake_all(&thread_state);
    if (error != 0) throw_system_error(error, "starting the thread that wakes blocked calls");
  }

  static void* thread_main(void*) {
    name_this_thread("lastcall-nudge");
    keep_exact_time();
    run();
  }

  [[noreturn]] static void run() noexcept {
    Nudge* known = nullptr;
    Clock::time_point tick{};  // when those are tried again
    for (;;) {
      // acquire: before the look at the list, so that a ring after that look ends the sleep at once.
      const std::uint32_t rung = doorbell.load(std::memory_order_acquire);
      Nudge* const fresh = handed_over.exchange(nullptr, std::memory_order_acquire);
      Nudge* rest = nullptr;
      const bool again = known != nullptr && Clock::now() >= tick;
      look_at(known, again, rest);
      look_at(fresh, true, rest);
      if (again || known == nullptr) tick = Clock::now() + std::chrono::milliseconds(1);
      known = rest;
      futex_wait_until(doorbell, rung, known == nullptr ? Clock::time_point::max() : tick);
    }
  }

  // Lets go of those that are out, or heard an attempt; the others go to `rest`.
  static void look_at(Nudge* first, bool attempts, Nudge*& rest) noexcept {
    while (first != nullptr) {
      Nudge* const nudge = std::exchange(first, first->next_);
      const bool is_out = (nudge->state_.load(std::memory_order_acquire) & blocking) == 0;
      if (is_out || (attempts && nudge->attempt_(nudge->target_))) {
        nudge->release();
      } else {
        nudge->next_ = std::exchange(rest, nudge);
      }
    }
  }

  void release() noexcept {
    // release: the attempts come before the thread goes on. It may be gone after this; the wake uses the
    // address alone.
    Word* const state = &state_;
    if ((state->fetch_or(released, std::memory_order_acq_rel) & leaving) != 0) {
      futex_wake_all(state);
    }
  }

  // Of the process. Constant from the start and never destroyed: stragglers may be here until it is gone.
  static inline constinit Word thread_state{absent};
  static inline constinit Word doorbell{0};
  static inline constinit std::atomic<bool> watches_forks{false};
  static inline constinit std::atomic<Nudge*> handed_over{nullptr};

  const Attempt attempt_;
  void* const target_;
  Word state_{0};
  Nudge* next_ = nullptr;        // of the list, then of the nudging thread's own
  bool is_handed_over_ = false;  // guarded by the lane's lock, and constant once it isn't linked
};

}  // namespace lastcall::detail
