// The coordinator's signal thread: reads signals, lets wishes grow, keeps the clock, and ends the
// process if nobody else does. It runs no user code, takes no lock that user code can hold, and
// neither allocates nor frees.
//
// It has the trapped signals unblocked, so that somebody has. But a handler of the program's that was
// there before is called on, on whatever thread takes the signal, and may hang there. Such a signal is
// not for this thread's handler: it stays blocked, is left to the program's threads for a while, and if
// none has taken it then, because all of them block it or hang in that handler, it is taken without one.
#pragma once

#include <lastcall/detail/engine_state.hpp>
#include <lastcall/detail/last_rites.hpp>
#include <lastcall/detail/last_words.hpp>
#include <lastcall/detail/thread.hpp>
#include <lastcall/signal_trap.hpp>

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdlib>

#if LASTCALL_LINUX
#include <sys/signalfd.h>
#endif

// sigtimedwait(): not where POSIX's realtime signals are missing (macOS, OpenBSD).
#if defined(_POSIX_REALTIME_SIGNALS) && _POSIX_REALTIME_SIGNALS > 0
#define LASTCALL_CAN_WAIT_FOR_SIGNALS 1
#else
#define LASTCALL_CAN_WAIT_FOR_SIGNALS 0
#endif

namespace lastcall::detail {

class EngineSignals {
 public:
  EngineSignals(EngineState& engine, TrapCore& trap) noexcept : engine_(engine), trap_(trap) {
    ::sigemptyset(&open_);
    ::sigemptyset(&reserved_);
  }
  EngineSignals(const EngineSignals&) = delete;
  EngineSignals& operator=(const EngineSignals&) = delete;
  ~EngineSignals() {
    const int fd = reserved_fd_.load(std::memory_order_relaxed);
    if (fd >= 0) ::close(fd);
  }

  /// The thread will take this one, too. Before it runs, or by itself.
  void take_over(int number, bool has_handler_beneath) noexcept {
    if (can_reserve && has_handler_beneath) {
      ::sigaddset(&reserved_, number);
      any_reserved_ = true;
    } else {
      ::sigaddset(&open_, number);
    }
  }

  /// Before a number with a handler beneath is taken over, by the thread that asks for that: a descriptor that
  /// another one makes at its leisure would get a number that this one counts on. If there is none to be
  /// had, what is pending is looked up now and then. Not by two threads at once.
  void make_descriptor() noexcept {
#if LASTCALL_LINUX
    if (has_no_descriptor_.load(std::memory_order_relaxed) ||
        reserved_fd_.load(std::memory_order_relaxed) >= 0) {
      return;
    }
    sigset_t none;
    ::sigemptyset(&none);
    reserved_fd_.store(out_of_the_way(::signalfd(-1, &none, SFD_NONBLOCK | SFD_CLOEXEC)),
                       std::memory_order_release);
#endif
  }

  /// The thread's body; returns when `quit` is set and the bell rung.
  void loop() noexcept {
    engine_.signal_thread.store(this_thread_mark(), std::memory_order_relaxed);
    open_signals();
    // The first signal is the one that counts: what its way needs is in memory before it comes.
    read_signals();
    while (!engine_.quit.load(std::memory_order_acquire)) {
      const Clock::time_point next = next_deadline();
      engine_.signal_thread_wakes.store(next);
      // A section may have been entered while the deadlines were looked at: see guarded().
      const Clock::time_point again = next_deadline();
      sleep_until(again < next ? again : next);
      take_over_new_handlers();
      take_reserved();
      read_signals();
      engine_.mark_what_is_owed();
      look_at_clock();
      describe_sender();
    }
  }

