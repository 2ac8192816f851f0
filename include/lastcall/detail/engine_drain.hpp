// The coordinator's drain thread: one small step at a time, so that its successor can go on wherever it
// was left hanging.
#pragma once

#include <lastcall/detail/engine_snapshot.hpp>
#include <lastcall/detail/engine_state.hpp>
#include <lastcall/detail/last_rites.hpp>
#include <lastcall/detail/last_words.hpp>
#include <lastcall/detail/thread.hpp>
#include <lastcall/detail/thread_id.hpp>

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lastcall::detail {

// The state here belongs to whichever thread is the current driver; it is handed on by the release of
// EngineState::current_driver.
class EngineDrain {
 public:
  explicit EngineDrain(EngineState& engine) noexcept
      : engine_(engine), observer_(engine.options.observer.get()) {}

  /// The body of drain thread number `mine`. `start_next` starts thread number `mine` + 1, which waits
  /// for its turn; false if there is none to be had. Returns when all is done, or when this thread came
  /// back too late from a call that it was abandoned in: then it may touch nothing any more.
  template <class StartNext>
  void drive(std::uint32_t mine, StartNext start_next) {
    for (;;) {
      const std::uint32_t current = engine_.current_driver.load(std::memory_order_acquire);
      if ((current & EngineState::driver_quits) != 0) return;
      if (current == mine) break;
      futex_wait(engine_.current_driver, current);
    }
    driver_ = mine;
    // For last words, also where it hangs between two calls.
    engine_.sections[mine].thread_id.store(current_thread_id(), std::memory_order_relaxed);
    start_next_ = [](void* context) noexcept { return (*static_cast<StartNext*>(context))(); };
    start_next_context_ = &start_next;
    has_standby_ = false;
    write_down_abandoned();
    for (;;) {
      const std::uint32_t rung = engine_.drain_bell.seen();
      Next next = Next::wait;
      wait_until_ = Clock::now() + std::chrono::milliseconds(1);
      // Nothing in a step needs memory to be correct; should one run out of it all the same, it is
      // tried again.
      LASTCALL_TRY { next = step(); }
      LASTCALL_CATCH(const std::bad_alloc&) {}
      if (next == Next::leave) return;
      if (next == Next::wait && !has_more_to_tell()) {
        const bool before = engine_.requested();
        engine_.drain_bell.wait(rung, wait_until_);
        // Who was woken by the request's mark goes first, where there is one processor: the bell rings after it,
        // but a thread that wakes may preempt the one that woke it, and those that wait with it.
        if (!before && engine_.requested()) ::sched_yield();
      }
    }
  }

  const ShutdownReport& report() const noexcept { return report_; }

 private:
  enum class Next { again, wait, leave };
  enum class At {
    running,
    stage,
    callbacks,
    stops,
    waiting,
    drained,
    stage_over,
    lingering,
    naming,
    telling,
    ended
  };
  enum class Calling { nothing, observer, callback, stop, drained, naming, flush };

  // ---- one step -----------------------------------------------------------------------------------

  Next step() {
    // Put away: nobody is left who would wait for more.
    if ((engine_.current_driver.load(std::memory_order_acquire) & EngineState::driver_quits) != 0) {
      return Next::leave;
    }
    tell_signals();
    if (!tell_observer()) return Next::leave;
    if (dump_ != Dump::none || engine_.dumps_wanted.load(std::memory_order_relaxed) > 0) {
      return step_dump();
    }
    if (engine_.abort_work_ready.load(std::memory_order_acquire)) {
      if (!aborting_told_) {
        aborting_told_ = true;
        note_phase(Phase::aborting, engine_.aborting_since.load(), {});
        return Next::again;
      }
      share_out();
      if (!run_abort_callbacks()) return Next::leave;
    }
    if (hook_ != nullptr) return run_hook() ? Next::again : Next::leave;
    switch (at_) {
      case At::running: return step_running();
      case At::stage: return step_stage();
      case At::callbacks: return step_callbacks();
      case At::stops: return step_stops();
      case At::waiting: return step_waiting();
      case At::drained: return step_drained();
      case At::stage_over: return step_stage_over();
      case At::lingering: return step_lingering();
      case At::naming: return step_naming();
      case At::telling: return step_telling();
      case At::ended: return step_ended();
    }
    return Next::leave;
  }

  Next wait_for_bell(Clock::time_point until) noexcept {
    wait_until_ = until;
    return Next::wait;
  }

  Next step_running() {
    if (!engine_.requested()) return wait_for_bell(Clock::time_point::max());
    if (!request_told_) {
      const Cause cause = engine_.cause();
      // What came first is told first, also if its turn in the ring has not come.
      if (CauseAccess::peek(cause) == engine_.signal_record) tell_cause(*cause.signal());
      request_told_ = true;
      const Clock::time_point since = engine_.requested_at.load();
      next_status_ = since + std::chrono::seconds(1);
      note_phase(Phase::announced, since, cause.message());
      engine_.log.mark_requested();
      return Next::again;
    }
    if (!engine_.draining_claimed.load(std::memory_order_acquire)) {
      return show_status(engine_.announce_until.load());
    }
    // Claimed, but the phase and the time may be a moment behind: the bell comes after them.
    if (engine_.phase.load(std::memory_order_acquire) == Phase::announced) {
      return wait_for_bell(Clock::now() + std::chrono::milliseconds(1));
    }
    note_phase(Phase::draining, engine_.draining_since.load(), {});
    stage_ = engine_.first_stage;
    at_ = At::stage;
    return Next::again;
  }

  Next step_stage() {
    stage_->begun_ = stage_ == engine_.first_stage ? engine_.draining_since.load() : Clock::now();
    stage_->deadline_ = engine_.deadline_of(*stage_, stage_->begun_, engine_.budget_of(*stage_));
    shared_out_ = engine_.abort_claimed.load(std::memory_order_acquire);
    note(EventKind::stage, EventResult::begun, {}, stage_->name(), {}, stage_->begun_,
         stage_->begun_);
    engine_.mark(*stage_);
    callbacks_owed_ = !stage_->work_ready_.load(std::memory_order_acquire);
    if (callbacks_owed_) engine_.signal_bell.raise();
    at_ = At::callbacks;
    return Next::again;
  }

  Next step_callbacks() {
    // Another thread may be in the middle of marking: it rings when it is through. If it was stopped
    // there, hooks come first, for once.
    if (callbacks_owed_ && !stage_->work_ready_.load(std::memory_order_acquire)) {
      const Clock::time_point now = Clock::now();
      const Clock::time_point until = std::min({stage_->begun_ + std::chrono::milliseconds(100),
                                                stage_->deadline_, engine_.wait_until()});
      if (now < until) return wait_for_bell(std::min(until, now + std::chrono::milliseconds(1)));
      at_ = At::stops;
      return Next::again;
    }
    callbacks_owed_ = false;
    CallbackLink* const callback = may_call_users() ? stage_->work_.take_one() : nullptr;
    if (callback == nullptr) {
      at_ = At::stops;
      return Next::again;
    }
    return run_callback(callback, a_callback, stage_, stage_->deadline_) ? Next::again
                                                                         : Next::leave;
  }

  Next step_stops() {
    Hook* hook = nullptr;
    {
      const std::lock_guard<std::mutex> lock(stage_->mutex_);
      if (stage_->stops_taken_ < stage_->stops_.size())
        hook = &stage_->stops_[stage_->stops_taken_];
    }
    if (hook != nullptr) {
      ++stage_->stops_taken_;
      begin_hook(*hook, Calling::stop);
      return Next::again;
    }
    stage_->group().close();
    at_ = At::waiting;
    return Next::again;
  }

  // The end may be much nearer now: what is left of this budget and the later ones share it.
  void share_out() noexcept {
    if (stage_ == nullptr || std::exchange(shared_out_, true)) return;
    const Clock::time_point now = Clock::now();
    const Clock::duration own = std::max(stage_->deadline_ - now, Clock::duration::zero());
    stage_->deadline_ = std::min(stage_->deadline_, engine_.deadline_of(*stage_, now, own));
  }

  Next step_waiting() {
    if (callbacks_owed_ && stage_->work_ready_.load(std::memory_order_acquire)) {
      at_ = At::callbacks;
      return Next::again;
    }
    const Clock::time_point now = Clock::now();
    // In slices, so that events, callbacks of the abort and the status get their turn; and the end may
    // have moved closer since.
    const Clock::time_point slice =
        std::min(stage_->deadline_, now + std::chrono::milliseconds(10));
    const Clock::time_point until = std::min(slice, engine_.wait_until());
    if (stage_->group().wait_until(until)) {
      at_ = At::drained;
      return Next::again;
    }
    const Clock::time_point later = Clock::now();
    if (later < stage_->deadline_ && later < engine_.wait_until()) {
      return show_status_now() ? Next::again : Next::leave;
    }
    stage_->overran_ = stage_->still_used_ = true;
    at_ = At::drained;
    return Next::again;
  }

  Next step_drained() {
    Hook* hook = nullptr;
    {
      const std::lock_guard<std::mutex> lock(stage_->mutex_);
      stage_->drained_closed_ = true;  // from now on they all stay where they are
      const std::size_t count = stage_->drained_.size();
      if (stage_->drained_taken_ < count)
        hook = &stage_->drained_[count - 1 - stage_->drained_taken_];
    }
    if (hook == nullptr) {
      at_ = At::stage_over;
      return Next::again;
    }
    ++stage_->drained_taken_;
    if (stage_->still_used_) {
      const Clock::time_point now = Clock::now();
      note(EventKind::hook, EventResult::skipped, stage_->name(), hook->name, "the stage overran",
           now, now);
      return Next::again;
    }
    begin_hook(*hook, Calling::drained);
    return Next::again;
  }

  Next step_stage_over() {
    char words[48];
    BoundedText detail(words, sizeof words);
    const std::size_t in = stage_->overran_ ? stage_->group().count() : 0;
    if (in != 0) detail.add_digits(in).add(" still in");
    note(EventKind::stage, stage_->overran_ ? EventResult::overran : EventResult::ok, {},
         stage_->name(), detail.view(), stage_->begun_, Clock::now());
    stage_ = stage_->next();
    at_ = stage_ == nullptr ? At::lingering : At::stage;
    return Next::again;
  }

  // What is left of the grace period goes to those still in, and then to main.
  Next step_lingering() {
    const bool out = everybody_out();
    const bool main_here = engine_.ending.load(std::memory_order_acquire) != Ending::nobody;
    const Clock::time_point now = Clock::now();
    // In the middle of the abort: its callbacks come first.
    if (!aborting_told_ && engine_.abort_claimed.load(std::memory_order_acquire) &&
        now < engine_.wait_until()) {
      return wait_for_bell(now + std::chrono::milliseconds(1));
    }
    if ((out && main_here) || now >= engine_.wait_until()) {
      late_ = !out || !main_here;
      // step_ended() overwrites `ending`, and last words may still be said after it.
      engine_.main_was_late.store(!main_here, std::memory_order_release);
      list_stragglers();
      at_ = At::naming;
      return Next::again;
    }
    if (out) return wait_for_bell(engine_.wait_until());
    if (!show_status_now()) return Next::leave;
    return wait_for_bell(std::min(engine_.wait_until(), now + std::chrono::milliseconds(5)));
  }

  void list_stragglers() noexcept {
    LASTCALL_TRY {
      if (!everybody_out()) report_.stragglers = who_is_in(engine_, &engine_.sections[driver_]);
      if (engine_.main_was_late.load(std::memory_order_relaxed)) {
        report_.stragglers.push_back(
            straggler_of("main", "", {}, engine_.requested_at.load(), engine_.main_thread));
      }
      // The time to the end is for three: these questions, the stacks, and telling it all.
      const Clock::time_point now = Clock::now();
      const Clock::duration left = std::max(engine_.end_at.load() - now, Clock::duration::zero());
      ask_kernel(report_.stragglers, now + left / 4);
    }
    LASTCALL_CATCH(...) { engine_.log.note_lost(); }
  }

  Next step_naming() {
    // There was no memory a moment ago, and may be some now.
    if (late_ && report_.stragglers.empty()) list_stragglers();
    at_ = At::telling;
    const Clock::duration left = engine_.end_at.load() - Clock::now();
    return name_stacks(report_.stragglers, left / 2) ? Next::again : Next::leave;
  }

  Next step_telling() {
    at_ = At::ended;
    for (const Straggler& straggler : report_.stragglers) {
      LASTCALL_TRY { add_straggler(straggler, EventResult::overran); }
      LASTCALL_CATCH(...) { engine_.log.note_lost(); }
    }
    finish();
    return Next::again;
  }

  // Where nobody will ever see the report, and the observer missed some of it: it hung, threw, ended its thread, or
  // there was no memory for a line, or no other thread to go on if it hung.
  void say_what_was_missed() noexcept {
    const bool not_called = observer_ != nullptr && is_last_thread() && engine_.log.has_untaken();
    if (late_ && (observer_missed_ || not_called || engine_.log.any_lost()) &&
        !engine_.told.load(std::memory_order_relaxed) && engine_.begin_words()) {
      write_last_words(engine_, "over, and not all could be told,");
    }
  }

  // The report is made and the observer has been told: hand it over, or end the process.
  Next step_ended() {
    // If nobody has come for it the process ends, and who comes now is too late.
    Ending ending = Ending::nobody;
    if (!engine_.ending.compare_exchange_strong(ending, Ending::run, std::memory_order_acq_rel) &&
        (ending == Ending::drain || ending == Ending::destructor)) {
      if (ending == Ending::destructor) say_what_was_missed();
      engine_.set_done(EngineState::done_with_report);
      return Next::leave;
    }
    engine_.leaving.store(true, std::memory_order_release);
    engine_.set_done(EngineState::done_with_report);
    say_what_was_missed();
    engine_.told.store(true, std::memory_order_release);
    if (!flushed_) {
      flushed_ = true;
      // Past its time nobody takes over, since nothing but the exit is left: the signal thread does it.
      if (!guarded(Calling::flush, "flushing the streams", nullptr, Clock::time_point::max(),
                   [out = !late_]() noexcept { flush_everything(out); })) {
        return Next::leave;
      }
    }
    if (engine_.options.exit_by_signal) {
      if (const SignalInfo* const info = report_.cause.signal()) exit_as_by_signal(info->number);
    }
    std::_Exit(report_.exit_code);
  }

  // ---- user code ----------------------------------------------------------------------------------

  // Nothing of the user's is begun once there is only time for the report; nor with the last thread that
  // there is a place for: somebody has to come through.
  bool may_call_users() const noexcept {
    return Clock::now() < engine_.wait_until() && !is_last_thread();
  }
  bool is_last_thread() const noexcept { return driver_ + 1 == EngineState::most_drivers; }

  // Runs `body` as a section that the signal thread watches. False: it took too long, another thread
  // has taken over, and this one must leave without touching anything. `body` touches nothing that is
  // shared with that other thread. `name` lives as long as the engine.
  template <class Body>
  bool guarded(Calling call, const char* name, const Stage* stage, Clock::time_point deadline,
               Body body) {
    // The flush needs none: after it there is only the exit, which the signal thread can do. Where no
    // thread is to be had there may be one the next time.
    if (call != Calling::flush && !has_standby_ && !is_last_thread() &&
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
    // From the next line on this thread may be abandoned, and then its successor writes the rest.
    const bool shared_out = shared_out_;
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
      body();
      unwound.returned = true;
    }
    std::uint32_t inside = Section::inside;
    // acq_rel: it races with being abandoned, and one of the two wins.
    if (section.state.compare_exchange_strong(inside, Section::idle, std::memory_order_acq_rel)) {
      calling_ = Calling::nothing;
      return true;
    }
    section.state.store(Section::returned, std::memory_order_release);
    engine_.drain_bell.ring();
    return false;
  }

  // What is called may end its thread (pthread_exit): that unwinds the stack, and the successor goes on.
  struct UntilReturn {
    EngineDrain& drain;
    Section& section;
    mutable bool returned = false;
    ~UntilReturn() {
      if (!returned) drain.thread_ends(section);
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

  static Section::Kind kind_of(Calling call) noexcept {
    switch (call) {
      case Calling::callback:
      case Calling::stop:
      case Calling::drained: return Section::Kind::hook;
      case Calling::flush: return Section::Kind::flush;
      case Calling::observer:
      case Calling::naming:
      case Calling::nothing: break;
    }
    return Section::Kind::observer;
  }

  // A hook is called in a step of its own, so that the observer has been told that it begins, and has
  // not taken it down with itself if it hung.
  void begin_hook(Hook& hook, Calling call) {
    const Clock::time_point now = Clock::now();
    if (!may_call_users()) {
      note(EventKind::hook, EventResult::skipped, stage_->name(), hook.name, "out of time", now,
           now);
      return;
    }
    note(EventKind::hook, EventResult::begun, stage_->name(), hook.name, {}, now, now);
    hook_ = &hook;
    hook_call_ = call;
  }

  bool run_hook() {
    Hook& hook = *std::exchange(hook_, nullptr);
    hook_name_ = &hook.name;
    hook_begun_ = Clock::now();
    bool threw = false;
    std::string detail;
    // what() is the user's, too, and so is the destructor of what was thrown.
    const bool mine =
        guarded(hook_call_, hook.name.c_str(), stage_, patience(stage_->deadline_), [&] {
          const std::exception_ptr error = thrown_by(hook.run);
          if (!error) return;
          threw = true;
          engine_.log.note_failed();  // there may be no memory for more
          thrown_by([&] { engine_.log.add_failure(hook.name, error); });
          thrown_by([&] { detail = describe_exception(error); });
        });
    if (!mine) return false;
    hook_name_ = nullptr;
    note_hook(hook.name, threw, detail);
    return true;
  }

  static constexpr const char* a_callback = "a cancellation callback";
  static constexpr const char* an_abort_callback = "a cancellation callback of the abort token";

  bool run_callback(CallbackLink* callback, const char* name, const Stage* stage,
                    Clock::time_point deadline) {
    callback_name_ = name;
    return guarded(Calling::callback, name, stage, patience(deadline),
                   [callback]() noexcept { CancelWork::run(callback); });
  }

  // Those of stages whose turn has not come run then: each stage's callbacks come before its hooks.
  bool run_abort_callbacks() {
    while (may_call_users()) {
      CallbackLink* const callback = engine_.abort_work.take_one();
      if (callback == nullptr) break;
      if (!run_callback(callback, an_abort_callback, nullptr,
                        engine_.wait_until() - engine_.margin / 2)) {
        return false;
      }
    }
    return true;
  }

  // The time that a call may take: until `deadline`, and a short while where that has passed already,
  // so that the hooks after one that hung get their turn.
  Clock::time_point patience(Clock::time_point deadline) const noexcept {
    const Clock::time_point now = Clock::now();
    const Clock::duration left = engine_.wait_until() - now;
    const Clock::duration slice = std::clamp<Clock::duration>(
        left / 8, std::chrono::milliseconds(5), std::chrono::milliseconds(100));
    return std::max(deadline, now + slice);
  }

  void note_hook(const std::string& name, bool threw, const std::string& detail) noexcept {
    LASTCALL_TRY {
      note(EventKind::hook, threw ? EventResult::failed : EventResult::ok, stage_->name(), name,
           detail, hook_begun_, Clock::now());
    }
    LASTCALL_CATCH(...) { engine_.log.note_lost(); }
  }

  // The previous thread was left hanging in something: that is written down, and it is not called again.
  void write_down_abandoned() noexcept {
    const Clock::time_point now = Clock::now();
    if (std::exchange(thread_ended_, false)) {
      if (std::exchange(calling_, Calling::nothing) == Calling::observer) {
        // It would take thread after thread down.
        observer_ = nullptr;
        observer_missed_ = true;
      }
      if (hook_name_ == nullptr) return;
      note(EventKind::hook, EventResult::ok, stage_name_view(), *hook_name_, "ended its thread",
           hook_begun_, now);
      hook_name_ = nullptr;
      return;
    }
    switch (std::exchange(calling_, Calling::nothing)) {
      case Calling::observer:
        observer_ = nullptr;
        observer_missed_ = true;
        break;
      case Calling::callback:
        note(EventKind::hook, EventResult::overran, stage_name_view(), callback_name_,
             "abandoned on its thread", engine_.sections[driver_ - 1].begin.load(), now);
        if (at_ == At::callbacks) stage_->overran_ = stage_->still_used_ = true;
        break;
      case Calling::stop:
      case Calling::drained:
        note(EventKind::hook, EventResult::overran, stage_name_view(), *hook_name_,
             "abandoned on its thread", hook_begun_, now);
        // Its stage is past its budget. Those after one that hangs while it releases still run.
        stage_->overran_ = true;
        if (hook_call_ == Calling::stop) stage_->still_used_ = true;
        hook_name_ = nullptr;
        break;
      case Calling::naming:
      case Calling::flush:
      case Calling::nothing: break;
    }
  }

  // ---- telling ------------------------------------------------------------------------------------

  // Writes a line of the story. With no memory for it the line is lost, never the shutdown.
  void note(EventKind kind, EventResult result, std::string_view stage, std::string_view name,
            std::string_view detail, Clock::time_point begin, Clock::time_point end) noexcept {
    LASTCALL_TRY {
      engine_.log.add(
          {kind, result, std::string(stage), std::string(name), std::string(detail), begin, end});
    }
    LASTCALL_CATCH(...) { engine_.log.note_lost(); }
  }
  void note_phase(Phase phase, Clock::time_point when, std::string_view detail) noexcept {
    note(EventKind::phase, EventResult::begun, {}, name_of(phase), detail, when, when);
  }

  void tell_signals() noexcept {
    SeenSignal seen;
    while (engine_.seen_signals.pop(seen)) {
      using Verdict = SeenSignal::Verdict;
      if (seen.verdict == Verdict::shutdown) {
        tell_cause(seen.info);
        continue;
      }
      const bool idle = seen.verdict == Verdict::repeated || seen.verdict == Verdict::echo;
      if (idle && ++repeats_ > most_repeats_told) continue;  // a storm is no story
      LASTCALL_TRY {
        std::string detail = Cause::signal(seen.info).message();
        detail += what_it_did(seen.verdict);
        note_signal(seen.info, idle ? EventResult::skipped : EventResult::ok, detail);
      }
      LASTCALL_CATCH(...) {}
    }
  }
  void tell_cause(const SignalInfo& info) noexcept {
    if (std::exchange(cause_told_, true)) return;
    const Cause cause = engine_.cause();
    note_signal(info, EventResult::ok, cause.message());
  }
  void note_signal(const SignalInfo& info, EventResult result, std::string_view detail) noexcept {
    note(EventKind::signal, result, {}, signal_name(info.number), detail, info.received,
         info.received);
  }

  static std::string_view what_it_did(SeenSignal::Verdict verdict) noexcept {
    using Verdict = SeenSignal::Verdict;
    switch (verdict) {
      case Verdict::repeated: return ": shutting down already";
      case Verdict::echo: return ": an echo of the last one";
      case Verdict::skips_delay: return ": ends the announce delay";
      case Verdict::aborts: return ": aborts";
      case Verdict::dump: return ": snapshot";
      case Verdict::shutdown:
      case Verdict::handled: break;
    }
    return {};
  }

  // Hands over the events that the observer has not seen. False: it hung, and this thread must leave.
  // Some at a time, so that one that makes an event of each, by spawning for example, can't keep the drain
  // from closing the stages.
  bool tell_observer() {
    constexpr unsigned most_at_once = 64;
    for (unsigned told = 0; has_more_to_tell(); ++told) {
      if (told == most_at_once && at_ != At::ended) return true;
      Event event;
      LASTCALL_TRY {
        if (!engine_.log.take(event)) break;
      }
      LASTCALL_CATCH(...) {
        observer_missed_ = true;
        return true;
      }
      const bool announce = request_told_ && !observer_knows_;
      bool wants_status = false;
      Observer* const observer = observer_;
      const Clock::time_point since = engine_.requested_at.load();
      bool threw = false;
      const bool mine = guarded(Calling::observer, the_observer, stage_, observer_deadline(), [&] {
        // What it throws is destroyed in here: that is the user's, too.
        const std::exception_ptr error = thrown_by([&] {
          if (announce) {
            observer->on_request(since);
            wants_status = observer->wants_status();
          }
          observer->on_event(event);
        });
        threw = error != nullptr;
      });
      if (!mine) return false;
      if (threw) observer_missed_ = true;
      if (announce) {
        observer_knows_ = true;
        wants_status_ = wants_status;
      }
    }
    return true;
  }

  bool has_more_to_tell() const noexcept {
    return observer_ != nullptr && !is_last_thread() && engine_.log.has_untaken();
  }

  static constexpr const char* the_observer = "the observer";

  std::string_view stage_name_view() const noexcept {
    return stage_ == nullptr ? std::string_view() : std::string_view(stage_->name());
  }

  // A twentieth of the grace period, at most half a second: an observer that hangs must not cost the
  // hooks their time.
  Clock::time_point observer_deadline() const noexcept {
    const Clock::duration most = std::clamp<Clock::duration>(
        engine_.grace / 20, std::chrono::milliseconds(20), std::chrono::milliseconds(500));
    return time_after(Clock::now(), most);
  }

  // Waits for the bell, showing the status each second if somebody watches.
  Next show_status(Clock::time_point until) {
    if (!show_status_now()) return Next::leave;
    return wait_for_bell(wants_status_ && observer_ != nullptr ? std::min(until, next_status_)
                                                               : until);
  }

  bool show_status_now() {
    const Clock::time_point now = Clock::now();
    if (!wants_status_ || observer_ == nullptr || now < next_status_ || is_last_thread())
      return true;
    next_status_ = now + std::chrono::seconds(1);
    LiveStatus status{};
    LASTCALL_TRY {
      status.since_request = now - engine_.requested_at.load();
      status.until_end = engine_.end_at.load() - now;
      status.stage = std::string(stage_name_view());
      for (const Stage* stage = engine_.first_stage; stage != nullptr; stage = stage->next()) {
        status.in_flight += stage->group().count();
        for (WaitGroup::Member& member : stage->group().members()) {
          if (status.names.size() < 8) status.names.push_back(std::move(member.name));
        }
      }
    }
    LASTCALL_CATCH(...) { return true; }
    Observer* const observer = observer_;
    return guarded(Calling::observer, the_observer, stage_, observer_deadline(),
                   [&] { thrown_by([&] { observer->on_status(status); }); });
  }

  // dump_signal: the snapshot as events, one a straggler. In two steps: the successor of a thread that
  // hangs in the first one tells what there is.
  Next step_dump() {
    if (dump_ == Dump::none) {
      engine_.dumps_wanted.store(0, std::memory_order_relaxed);
      dumped_ = who_is_in(engine_, &engine_.sections[driver_]);
      ask_kernel(dumped_, deadline_after(std::chrono::milliseconds(200)));
      dump_ = Dump::taken;
      return name_stacks(dumped_, std::chrono::milliseconds(200)) ? Next::again : Next::leave;
    }
    dump_ = Dump::none;
    LASTCALL_TRY {
      const Clock::time_point now = Clock::now();
      note(EventKind::signal, EventResult::ok, {}, "snapshot",
           std::to_string(dumped_.size()) + " in", now, now);
      for (const Straggler& straggler : dumped_) add_straggler(straggler, EventResult::begun);
      dumped_.clear();
    }
    LASTCALL_CATCH(...) {}
    return Next::again;
  }

  // Naming frames takes the dynamic loader's lock, which somebody may hold for ever (a dlopen() whose
  // constructors hang): so it is a call like a user's, and works on a copy.
  bool name_stacks(std::vector<Straggler>& stragglers, Clock::duration budget) {
    if (stragglers.empty() || is_last_thread()) return true;
    budget = std::clamp<Clock::duration>(budget, std::chrono::milliseconds(1),
                                         std::chrono::milliseconds(200));
    auto copy = stragglers;
    const bool mine = guarded(Calling::naming, "naming the stragglers' frames", nullptr,
                              Clock::now() + 2 * budget,
                              [&copy, budget] { thrown_by([&] { add_stacks(copy, budget); }); });
    if (mine) stragglers = std::move(copy);
    return mine;
  }

  void add_straggler(const Straggler& straggler, EventResult result) {
    const Clock::time_point now = Clock::now();
    note(EventKind::task, result, straggler.stage, straggler.name, describe_straggler(straggler),
         now - straggler.age, result == EventResult::begun ? now - straggler.age : now);
  }

  // ---- the end ------------------------------------------------------------------------------------

  bool everybody_out() const noexcept {
    for (const Stage* stage = engine_.first_stage; stage != nullptr; stage = stage->next()) {
      if (stage->group().count() != 0) return false;
    }
    for (const Section& section : engine_.sections) {
      if (section.state.load(std::memory_order_acquire) == Section::abandoned) return false;
    }
    return true;
  }

  void finish() noexcept {
    report_.cause = engine_.cause();
    if (engine_.was_forced.load(std::memory_order_acquire)) {
      report_.outcome = Outcome::forced;
    } else if (late_) {
      report_.outcome = Outcome::overrun;
    } else if (engine_.log.any_failed() || report_.cause.kind() == CauseKind::failure) {
      report_.outcome = Outcome::failed;
    } else {
      report_.outcome = Outcome::clean;
    }
    report_.exit_code = code_of(report_.outcome);
    engine_.raise_phase(Phase::finished);
    const Clock::time_point now = Clock::now();
    report_.elapsed = now - engine_.requested_at.load();
    LASTCALL_TRY {
      if (repeats_ > most_repeats_told) {
        note(EventKind::signal, EventResult::skipped, {}, "repeated signals",
             std::to_string(repeats_ - most_repeats_told) + " more: shutting down already", now,
             now);
      }
      note_phase(Phase::finished, now, describe_outcome(report_.outcome, report_.exit_code));
      report_.events = engine_.log.all();
      report_.failures = engine_.log.failures();
    }
    LASTCALL_CATCH(...) {}
    engine_.exit_code.store(report_.exit_code, std::memory_order_release);
  }

  int code_of(Outcome outcome) const noexcept {
    const ExitCodes& codes = engine_.options.exit_codes;
    switch (outcome) {
      case Outcome::clean: return codes.clean;
      case Outcome::failed: return codes.failed;
      case Outcome::overrun: return codes.overrun;
      case Outcome::forced: return 128 + SIGINT;
    }
    return codes.failed;
  }

  EngineState& engine_;
  Observer* observer_;
  At at_ = At::running;
  Stage* stage_ = nullptr;
  Calling calling_ = Calling::nothing;
  Hook* hook_ = nullptr;  // to be called next
  Calling hook_call_ = Calling::nothing;
  const std::string* hook_name_ = nullptr;  // being called
  Clock::time_point hook_begun_{};
  const char* callback_name_ = a_callback;
  bool request_told_ = false;
  bool cause_told_ = false;
  bool observer_knows_ = false;
  bool aborting_told_ = false;
  bool wants_status_ = false;
  bool flushed_ = false;
  bool shared_out_ = false;      // the stage's deadline takes the abort into account
  bool callbacks_owed_ = false;  // the stage's token could not be cancelled in time for them
  bool late_ = false;            // somebody was still in at the end
  bool observer_missed_ = false;
  bool thread_ended_ = false;  // by itself, in what it was calling
  static constexpr std::size_t most_repeats_told = 50;
  std::size_t repeats_ = 0;
  enum class Dump { none, taken };
  Dump dump_ = Dump::none;
  std::vector<Straggler> dumped_;
  Clock::time_point next_status_{};
  Clock::time_point wait_until_{};
  ShutdownReport report_;

  std::uint32_t driver_ = 0;
  bool has_standby_ = false;
  bool (*start_next_)(void*) noexcept = nullptr;
  void* start_next_context_ = nullptr;
};

}  // namespace lastcall::detail
