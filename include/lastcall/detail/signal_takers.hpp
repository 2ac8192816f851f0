// Threads that do nothing but take signals for which the program had a handler before.
//
// That handler is called on (I8 of <lastcall/signal_trap.hpp>), on whatever thread takes the signal, and may hang
// there. If all of the program's own threads block the signal, or hang in it already, only a thread of the
// library's is left to take it; and the one that keeps the clock must not be it.
#pragma once

#include <lastcall/detail/engine_state.hpp>
#include <lastcall/detail/posix.hpp>
#include <lastcall/detail/signal_core.hpp>
#include <lastcall/detail/signal_numbers.hpp>
#include <lastcall/detail/thread.hpp>
#include <lastcall/detail/throw_system_error.hpp>

#include <pthread.h>

#include <atomic>
#include <memory>

namespace lastcall::detail {

/// Whether a trap of the number calls on a handler that is there now: somebody else's, or another copy's of this
/// library.
inline bool has_handler_beneath(int number) noexcept {
  const SignalRegistryLock lock;
  const struct sigaction now = current_disposition(number);
  const int index = layer_of(now);
  if (index < 0) return is_function(now);
  const KeptDisposition* previous =
      signal_registry.layers[index][number].previous.load(std::memory_order_relaxed);
  return previous != nullptr && is_function(previous->action);
}

class SignalTakers {
 public:
  /// One for each wish of one user's that changes something: the shutdown, the end of the delay, the abort, the
  /// exit by force. So many handlers may hang, and the next signal is still taken.
  static constexpr int most = 4;

  SignalTakers() = default;
  SignalTakers(const SignalTakers&) = delete;
  SignalTakers& operator=(const SignalTakers&) = delete;
  ~SignalTakers() { stop(Clock::now() + std::chrono::milliseconds(10), false); }

  /// Starts the threads, if they don't run yet. The caller has all signals blocked. Throws std::bad_alloc or
  /// std::system_error, and then none runs.
  void start() {
    if (state_) return;
    state_ = std::make_shared<State>();
    while (started_ < most) {
      auto keep = std::make_unique<std::shared_ptr<State>>(state_);
      const int error = start_thread(threads_[started_], &main, keep.get());
      if (error != 0) {
        stop(Clock::time_point::max(), false);
        throw_system_error(error, "starting the threads that take signals");
      }
      static_cast<void>(keep.release());
      ++started_;
    }
  }

  /// From now on they take this one, too. After start().
  void take(int number) noexcept {
    // release: nothing that the threads need goes with it, but the ringing is to come after it.
    state_->wanted[number].store(true, std::memory_order_release);
    state_->bell.ring();
  }

  /// Ends those that don't hang, and forgets the others. With `leave_alone` nobody is waited for: they end
  /// by themselves.
  void stop(Clock::time_point patience, bool leave_alone) noexcept {
    if (!state_) return;
    state_->quit.store(true, std::memory_order_release);
    state_->bell.ring();
    if (leave_alone) return;
    for (; started_ > 0; --started_) {
      if (!join_until(threads_[started_ - 1], patience)) ::pthread_detach(threads_[started_ - 1]);
    }
    state_.reset();
  }

 private:
  // Theirs and the owner's: one that hangs may outlive it.
  struct State {
    std::atomic<bool> wanted[signal_limit]{};
    std::atomic<bool> quit{false};
    Bell bell;
  };

  static void* main(void* given) {
    name_this_thread("lastcall-take");
    const std::unique_ptr<std::shared_ptr<State>> keep(static_cast<std::shared_ptr<State>*>(given));
    State& state = **keep;
    for (;;) {
      const std::uint32_t rung = state.bell.seen();
      for (int number = 1; number < signal_limit; ++number) {
        if (state.wanted[number].load(std::memory_order_acquire)) unblock(&number, 1);
      }
      if (state.quit.load(std::memory_order_acquire)) return nullptr;
      state.bell.wait(rung, Clock::time_point::max());
    }
  }

  std::shared_ptr<State> state_;
  pthread_t threads_[most]{};
  int started_ = 0;
};

}  // namespace lastcall::detail