 private:
  void sleep_until(Clock::time_point deadline) noexcept {
    // poll(2) passes over -1.
    pollfd watched[3] = {
        {trap_.fd(), POLLIN, 0},
        {engine_.signal_bell.fd(), POLLIN, 0},
        {is_any_pending() ? -1 : reserved_fd_.load(std::memory_order_acquire), POLLIN, 0}};
    const int ready = ::poll(watched, 3, poll_timeout(Clock::now(), short_of(deadline)));
    was_told_ = ready > 0 && watched[2].revents != 0;
    if (was_told_ && (watched[2].revents & POLLNVAL) != 0) forget_descriptor();  // it is closed
    if (ready <= 0 || watched[1].revents != 0) engine_.signal_bell.lower();
    const auto closed = static_cast<short>(watched[0].revents | watched[1].revents) & POLLNVAL;
    if ((ready < 0 && errno != EINTR) || (ready > 0 && closed != 0)) {
      // ENOMEM, a filter that refuses poll, or somebody has closed all descriptors, and that for ever: the clock
      // must go on.
      const timespec nap{0, ready < 0 ? 1'000'000 : 5'000'000};
      ::nanosleep(&nap, nullptr);
    }
  }

  // Linux lets a poll() of 25 s be 25 ms late, and one of two minutes 100 ms: a thousandth of the time,
  // five times that for a nice process. So all but the last hundredth is slept first. (A wait that ends
  // too soon is nothing here: the loop looks at the clock and waits again.)
  static Clock::time_point short_of(Clock::time_point deadline) noexcept {
    const Clock::time_point now = Clock::now();
    const Clock::duration left = deadline - now;
    if (deadline == Clock::time_point::max() || left < std::chrono::milliseconds(200))
      return deadline;
    return deadline - std::min<Clock::duration>(left / 100, std::chrono::milliseconds(250));
  }

  // What on_signal() added is trapped already.
  void take_over_new_handlers() noexcept {
    SignalHandler* const newest = engine_.handlers.load(std::memory_order_acquire);
    if (newest == seen_handlers_) return;
    for (SignalHandler* added = newest; added != seen_handlers_ && added != nullptr;
         added = added->next) {
      const int number = added->number.load(std::memory_order_relaxed);
      if (number != 0) take_over(number, added->has_handler_beneath);
    }
    seen_handlers_ = newest;
    open_signals();
  }

  void open_signals() noexcept {
    ::pthread_sigmask(SIG_UNBLOCK, &open_, nullptr);
#if LASTCALL_LINUX
    const int fd = reserved_fd_.load(std::memory_order_acquire);
    if (!any_reserved_ || fd < 0) return;
    if (::signalfd(fd, &reserved_, SFD_NONBLOCK | SFD_CLOEXEC) >= 0) return;
    // It would keep silent about the new numbers. Not closed if it isn't ours any more.
    const bool ours = errno != EINVAL && errno != EBADF;
    forget_descriptor();
    if (ours) ::close(fd);
#endif
  }

  void forget_descriptor() noexcept {
    has_no_descriptor_.store(true, std::memory_order_relaxed);
    reserved_fd_.store(-1, std::memory_order_release);
  }

  // So long a signal with a handler beneath is left to the program's threads, which may be slow.
  static constexpr std::chrono::milliseconds patience{100};

  bool is_any_pending() const noexcept { return next_due_ != Clock::time_point::max(); }
  Clock::time_point reserved_deadline() const noexcept {
    if (!any_reserved_ || is_any_pending()) return next_due_;
    const bool is_told = reserved_fd_.load(std::memory_order_acquire) >= 0;
    return is_told ? Clock::time_point::max() : Clock::now() + patience;
  }

#if LASTCALL_CAN_WAIT_FOR_SIGNALS
  static constexpr bool can_reserve = true;

  void take_reserved() noexcept {
    if (!any_reserved_) return;
    sigset_t due;
    if (!look_what_is_due(due)) return;
    // Of queued ones no more than a pipe has room for: the clock comes first.
    for (int turn = 0; turn < 2000; ++turn) {
      siginfo_t info{};
      constexpr timespec at_once{0, 0};
      const int number = ::sigtimedwait(&due, &info, &at_once);
      if (number > 0 && number < signal_limit) {
        hand_round_taken(number, info, pending_since_[number]);
      }
      if (number < 0 && errno != EINTR) break;
    }
    for (int number = 1; number < signal_limit; ++number) {
      if (::sigismember(&due, number) == 1) pending_since_[number] = not_pending;
    }
  }

