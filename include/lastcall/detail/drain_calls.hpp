// The drain thread's calls into user code, and into whatever else may hang: each is a section that the signal
// thread watches. One that takes longer than it may is abandoned on its thread, and a successor goes on.
#pragma once

#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/engine_state.hpp>
#include <lastcall/detail/futex.hpp>
#include <lastcall/detail/stack_capture.hpp>
#include <lastcall/detail/thread_cancellation.hpp>
#include <lastcall/detail/thread_id.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <utility>

namespace lastcall::detail {

// What the drain thread is in.
enum class DrainCall { nothing, observer, callback, stop, drained, naming, flush };

// Belongs to whichever thread is the current driver, as all of EngineDrain.
class DrainCalls {
 public:
  explicit DrainCalls(EngineState& engine) noexcept : engine_(engine) {}

  /// Waits for the turn of drain thread number `mine`, and makes it the driver. `start_next` starts the thread
  /// after it, which waits for its turn; false if there is none to be had. False: nobody is needed any more.
  template <class StartNext>
  bool take_turn(std::uint32_t mine, StartNext& start_next) noexcept {
    for (;;) {
      const std::uint32_t current = engine_.current_driver.load(std::memory_order_acquire);
      if ((current & EngineState::driver_quits) != 0) return false;
      if (current == mine) break;
      futex_wait(engine_.current_driver, current);
    }
    driver_ = mine;
    // For last words, also where it hangs between two calls.
    section().thread_id.store(current_thread_id(), std::memory_order_relaxed);
    start_next_ = [](void* context) noexcept { return (*static_cast<StartNext*>(context))(); };
    start_next_context_ = &start_next;
    has_standby_ = false;
    return true;
  }

  Section& section() noexcept { return engine_.sections[driver_]; }
  /// Of the thread before this one.
  const Section& abandoned_section() const noexcept { return engine_.sections[driver_ - 1]; }

  /// What the thread before this one was in when it was left behind; asked once.
  DrainCall take_interrupted() noexcept { return std::exchange(calling_, DrainCall::nothing); }
  /// Whether it ended by itself in there; asked once.
  bool take_thread_ended() noexcept { return std::exchange(thread_ended_, false); }

  /// Whether the deadlines that are given to guarded() take the abort into account.
  void know_of_abort(bool known) noexcept { knows_of_abort_ = known; }
  bool knows_of_abort() const noexcept { return knows_of_abort_; }

  /// Nothing of the user's is begun once there is only time for the report; nor with the last thread that
  /// there is a place for: somebody has to come through.
  bool may_call_users() const noexcept {
    return Clock::now() < engine_.wait_until() && !is_last_thread();
  }
  bool is_last_thread() const noexcept { return driver_ + 1 == EngineState::most_drivers; }

  /// The time that a call may take: until `deadline`, and a short while where that has passed already,
  /// so that the hooks after one that hung get their turn.
  Clock::time_point patience(Clock::time_point deadline) const noexcept {
    const Clock::time_point now = Clock::now();
    const Clock::duration left = engine_.wait_until() - now;
    const Clock::duration slice = std::clamp<Clock::duration>(
        left / 8, std::chrono::milliseconds(5), std::chrono::milliseconds(100));
    return std::max(deadline, now + slice);
  }

