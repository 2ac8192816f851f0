// Ends a process well: the signal comes, new work stops, work in flight finishes, everything is
// released in order, and the process exits with the right code, on time, whatever user code does.
//
//   int main() {
//     lastcall::ShutdownCoordinator lifetime;
//     lifetime.spawn("worker", [](lastcall::CancellationToken token) {
//       while (!token.is_cancelled()) work();
//     });
//     lifetime.run();
//   }
//
// Two threads, two trusts. One waits for signals, marks the tree and keeps the clock; it runs no user
// code, takes no lock that user code can hold, allocates nothing, and can always end the process. The
// other runs what users wrote: callbacks, hooks, observers; when it hangs there past its time it is
// abandoned, and a successor goes on. Both sleep until something happens.
//
// How the time is shared. The grace period is: the announce delay, the budgets of the stages one after
// the other, and the abort margin, in which whoever is still in is told by abort_token(). What a stage
// does not use is nobody's: the next one begins at once. When an abort moves the end closer, or stages
// began late, those that are left share what there is in proportion to their budgets, so the last ones
// always get their turn. A hook that comes after one that ate its stage's budget still gets a moment:
// an eighth of what is left, 5 to 100 ms. The last twentieth of the grace period, 200 ms at most, is for
// naming those who are still in and for the flush. Whatever the drain does, the signal thread ends the
// process 20 ms after the end of the grace period.
#pragma once

#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/engine.hpp>
#include <lastcall/detail/shutdown_options.hpp>
#include <lastcall/observer.hpp>
#include <lastcall/shutdown_report.hpp>
#include <lastcall/stage.hpp>

#include <unistd.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lastcall {

/// Sees a process to its end. One at a time in a process. All members are thread-safe.
class ShutdownCoordinator {
 public:
  /// Traps the signals and starts two threads that sleep. Throws std::logic_error if there is another
  /// one, or if a SignalIgnore holds one of the signals; std::invalid_argument for negative times, an
  /// announce delay that is not below the grace period, or signals that can't be trapped;
  /// std::system_error if descriptors or threads have run out. Nothing has changed then.
  explicit ShutdownCoordinator(ShutdownOptions options = {}) {
    check(options);
    const OnlyOne claim;
    engine_ = std::make_shared<detail::Engine>(std::move(options));
    engine_->start();
    claim.keep();
  }
  ShutdownCoordinator(const ShutdownCoordinator&) = delete;
  ShutdownCoordinator& operator=(const ShutdownCoordinator&) = delete;

  /// If nobody asked, asks ("coordinator destroyed") and drains as drain() does; then puts every
  /// disposition back. Never throws, never exits the process. After an overrun it neither joins nor
  /// terminates: what stragglers use outlives it. Stragglers that the observer could not be told of
  /// are named on options.last_words.
  ///
  /// From inside one of its own tasks, hooks, callbacks, observers or on_signal functions, which it would have to
  /// wait for, it asks and returns at once. The drain goes on without it, and nothing exits the process; a thread
  /// of the library's puts the dispositions back at the drain's end, and only then there may be another
  /// coordinator. What the engine holds, with hooks and observer, is kept for as long as the process lives.
  ~ShutdownCoordinator() {
    if (state().owner != ::getpid()) {
      engine_->keep_for_ever();  // the child of a fork: the threads are the parent's
      return;
    }
    if (detail::TaskScope::of(&state()) != nullptr || in_task()) {
      engine_->run_on_alone(destroyed(), &OnlyOne::release);
      return;
    }
    const detail::NoThreadCancellation whole;
    state().request(destroyed());
    engine_->wait_for_end(detail::Ending::destructor);
    engine_->put_away();
    if (engine_->is_in_use()) engine_->keep_for_ever();
    OnlyOne::release();
    engine_.reset();  // closes descriptors: under `whole`
  }

  /// Take no new work: cancelled after the announce delay.
  CancellationToken token() const noexcept { return first().token(); }
  /// Drop what you are doing: cancelled when time is nearly up, or by a second Ctrl-C.
  CancellationToken abort_token() const noexcept { return state().abort_source.token(); }