  // Those that have been pending for long enough; false: none. Says when the next one will be.
  bool look_what_is_due(sigset_t& due) noexcept {
    ::sigemptyset(&due);
    sigset_t pending;
    if (::sigpending(&pending) != 0) ::sigemptyset(&pending);
    const Clock::time_point now = Clock::now();
    next_due_ = Clock::time_point::max();
    bool any = false;
    bool any_due = false;
    for (int number = 1; number < signal_limit; ++number) {
      Clock::time_point& since = pending_since_[number];
      if (::sigismember(&reserved_, number) != 1 || ::sigismember(&pending, number) != 1) {
        since = not_pending;
        continue;
      }
      any = true;
      if (since == not_pending) since = now;
      if (now >= since + patience) {
        ::sigaddset(&due, number);
        any_due = true;
      } else {
        next_due_ = std::min<Clock::time_point>(next_due_, since + patience);
      }
    }
    // It says so, but there is nothing: then it is somebody else's by now.
    woken_in_vain_ = was_told_ && !any ? woken_in_vain_ + 1 : 0;
    if (woken_in_vain_ > 1000) forget_descriptor();
    return any_due;
  }
#else
  // Its handler is called on this thread then, and must not hang.
  static constexpr bool can_reserve = false;
  void take_reserved() noexcept {}
#endif

  // The sender may be gone in a moment, and its name with it. The drain thread looks it up as soon as it
  // runs; should it hang, this one does, but not before the workers had the processor: it costs some
  // microseconds, and who was woken waits for them if there is one processor.
  void describe_sender() noexcept {
    if (!owes_description_ || Clock::now() < describes_at_) return;
    owes_description_ = false;
    engine_.signal_record->describe();
  }

  void read_signals() noexcept {
    SignalInfo batch[32];
    for (int turn = 0; turn < 64; ++turn) {
      const std::size_t count = trap_.read_own_batch(batch, 32);
      for (std::size_t i = 0; i < count; ++i) take(batch[i]);
      if (count < 32) break;
    }
  }

  void take(const SignalInfo& info) noexcept {
    using Verdict = SeenSignal::Verdict;
    // Somebody of the program's does take them: what is pending now has only just come.
    if (any_reserved_ && is_signal_number(info.number)) pending_since_[info.number] = not_pending;
    Verdict verdict = Verdict::handled;
    if (is_wish(info.number)) {
      verdict = wish(info);
    } else if (engine_.options.dump_signal == info.number) {
      verdict = Verdict::dump;
      engine_.dumps_wanted.fetch_add(1, std::memory_order_relaxed);
    }
    engine_.seen_signals.push(SeenSignal{info, verdict});
    // Only now: the signal comes before what its function does, in the story too.
    if (verdict == Verdict::handled) hand_to_handler(info);
    engine_.drain_bell.ring();
    if (verdict == Verdict::shutdown) {
      owes_description_ = true;
      describes_at_ = Clock::now() + std::chrono::milliseconds(1);
    }
  }

  bool is_wish(int number) const noexcept {
    for (const int wanted : engine_.options.signals) {
      if (wanted == number) return true;
    }
    return false;
  }

