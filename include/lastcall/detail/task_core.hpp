// What a TaskGroup and a stage of the coordinator have in common: a group, the threads that were
// spawned into it, and what went wrong in them.
//
// Invariants:
//
//  1. A task is a member from before spawn() or wrap() returns until its function has been destroyed
//     and its hooks have been told. Then it leaves, as the last thing that it does with the group.
//  2. Entering holds enter_mutex_, leaving doesn't. So under enter_mutex_ a count of zero is exact: the
//     group can be closed at zero, and whoever comes meanwhile was either waited for or is refused.
//  3. A thread puts itself into the list of finished ones before it leaves. So who has waited for the
//     group finds there every thread that is left to join.
//  4. Neither mutex_ nor enter_mutex_ is held while anything of the user's runs; mutex_ is not held
//     over an allocation either.
//  5. Tasks hold references: a core outlives every member, also one that outlives whoever made the core.
#pragma once

#include <lastcall/detail/futex.hpp>
#include <lastcall/detail/task.hpp>
#include <lastcall/detail/thread.hpp>
#include <lastcall/detail/thread_end.hpp>
#include <lastcall/detail/thread_id.hpp>
#include <lastcall/detail/throw_system_error.hpp>

#include <unistd.h>

#include <ctime>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lastcall::detail {

/// Who is told what becomes of the tasks. Null functions are not called. All are called with no lock
/// held; all that happen before a task has left have returned when the group is at zero.
struct TaskHooks {
  /// Also what TaskScope::of() takes. Must live until the last task has left.
  void* context = nullptr;
  /// On the spawner's thread, before there is a thread for it. Only for spawn().
  void (*admitted)(void* context) noexcept = nullptr;
  /// On the spawner's thread: it was admitted, but there was no thread to be had.
  void (*withdrawn)(void* context) noexcept = nullptr;
  /// On the task's thread.
  void (*begun)(void* context, const TaskReport& task) noexcept = nullptr;
  /// On the task's thread, after its failure stands in the list. May run users' cancellation callbacks.
  void (*failed)(void* context, const Failure& failure) noexcept = nullptr;
  /// On the task's thread, when its function has been destroyed, before it leaves the group.
  void (*ended)(void* context, const TaskReport& task) noexcept = nullptr;
};

/// The cause of a shutdown or a cancel that a task's failure brings about: "task 'x': what()".
inline Cause cause_of(const Failure& failure) noexcept {
  LASTCALL_TRY {
    return Cause::failure(failure.error,
                          "task '" + failure.task + "': " + describe_exception(failure.error));
  }
  LASTCALL_CATCH(...) {}
  return CauseAccess::share(record_of(CommonCause::untold_failure));
}

/// For what can neither be done nor reported: says so on stderr and terminates. Allocates nothing.
[[noreturn]] inline void terminate_because(std::string_view what, std::string_view task) noexcept {
  for (const std::string_view part :
       {std::string_view("lastcall: "), what, std::string_view(" '"), task,
        std::string_view("', for which it would have to wait\n")}) {
    static_cast<void>(::write(STDERR_FILENO, part.data(), part.size()) < 0);
  }
  std::terminate();
}

class TaskCore final : public Counted {
 public:
  TaskCore(CancellationToken token, const TaskHooks& hooks)
      : token_(std::move(token)), hooks_(hooks) {
#if LASTCALL_EXCEPTIONS
    foreign_exception();  // made here: there may be no memory when a task throws one
#endif
  }
  ~TaskCore() {
    abandon();
    while (failures_ != nullptr) delete std::exchange(failures_, failures_->next);
  }

  /// What tasks are given.
  const CancellationToken& token() const noexcept { return token_; }
  const void* owner() const noexcept { return hooks_.context; }
  /// Enter it, close it, wait for it, as you like: but a TaskGroup's is closed by wait_and_close().
  WaitGroup& group() noexcept { return group_; }

