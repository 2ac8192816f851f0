// What the drain thread tells: lines of the story for the log, the log to the observer, the status to who
// watches, and a snapshot on demand.
#pragma once

#include <lastcall/detail/bounded_text.hpp>
#include <lastcall/detail/drain_calls.hpp>
#include <lastcall/detail/engine_snapshot.hpp>
#include <lastcall/detail/engine_state.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lastcall::detail {

// Belongs to whichever thread is the current driver, as all of EngineDrain.
class DrainStory {
 public:
  DrainStory(EngineState& engine, DrainCalls& calls) noexcept
      : engine_(engine), calls_(calls), observer_(engine.options.observer.get()) {}

  /// Writes a line of the story. With no memory for it the line is lost, never the shutdown.
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

  bool is_request_told() const noexcept { return request_told_; }
  /// Once it is requested. Idempotent.
  void tell_request() noexcept {
    if (std::exchange(request_told_, true)) return;
    const Cause cause = engine_.cause();
    // What came first is told first, also if its turn in the ring has not come.
    const SignalInfo* const signal = cause.signal();
    if (signal != nullptr && CauseAccess::peek(cause) == engine_.signal_record) {
      note_signal(*signal, EventResult::ok, cause.message());
    }
    const Clock::time_point since = engine_.requested_at.load();
    next_status_ = since + std::chrono::seconds(1);
    note_phase(Phase::announced, since, cause.message());
    engine_.log.mark_requested();
  }

  /// Takes over what the signal thread has read, and what on_signal functions have done.
  void tell_what_came() noexcept {
    // Taken first: each one's signal was in the ring before it.
    std::vector<Event> done = engine_.log.take_of_handlers();
    tell_signals();
    for (Event& event : done) {
      // Part of the shutdown's story if that was asked for meanwhile, and then after the request itself.
      if (engine_.requested()) {
        engine_.log.add_in_drain(std::move(event));
      } else {
        engine_.log.add(std::move(event));
      }
    }
  }
  /// The rest of the story but for its last line.
  void tell_last(Clock::time_point now) {
    tell_what_came();
    tell_rest_of_storm(now);
    LASTCALL_TRY {
      Event hook;
      if (engine_.log.give_up_handler(hook, now)) engine_.log.add(std::move(hook));
    }
    LASTCALL_CATCH(...) { engine_.log.note_lost(); }
  }

  /// Hands over the events that the observer has not seen. False: it hung, and this thread must leave.
  /// Some at a time, so that one that makes an event of each, by spawning for example, can't keep the drain
  /// from closing the stages; at the end all of them, or as many of thousands as there is time for, and the last.
  bool tell_observer(const Stage* stage, bool at_the_end) {
    constexpr unsigned most_at_once = 64;
    for (unsigned told = 0; has_more_to_tell(at_the_end); ++told) {
      if (told == most_at_once && !at_the_end) return true;
      if (at_the_end && Clock::now() >= tell_until_ && engine_.log.skip_to_last(most_at_once)) {
        observer_missed_ = true;
      }
      Event event;
      LASTCALL_TRY {
        if (!engine_.log.take(event)) break;
      }
      LASTCALL_CATCH(...) {
        observer_missed_ = true;
        return true;
      }
      const bool introduce = !observer_introduced_;
      const bool announce = request_told_ && !observer_knows_;
      bool wants_status = false;
      Observer* const observer = observer_;
      const Clock::time_point since = engine_.requested_at.load();
      const Clock::duration most = observer_time();
      bool threw = false;
      const bool mine = calls_observer(stage, [&] {
        // What it throws is destroyed in here: that is the user's, too. And it costs it that call alone.
        const auto call = [&threw](auto&& function) {
          if (thrown_by(function) != nullptr) threw = true;
        };
        if (introduce) call([&] { observer->on_time_limit(most); });
        if (announce) {
          call([&] { observer->on_request(since); });
          call([&] { wants_status = observer->wants_status(); });
        }
        call([&] { observer->on_event(event); });
      });
      if (!mine) return false;
      if (threw) observer_missed_ = true;
      observer_introduced_ = true;
      if (announce) {
        observer_knows_ = true;
        wants_status_ = wants_status;
      }
    }
    return true;
  }