  SeenSignal::Verdict wish(const SignalInfo& info) noexcept {
    using Verdict = SeenSignal::Verdict;
    if (engine_.cause_record.load(std::memory_order_acquire) == nullptr) {
      engine_.signal_record->info = info;
      if (engine_.request(engine_.signal_cause)) {
        if (info.number == SIGINT) note_interrupt(info);
        return Verdict::shutdown;
      }
    }
    // Whoever asked may be in the middle of it, without the processor.
    if (!engine_.requested()) engine_.begin();
    if (info.number != SIGINT) return Verdict::repeated;
    if (interrupted_ &&
        info.received < time_after(last_interrupt_, engine_.options.repeat_window)) {
      return Verdict::echo;
    }
    note_interrupt(info);
    const Clock::time_point now = Clock::now();
    if (!engine_.draining_claimed.load(std::memory_order_acquire) &&
        now < engine_.announce_until.load()) {
      engine_.start_draining();
      return Verdict::skips_delay;
    }
    if (!engine_.abort_claimed.load(std::memory_order_acquire)) {
      engine_.end_at.lower_to(time_after(now, engine_.margin));
      engine_.abort();
      hurry_section();
      return Verdict::aborts;
    }
    force(info.number);
    return Verdict::repeated;
  }

  void note_interrupt(const SignalInfo& info) noexcept {
    interrupted_ = true;
    last_interrupt_ = info.received;
  }

  void hand_to_handler(const SignalInfo& info) noexcept {
    for (SignalHandler* handler = engine_.handlers.load(std::memory_order_acquire);
         handler != nullptr; handler = handler->next) {
      if (handler->number.load(std::memory_order_relaxed) == info.number)
        handler->pending.push(info);
    }
    engine_.handler_bell.ring();
  }

  // The third wish.
  void force(int number) noexcept {
    engine_.was_forced.store(true, std::memory_order_release);
    if (engine_.ending.load(std::memory_order_acquire) == Ending::destructor) {
      // It never exits the process: the drain ends here and now instead.
      engine_.end_at.lower_to(Clock::now());
      return;  // take() rings
    }
    write_last_words(engine_, "forced by a third wish");
    leave(128 + number);
  }

  [[noreturn]] void leave(int code) noexcept {
    if (engine_.options.exit_by_signal) {
      const Cause cause = engine_.cause();
      if (const SignalInfo* const info = cause.signal()) exit_as_by_signal(info->number);
    }
    std::_Exit(code);
  }

  Clock::time_point next_deadline() const noexcept {
    Clock::time_point next = std::min(section_deadline(), reserved_deadline());
    if (!engine_.requested()) return next;
    if (owes_description_) next = std::min(next, describes_at_);
    if (!is_handed_over()) next = std::min(next, forced_at());
    if (engine_.marks_owed.load(std::memory_order_acquire)) {
      next = std::min(next, Clock::now() + std::chrono::milliseconds(2));
    }
    if (!engine_.draining_claimed.load(std::memory_order_acquire)) {
      next = std::min(next, engine_.announce_until.load());
    } else if (!engine_.abort_claimed.load(std::memory_order_acquire)) {
      next = std::min(next, engine_.abort_at.load());
    }
    return next;
  }

  Clock::time_point section_deadline() const noexcept {
    const Section& section = engine_.sections[driver()];
    // seq_cst: see EngineState::signal_thread_wakes.
    if (section.state.load(std::memory_order_seq_cst) != Section::inside || !has_standby()) {
      return Clock::time_point::max();
    }
    return engine_.deadline_of(section);
  }

  // The end is nearer than it was: a hook that runs gets its share of what is left, and no more.
  void hurry_section() noexcept {
    Section& section = engine_.sections[driver()];
    const Stage* const stage = section.stage.load(std::memory_order_relaxed);
    // seq_cst: see DrainCalls::guarded().
    if (section.state.load(std::memory_order_seq_cst) != Section::inside || stage == nullptr)
      return;
    const Clock::time_point now = Clock::now();
    const Clock::duration own = std::max(section.deadline.load() - now, Clock::duration::zero());
    section.deadline.lower_to(engine_.deadline_of(*stage, now, own));
  }

  std::uint32_t driver() const noexcept {
    return engine_.current_driver.load(std::memory_order_relaxed);
  }
  bool has_standby() const noexcept {
    return engine_.standbys.load(std::memory_order_acquire) > driver();
  }