  /// Runs f(token) or f() on a new thread. False, and f is destroyed, if the group is closed. Throws
  /// std::system_error (EAGAIN) if there is no thread to be had, or std::bad_alloc: nobody has entered.
  template <class F>
  bool spawn(std::string name, F f, SourceLocation where) {
    static_assert(is_task_function<F>, "a task is called as f(CancellationToken) or f()");
    reap();
    if (group_.is_closed()) return false;
    auto task = std::make_unique<WithFunction<SpawnedTask, F>>(
        std::move(f), Ref<TaskCore>::share(this), std::move(name), where, true);
    if (!task->enter()) return false;
    launch(std::move(task));
    return true;
  }

  /// A callable that runs f on whatever thread calls it. May throw std::bad_alloc: nobody has entered.
  template <class F>
  WrappedCall<F> wrap(std::string name, F f, SourceLocation where) {
    static_assert(is_task_function<F>, "a task is called as f(CancellationToken) or f()");
    if (group_.is_closed()) return {};
    auto task = Ref<WrappedTask>::adopt(new WithFunction<WrappedTask, F>(
        std::move(f), Ref<TaskCore>::share(this), std::move(name), where, false));
    if (!task->enter()) return {};
    return WrappedCall<F>(std::move(task));
  }

  /// Waits until nobody is left, and closes the group at that very moment.
  void wait_and_close() {
    for (;;) {
      group_.wait();
      const std::lock_guard<std::mutex> lock(enter_mutex_);
      if (group_.count() != 0) continue;  // somebody came in between
      group_.close();
      break;
    }
    group_.wait();  // at zero for good; this is for what the last ones did before they left
  }

  /// Joins every finished thread. Waits for their thread_local destructors too.
  void join_finished() noexcept {
    const NoThreadCancellation whole;
    const std::lock_guard<std::mutex> joining(join_mutex_);
    while (SpawnedTask* const task = take_finished()) {
      if (::pthread_equal(task->thread_, ::pthread_self()) != 0) {
        ::pthread_detach(task->thread_);
      } else {
        ::pthread_join(task->thread_, nullptr);
      }
      delete task;
    }
  }

  /// Joins the finished threads that are gone by `deadline`. False if some are left, whose thread_local
  /// destructors hang: try again, or abandon() them.
  bool join_finished_until(Clock::time_point deadline) noexcept {
    std::unique_lock<std::mutex> joining(join_mutex_, std::defer_lock);
    // Who has it frees, which may hang.
    if (!try_until(deadline, [&joining] { return joining.try_lock(); })) return false;
    SpawnedTask* late = nullptr;
    while (SpawnedTask* const task = take_finished()) {
      if (joined_by(*task, deadline)) {
        delete task;
      } else {
        task->next_ = late;
        late = task;
      }
    }
    const bool all = late == nullptr;
    while (late != nullptr) put_finished(*std::exchange(late, late->next_));
    return all;
  }

