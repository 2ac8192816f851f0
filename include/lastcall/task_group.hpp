// A group of tasks: Go's errgroup, with names, and with failures that don't end the process.
//
//   lastcall::TaskGroup group(parent_token);
//   group.spawn("fetch", [](lastcall::CancellationToken stop) { fetch_all(stop); });
//   group.spawn("index", [] { build_index(); });
//   group.wait();  // until both have left; rethrows what the first to fail has thrown
//
// A task is a member of the group from its spawn() until its function, with all that it captured, has
// been destroyed. One that throws cancels the token of the others (OnFailure::cancel_group).
#pragma once

#include <lastcall/cancellation.hpp>
#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/failure.hpp>  // Failure
#include <lastcall/detail/source_location.hpp>
#include <lastcall/detail/task_core.hpp>
#include <lastcall/wait_group.hpp>

#include <exception>
#include <string>
#include <utility>
#include <vector>

namespace lastcall {

/// What a task's failure means to the other tasks of its group.
enum class OnFailure {
  cancel_group,  ///< the group's token is cancelled with Cause::failure
  keep_going,    ///< nothing; the failure is kept
};

/// Owns threads, or memberships of other people's, that end together. All members but the constructor
/// and the destructor may be called from any thread, also from the group's own tasks; wait() may not.
class TaskGroup {
 public:
  /// Its token is cancelled with `parent`, at the latest. May throw std::bad_alloc.
  explicit TaskGroup(CancellationToken parent = {}, OnFailure on_failure = OnFailure::cancel_group)
      : source_(parent),
        on_failure_(on_failure),
        core_(detail::Ref<detail::TaskCore>::adopt(
            new detail::TaskCore(source_.token(), hooks(this)))) {}
  TaskGroup(const TaskGroup&) = delete;
  TaskGroup& operator=(const TaskGroup&) = delete;

  /// Cancels, waits until every task has left, joins their threads. Failures that nobody asked for are
  /// dropped. Destroyed by one of its own tasks, which it would wait for, it terminates with a message.
  ~TaskGroup() {
    if (const detail::TaskScope* const scope = detail::TaskScope::of(this)) {
      detail::terminate_because("a TaskGroup was destroyed by its own task", scope->name());
    }
    source_.cancel();
    core_->wait_and_close();
    core_->join_finished();
  }

  /// Runs f(CancellationToken), or f(), on a new thread that is named by the first 15 bytes of `name`
  /// and has the signal mask of this one. f is moved to where it runs, and destroyed there before the
  /// task leaves. After cancel() it still runs, with a token that is cancelled from the start.
  ///
  /// False once the group is closed: f never runs, and has been destroyed. Throws std::system_error
  /// (EAGAIN) when there is no thread to be had, or std::bad_alloc: then nobody has entered.
  /// Cost: a thread, and three small allocations.
  template <class F>
  bool spawn(std::string name, F f, SourceLocation where = SourceLocation::current()) {
    return core_->spawn(std::move(name), std::move(f), where);
  }

  /// The same on a thread of your own: returns a callable, copyable if F is, to hand to any executor.
  /// It is a member of the group until it has been called, or until its last copy is destroyed; copies
  /// share the one membership, and only the first call runs f. What f throws is kept as a Failure and
  /// doesn't come out of the call.
  ///
  /// Once the group is closed the callable is false in a condition, and calling it does nothing. May
  /// throw std::bad_alloc: then nobody has entered.
  template <class F>
  auto wrap(std::string name, F f, SourceLocation where = SourceLocation::current()) {
    return core_->wrap(std::move(name), std::move(f), where);
  }

  /// What the tasks are given.
  CancellationToken token() const noexcept { return core_->token(); }

  /// Cancels the token. True for the call that did it. Tasks may still be spawned.
  bool cancel(Cause cause = Cause::cancelled()) noexcept {
    return source_.cancel(std::move(cause));
  }

  /// Waits until every task has left, also those that tasks have spawned meanwhile, and joins their
  /// threads. The group is closed then. Rethrows the first failure, each time it is called. Throws
  /// std::logic_error from inside a task of this group, which would wait for itself.
  void wait() {
    if (const detail::TaskScope* const scope = detail::TaskScope::of(this)) {
      detail::throw_logic_error("TaskGroup::wait: called by the group's own task '" +
                                std::string(scope->name()) + "', which would wait for itself");
    }
    core_->wait_and_close();
    core_->join_finished();
    if (const Failure* const first = core_->first_failure()) std::rethrow_exception(first->error);
  }

  /// Waits until every task has left (true), or for the time given (false). Neither closes the group
  /// nor rethrows anything.
  template <class Rep, class Period>
  bool wait_for(std::chrono::duration<Rep, Period> duration) {
    return core_->group().wait_for(duration);
  }

  /// Every failure so far, in the order they happened.
  std::vector<Failure> failures() const { return core_->failures(); }

 private:
  static detail::TaskHooks hooks(TaskGroup* group) noexcept {
    detail::TaskHooks hooks;
    hooks.context = group;
    hooks.failed = &TaskGroup::on_task_failed;
    return hooks;
  }

  static void on_task_failed(void* group, const Failure&) noexcept {
    auto* const self = static_cast<TaskGroup*>(group);
    if (self->on_failure_ == OnFailure::keep_going) return;
    // The first one's, also when two fail at once: the cause is what wait() rethrows.
    self->source_.cancel(detail::cause_of(*self->core_->first_failure()));
  }

  CancellationSource source_;
  const OnFailure on_failure_;
  detail::Ref<detail::TaskCore> core_;
};

}  // namespace lastcall
