// One task: a function, its membership of a group, and what comes of it. TaskCore runs them.
#pragma once

#include <lastcall/cancellation.hpp>
#include <lastcall/detail/failure.hpp>
#include <lastcall/detail/posix.hpp>
#include <lastcall/detail/ref.hpp>
#include <lastcall/detail/signal_pin.hpp>
#include <lastcall/detail/source_location.hpp>
#include <lastcall/detail/thread.hpp>
#include <lastcall/wait_group.hpp>

#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace lastcall::detail {

class TaskCore;

/// Marks the calling thread as being inside a task (or a hook) of some owner while it lives. They
/// nest. What would wait for its own end can tell, and say so instead of hanging.
class TaskScope {
 public:
  /// Keeps `name` by reference.
  TaskScope(const void* owner, std::string_view name) noexcept
      : owner_(owner), name_(name), outer_(std::exchange(innermost(), this)) {}
  TaskScope(const TaskScope&) = delete;
  TaskScope& operator=(const TaskScope&) = delete;
  ~TaskScope() { innermost() = outer_; }

  std::string_view name() const noexcept { return name_; }

  /// The innermost scope of the calling thread; null outside every task.
  static const TaskScope* current() noexcept { return innermost(); }
  /// The innermost one of this owner, or null.
  static const TaskScope* of(const void* owner) noexcept {
    const TaskScope* scope = innermost();
    while (scope != nullptr && scope->owner_ != owner) scope = scope->outer_;
    return scope;
  }
  /// For a thread that ends without unwinding its stack, where the scopes were.
  static void forget_all() noexcept { innermost() = nullptr; }

 private:
  static const TaskScope*& innermost() noexcept {
    static thread_local const TaskScope* scope = nullptr;
    return scope;
  }

  const void* owner_;
  std::string_view name_;
  const TaskScope* outer_;
};

// A failure in the list of its core. It is made together with its task, under whose name, so that
// nothing has to be allocated when the task throws.
struct FailureNode {
  Failure failure;
  FailureNode* next = nullptr;
};

/// A task as the hooks of its core see it.
struct TaskReport {
  const std::string& name;
  SourceLocation where;  ///< of spawn() or wrap()
  bool spawned;          ///< false: wrapped, for somebody else's thread
  pid_t thread_id;       ///< of the thread that runs it
  Clock::time_point begin;
  Clock::time_point end;   ///< equal to begin until it has ended
  const Failure* failure;  ///< null: it went well
};

/// Whether F can be a task: f(CancellationToken) or f(). Each is asked only if those before it are no: a generic
/// callable that can be called with a token may not even compile without one.
template <class F>
inline constexpr bool is_task_function =
    std::disjunction_v<std::is_invocable<F, CancellationToken>,
                       std::is_invocable<F&, CancellationToken>, std::is_invocable<F>,
                       std::is_invocable<F&>>;

class Task {
 public:
  Task(Ref<TaskCore> core, std::string name, SourceLocation where, bool spawned);
  Task(const Task&) = delete;
  Task& operator=(const Task&) = delete;
  virtual ~Task();

  const std::string& name() const noexcept { return node_->failure.task; }

  /// Becomes a member; false if the group is closed.
  bool enter();
  /// Runs the function on this thread. What it throws becomes a Failure; only the C library's own
  /// unwinding of a thread that ends (pthread_exit) passes through.
  void run();
  /// Destroys the function and tells the hooks. It is a member still: leaving comes after.
  void end() noexcept;

 protected:
  virtual void call(const CancellationToken& token) = 0;
  virtual void drop_function() = 0;

  TaskReport report() const noexcept;

  // In this order: leaving the group comes before letting go of the core that it is in.
  Ref<TaskCore> core_;
  WaitGroup::Guard guard_;

 private:
  friend class TaskCore;

  FailureNode* node_;  // its own, or the core's once it has failed
  SourceLocation where_;
  Clock::time_point begin_{};
  Clock::time_point end_{};
  pid_t thread_id_ = 0;
  const bool spawned_;
  bool failed_ = false;
  bool begun_ = false;
};

