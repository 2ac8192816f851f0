// The coordinator's drain thread: one small step at a time, so that its successor can go on wherever it
// was left hanging.
#pragma once

#include <lastcall/detail/drain_calls.hpp>
#include <lastcall/detail/drain_story.hpp>
#include <lastcall/detail/engine_snapshot.hpp>
#include <lastcall/detail/engine_state.hpp>
#include <lastcall/detail/last_rites.hpp>
#include <lastcall/detail/last_words.hpp>
#include <lastcall/detail/thread.hpp>

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lastcall::detail {

// The state here, and in what it is made of, belongs to whichever thread is the current driver; it is handed on by
// the release of EngineState::current_driver.
class EngineDrain {
 public:
  explicit EngineDrain(EngineState& engine) noexcept
      : engine_(engine), calls_(engine), story_(engine, calls_) {}

  /// The body of drain thread number `mine`. `start_next` starts thread number `mine` + 1, which waits
  /// for its turn; false if there is none to be had. Returns when all is done, or when this thread came
  /// back too late from a call that it was abandoned in: then it may touch nothing any more.
  template <class StartNext>
  void drive(std::uint32_t mine, StartNext start_next) {
    if (!calls_.take_turn(mine, start_next)) return;
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
      if (next == Next::wait && !story_.has_more_to_tell(at_ == At::ended)) {
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

  // ---- one step -----------------------------------------------------------------------------------

  Next step() {
    // Put away: nobody is left who would wait for more.
    if ((engine_.current_driver.load(std::memory_order_acquire) & EngineState::driver_quits) != 0) {
      return Next::leave;
    }
    story_.tell_what_came();
    if (!story_.tell_observer(stage_, at_ == At::ended)) return Next::leave;
    if (story_.has_dump()) return story_.tell_dump() ? Next::again : Next::leave;
    // An abort has claimed the draining, whatever phase was told last: that is told first.
    if (at_ != At::running && engine_.abort_work_ready.load(std::memory_order_acquire)) {
      if (!aborting_told_ && at_ != At::ended) {
        aborting_told_ = true;
        story_.note_phase(Phase::aborting, engine_.aborting_since.load(), {});
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
    wait_until_ = std::min(until, story_.next_dump());
    return Next::wait;
  }

  Next step_running() {
    if (!engine_.requested()) return wait_for_bell(Clock::time_point::max());
    if (!story_.is_request_told()) {
      story_.tell_request();
      return Next::again;
    }
    if (!engine_.draining_claimed.load(std::memory_order_acquire)) {
      return show_status(engine_.announce_until.load());
    }
    // Claimed, but the phase and the time may be a moment behind: the bell comes after them.
    if (engine_.phase.load(std::memory_order_acquire) == Phase::announced) {
      return wait_for_bell(Clock::now() + std::chrono::milliseconds(1));
    }
    story_.note_phase(Phase::draining, engine_.draining_since.load(), {});
    stage_ = engine_.first_stage;
    at_ = At::stage;
    return Next::again;
  }

  Next step_stage() {
    stage_->begun_ = stage_ == engine_.first_stage ? engine_.draining_since.load() : Clock::now();
    stage_->deadline_ = engine_.deadline_of(*stage_, stage_->begun_, engine_.budget_of(*stage_));
    calls_.know_of_abort(engine_.abort_claimed.load(std::memory_order_acquire));
    story_.note(EventKind::stage, EventResult::begun, {}, stage_->name(), {}, stage_->begun_,
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
    CallbackLink* const callback = calls_.may_call_users() ? stage_->work_.take_one() : nullptr;
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
      begin_hook(*hook, DrainCall::stop);
      return Next::again;
    }
    stage_->group().close();
    at_ = At::waiting;
    return Next::again;
  }

  // The end may be much nearer now: what is left of this budget and the later ones share it.
  void share_out() noexcept {
    if (stage_ == nullptr || calls_.knows_of_abort()) return;
    calls_.know_of_abort(true);
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
      return story_.show_status(stage_) ? Next::again : Next::leave;
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
      story_.note(EventKind::hook, EventResult::skipped, stage_->name(), hook->name,
                  "the stage overran", now, now);
      return Next::again;
    }
    begin_hook(*hook, DrainCall::drained);
    return Next::again;
  }

  Next step_stage_over() {
    char words[48];
    BoundedText detail(words, sizeof words);
    const std::size_t in = stage_->overran_ ? stage_->group().count() : 0;
    if (in != 0) detail.add_digits(in).add(" still in");
    story_.note(EventKind::stage, stage_->overran_ ? EventResult::overran : EventResult::ok, {},
                stage_->name(), detail.view(), stage_->begun_, Clock::now());
    stage_ = stage_->next_or_close();
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
    if (!story_.show_status(stage_)) return Next::leave;
    return wait_for_bell(std::min(engine_.wait_until(), now + std::chrono::milliseconds(5)));
  }

  void list_stragglers() noexcept {
    LASTCALL_TRY {
      if (!everybody_out()) report_.stragglers = who_is_in(engine_, &calls_.section());
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
    return story_.name_stacks(report_.stragglers, left / 2) ? Next::again : Next::leave;
  }

  Next step_telling() {
    at_ = At::ended;
    const Clock::duration left = engine_.end_at.load() - Clock::now();
    story_.add_stragglers(report_.stragglers, std::max(left, Clock::duration::zero()));
    finish();
    return Next::again;
  }

  // Where nobody will ever see the report, and the observer missed some of it.
  void say_what_was_missed() noexcept {
    if (late_ && story_.is_incomplete() && !engine_.told.load(std::memory_order_relaxed) &&
        engine_.begin_words()) {
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
    while (rites_begun_ < last_rites) {
      // Past its time nobody takes over, since nothing but the exit is left: the signal thread does it. A rite that
      // ends its thread has a successor, which goes on with the next one.
      if (!calls_.guarded(DrainCall::flush, "flushing the streams", nullptr,
                          Clock::time_point::max(),
                          [rite = rites_begun_++, out = !late_] { perform_rite(rite, out); })) {
        return Next::leave;
      }
    }
    if (engine_.options.exit_by_signal) {
      if (const SignalInfo* const info = report_.cause.signal()) exit_as_by_signal(info->number);
    }
    std::_Exit(report_.exit_code);
  }

  // ---- user code ----------------------------------------------------------------------------------

  // A hook is called in a step of its own, so that the observer has been told that it begins, and has
  // not taken it down with itself if it hung.
  void begin_hook(Hook& hook, DrainCall call) {
    const Clock::time_point now = Clock::now();
    if (!calls_.may_call_users()) {
      story_.note(EventKind::hook, EventResult::skipped, stage_->name(), hook.name, "out of time",
                  now, now);
      return;
    }
    story_.note(EventKind::hook, EventResult::begun, stage_->name(), hook.name, {}, now, now);
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
    const bool mine = calls_.guarded(
        hook_call_, hook.name.c_str(), stage_, calls_.patience(stage_->deadline_), [&] {
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
    return calls_.guarded(DrainCall::callback, name, stage, calls_.patience(deadline),
                          [callback]() noexcept { CancelWork::run(callback); });
  }

  // Those of stages whose turn has not come run then: each stage's callbacks come before its hooks.
  bool run_abort_callbacks() {
    while (calls_.may_call_users()) {
      CallbackLink* const callback = engine_.abort_work.take_one();
      if (callback == nullptr) break;
      if (!run_callback(callback, an_abort_callback, nullptr,
                        engine_.wait_until() - engine_.margin / 2)) {
        return false;
      }
    }
    return true;
  }

  void note_hook(const std::string& name, bool threw, const std::string& detail) noexcept {
    LASTCALL_TRY {
      story_.note(EventKind::hook, threw ? EventResult::failed : EventResult::ok, stage_->name(),
                  name, detail, hook_begun_, Clock::now());
    }
    LASTCALL_CATCH(...) { engine_.log.note_lost(); }
  }

  // The previous thread was left hanging in something: that is written down, and it is not called again.
  void write_down_abandoned() noexcept {
    const Clock::time_point now = Clock::now();
    if (calls_.take_thread_ended()) {
      if (calls_.take_interrupted() == DrainCall::observer) story_.lose_observer();
      if (hook_name_ == nullptr) return;
      story_.note(EventKind::hook, EventResult::ok, stage_name_view(), *hook_name_,
                  "ended its thread", hook_begun_, now);
      hook_name_ = nullptr;
      return;
    }
    switch (calls_.take_interrupted()) {
      case DrainCall::observer: story_.lose_observer(); break;
      case DrainCall::callback:
        story_.note(EventKind::hook, EventResult::overran, stage_name_view(), callback_name_,
                    "abandoned on its thread", calls_.abandoned_section().begin.load(), now);
        if (at_ == At::callbacks) stage_->overran_ = stage_->still_used_ = true;
        break;
      case DrainCall::stop:
      case DrainCall::drained:
        story_.note(EventKind::hook, EventResult::overran, stage_name_view(), *hook_name_,
                    "abandoned on its thread", hook_begun_, now);
        // Its stage is past its budget. Those after one that hangs while it releases still run.
        stage_->overran_ = true;
        if (hook_call_ == DrainCall::stop) stage_->still_used_ = true;
        hook_name_ = nullptr;
        break;
      case DrainCall::naming:
      case DrainCall::flush:
      case DrainCall::nothing: break;
    }
  }

  // Waits for the bell, showing the status each second if somebody watches.
  Next show_status(Clock::time_point until) {
    if (!story_.show_status(stage_)) return Next::leave;
    return wait_for_bell(story_.next_status(until));
  }

  std::string_view stage_name_view() const noexcept {
    return stage_ == nullptr ? std::string_view() : std::string_view(stage_->name());
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
      story_.tell_last(now);
      story_.note_phase(Phase::finished, now, describe_outcome(report_.outcome, report_.exit_code));
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
  DrainCalls calls_;
  DrainStory story_;
  At at_ = At::running;
  Stage* stage_ = nullptr;
  Hook* hook_ = nullptr;  // to be called next
  DrainCall hook_call_ = DrainCall::nothing;
  const std::string* hook_name_ = nullptr;  // being called
  Clock::time_point hook_begun_{};
  const char* callback_name_ = a_callback;
  bool aborting_told_ = false;
  unsigned rites_begun_ = 0;
  bool callbacks_owed_ = false;  // the stage's token could not be cancelled in time for them
  bool late_ = false;            // somebody was still in at the end
  Clock::time_point wait_until_{};
  ShutdownReport report_;
};

}  // namespace lastcall::detail