  /// Nobody will join any more: finished threads, and those that finish later, look after themselves.
  void abandon() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    abandoned_ = true;
    while (SpawnedTask* const task = take_finished_locked()) {
      ::pthread_detach(task->thread_);
      task->abandoned_ = true;
      if (task->gone_.load(std::memory_order_acquire) != 0) delete task;
    }
  }

  /// The same for a caller whom the allocator must not hold up: frees nothing, and joins nobody. The threads that
  /// have finished stay as they are, and the core, which must live for ever, has them.
  void forsake() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    abandoned_ = true;
    while (SpawnedTask* const task = take_finished_locked()) {
      // Not one that is over: with its stack goes what the C library has allocated for it.
      if (task->gone_.load(std::memory_order_acquire) == 0) ::pthread_detach(task->thread_);
      task->next_ = std::exchange(forsaken_, task);
    }
  }

  /// Every failure so far, in the order they happened.
  std::vector<Failure> failures() const {
    std::size_t count = 0;
    const FailureNode* node = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      count = failure_count_;
      node = failures_;
    }
    // The list only grows at its end: what was there stays as it is.
    std::vector<Failure> out;
    out.reserve(count);
    for (; count > 0; --count) {
      out.push_back(node->failure);
      if (count > 1) node = node->next;
    }
    return out;
  }

  /// The first failure, or null. Lives as long as the core.
  const Failure* first_failure() const noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    return failures_ == nullptr ? nullptr : &failures_->failure;
  }

 private:
  friend class Task;
  friend class SpawnedTask;

  WaitGroup::Guard admit(std::string name, SourceLocation where) {
    const std::lock_guard<std::mutex> lock(enter_mutex_);
    return group_.try_enter(std::move(name), where);
  }

  void launch(std::unique_ptr<SpawnedTask> task) {
    if (hooks_.admitted != nullptr) hooks_.admitted(hooks_.context);
    const int error = task->start();
    if (error == 0) {
      static_cast<void>(task.release());  // the thread has it, and may be through with it
      return;
    }
    if (hooks_.withdrawn != nullptr) hooks_.withdrawn(hooks_.context);
    const std::string doing = "starting a thread for task '" + task->name() + "'";
    task.reset();  // it has left before the caller knows
    throw_system_error(error, doing);
  }

  // In a handler: makes a Failure of the exception, unless it is none.
  LASTCALL_NO_NULL_CHECK void caught(Task& task) {
#if LASTCALL_EXCEPTIONS
    let_thread_end();
    try {
      throw;
    }
#if defined(__GLIBCXX__)
    // pthread_exit() and pthread_cancel() unwind the stack by it; glibc ends a process that stops it.
    catch (abi::__forced_unwind&) {
      throw;
    }
#endif
    catch (const OperationCancelled&) {
      if (token_.is_cancelled()) return;  // it did as it was told
    } catch (...) {
    }
    add_failure(task, what_is_handled());
#else
    static_cast<void>(task);
#endif
  }

  void add_failure(Task& task, std::exception_ptr error) noexcept {
    const NoThreadCancellation whole;
    FailureNode* node = task.node_;
    if (std::exchange(task.failed_, true)) {
      // It threw, and then so did the destructor of what it captured: the one case that allocates.
      node = new (std::nothrow) FailureNode;
      if (node == nullptr) return;
      LASTCALL_TRY { node->failure.task = task.name(); }
      LASTCALL_CATCH(...) {}
    }
    node->failure.error = std::move(error);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      *failures_end_ = node;
      failures_end_ = &node->next;
      ++failure_count_;
    }
    if (hooks_.failed != nullptr) hooks_.failed(hooks_.context, node->failure);
  }

  // ---- finished threads ----

  SpawnedTask* take_finished_locked() noexcept {
    SpawnedTask* const task = finished_;
    if (task != nullptr) {
      finished_ = task->next_;
      if (finished_ == nullptr) finished_end_ = &finished_;
    }
    return task;
  }
  SpawnedTask* take_finished() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    return take_finished_locked();
  }
  void put_finished(SpawnedTask& task) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    put_finished_locked(task);
  }
  void put_finished_locked(SpawnedTask& task) noexcept {
    if (abandoned_) {
      ::pthread_detach(task.thread_);
      task.abandoned_ = true;
      if (task.gone_.load(std::memory_order_acquire) != 0) delete &task;
      return;
    }
    task.next_ = nullptr;
    *finished_end_ = &task;
    finished_end_ = &task.next_;
  }

  // The last two steps of a thread, around its leaving the group.
  void retire(SpawnedTask& task) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    task.thread_ = ::pthread_self();
    put_finished_locked(task);
  }
  void depart(SpawnedTask& task) noexcept {
    Word* const gone = &task.gone_;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (task.abandoned_) {
        delete &task;
        return;
      }
      gone->store(1, std::memory_order_release);
    }
    futex_wake_all(gone);  // by address: the task may have been joined and deleted
  }

  // A few per spawn, so that a group that lives for ever doesn't gather dead threads.
  void reap() noexcept {
    const std::unique_lock<std::mutex> joining(join_mutex_, std::try_to_lock);
    if (!joining) return;
    for (int turn = 0; turn < 4; ++turn) {
      SpawnedTask* const task = take_finished();
      if (task == nullptr) return;
      if (task->gone_.load(std::memory_order_acquire) != 0 && join_if_gone(task->thread_)) {
        delete task;
      } else {
        put_finished(*task);
      }
    }
  }

  static bool joined_by(SpawnedTask& task, Clock::time_point deadline) noexcept {
    while (task.gone_.load(std::memory_order_acquire) == 0) {
      if (!futex_wait_until(task.gone_, 0, deadline) && Clock::now() >= deadline) return false;
    }
    // From here to its very end are microseconds, but for destructors of thread_local objects.
    return join_until(task.thread_, deadline);
  }

  WaitGroup group_;
  const CancellationToken token_;
  const TaskHooks hooks_;
  std::mutex enter_mutex_;  // before mutex_, should anybody ever need both
  std::mutex join_mutex_;   // held while joining; before mutex_
  mutable std::mutex mutex_;
  FailureNode* failures_ = nullptr;
  FailureNode** failures_end_ = &failures_;
  std::size_t failure_count_ = 0;
  SpawnedTask* finished_ = nullptr;
  SpawnedTask** finished_end_ = &finished_;
  SpawnedTask* forsaken_ = nullptr;  // so that leak checkers find them
  bool abandoned_ = false;
};