// Adds the function to a task, one way or the other (Base: SpawnedTask, WrappedTask).
template <class Base, class F>
class WithFunction final : public Base {
 public:
  template <class... Arguments>
  explicit WithFunction(F&& function, Arguments&&... arguments)
      : Base(std::forward<Arguments>(arguments)...), function_(std::move(function)) {}
  ~WithFunction() noexcept override {
    // Never run, nor ended: it was refused, or there was no thread for it.
    LASTCALL_TRY { WithFunction::drop_function(); }
    LASTCALL_CATCH(...) {}
  }

 private:
  void call(const CancellationToken& token) override {
    if constexpr (std::is_invocable_v<F, CancellationToken>) {
      static_cast<void>(std::move(function_)(CancellationToken(token)));
    } else if constexpr (std::is_invocable_v<F&, CancellationToken>) {
      static_cast<void>(function_(CancellationToken(token)));
    } else if constexpr (std::is_invocable_v<F>) {
      static_cast<void>(std::move(function_)());
    } else {
      static_cast<void>(function_());
    }
  }
  void drop_function() override {
    if (std::exchange(alive_, false)) function_.~F();
  }

  // In a union, so that it can go before the task does.
  union {
    F function_;
  };
  bool alive_ = true;
};

// A task that has a thread of its own. When it has ended, it stands in its core's list of finished
// threads until somebody has joined it.
class SpawnedTask : public Task {
 public:
  using Task::Task;

  /// Starts the thread, which takes the task over. Returns 0 or an errno.
  int start() noexcept;

 private:
  friend class TaskCore;

  static void* thread_main(void* self);
  // pthread_exit() leaves thread_main() without a return, and not everywhere by unwinding: then this
  // is called, as the destructor of a thread-specific value.
  static void thread_exit(void* task) noexcept;
  static void conclude(SpawnedTask* task) noexcept;

  // Never deleted: a static group that is destroyed after this would wait for a task whose end nobody tells. So
  // the shared object with its destructor's code stays loaded. Without a key (there are 1024 in a process) only
  // pthread_exit() from inside a task is amiss: the task never leaves.
  struct ExitKey {
    ExitKey() noexcept : usable(::pthread_key_create(&key, &SpawnedTask::thread_exit) == 0) {
      if (usable) pin_module_of(reinterpret_cast<const void*>(&SpawnedTask::thread_exit));
    }
    pthread_key_t key{};
    bool usable;
  };
  static const ExitKey& exit_key() noexcept {
    static const ExitKey key;
    return key;
  }

  SpawnedTask* next_ = nullptr;  // in the core's list; guarded by its mutex, as are the next two
  pthread_t thread_{};
  bool abandoned_ = false;  // nobody will join it: it deletes itself
  Word gone_{0};            // 1: past its last step; only the C library's remain
};

// A task for somebody else's thread, shared by the copies of one wrapped callable.
class WrappedTask : public Task, public Counted {
 public:
  using Task::Task;

  /// Runs it, if nobody has before.
  void run_once();
  /// The last copy is gone: if it was never run, it never will be.
  void last_ref_gone() noexcept;

 private:
  std::atomic<bool> claimed_{false};
};

// Takes the copy operations from a class that derives from it.
struct MoveOnly {
  MoveOnly() noexcept = default;
  MoveOnly(MoveOnly&&) noexcept = default;
  MoveOnly& operator=(MoveOnly&&) noexcept = default;
};
struct Copyable {};

/// What wrap() returns: a callable to hand to any executor. Its copies share one membership of the
/// group, which ends when one of them has been called, or when the last of them is destroyed. Calling
/// a second one does nothing; nor does calling one that was refused, or moved from.
template <class F>
class WrappedCall
    : private std::conditional_t<std::is_copy_constructible_v<F>, Copyable, MoveOnly> {
 public:
  WrappedCall() noexcept = default;
  explicit WrappedCall(Ref<WrappedTask> task) noexcept : task_(std::move(task)) {}

  /// False: the group was closed, and the function will never run.
  explicit operator bool() const noexcept { return static_cast<bool>(task_); }

  /// Runs the function on this thread, if no copy has done so yet. What it throws is kept as a Failure
  /// of the group and goes no further.
  void operator()() const {
    if (!task_) return;
    // This object may be destroyed by what it runs.
    const Ref<WrappedTask> task = task_;
    task->run_once();
  }

 private:
  Ref<WrappedTask> task_;
};

}  // namespace lastcall::detail