  /// How far the shutdown has come.
  Phase phase() const noexcept { return state().phase.load(std::memory_order_acquire); }
  /// For readiness probes: phase() is running.
  bool is_ready() const noexcept { return phase() == Phase::running; }

  /// These are the first stage's: see Stage.
  template <class F>
  bool spawn(std::string name, F f, SourceLocation where = SourceLocation::current()) {
    return first().spawn(std::move(name), std::move(f), where);
  }
  template <class F>
  auto wrap(std::string name, F f, SourceLocation where = SourceLocation::current()) {
    return first().wrap(std::move(name), std::move(f), where);
  }
  WaitGroup::Guard enter() { return first().enter(); }
  WaitGroup::Guard enter(std::string name, SourceLocation where = SourceLocation::current()) {
    return first().enter(std::move(name), where);
  }
  WaitGroup::Guard try_enter() noexcept { return first().try_enter(); }
  WaitGroup::Guard try_enter(std::string name, SourceLocation where = SourceLocation::current()) {
    return first().try_enter(std::move(name), where);
  }
  void on_stop(std::string name, std::function<void()> hook) {
    first().on_stop(std::move(name), std::move(hook));
  }
  void on_drained(std::string name, std::function<void()> hook) {
    first().on_drained(std::move(name), std::move(hook));
  }

  /// Calls the function for each signal of that number, on a thread of its own, so that a reload that
  /// hangs can't stop a drain: one that still runs when that is over is left behind, an event "on SIGHUP"
  /// that has begun and overrun, and what it uses has to outlive the coordinator. What it throws is an
  /// event, too, and no failure of the shutdown. Throws std::logic_error for a number that has one already
  /// or is a shutdown signal, and otherwise what the constructor throws.
  void on_signal(int number, std::function<void(const SignalInfo&)> function) {
    engine_->on_signal(number, std::move(function));
  }

