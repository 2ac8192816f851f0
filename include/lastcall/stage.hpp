// A stage of a shutdown: tasks, guards and hooks that stop together, after the stages before.
//
// The order inside a stage: its token is cancelled, its callbacks run, its on_stop hooks run in the
// order registered, its group is closed and waited for, its on_drained hooks run, newest first. All of
// that has the stage's budget. Past it the stage is written down (`overran`), its on_drained hooks are
// skipped, since somebody may still use what they release, and the next stage begins.
#pragma once

#include <lastcall/cancellation.hpp>
#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/task_core.hpp>
#include <lastcall/wait_group.hpp>

#include <atomic>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <utility>

namespace lastcall {

class Stage;

namespace detail {

struct EngineState;
class EngineDrain;

// What a stage tells its coordinator.
struct StageHost {
  virtual void task_admitted(Stage& stage) noexcept = 0;
  virtual void task_withdrawn(Stage& stage) noexcept = 0;
  virtual void task_failed(Stage& stage, const Failure& failure) noexcept = 0;
  virtual void task_ended(Stage& stage, const TaskReport& task) noexcept = 0;
  /// Runs an on_stop hook that came late, on the caller's thread.
  virtual void run_late_stop(Stage& stage, const std::string& name,
                             const std::function<void()>& hook) = 0;

 protected:
  ~StageHost() = default;
};

struct Hook {
  std::string name;
  std::function<void()> run;
};

}  // namespace detail

/// One stage. Made by ShutdownCoordinator::stage(), lives as long as the coordinator. All members are
/// thread-safe.
class Stage {
 public:
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;
  ~Stage() = default;

  /// What reports call it.
  const std::string& name() const noexcept { return name_; }

  /// Cancelled when this stage's turn to stop has come, or at the abort.
  CancellationToken token() const noexcept { return source_.token(); }

  /// Runs f(CancellationToken) or f() on a new thread of that name (the kernel keeps 15 bytes), as a
  /// member of this stage. False, and f never runs, once the stage is closed. What f throws requests
  /// shutdown with Cause::failure. Throws std::system_error (EAGAIN) if there is no thread to be had.
  template <class F>
  bool spawn(std::string name, F f, SourceLocation where = SourceLocation::current()) {
    return tasks_->spawn(std::move(name), std::move(f), where);
  }

  /// For your own executor: a callable that runs f, and is a member until it has run or its last copy
  /// is gone. Refused once closed: false in a condition, and calling it does nothing.
  template <class F>
  auto wrap(std::string name, F f, SourceLocation where = SourceLocation::current()) {
    return tasks_->wrap(std::move(name), std::move(f), where);
  }

  /// One piece of work in flight; std::logic_error once closed. See WaitGroup for these four.
  WaitGroup::Guard enter() { return group().enter(); }
  WaitGroup::Guard enter(std::string name, SourceLocation where = SourceLocation::current()) {
    return group().enter(std::move(name), where);
  }
  WaitGroup::Guard try_enter() noexcept { return group().try_enter(); }
  WaitGroup::Guard try_enter(std::string name, SourceLocation where = SourceLocation::current()) {
    return group().try_enter(std::move(name), where);
  }

  /// Runs when the token is cancelled, after its callbacks, in the order registered, on the drain
  /// thread: ends what blocks (server.stop()). Registered later, it runs at once on the caller. An
  /// empty function: std::invalid_argument.
  void on_stop(std::string name, std::function<void()> hook) {
    check(name, hook, "on_stop");
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!source_.is_cancelled()) {
        stops_.push_back({std::move(name), std::move(hook)});
        return;
      }
    }
    host_.run_late_stop(*this, name, hook);
  }

  /// Runs after the last member has left, newest first, on the drain thread: releases what they used.
  /// Once that has begun: std::logic_error.
  void on_drained(std::string name, std::function<void()> hook) {
    check(name, hook, "on_drained");
    const std::lock_guard<std::mutex> lock(mutex_);
    if (drained_closed_) {
      detail::throw_logic_error("on_drained('" + name + "'): stage '" + name_ +
                                "' has been drained already");
    }
    drained_.push_back({std::move(name), std::move(hook)});
  }

 private:
  friend struct detail::EngineState;
  friend class detail::EngineDrain;

  Stage(std::string name, Clock::duration budget, detail::StageHost& host)
      : name_(std::move(name)), budget_(budget), host_(host) {
    detail::TaskHooks hooks;
    hooks.context = this;
    hooks.admitted = [](void* self) noexcept { at(self).host_.task_admitted(at(self)); };
    hooks.withdrawn = [](void* self) noexcept { at(self).host_.task_withdrawn(at(self)); };
    hooks.failed = [](void* self, const Failure& failure) noexcept {
      at(self).host_.task_failed(at(self), failure);
    };
    hooks.ended = [](void* self, const detail::TaskReport& task) noexcept {
      at(self).host_.task_ended(at(self), task);
    };
    tasks_ = detail::Ref<detail::TaskCore>::adopt(new detail::TaskCore(source_.token(), hooks));
  }

  static Stage& at(void* self) noexcept { return *static_cast<Stage*>(self); }
  WaitGroup& group() const noexcept { return tasks_->group(); }

  template <class Function>
  static void check(const std::string& name, const Function& hook, const char* what) {
    if (!hook) {
      detail::throw_invalid_argument(std::string(what) + "('" + name + "'): the function is empty");
    }
  }

  // For the coordinator's threads.
  detail::Node* node() noexcept { return detail::TreeAccess::node_of(source_); }
  detail::CancelWork& work() noexcept { return work_; }
  Stage* next() const noexcept {
    Stage* const next = next_.load(std::memory_order_acquire);
    return next == this ? nullptr : next;
  }
  // A stage is linked, or the last one is closed by linking it to itself, once and for all: of who makes a stage
  // and the drain thread, which comes to the end of the list, one is the first.
  bool link_next(Stage* next) noexcept {
    Stage* none = nullptr;
    // release: who sees the stage sees what it was made of. acquire: as in next().
    return next_.compare_exchange_strong(none, next, std::memory_order_acq_rel);
  }
  Stage* next_or_close() noexcept { return link_next(this) ? nullptr : next(); }

  const std::string name_;
  const Clock::duration budget_;  // of the first stage: what the others leave, found when it begins
  detail::StageHost& host_;
  CancellationSource source_;
  detail::Ref<detail::TaskCore> tasks_;
  std::atomic<Stage*> next_{nullptr};

  // Marked and woken, callbacks still to run. Written by who marks, then by the drain thread.
  detail::CancelWork work_;
  std::atomic<bool> mark_wanted_{false};  // its turn has come
  std::atomic<bool> marking_{false};      // somebody is at it
  std::atomic<bool> work_ready_{false};

  std::mutex mutex_;  // guards the hooks; never held in one
  std::deque<detail::Hook> stops_;
  std::deque<detail::Hook> drained_;
  bool drained_closed_ = false;

  // The drain thread's own.
  std::size_t stops_taken_ = 0;
  std::size_t drained_taken_ = 0;
  Clock::time_point begun_{};
  Clock::time_point deadline_{};
  bool overran_ = false;
  bool still_used_ = false;  // what on_drained releases: by a member or hook that was left behind
};

}  // namespace lastcall