  /// Runs `body` as a section that the signal thread watches. False: it took too long, another thread
  /// has taken over, and this one must leave without touching anything. `body` touches nothing that is
  /// shared with that other thread. `name` lives as long as the engine.
  template <class Body>
  bool guarded(DrainCall call, const char* name, const Stage* stage, Clock::time_point deadline,
               Body body) {
    // The flush needs none: after it there is only the exit, which the signal thread can do. Where no
    // thread is to be had there may be one the next time.
    if (call != DrainCall::flush && !has_standby_ && !is_last_thread() &&
        start_next_(start_next_context_)) {
      has_standby_ = true;
      engine_.standbys.store(driver_ + 1, std::memory_order_release);
    }
    Section& section = engine_.sections[driver_];
    section.kind.store(kind_of(call), std::memory_order_relaxed);
    section.name.store(name, std::memory_order_relaxed);
    section.stage.store(stage, std::memory_order_relaxed);
    section.thread_id.store(current_thread_id(), std::memory_order_relaxed);
    section.begin.store(Clock::now());
    section.deadline.store(deadline);
    calling_ = call;
    // From here to the end this thread may be abandoned, and then its successor writes what is written here.
    const bool shared_out = knows_of_abort_;
    // seq_cst, as all that follows: either the signal thread's look at the sections sees this one, or
    // its plan to sleep is seen here and it is rung. And either its hurry_section() sees this one, or
    // the abort is seen here.
    section.state.store(Section::inside, std::memory_order_seq_cst);
    if (stage != nullptr && !shared_out && engine_.abort_claimed.load(std::memory_order_seq_cst)) {
      const Clock::time_point now = Clock::now();
      const Clock::duration own = std::max(deadline - now, Clock::duration::zero());
      section.deadline.lower_to(engine_.deadline_of(*stage, now, own));
    }
    if (engine_.deadline_of(section) < engine_.signal_thread_wakes.load()) {
      engine_.signal_bell.raise();
    }
    {
      const UntilReturn unwound{*this, section};
      const TaskScope scope(&engine_, name);
      const OpenToCapture open;
      if (call == DrainCall::naming) {
        body();  // the library's own
      } else {
        const OpenToThreadCancellation to_cancels;
        body();
        to_cancels.let_thread_end_here();
      }
      unwound.returned = true;
    }
    std::uint32_t inside = Section::inside;
    // acq_rel: it races with being abandoned, and one of the two wins.
    if (section.state.compare_exchange_strong(inside, Section::idle, std::memory_order_acq_rel)) {
      calling_ = DrainCall::nothing;
      return true;
    }
    section.state.store(Section::returned, std::memory_order_release);
    engine_.drain_bell.ring();
    return false;
  }

 private:
  // What is called may end its thread (pthread_exit, pthread_cancel): that unwinds the stack, and the successor goes on.
  struct UntilReturn {
    DrainCalls& calls;
    Section& section;
    mutable bool returned = false;
    ~UntilReturn() {
      if (!returned) calls.thread_ends(section);
    }
  };
  void thread_ends(Section& section) noexcept {
    std::uint32_t inside = Section::inside;
    if (!section.state.compare_exchange_strong(inside, Section::idle, std::memory_order_acq_rel)) {
      section.state.store(Section::returned, std::memory_order_release);
      engine_.drain_bell.ring();
      return;
    }
    // Without a successor nobody goes on: the signal thread ends the process in time.
    if (!has_standby_ && (is_last_thread() || !start_next_(start_next_context_))) return;
    engine_.standbys.store(driver_ + 1, std::memory_order_release);
    thread_ended_ = true;
    // Unless drain() has returned without this thread meanwhile: then nobody goes on.
    std::uint32_t mine = driver_;
    engine_.current_driver.compare_exchange_strong(mine, driver_ + 1, std::memory_order_acq_rel);
    futex_wake_all(&engine_.current_driver);
  }

  static Section::Kind kind_of(DrainCall call) noexcept {
    switch (call) {
      case DrainCall::callback:
      case DrainCall::stop:
      case DrainCall::drained: return Section::Kind::hook;
      case DrainCall::flush: return Section::Kind::flush;
      case DrainCall::observer:
      case DrainCall::naming:
      case DrainCall::nothing: break;
    }
    return Section::Kind::observer;
  }

  EngineState& engine_;
  DrainCall calling_ = DrainCall::nothing;
  bool knows_of_abort_ = false;
  bool thread_ended_ = false;  // by itself, in what it was calling
  std::uint32_t driver_ = 0;
  bool has_standby_ = false;
  bool (*start_next_)(void*) noexcept = nullptr;
  void* start_next_context_ = nullptr;
};

}  // namespace lastcall::detail
