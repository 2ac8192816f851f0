// The coordinator's engine: its state, its signals and its threads, made, driven and put away.
#pragma once

#include <lastcall/detail/engine_drain.hpp>
#include <lastcall/detail/engine_exit.hpp>
#include <lastcall/detail/engine_signal.hpp>
#include <lastcall/detail/throw_system_error.hpp>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace lastcall::detail {

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  explicit Engine(ShutdownOptions options)
      : state_(std::move(options)), signals_(state_, trap_), drain_(state_) {
    state_.append_stage("service", Clock::duration::zero());
  }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  EngineState& state() noexcept { return state_; }

  /// Traps the signals and starts the two threads. All or nothing: std::system_error,
  /// std::invalid_argument (a signal that can't be trapped), std::logic_error (a SignalIgnore holds it).
  void start() {
    const NoThreadCancellation whole;
    // Threads that are abandoned run on after the coordinator; and it may trap nothing, which would do it.
    pin_module_of(reinterpret_cast<const void*>(&signal_main));
    warm_up_stack_capture();
    std::vector<int> wanted;
    for (const int number : state_.options.signals) {
      check_signal(number, "trapped");
      if (!stays_ignored(number)) wanted.push_back(number);
    }
    if (state_.options.dump_signal) {
      const int number = *state_.options.dump_signal;
      check_signal(number, "trapped");
      if (is_shutdown_signal(number)) {
        throw_invalid_argument("dump_signal: " + describe_signal(number) +
                               " is a shutdown signal already");
      }
      if (!stays_ignored(number)) wanted.push_back(number);
    }
    for (const int number : wanted) {
      const bool beneath = has_handler_beneath(number);
      if (beneath) signals_.make_descriptor();
      signals_.take_over(number, beneath);
    }
    if (!wanted.empty()) trap_.subscribe(std::span<const int>(wanted));
    const BlockAllSignals quiet;  // the threads inherit it
    start_signal_thread();
    if (!start_drain_thread(0)) {
      const int error = errno;
      stop_signal_thread();
      throw_system_error(error, "starting the drain thread");
    }
    if (state_.options.ignore_sigpipe) catch_sigpipe();
  }

  void on_signal(int number, std::function<void(const SignalInfo&)> run) {
    const NoThreadCancellation whole;
    const std::string what = "on_signal: " + describe_signal(number);
    if (!run) throw_invalid_argument(what + ": the function is empty");
    check_signal(number, "trapped");
    const std::lock_guard<std::mutex> lock(mutex_);
    if (put_away_.load(std::memory_order_acquire) != nobody_has)
      throw_logic_error(what + ": the coordinator has drained already");
    if (is_shutdown_signal(number)) throw_logic_error(what + " is a shutdown signal already");
    if (state_.options.dump_signal == number)
      throw_logic_error(what + " is the dump signal already");
    for (const auto& known : handlers_) {
      if (known->number.load(std::memory_order_relaxed) == number)
        throw_logic_error(what + " has a function already");
    }
    auto handler = std::make_unique<SignalHandler>();
    handler->number.store(number, std::memory_order_relaxed);
    handler->run = std::move(run);
    handlers_.reserve(handlers_.size() + 1);
    if (!handler_thread_) start_handler_thread();
    handler->has_handler_beneath = has_handler_beneath(number);
    if (handler->has_handler_beneath) signals_.make_descriptor();
    handler->next = state_.handlers.load(std::memory_order_relaxed);
    SignalHandler* const added = handler.get();
    handlers_.push_back(std::move(handler));
    // In the list before the first signal can come; out again if it can't be trapped.
    state_.handlers.store(added, std::memory_order_release);
    if (stays_ignored(number)) return;
    LASTCALL_TRY { trap_.subscribe(number); }
    LASTCALL_CATCH(...) {
      state_.handlers.store(added->next, std::memory_order_release);
      // Kept, not freed: the signal thread may be looking at it.
      added->number.store(0, std::memory_order_relaxed);
      LASTCALL_RETHROW;
    }
    state_.signal_bell.raise();  // its thread takes the new one, too
  }

  /// Waits until all is done, as `how`. Returns once the end is in the caller's hands; if the process is
  /// ending already, because somebody called run() or nobody came in time, never.
  void wait_for_end(Ending how) noexcept {
    const NoThreadCancellation whole;  // whoever is to be ended here is when the call has returned
    Ending nobody = Ending::nobody;
    if (!state_.ending.compare_exchange_strong(nobody, how, std::memory_order_acq_rel) &&
        how == Ending::run) {
      // Of several callers, one that wants the process to end wins.
      Ending drain = Ending::drain;
      state_.ending.compare_exchange_strong(drain, Ending::run, std::memory_order_acq_rel);
    }
    state_.drain_bell.ring();
    while (!state_.is_done()) futex_wait(state_.done, EngineState::not_done);
    while (state_.leaving.load(std::memory_order_acquire)) ::pause();
    if (how != Ending::destructor) make_late_report();
  }

  /// Stops the threads, and puts every disposition back. After it nothing exits by force. Idempotent; whoever
  /// comes second waits for the first.
  void put_away() noexcept {
    const NoThreadCancellation whole;
    std::uint32_t before = nobody_has;
    if (!put_away_.compare_exchange_strong(before, somebody_does, std::memory_order_acq_rel)) {
      while (put_away_.load(std::memory_order_acquire) != somebody_has)
        futex_wait(put_away_, somebody_does);
      return;
    }
    const ExactTime exact;  // the caller's slack may be seconds
    stop_signal_thread();
    const Clock::time_point patience = patience_at_the_end();
    // on_signal() allocates, starts a thread and subscribes under it: each of them may hang.
    std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
    try_until(patience, [&lock] { return lock.try_lock(); });
    on_signal_hangs_ = !lock.owns_lock();
    // A fork() holds it while it runs the handlers of pthread_atfork(): if one hangs, dispositions stay.
    unsubscribed_ = trap_.unsubscribe_all_by(patience);
    restore_sigpipe(patience);
    // What still runs between here and a thread's very end is destructors of thread_local objects.
    stop_drain_threads(patience);
    // What the on_signal thread is known by belongs to who is in on_signal(); it ends all the same.
    if (on_signal_hangs_) {
      state_.handler_bell.ring();
    } else {
      stop_handler_thread(patience);
    }
    wait_for_capture(patience);  // a drain thread that ran out of time may be taking stacks
    for (const Stage* stage = state_.first_stage; stage != nullptr;
         stage = EngineState::after(*stage)) {
      if (allocator_may_hang()) {
        EngineState::forsake_tasks(*stage);
      } else {
        EngineState::stop_joining(*stage, patience);
      }
    }
    put_away_.store(somebody_has, std::memory_order_release);
    futex_wake_all(&put_away_);
  }

  /// Keeps it for as long as the process lives: stragglers use it. Allocates nothing.
  void keep_for_ever() noexcept {
    static std::atomic<Engine*> all{nullptr};  // so that leak checkers find it
    self_ = shared_from_this();
    next_kept_ = all.load(std::memory_order_relaxed);
    while (!all.compare_exchange_weak(next_kept_, this, std::memory_order_acq_rel)) {
    }
  }

  /// For a destructor that was called from inside, which can't wait: the drain runs on by itself, on behalf of a
  /// destructor, and a thread of the library's puts away what is left of it. Then it calls `afterwards`. The
  /// engine is kept for ever. Allocates nothing. Where there is no thread to be had, now or when the drain is
  /// through, nothing exits by force all the same; but dispositions stay, and `afterwards` is not called.
  void run_on_alone(const Cause& why, void (*afterwards)() noexcept) noexcept {
    keep_for_ever();
    afterwards_ = afterwards;
    // Before the request: with a grace period of nothing the clock looks for somebody at once.
    Ending nobody = Ending::nobody;
    state_.ending.compare_exchange_strong(nobody, Ending::destructor, std::memory_order_acq_rel);
    // release: who starts the thread sees the function.
    undertaker_.store(Undertaker::wanted, std::memory_order_release);
    state_.request(why);
    state_.drain_bell.ring();
    start_undertaker();
  }

  /// Whether somebody may still use the engine: then it must outlive the coordinator.
  bool is_in_use() const noexcept {
    if (state_.done.load(std::memory_order_acquire) == EngineState::done_without) return true;
    if (state_.has_stuck_marks() || !unsubscribed_ || on_signal_hangs_) return true;
    for (const Stage* stage = state_.first_stage; stage != nullptr;
         stage = EngineState::after(*stage)) {
      if (EngineState::group_of(*stage).count() != 0) return true;
    }
    return false;
  }

  const ShutdownReport& report() const noexcept {
    const bool late = state_.done.load(std::memory_order_acquire) == EngineState::done_without;
    return late ? late_report_ : drain_.report();
  }

 private:
  // Time was up, and the drain thread had not come through: it hangs where nobody could take over, or the
  // machine has no time for it. So drain()'s caller says what is known, and names no functions: that takes the
  // loader's lock.
  void make_late_report() noexcept {
    const std::lock_guard<std::mutex> lock(late_mutex_);
    if (state_.done.load(std::memory_order_acquire) != EngineState::done_without ||
        state_.taken_over.load(std::memory_order_acquire)) {
      return;
    }
    const Clock::time_point now = Clock::now();
    late_report_.outcome = Outcome::overrun;
    late_report_.cause = state_.cause();
    late_report_.exit_code = state_.options.exit_codes.overrun;
    late_report_.elapsed = now - state_.requested_at.load();
    state_.raise_phase(Phase::finished);
    LASTCALL_TRY {
      late_report_.stragglers = who_is_in(state_);
      late_report_.failures = state_.log.failures();
      // The drain thread may have come to an end of its own just now, too late.
      late_report_.events = state_.log.all();
      for (Event& event : state_.log.take_of_handlers())
        late_report_.events.push_back(std::move(event));
      Event hook;
      if (state_.log.give_up_handler(hook, now)) late_report_.events.push_back(std::move(hook));
      end_story(late_report_.events,
                {EventKind::phase,
                 EventResult::begun,
                 {},
                 name_of(Phase::finished),
                 describe_outcome(late_report_.outcome, late_report_.exit_code),
                 now,
                 now});
    }
    LASTCALL_CATCH(...) {}
    // Whoever is in is named by now, whatever comes of these. The signal thread waits for some 50 ms, and has to:
    // they allocate, and may hang in it. So where naming thousands took most of that they are left out.
    constexpr Clock::duration a_moment = std::chrono::milliseconds(10);
    const Clock::time_point last = time_after(state_.hard_end(), a_moment * 5 / 2);
    LASTCALL_TRY {
      ask_kernel(late_report_.stragglers, std::min(deadline_after(a_moment), last));
      if (Clock::now() < last) add_stacks(late_report_.stragglers, a_moment, Frames::by_offset);
    }
    LASTCALL_CATCH(...) {}
    state_.exit_code.store(late_report_.exit_code, std::memory_order_release);
    state_.taken_over.store(true, std::memory_order_release);
  }

  // There was no report in time: whoever is still in may have what it takes to make one. Then nothing is freed
  // here, and no thread joined, whose stack the C library may free: the engine is kept for ever anyhow.
  bool allocator_may_hang() const noexcept {
    return state_.done.load(std::memory_order_acquire) == EngineState::done_without;
  }

  // All that is waited for when the drain is over has one end, inside the 100 ms after the grace period.
  Clock::time_point patience_at_the_end() const noexcept {
    const Clock::time_point now = Clock::now();
    const Clock::time_point last =
        time_after(state_.end_at.load(), Clock::duration(std::chrono::milliseconds(80)));
    // Whoever comes late has a moment still: a lock that is held for microseconds is not one that hangs.
    return std::max(now + std::chrono::milliseconds(5),
                    std::min(now + std::chrono::milliseconds(50), last));
  }

  struct DriverArgument {
    std::shared_ptr<Engine> engine;
    std::uint32_t number = 0;
    std::atomic<bool> over{false};  // see SetAtTheEnd
  };

  bool is_shutdown_signal(int number) const noexcept {
    for (const int wanted : state_.options.signals) {
      if (wanted == number) return true;
    }
    return false;
  }

  // What nohup and a background job of a shell without job control left ignored. What a SignalIgnore of
  // this program ignores is no such thing: trapping it throws.
  bool stays_ignored(int number) const noexcept {
    return state_.options.respect_ignored &&
           (number == SIGINT || number == SIGHUP || number == SIGQUIT) && is_ignored(number) &&
           !has_signal_ignore(number);
  }
  static bool has_signal_ignore(int number) noexcept {
    const SignalRegistryLock lock;
    return signal_registry.ignored[number].count > 0;
  }

  // ---- the signal thread ----

  void start_signal_thread() {
    const int error = start_thread(signal_thread_, &signal_main, this);
    if (error != 0) throw_system_error(error, "starting the signal thread");
    signal_thread_runs_ = true;
  }
  static void* signal_main(void* self) {
    name_this_thread("lastcall-signal");
    keep_exact_time();
    const NoThreadCancellation always;
    auto* const engine = static_cast<Engine*>(self);
    const SetAtTheEnd at_the_end{engine->signal_thread_over_};
    engine->signals_.loop();
    return nullptr;
  }
  void stop_signal_thread() noexcept {
    if (!std::exchange(signal_thread_runs_, false)) return;
    const bool let_go = allocator_may_hang();
    if (let_go) ::pthread_detach(signal_thread_);
    state_.quit.store(true, std::memory_order_release);
    state_.signal_bell.raise();
    // It runs nothing of the user's: this takes microseconds, and where it is saying the last words, 20 ms.
    if (let_go) {
      try_until(Clock::time_point::max(),
                [this] { return signal_thread_over_.load(std::memory_order_acquire); });
    } else {
      ::pthread_join(signal_thread_, nullptr);
    }
  }

  // ---- the drain threads ----

  bool start_drain_thread(std::uint32_t number) noexcept {
    // No memory is asked for: there may be none in a drain. The thread keeps the engine.
    DriverArgument& argument = driver_arguments_[number];
    argument.engine = shared_from_this();
    argument.number = number;
    argument.over.store(false, std::memory_order_relaxed);
    const BlockAllSignals quiet;
    const int error = start_thread(drivers_[number], &drain_main, &argument);
    errno = error;
    if (error != 0) {
      argument.engine.reset();
      return false;
    }
    drivers_started_.store(number + 1, std::memory_order_release);
    return true;
  }
  static void* drain_main(void* given) {
    name_this_thread("lastcall-drain");
    keep_exact_time();
    const NoThreadCancellation own;  // but in calls of the user's
    auto* const argument = static_cast<DriverArgument*>(given);
    const std::shared_ptr<Engine> keep = std::move(argument->engine);
    Engine& engine = *keep;
    // The argument is the engine's, which `keep` still has.
    const SetAtTheEnd at_the_end{argument->over};
    const std::uint32_t number = argument->number;
    engine.drain_.drive(
        number, [&engine, number]() noexcept { return engine.start_drain_thread(number + 1); });
    engine.start_undertaker();
    return nullptr;
  }
  void stop_drain_threads(Clock::time_point patience) noexcept {
    state_.quit.store(true, std::memory_order_release);
    const std::uint32_t current =
        state_.current_driver.fetch_or(EngineState::driver_quits, std::memory_order_acq_rel);
    futex_wake_all(&state_.current_driver);
    state_.drain_bell.ring();
    // Not even let go: who lets a thread go that has ended frees it. They keep the engine.
    if (allocator_may_hang()) return;
    const bool current_hangs =
        state_.sections[current].state.load(std::memory_order_acquire) == Section::inside;
    const std::uint32_t count = drivers_started_.load(std::memory_order_acquire);
    for (std::uint32_t i = 0; i < count; ++i) {
      // Those before the current one hang in user code, or came back from it too late: they keep the
      // engine, and go when they go. The current one is past its last call, or hangs in one.
      if (i < current || (i == current && current_hangs)) {
        ::pthread_detach(drivers_[i]);
      } else {
        join_or_detach(drivers_[i], driver_arguments_[i].over, patience);
      }
    }
    drivers_started_.store(0, std::memory_order_relaxed);
  }

  // Set by a thread of the engine's when it is past its last use of the engine, or nearly; also if a hook
  // ends the thread (pthread_exit).
  struct SetAtTheEnd {
    std::atomic<bool>& over;
    ~SetAtTheEnd() { over.store(true, std::memory_order_release); }
  };

  static void join_or_detach(pthread_t thread, const std::atomic<bool>& over,
                             Clock::time_point patience) noexcept {
    while (!over.load(std::memory_order_acquire) && Clock::now() < patience) {
      nap(50'000);
    }
    if (!over.load(std::memory_order_acquire) || !join_until(thread, patience)) {
      ::pthread_detach(thread);
    }
  }

  // ---- the thread that stands in for a destructor ----

  // Once, whoever comes: the destructor, or a drain thread that is through, if there was no thread for it before.
  void start_undertaker() noexcept {
    Undertaker wanted = Undertaker::wanted;
    // acquire: see run_on_alone().
    if (!undertaker_.compare_exchange_strong(wanted, Undertaker::started,
                                             std::memory_order_acquire)) {
      return;
    }
    const BlockAllSignals quiet;
    pthread_t thread{};
    if (start_thread(thread, &undertaker_main, this) == 0) {
      ::pthread_detach(thread);
    } else {
      undertaker_.store(Undertaker::wanted, std::memory_order_release);
    }
  }
  static void* undertaker_main(void* self) {
    name_this_thread("lastcall-end");
    const NoThreadCancellation always;
    auto* const engine = static_cast<Engine*>(self);
    engine->wait_for_end(Ending::destructor);
    engine->put_away();
    engine->afterwards_();
    return nullptr;
  }

  // ---- the on_signal thread ----

  void start_handler_thread() {
    const int error = try_to_start_handler_thread();
    if (error != 0) throw_system_error(error, "starting the on_signal thread");
  }
  int try_to_start_handler_thread() noexcept {
    // The thread keeps the engine, and no memory is asked for that.
    handler_keeps_ = shared_from_this();
    const BlockAllSignals quiet;
    const int error = start_thread(handler_pthread_, &handler_main, this);
    if (error != 0) handler_keeps_.reset();
    handler_thread_ = error == 0;
    return error;
  }
  static void* handler_main(void* self) {
    name_this_thread("lastcall-reload");
    const NoThreadCancellation own;  // but in calls of the user's
    const std::shared_ptr<Engine> keep = std::move(static_cast<Engine*>(self)->handler_keeps_);
    const SetAtTheEnd at_the_end{keep->handler_over_};
    keep->handle_signals();
    return nullptr;
  }
  void handle_signals() {
    for (;;) {
      const std::uint32_t rung = state_.handler_bell.seen();
      if (state_.quit.load(std::memory_order_acquire)) break;
      bool any = false;
      for (SignalHandler* handler = state_.handlers.load(std::memory_order_acquire);
           handler != nullptr; handler = handler->next) {
        SignalInfo info;
        if (!handler->pending.pop(info)) continue;
        any = true;
        handle(*handler, info);
      }
      if (!any) state_.handler_bell.wait(rung, Clock::time_point::max());
    }
  }
  void handle(SignalHandler& handler, const SignalInfo& info) {
    const Clock::time_point begin = Clock::now();
    const std::string_view name = signal_name(info.number);
    std::exception_ptr error;
    // seq_cst: either it is seen here that all is over, or there that this thread may hang.
    in_handler_.store(true, std::memory_order_seq_cst);
    const bool runs = !state_.quit.load(std::memory_order_seq_cst);
    if (runs) {
      LASTCALL_TRY {
        state_.log.handler_begins(
            {EventKind::hook, EventResult::begun, {}, "on " + std::string(name), {}, begin, begin});
      }
      LASTCALL_CATCH(...) { state_.log.note_lost(); }
      state_.drain_bell.ring();
      const TaskScope scope(&state_, name);
      const OpenToCapture open;  // and so are the threads that it makes
      const UntilReturn unwound{*this};
      const OpenToThreadCancellation to_cancels;
      error = thrown_by([&] { handler.run(info); });
      to_cancels.let_thread_end_here();
      unwound.returned = true;
    }
    in_handler_.store(false, std::memory_order_release);
    if (!runs) return;
    std::string detail;
    LASTCALL_TRY {
      if (error) detail = describe_exception(error);
    }
    LASTCALL_CATCH(...) {}
    state_.log.handler_ends(error ? EventResult::failed : EventResult::ok, std::move(detail),
                            Clock::now());
    state_.drain_bell.ring();
  }
  // A function may end its thread (pthread_exit, pthread_cancel): that unwinds the stack, and another thread goes
  // on with the next signal.
  struct UntilReturn {
    Engine& engine;
    mutable bool returned = false;
    ~UntilReturn() {
      if (!returned) engine.handler_thread_ends();
    }
  };
  void handler_thread_ends() noexcept {
    std::string detail;
    LASTCALL_TRY { detail = "ended its thread"; }
    LASTCALL_CATCH(...) {}
    state_.log.handler_ends(EventResult::ok, std::move(detail), Clock::now());
    state_.drain_bell.ring();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!handler_thread_) return;  // stopped meanwhile: it has let this thread go
    ::pthread_detach(handler_pthread_);
    in_handler_.store(false, std::memory_order_release);
    // If there is none to be had, the next on_signal() tries again.
    static_cast<void>(try_to_start_handler_thread());
  }
  void stop_handler_thread(Clock::time_point patience) noexcept {
    if (!std::exchange(handler_thread_, false)) return;
    state_.quit.store(true, std::memory_order_seq_cst);
    state_.handler_bell.ring();
    // A reload that hangs keeps its thread, and the engine with it.
    if (allocator_may_hang()) return;  // as in stop_drain_threads()
    if (in_handler_.load(std::memory_order_seq_cst)) {
      ::pthread_detach(handler_pthread_);
    } else {
      join_or_detach(handler_pthread_, handler_over_, patience);
    }
  }

  // ---- SIGPIPE ----

  // Writing to a peer that has gone gives EPIPE then. An empty handler, because SIG_IGN would be
  // inherited through exec.
  void catch_sigpipe() noexcept {
    struct sigaction before {};
    if (::sigaction(SIGPIPE, nullptr, &before) != 0 ||
        (static_cast<unsigned>(before.sa_flags) & static_cast<unsigned>(SA_SIGINFO)) != 0 ||
        before.sa_handler != SIG_DFL) {
      return;  // somebody deals with it already
    }
    struct sigaction empty {};
    empty.sa_handler = &ignore_signal;
    empty.sa_flags = SA_RESTART | SA_ONSTACK;
    ::sigemptyset(&empty.sa_mask);
    pipe_caught_ = ::sigaction(SIGPIPE, &empty, &pipe_before_) == 0;
    const SignalRegistryLock lock;
    pipe_kept_ = keep_disposition(pipe_before_);
  }
  void restore_sigpipe(Clock::time_point patience) noexcept {
    if (!std::exchange(pipe_caught_, false)) return;
    struct sigaction now {};
    if (::sigaction(SIGPIPE, nullptr, &now) != 0) return;
    struct sigaction ours {};
    ours.sa_handler = &ignore_signal;
    if (same_function(now, ours)) {
      ::sigaction(SIGPIPE, &pipe_before_, nullptr);
    } else if (const SignalRegistryLock lock(patience); lock.owns_lock() && pipe_kept_ != nullptr) {
      replace_beneath(SIGPIPE, ours, pipe_kept_);
    }
  }
  static void ignore_signal(int) {}

  TrapCore trap_;
  EngineState state_;
  EngineSignals signals_;
  EngineDrain drain_;

  std::mutex mutex_;  // on_signal(), put_away()
  std::vector<std::unique_ptr<SignalHandler>> handlers_;
  pthread_t signal_thread_{};
  bool signal_thread_runs_ = false;
  std::atomic<bool> signal_thread_over_{false};  // see SetAtTheEnd
  pthread_t drivers_[EngineState::most_drivers]{};
  DriverArgument driver_arguments_[EngineState::most_drivers];
  std::atomic<std::uint32_t> drivers_started_{0};
  pthread_t handler_pthread_{};
  bool handler_thread_ = false;
  std::shared_ptr<Engine> handler_keeps_;  // until that thread has taken it
  std::atomic<bool> handler_over_{false};  // see SetAtTheEnd
  std::atomic<bool> in_handler_{false};
  std::mutex late_mutex_;
  ShutdownReport late_report_;
  static constexpr std::uint32_t nobody_has = 0;
  static constexpr std::uint32_t somebody_does = 1;
  static constexpr std::uint32_t somebody_has = 2;
  Word put_away_{nobody_has};
  enum class Undertaker : std::uint32_t { none, wanted, started };
  std::atomic<Undertaker> undertaker_{Undertaker::none};
  void (*afterwards_)() noexcept = nullptr;
  bool unsubscribed_ = true;
  bool on_signal_hangs_ = false;
  std::shared_ptr<Engine> self_;
  Engine* next_kept_ = nullptr;
  bool pipe_caught_ = false;
  struct sigaction pipe_before_ {};
  const KeptDisposition* pipe_kept_ = nullptr;  // the same, for who was put on top
};

}  // namespace lastcall::detail