  /// Another stage, which stops after those declared before it, in `budget` out of the grace period.
  /// std::invalid_argument if that leaves nothing for the first stage, or the name is taken;
  /// std::logic_error after the request.
  Stage& stage(std::string name, std::chrono::milliseconds budget) {
    detail::EngineState& shared = state();
    const std::lock_guard<std::mutex> lock(shared.stages_mutex);
    if (shared.requested()) refuse_late_stage(name);
    for (const auto& known : shared.stages) {
      if (known->name() == name) {
        detail::throw_invalid_argument("stage('" + name + "'): there is a stage of that name");
      }
    }
    if (budget <= std::chrono::milliseconds::zero()) {
      detail::throw_invalid_argument("stage('" + name + "'): a budget of " +
                                     std::to_string(budget.count()) + " ms");
    }
    const Clock::duration left = shared.budget_of(*shared.first_stage);
    if (detail::EngineState::bounded(budget) >= left) {
      detail::throw_invalid_argument(
          "stage('" + name + "'): a budget of " + std::to_string(budget.count()) +
          " ms leaves nothing for the first stage, which has " +
          std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(left).count()) +
          " ms");
    }
    Stage* const added = shared.append_stage(name, detail::EngineState::bounded(budget));
    if (added == nullptr) refuse_late_stage(name);
    return *added;
  }

  /// Asks for shutdown, as a signal does. True for the first; an empty cause means
  /// Cause::cancelled(). Returns at once; does not allocate.
  bool request_shutdown(Cause cause = Cause::cancelled("requested")) noexcept {
    return state().request(cause);
  }

  /// Who is in now, and where: the same as at the end, at any time. Interrupts the threads for a
  /// moment to take their stacks; some 100 us and more.
  std::vector<Straggler> snapshot() const {
    const detail::NoThreadCancellation whole;
    std::vector<Straggler> all = detail::who_is_in(state());
    detail::ask_kernel(all, detail::deadline_after(std::chrono::milliseconds(200)));
    detail::add_stacks(all, std::chrono::milliseconds(200));
    return all;
  }

  /// Waits for the request, sees it through, and hands the exit over to the caller: from its return on
  /// nothing exits by force and the dispositions are as before. Called again, or by several: the same
  /// report. From a task or hook, or in the child of a fork: std::logic_error. Never returns if somebody
  /// else has called run(), or if it comes when time is up and the process is ending already. If the drain
  /// thread has no report in time (it hangs in the allocator), there is one without it, whose stacks are
  /// module+offset.
  ShutdownReport drain() {
    refuse_inside("drain()");
    engine_->wait_for_end(detail::Ending::drain);
    engine_->put_away();
    return engine_->report();
  }

  /// drain(), flush, std::_Exit(code). After drain() it exits at once with the report's code. From a
  /// task or hook: std::logic_error.
  [[noreturn]] void run() {
    refuse_inside("run()");
    engine_->wait_for_end(detail::Ending::run);
    // The drain thread ends the process then, unless drain() took it over before.
    engine_->put_away();
    detail::exit_after_drain(engine_->state(), engine_->report());
  }

 private:
  [[noreturn]] static void refuse_late_stage(const std::string& name) {
    detail::throw_logic_error("stage('" + name + "'): shutdown has been requested already");
  }

  // The process's one coordinator: claimed while a constructor runs, kept if it succeeds.
  class OnlyOne {
   public:
    OnlyOne() {
      pid_t before = owner().load(std::memory_order_relaxed);
      const pid_t self = ::getpid();
      // A forked child inherits the word, but not the coordinator's threads: it may have its own.
      do {
        if (before == self) {
          detail::throw_logic_error(
              "ShutdownCoordinator: there is one in this process already (pid " +
              std::to_string(self) + ")");
        }
      } while (!owner().compare_exchange_weak(before, self, std::memory_order_acq_rel));
    }
    OnlyOne(const OnlyOne&) = delete;
    OnlyOne& operator=(const OnlyOne&) = delete;
    ~OnlyOne() {
      if (!kept_) release();
    }
    void keep() const noexcept { kept_ = true; }
    static void release() noexcept { owner().store(0, std::memory_order_release); }

   private:
    static std::atomic<pid_t>& owner() noexcept {
      static std::atomic<pid_t> pid{0};
      return pid;
    }
    mutable bool kept_ = false;
  };

  static void check(const ShutdownOptions& options) {
    const auto refuse_negative = [](const char* name, std::chrono::milliseconds value) {
      if (value < std::chrono::milliseconds::zero()) {
        detail::throw_invalid_argument(std::string("ShutdownOptions::") + name +
                                       " is negative: " + std::to_string(value.count()) + " ms");
      }
    };
    refuse_negative("grace_period", options.grace_period);
    refuse_negative("announce_delay", options.announce_delay);
    refuse_negative("abort_margin", options.abort_margin);
    refuse_negative("repeat_window", options.repeat_window);
    if (options.announce_delay >= options.grace_period) {
      detail::throw_invalid_argument("ShutdownOptions::announce_delay (" +
                                     std::to_string(options.announce_delay.count()) +
                                     " ms) must be less than grace_period (" +
                                     std::to_string(options.grace_period.count()) + " ms)");
    }
  }

  // "coordinator destroyed", and no memory asked for: not even for a string of these words.
  static Cause destroyed() noexcept {
    return detail::CauseAccess::share(detail::record_of(detail::CommonCause::destroyed));
  }

  detail::EngineState& state() const noexcept { return engine_->state(); }
  Stage& first() const noexcept { return *state().first_stage; }

  bool in_task() const noexcept {
    for (const Stage* stage = state().first_stage; stage != nullptr;
         stage = detail::EngineState::after(*stage)) {
      if (detail::TaskScope::of(stage) != nullptr) return true;
    }
    return false;
  }
  void refuse_inside(const char* call) const {
    if (state().owner != ::getpid()) {
      detail::throw_logic_error(std::string("ShutdownCoordinator::") + call +
                                " in the child of a fork: the coordinator is process " +
                                std::to_string(state().owner) + "'s");
    }
    if (detail::TaskScope::of(&state()) != nullptr || in_task()) {
      detail::throw_logic_error(std::string("ShutdownCoordinator::") + call + " inside '" +
                                std::string(detail::TaskScope::current()->name()) +
                                "', which it would wait for");
    }
  }

  std::shared_ptr<detail::Engine> engine_;
};

}  // namespace lastcall