// ---- Task ----

inline Task::Task(Ref<TaskCore> core, std::string name, SourceLocation where, bool spawned)
    : core_(std::move(core)),
      node_(new FailureNode{{std::move(name), nullptr}}),
      where_(where),
      spawned_(spawned) {}

inline Task::~Task() {
  if (!failed_) delete node_;
}

inline bool Task::enter() {
  guard_ = core_->admit(name(), where_);
  return static_cast<bool>(guard_);
}

inline TaskReport Task::report() const noexcept {
  return {name(), where_, spawned_, thread_id_, begin_, end_, failed_ ? &node_->failure : nullptr};
}

inline void Task::run() {
  const TaskScope scope(core_->owner(), name());
  thread_id_ = current_thread_id();
  WaitGroupAccess::set_thread(guard_, thread_id_);
  begin_ = end_ = Clock::now();
  begun_ = true;
  if (core_->hooks_.begun != nullptr) {
    const NoThreadCancellation whole;
    core_->hooks_.begun(core_->hooks_.context, report());
  }
  LASTCALL_TRY { call(core_->token()); }
  LASTCALL_CATCH(...) { core_->caught(*this); }
}

inline void Task::end() noexcept {
  const NoThreadCancellation whole;
  const TaskScope scope(core_->owner(), name());
  LASTCALL_TRY { drop_function(); }
  LASTCALL_CATCH(...) { core_->caught(*this); }
  if (!begun_) return;
  end_ = Clock::now();
  if (core_->hooks_.ended != nullptr) core_->hooks_.ended(core_->hooks_.context, report());
}

// ---- SpawnedTask ----

inline int SpawnedTask::start() noexcept {
  exit_key();          // made here, so that the thread finds it
  pthread_t unused{};  // the thread knows itself, and may be gone before this returns
  return start_thread(unused, &SpawnedTask::thread_main, this);
}

inline void* SpawnedTask::thread_main(void* self) {
  auto* const task = static_cast<SpawnedTask*>(self);
  const ExitKey& key = exit_key();
  if (key.usable) ::pthread_setspecific(key.key, task);
  name_this_thread(task->name());
  task->run();
  if (key.usable) ::pthread_setspecific(key.key, nullptr);
  conclude(task);
  return nullptr;
}

inline void SpawnedTask::thread_exit(void* task) noexcept {
  TaskScope::forget_all();
  conclude(static_cast<SpawnedTask*>(task));
}

inline void SpawnedTask::conclude(SpawnedTask* task) noexcept {
  const NoThreadCancellation whole;
  task->end();
  WaitGroup::Guard guard = std::move(task->guard_);
  const Ref<TaskCore> core = std::move(task->core_);
  core->retire(*task);
  guard.release();
  core->depart(*task);
}

// ---- WrappedTask ----

inline void WrappedTask::run_once() {
  // acq_rel: one caller gets it, and sees the function as wrap() left it.
  if (claimed_.exchange(true, std::memory_order_acq_rel)) return;
  // A destructor, so that it leaves also when pthread_exit() unwinds the thread from inside it.
  struct Leave {
    WrappedTask* task;
    ~Leave() {
      task->end();
      const NoThreadCancellation whole;
      task->guard_.release();
    }
  };
  const Leave leave{this};
  run();
}

inline void WrappedTask::last_ref_gone() noexcept {
  if (!claimed_.load(std::memory_order_acquire)) end();
}

}  // namespace lastcall::detail