  void look_at_clock() noexcept {
    const Clock::time_point now = Clock::now();
    if (now >= section_deadline()) abandon_driver();
    if (!engine_.requested()) return;
    if (now >= engine_.announce_until.load()) engine_.start_draining();
    if (now >= engine_.abort_at.load()) engine_.abort();
    if (now >= forced_at()) end_by_force();
  }

  // The drain thread hangs in user code past its time: its successor goes on with the next item.
  void abandon_driver() noexcept {
    const std::uint32_t at = driver();
    std::uint32_t inside = Section::inside;
    // acq_rel: it races with the section's end, and one of the two wins.
    if (!engine_.sections[at].state.compare_exchange_strong(inside, Section::abandoned,
                                                            std::memory_order_acq_rel)) {
      return;
    }
    engine_.current_driver.store(at + 1, std::memory_order_release);
    futex_wake_all(&engine_.current_driver);
    engine_.drain_bell.ring();
  }

  // Somebody has the end in hand, and stops this thread in a moment.
  bool is_handed_over() const noexcept {
    return engine_.is_done() && !engine_.leaving.load(std::memory_order_acquire) &&
           !drain_is_late();
  }
  // drain() has to do without the drain thread, and is making a report of its own; a run() that came after it waits
  // for that.
  bool drain_is_late() const noexcept {
    return engine_.done.load(std::memory_order_acquire) == EngineState::done_without &&
           engine_.ending.load(std::memory_order_acquire) != Ending::destructor &&
           !engine_.taken_over.load(std::memory_order_acquire);
  }
  // Whoever is about to be done, a report or the last words in hand, has a moment more.
  Clock::time_point forced_at() const noexcept {
    const Clock::duration more = drain_is_late() || engine_.are_words_being_said()
                                     ? std::chrono::milliseconds(50)
                                     : Clock::duration();
    return time_after(engine_.hard_end(), more);
  }

  // False: the drain thread has just begun to say them, and has a moment.
  bool say_last_words() noexcept {
    if (engine_.begin_words()) {
      write_last_words(engine_, "out of time");
    } else if (Clock::now() < forced_at()) {
      return false;
    }
    return true;
  }

  void end_by_force() noexcept {
    if (is_handed_over()) return;
    if (engine_.ending.load(std::memory_order_acquire) == Ending::destructor) {
      // Its caller goes on, and gets no report.
      if (say_last_words()) engine_.set_done(EngineState::done_without);
      return;
    }
    if (!engine_.is_done() && engine_.ending.load(std::memory_order_acquire) == Ending::drain) {
      // The exit is its caller's. If even making a report hangs, this thread will be here again.
      const bool made =
          engine_.exit_code.load(std::memory_order_acquire) != EngineState::no_exit_code;
      engine_.set_done(made ? EngineState::done_with_report : EngineState::done_without);
      return;
    }
    int code = engine_.exit_code.load(std::memory_order_acquire);
    if (engine_.told.load(std::memory_order_acquire)) {
      // There may only be the flush left, which hangs.
      write_last_words(engine_, "out of time", LastWords::calls);
    } else if (!say_last_words()) {
      return;
    }
    if (code == EngineState::no_exit_code) code = engine_.options.exit_codes.overrun;
    leave(code);
  }

  EngineState& engine_;
  TrapCore& trap_;
  SignalHandler* seen_handlers_ = nullptr;
  sigset_t open_;      // what the thread has unblocked
  sigset_t reserved_;  // what has a handler beneath
  bool any_reserved_ = false;
  // Set by who makes it, forgotten by the thread.
  std::atomic<int> reserved_fd_{-1};
  std::atomic<bool> has_no_descriptor_{false};
  static constexpr Clock::time_point not_pending{};
  Clock::time_point pending_since_[signal_limit]{};
  Clock::time_point next_due_ = Clock::time_point::max();
  bool was_told_ = false;
  int woken_in_vain_ = 0;
  bool interrupted_ = false;
  Clock::time_point last_interrupt_{};
  bool owes_description_ = false;
  Clock::time_point describes_at_{};
};

}  // namespace lastcall::detail