  bool has_more_to_tell(bool at_the_end) const noexcept {
    return observer_ != nullptr && !calls_.is_last_thread() && (at_the_end || !is_too_slow()) &&
           engine_.log.has_untaken();
  }

  /// Whether the observer missed some of it: it hung, threw, ended its thread, or there was no memory for a line,
  /// or no other thread to go on if it hung.
  bool is_incomplete() const noexcept {
    const bool not_called =
        observer_ != nullptr && calls_.is_last_thread() && engine_.log.has_untaken();
    return observer_missed_ || not_called || engine_.log.any_lost();
  }
  /// It hung, or ended its thread, and would take thread after thread down: it is not called again.
  void lose_observer() noexcept {
    observer_ = nullptr;
    observer_missed_ = true;
  }

  /// `until`, or sooner when somebody watches who wants to see the status.
  Clock::time_point next_status(Clock::time_point until) const noexcept {
    return wants_status_ && observer_ != nullptr ? std::min(until, next_status_) : until;
  }

  /// Shows the status if somebody watches and a second is over. False: the observer hung, and this thread must
  /// leave.
  bool show_status(const Stage* current) {
    const Clock::time_point now = Clock::now();
    if (!wants_status_ || observer_ == nullptr || now < next_status_ || calls_.is_last_thread() ||
        is_too_slow()) {
      return true;
    }
    next_status_ = now + std::chrono::seconds(1);
    LiveStatus status{};
    LASTCALL_TRY {
      status.since_request = now - engine_.requested_at.load();
      status.until_end = engine_.end_at.load() - now;
      if (current != nullptr) status.stage = current->name();
      for (const Stage* stage = engine_.first_stage; stage != nullptr;
           stage = EngineState::after(*stage)) {
        status.in_flight += EngineState::group_of(*stage).count();
        for (WaitGroup::Member& member : EngineState::group_of(*stage).members()) {
          if (status.names.size() < 8) status.names.push_back(std::move(member.name));
        }
      }
    }
    LASTCALL_CATCH(...) { return true; }
    Observer* const observer = observer_;
    return calls_observer(current, [&] { thrown_by([&] { observer->on_status(status); }); });
  }

  /// dump_signal: whether the snapshot is wanted, or half told.
  bool has_dump() const noexcept { return dump_ != Dump::none || Clock::now() >= next_dump(); }
  /// When it will be told. Half of the time in a drain, whoever asks for it how often.
  Clock::time_point next_dump() const noexcept {
    const bool wanted = engine_.dumps_wanted.load(std::memory_order_relaxed) > 0;
    return wanted ? not_before_ : Clock::time_point::max();
  }
  /// The snapshot as events, one a straggler. In two steps: the successor of a thread that hangs in the first one
  /// tells what there is. False: this thread must leave.
  bool tell_dump() {
    if (dump_ == Dump::none) {
      engine_.dumps_wanted.store(0, std::memory_order_relaxed);
      dump_begun_ = Clock::now();
      dumped_ = who_is_in(engine_, &calls_.section());
      ask_kernel(dumped_, deadline_after(std::chrono::milliseconds(200)));
      dump_ = Dump::taken;
      return name_stacks(dumped_, std::chrono::milliseconds(200));
    }
    dump_ = Dump::none;
    const Clock::time_point now = Clock::now();
    if (engine_.requested()) not_before_ = now + (now - dump_begun_);
    LASTCALL_TRY {
      note(EventKind::signal, EventResult::ok, {}, "snapshot",
           std::to_string(dumped_.size()) + " in", now, now);
      for (const Straggler& straggler : dumped_) add_straggler(straggler, EventResult::begun);
      dumped_.clear();
    }
    LASTCALL_CATCH(...) {}
    return true;
  }

  /// Naming frames takes the dynamic loader's lock, which somebody may hold for ever (a dlopen() whose
  /// constructors hang): so it is a call like a user's, and touches
  /// nothing but an object of its own. False: it hung, and this thread must leave.
  bool name_stacks(std::vector<Straggler>& stragglers, Clock::duration budget) {
    if (stragglers.empty() || calls_.is_last_thread()) return true;
    budget = std::clamp<Clock::duration>(budget, std::chrono::milliseconds(1),
                                         std::chrono::milliseconds(200));
    StragglerStacks stacks(stragglers);
    const bool mine = calls_.guarded(
        DrainCall::naming, "naming the stragglers' frames", nullptr, Clock::now() + 2 * budget,
        [&stacks, budget] { thrown_by([&] { stacks.take(budget, Frames::named); }); });
    if (mine) stacks.share_with(stragglers);
    return mine;
  }

  /// Tells who is still in at the end, and that after three quarters of the time that is `left` only the end of the
  /// story is to be told. Each of them is an event, of up to some kilobytes: of thousands those that more than a
  /// quarter of that time would go to are one, which counts them. The report has them all.
  void add_stragglers(const std::vector<Straggler>& stragglers, Clock::duration left) noexcept {
    constexpr std::size_t always_told = 100;
    const Clock::time_point now = Clock::now();
    tell_until_ = time_after(now, left / 4 * 3);
    const Clock::time_point until = time_after(now, left / 4);
    std::size_t added = 0;
    for (const Straggler& straggler : stragglers) {
      if (added >= always_told && Clock::now() >= until) break;
      ++added;
      LASTCALL_TRY { add_straggler(straggler, EventResult::overran); }
      LASTCALL_CATCH(...) { engine_.log.note_lost(); }
    }
    if (added == stragglers.size()) return;
    if (observer_ != nullptr) observer_missed_ = true;
    char words[32];
    BoundedText count(words, sizeof words);
    count.add_digits(stragglers.size() - added).add(" more");
    note(EventKind::task, EventResult::overran, {}, count.view(), "there was no time to tell each",
         now, Clock::now());
  }

  void add_straggler(const Straggler& straggler, EventResult result) {
    const Clock::time_point now = Clock::now();
    note(EventKind::task, result, straggler.stage, straggler.name, describe_straggler(straggler),
         now - straggler.age, result == EventResult::begun ? now - straggler.age : now);
  }

 private:
  static constexpr const char* the_observer = "the observer";

  void tell_signals() noexcept {
    SeenSignal seen;
    while (engine_.seen_signals.pop(seen)) {
      using Verdict = SeenSignal::Verdict;
      // The wish that was the request is told with it; the later ones come after it.
      if (seen.verdict != Verdict::handled && seen.verdict != Verdict::dump) tell_request();
      if (seen.verdict == Verdict::shutdown) continue;
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
  // How many of a storm's signals had no line of their own.
  void tell_rest_of_storm(Clock::time_point now) {
    if (repeats_ <= most_repeats_told) return;
    note(EventKind::signal, EventResult::skipped, {}, "repeated signals",
         std::to_string(repeats_ - most_repeats_told) + " more: shutting down already", now, now);
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

  // A twentieth of the grace period, at most half a second: an observer that hangs must not cost the
  // hooks their time.
  Clock::duration observer_time() const noexcept {
    return std::clamp<Clock::duration>(engine_.grace / 20, std::chrono::milliseconds(20),
                                       std::chrono::milliseconds(500));
  }
  // False: it hung, and this thread must leave.
  template <class Body>
  bool calls_observer(const Stage* stage, Body body) {
    const Clock::time_point begun = Clock::now();
    if (!calls_.guarded(DrainCall::observer, the_observer, stage, begun + observer_time(), body)) {
      return false;
    }
    if (request_told_) observer_took_ += Clock::now() - begun;
    return true;
  }
  // One that takes its time, but never all of it: after a quarter of the grace period the hooks come first, and it
  // is told the rest when they are through.
  bool is_too_slow() const noexcept { return observer_took_ >= engine_.grace / 4; }

  EngineState& engine_;
  DrainCalls& calls_;
  Observer* observer_;
  bool request_told_ = false;
  bool observer_introduced_ = false;
  bool observer_knows_ = false;
  bool observer_missed_ = false;
  bool wants_status_ = false;
  Clock::duration observer_took_{};  // since the request
  Clock::time_point next_status_{};
  Clock::time_point tell_until_ = Clock::time_point::max();
  static constexpr std::size_t most_repeats_told = 50;
  std::size_t repeats_ = 0;
  enum class Dump { none, taken };
  Dump dump_ = Dump::none;
  Clock::time_point dump_begun_{};
  Clock::time_point not_before_{};
  std::vector<Straggler> dumped_;
};

}  // namespace lastcall::detail
