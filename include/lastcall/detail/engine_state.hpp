// What the threads of one coordinator share.
//
// Two threads, two trusts. The signal thread (engine_signal.hpp) polls, marks the tree, keeps the clock
// and can always end the process: it takes no lock that user code can hold, and neither allocates nor
// frees. The drain thread (engine_drain.hpp) runs what users wrote. When it hangs there past its time,
// the signal thread abandons it and wakes its successor, which goes on with the next item.
#pragma once

#include <lastcall/cancellation.hpp>
#include <lastcall/detail/engine_log.hpp>
#include <lastcall/detail/posix.hpp>
#include <lastcall/detail/shutdown_options.hpp>
#include <lastcall/detail/thread_end.hpp>
#include <lastcall/detail/thread_id.hpp>
#include <lastcall/stage.hpp>

#include <algorithm>
#include <atomic>
#include <deque>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>

namespace lastcall::detail {

// An atomic time point. Sequentially consistent: see EngineState::signal_thread_wakes.
class AtomicTime {
 public:
  explicit AtomicTime(Clock::time_point at = Clock::time_point::max()) noexcept
      : count_(at.time_since_epoch().count()) {}
  Clock::time_point load() const noexcept {
    return Clock::time_point(Clock::duration(count_.load(std::memory_order_seq_cst)));
  }
  void store(Clock::time_point at) noexcept {
    count_.store(at.time_since_epoch().count(), std::memory_order_seq_cst);
  }
  /// Sets it unless it is set already (not max()); what it is now.
  Clock::time_point set_once(Clock::time_point at) noexcept {
    Clock::rep seen = Clock::time_point::max().time_since_epoch().count();
    const bool first = count_.compare_exchange_strong(seen, at.time_since_epoch().count(),
                                                      std::memory_order_seq_cst);
    return first ? at : Clock::time_point(Clock::duration(seen));
  }
  void lower_to(Clock::time_point at) noexcept {
    Clock::rep seen = count_.load(std::memory_order_relaxed);
    while (at.time_since_epoch().count() < seen &&
           !count_.compare_exchange_weak(seen, at.time_since_epoch().count(),
                                         std::memory_order_seq_cst, std::memory_order_relaxed)) {
    }
  }

 private:
  std::atomic<Clock::rep> count_;
};

// One call into user code by a drain thread. Each drain thread has its own, so that one that was
// abandoned stays readable for as long as it hangs. Other threads read it at any time, so each member
// is one atomic; what the pointers point to lives as long as the engine.
struct Section {
  enum class Kind : std::uint8_t {
    hook,
    observer,
    flush
  };  // hook: and callbacks; who is "still in"

  static constexpr std::uint32_t idle = 0;
  static constexpr std::uint32_t inside = 1;
  static constexpr std::uint32_t abandoned = 2;
  static constexpr std::uint32_t returned = 3;  // after it was abandoned

  Word state{idle};
  AtomicTime deadline;
  std::atomic<Kind> kind{};
  std::atomic<const char*> name{""};
  std::atomic<const Stage*> stage{nullptr};
  std::atomic<pid_t> thread_id{0};
  AtomicTime begin;
};

// A signal that was received, on its way to the drain thread, which tells the observer.
struct SeenSignal {
  enum class Verdict : std::uint8_t {
    shutdown,
    repeated,
    echo,
    skips_delay,
    aborts,
    dump,
    handled
  };
  SignalInfo info{};
  Verdict verdict{};
};

// One writer (the signal thread), one reader, no allocation. When it is full the newest is dropped:
// only the story loses by it.
template <class T, std::size_t Size>
class Ring {
 public:
  bool push(const T& item) noexcept {
    const std::size_t at = written_.load(std::memory_order_relaxed);
    // acquire: the reader is done with the place.
    if (at - read_.load(std::memory_order_acquire) == Size) return false;
    items_[at % Size] = item;
    written_.store(at + 1, std::memory_order_release);
    return true;
  }
  bool pop(T& out) noexcept {
    const std::size_t at = read_.load(std::memory_order_relaxed);
    if (at == written_.load(std::memory_order_acquire)) return false;
    out = items_[at % Size];
    read_.store(at + 1, std::memory_order_release);
    return true;
  }
  bool empty() const noexcept {
    return read_.load(std::memory_order_relaxed) == written_.load(std::memory_order_acquire);
  }

 private:
  T items_[Size]{};
  std::atomic<std::size_t> written_{0};
  std::atomic<std::size_t> read_{0};
};

// An on_signal function. Appended to a list that is only ever added to.
struct SignalHandler {
  std::atomic<int> number{0};  // 0: it could not be trapped after all
  bool has_handler_beneath = false;
  std::function<void(const SignalInfo&)> run;
  Ring<SignalInfo, 64> pending;
  SignalHandler* next = nullptr;
};

// A word to sleep on that counts how often it was rung.
class Bell {
 public:
  std::uint32_t seen() const noexcept { return word_.load(std::memory_order_acquire); }
  void ring() noexcept {
    word_.fetch_add(1, std::memory_order_release);
    futex_wake_all(&word_);
  }
  void wait(std::uint32_t seen, Clock::time_point until) const noexcept {
    futex_wait_until(word_, seen, until);
  }

 private:
  Word word_{0};
};

/// How a caller waits for the end.
enum class Ending : std::uint32_t { nobody, drain, run, destructor };

struct EngineState final : StageHost {
  static constexpr unsigned most_drivers = 64;

  explicit EngineState(ShutdownOptions given)
      : options(std::move(given)),
        grace(bounded(options.grace_period)),
        announce(bounded(options.announce_delay)),
        margin(std::min(bounded(options.abort_margin), (grace - announce) / 2)) {
    // abort() marks it. Where nobody is aborted it is not cancelled at last by who destroys the engine.
    abort_source.disarm();
  }
  ~EngineState() { release(cause_record.load(std::memory_order_acquire)); }

  // -- what was asked for
  const ShutdownOptions options;
  const Clock::duration grace;
  const Clock::duration announce;
  const Clock::duration margin;
  const pid_t owner = ::getpid();
  const pid_t main_thread = current_thread_id();

  // -- the stages: a list that is only added to, before the request
  Stage* first_stage = nullptr;
  std::mutex stages_mutex;  // adders only
  std::deque<std::unique_ptr<Stage>> stages;

  // -- the request. One word, set once, is the request; begin() does what follows from it, and whoever
  // needs that done and can't wait for a requester that lost the processor in the middle does it again
  std::atomic<const CauseRecord*> cause_record{nullptr};
  std::atomic<Phase> phase{Phase::running};
  // Filled by the signal thread, which can't allocate.
  SignalCauseRecord* const signal_record = new SignalCauseRecord;
  const Cause signal_cause = CauseAccess::adopt(signal_record);
  AtomicTime requested_at;
  AtomicTime end_at;          // everybody is gone by then
  AtomicTime announce_until;  // when the first stage's token is cancelled
  AtomicTime abort_at;        // when abort_token() is cancelled
  AtomicTime draining_since;
  AtomicTime aborting_since;
  std::atomic<bool> draining_claimed{false};
  std::atomic<bool> abort_claimed{false};
  std::atomic<bool> was_forced{false};

  const Cause idle_cause = Cause::cancelled("the last task has left");
  CancellationSource abort_source;
  CancelWork abort_work;
  std::atomic<bool> abort_marking{false};
  std::atomic<bool> abort_work_ready{false};
  // A thread that was stopped in the middle of the tree has a lock that is needed for marking it: the
  // signal thread tries again now and then.
  std::atomic<bool> marks_owed{false};

  // -- signals on their way to the drain thread and to the on_signal thread
  Ring<SeenSignal, 128> seen_signals;
  std::atomic<std::uint32_t> dumps_wanted{0};
  std::atomic<SignalHandler*> handlers{nullptr};
  Bell handler_bell;

  // -- the threads
  PollableFlag signal_bell{"making the coordinator's bell", Place::out_of_the_way};
  Bell drain_bell;
  static constexpr std::uint32_t driver_quits = 1U << 31;  // on top of the number: no more turns
  Word current_driver{0};
  std::atomic<unsigned> standbys{0};  // the highest driver that has been started
  Section sections[most_drivers];
  // When the signal thread looks at the clock next. It stores this, then looks at the sections; a drain
  // thread enters its section, then loads this: all sequentially consistent, so one sees the other.
  AtomicTime signal_thread_wakes;
  std::atomic<ThreadMark> signal_thread{0};  // its mark
  std::atomic<bool> quit{false};

  // -- the end
  std::atomic<Ending> ending{Ending::nobody};
  static constexpr std::uint32_t not_done = 0;
  static constexpr std::uint32_t done_with_report = 1;
  static constexpr std::uint32_t done_without = 2;  // time was up for drain() or the destructor
  Word done{not_done};
  static constexpr int no_exit_code = std::numeric_limits<int>::min();
  std::atomic<int> exit_code{no_exit_code};  // set before done_with_report
  std::atomic<bool> taken_over{false};     // done_without, and drain() has made a report of its own
  std::atomic<bool> told{false};           // the observer has been told all that the report says
  std::atomic<bool> leaving{false};        // somebody is flushing, and then ends the process
  std::atomic<bool> main_was_late{false};  // nobody had come when the waiting was over
  std::atomic<bool> words_begun{false};    // somebody says the last words: see begin_words()

  EngineLog log;
  std::atomic<std::size_t> spawned_in{0};  // spawned tasks of all stages, for stop_when_idle
  std::atomic<bool> any_left{false};       // one of them has left

  /// A span of which several can be added to the present without overflow: some 70 years at most.
  static Clock::duration bounded(std::chrono::milliseconds span) noexcept {
    constexpr Clock::duration most = Clock::duration::max() / 4;
    if (span >= std::chrono::duration_cast<std::chrono::milliseconds>(most)) return most;
    return span;
  }

  // -- stages, whose insides are for the coordinator's threads alone
  static const Stage* after(const Stage& stage) noexcept { return stage.next(); }
  static const WaitGroup& group_of(const Stage& stage) noexcept { return stage.group(); }

  /// Joins the threads of tasks that have left; the others look after themselves from now on.
  static void stop_joining(const Stage& stage, Clock::time_point deadline) noexcept {
    stage.tasks_->join_finished_until(deadline);
    stage.tasks_->abandon();
  }
  /// The same for when the allocator may be held: the stage must live for ever.
  static void forsake_tasks(const Stage& stage) noexcept { stage.tasks_->forsake(); }

  /// Appends a stage; under stages_mutex. May throw std::bad_alloc. Null: the drain has been through the last one.
  Stage* append_stage(std::string name, Clock::duration budget) {
    stages.push_back(std::unique_ptr<Stage>(new Stage(std::move(name), budget, *this)));
    Stage* const added = stages.back().get();
    if (stages.size() == 1) {
      first_stage = added;
    } else if (!stages[stages.size() - 2]->link_next(added)) {
      stages.pop_back();
      return nullptr;
    }
    return added;
  }

  /// What the announce delay, the abort margin and the other stages leave is the first stage's.
  Clock::duration budget_of(const Stage& stage) const noexcept {
    if (&stage != first_stage) return stage.budget_;
    Clock::duration left = grace - announce - margin;
    for (const Stage* other = stage.next(); other != nullptr; other = other->next()) {
      left -= other->budget_;
    }
    return left;
  }

  // -- what stages tell (see StageHost)
  void task_admitted(Stage&) noexcept override {
    spawned_in.fetch_add(1, std::memory_order_relaxed);
  }
  void task_withdrawn(Stage&) noexcept override {
    // It may have kept the one that left before it from being the last one.
    task_left();
  }
  void task_left() noexcept {
    // acq_rel: the last one out has seen all the others out, and what they stored before that: so relaxed.
    if (spawned_in.fetch_sub(1, std::memory_order_acq_rel) == 1 &&
        any_left.load(std::memory_order_relaxed) && options.stop_when_idle) {
      request(idle_cause);
    }
  }
  void task_failed(Stage& stage, const Failure& failure) noexcept override {
    log.note_failed();  // there may be no memory for more
    LASTCALL_TRY { log.add_failure(failure.task, failure.error); }
    LASTCALL_CATCH(...) {}
    static_cast<void>(stage);
    request(cause_of(failure));
  }
  void task_ended(Stage& stage, const TaskReport& task) noexcept override {
    // Before the request only failures are worth a line: a service may spawn for years.
    if (task.failure != nullptr || requested()) {
      LASTCALL_TRY {
        log.add_in_drain(
            {EventKind::task, task.failure != nullptr ? EventResult::failed : EventResult::ok,
             stage.name(), task.name,
             task.failure != nullptr ? describe_exception(task.failure->error) : std::string(),
             task.begin, task.end});
      }
      LASTCALL_CATCH(...) {}
      drain_bell.ring();
    }
    if (!task.spawned) return;
    any_left.store(true, std::memory_order_relaxed);
    task_left();
  }
  void run_late_stop(Stage& stage, const std::string& name,
                     const std::function<void()>& hook) override {
    const TaskScope scope(this, name);
    const Clock::time_point begin = Clock::now();
    const std::exception_ptr error = thrown_by(hook);
    if (error) {
      log.note_failed();
      log.add_failure(name, error);
    }
    log.add_in_drain({EventKind::hook, error ? EventResult::failed : EventResult::ok, stage.name(),
                      name, error ? describe_exception(error) : std::string(), begin,
                      Clock::now()});
    drain_bell.ring();
  }

  // -- what several threads do ----------------------------------------------------------------------

  /// True for the first. Neither allocates nor throws; safe on the signal thread.
  bool request(const Cause& why) noexcept {
    const CauseRecord* const record =
        why ? CauseAccess::peek(why) : record_of(CommonCause::cancelled);
    const CauseRecord* nobody = nullptr;
    retain(record);
    if (!cause_record.compare_exchange_strong(nobody, record, std::memory_order_acq_rel)) {
      release(record);  // never the last reference: `why` has one
      return false;
    }
    begin();
    return true;
  }

  /// What follows from a request. Idempotent.
  void begin() noexcept {
    const SignalInfo* const info = cause().signal();
    const bool hurried = info != nullptr && info->number == SIGINT;
    const Clock::time_point at = requested_at.set_once(Clock::now());
    const Clock::time_point end = time_after(at, grace);
    end_at.set_once(end);
    const Clock::time_point until = hurried ? at : time_after(at, announce);
    announce_until.set_once(until);
    abort_at.set_once(end - margin);
    // release: whoever sees the phase sees the cause and the times.
    raise_phase(Phase::announced);
    // First of all: whatever becomes of this thread from here on, the clock is looked at. (The signal thread
    // looks at it anyhow, and a worker waits for the mark.)
    if (signal_thread.load(std::memory_order_relaxed) != this_thread_mark()) signal_bell.raise();
    if (until == at) {
      start_draining();  // rings
    } else {
      drain_bell.ring();
    }
  }

  /// Empty before the request.
  Cause cause() const noexcept {
    return CauseAccess::share(cause_record.load(std::memory_order_acquire));
  }
  bool requested() const noexcept {
    return phase.load(std::memory_order_acquire) != Phase::running;
  }

  void raise_phase(Phase to) noexcept {
    Phase seen = phase.load(std::memory_order_relaxed);
    while (seen < to && !phase.compare_exchange_weak(seen, to, std::memory_order_acq_rel,
                                                     std::memory_order_relaxed)) {
    }
  }

  /// Ends the announce delay: the first stage's token is cancelled. Idempotent.
  void start_draining() noexcept {
    // Not "claimed": who claimed it may have lost the processor before it marked.
    if (is_cancelled(first_stage->node())) return;
    draining_since.set_once(Clock::now());
    draining_claimed.store(true, std::memory_order_release);
    raise_phase(Phase::draining);
    mark(*first_stage);
    drain_bell.ring();
  }

  /// Cancels abort_token() and every stage's token. Idempotent. Only the signal thread calls it.
  void abort() noexcept {
    // seq_cst: see DrainCalls::guarded().
    if (abort_claimed.exchange(true, std::memory_order_seq_cst)) return;
    start_draining();
    aborting_since.store(Clock::now());  // the phases' times are in their order
    raise_phase(Phase::aborting);
    for (Stage* stage = first_stage; stage != nullptr; stage = stage->next()) mark(*stage);
    mark_abort();
    drain_bell.ring();
  }

  /// Cancels a stage's token and wakes its waiters; its callbacks are the drain thread's. Idempotent.
  /// Waits for a moment at most: what could not be done then is owed, and done by the signal thread.
  void mark(Stage& stage) noexcept {
    stage.mark_wanted_.store(true, std::memory_order_release);
    mark(stage.node(), stage.work(), stage.marking_, stage.work_ready_);
  }
  void mark_abort() noexcept {
    mark(TreeAccess::node_of(abort_source), abort_work, abort_marking, abort_work_ready);
  }
  void mark_what_is_owed() noexcept {
    if (!marks_owed.exchange(false, std::memory_order_acq_rel)) return;
    for (Stage* stage = first_stage; stage != nullptr; stage = stage->next()) {
      if (stage->mark_wanted_.load(std::memory_order_acquire)) mark(*stage);
    }
    if (abort_claimed.load(std::memory_order_acquire)) mark_abort();
    drain_bell.ring();
  }
  void mark(Node* root, CancelWork& work, std::atomic<bool>& busy,
            std::atomic<bool>& ready) noexcept {
    if (ready.load(std::memory_order_acquire)) return;
    // Not a lock to wait for: who has it may have been stopped, too.
    if (!busy.exchange(true, std::memory_order_acquire)) {
      const Clock::time_point patience = Clock::now() + std::chrono::milliseconds(2);
      const bool all = ready.load(std::memory_order_relaxed) || mark_until(root, work, patience);
      if (all) ready.store(true, std::memory_order_release);
      busy.store(false, std::memory_order_release);
      if (all) return;
    }
    marks_owed.store(true, std::memory_order_release);
  }
  /// Whether a lock in a tree is held by a thread that was stopped: who waits for it waits for ever.
  bool has_stuck_marks() const noexcept {
    if (abort_claimed.load(std::memory_order_acquire) &&
        !abort_work_ready.load(std::memory_order_acquire)) {
      return true;
    }
    for (const Stage* stage = first_stage; stage != nullptr; stage = stage->next()) {
      if (stage->mark_wanted_.load(std::memory_order_acquire) &&
          !stage->work_ready_.load(std::memory_order_acquire)) {
        return true;
      }
    }
    return false;
  }
  bool mark_until(Node* root, CancelWork& work, Clock::time_point patience) noexcept {
    bool all = false;
    {
      Marking marking(cause_record.load(std::memory_order_acquire), work);
      all = marking.try_mark(root, patience);
    }
    return work.wake(patience) && all;
  }

  bool is_done() const noexcept { return done.load(std::memory_order_acquire) != not_done; }

  /// True for the first, who says the last words: the drain thread, for an observer that missed something, or the
  /// signal thread, for a drain thread that is late. (A third wish is said in any case.)
  bool begin_words() noexcept { return !words_begun.exchange(true, std::memory_order_acq_rel); }
  /// Whether they are being said, by the drain thread. Afterwards it says so in one of the two ways.
  bool are_words_being_said() const noexcept {
    return words_begun.load(std::memory_order_acquire) && !told.load(std::memory_order_acquire) &&
           (leaving.load(std::memory_order_acquire) || !is_done());
  }

  void set_done(std::uint32_t how) noexcept {
    std::uint32_t before = not_done;
    done.compare_exchange_strong(before, how, std::memory_order_acq_rel);
    futex_wake_all(&done);
  }

  /// The latest moment at which the drain still waits for somebody: a little before the end, so that
  /// the report is written and the streams are flushed inside the grace period. On a machine that hung
  /// spinners keep busy each thread needs some turns of the scheduler before it has shown its stack, so
  /// it is a twentieth of the grace period, up to 200 ms; but over 50 ms only as far as that leaves those
  /// still in three quarters of the abort margin, and less where that leaves them less than half of it.
  Clock::time_point wait_until() const noexcept {
    const Clock::time_point end = end_at.load();
    if (end == Clock::time_point::max()) return end;
    constexpr Clock::duration most = std::chrono::milliseconds(200);
    Clock::duration least = std::chrono::milliseconds(50);
    if (margin > Clock::duration::zero()) least = std::min(least, margin / 2);
    return end - std::min({grace / 20, most, std::max(least, margin / 4)});
  }

  /// When a stage has to be through that begins now, or goes on now, and may still take `own`: after
  /// that time; or, if there is less than all that are left were promised, after its share of what there
  /// is. So the last stages get their turn whatever the first ones did.
  Clock::time_point deadline_of(const Stage& stage, Clock::time_point now,
                                Clock::duration own) const noexcept {
    const bool aborted = abort_claimed.load(std::memory_order_acquire);
    const Clock::time_point limit =
        aborted ? wait_until() : std::min(abort_at.load(), wait_until());
    Clock::duration promised = own;
    for (const Stage* later = stage.next(); later != nullptr; later = later->next()) {
      promised += later->budget_;
    }
    const Clock::duration room = std::max(limit - now, Clock::duration::zero());
    if (promised <= room) return now + own;
    const double share = static_cast<double>(own.count()) /
                         static_cast<double>(std::max<Clock::rep>(promised.count(), 1));
    return now + std::chrono::duration_cast<Clock::duration>(room * share);
  }

  /// When a call into user code is abandoned: at its own deadline, and a hook or callback in time for
  /// the report, an observer in time for the exit. Nobody takes over after the flush: there only the
  /// exit is left, which the signal thread can do.
  Clock::time_point deadline_of(const Section& section) const noexcept {
    switch (section.kind.load(std::memory_order_relaxed)) {
      case Section::Kind::hook: return std::min(section.deadline.load(), wait_until());
      case Section::Kind::observer: return std::min(section.deadline.load(), end_at.load());
      case Section::Kind::flush: break;
    }
    return Clock::time_point::max();
  }

  /// When the signal thread ends the process by itself. What is left of the 100 ms after it is for the
  /// last words, and for the kernel, which takes thousands of threads apart.
  Clock::time_point hard_end() const noexcept {
    return time_after(end_at.load(), Clock::duration(std::chrono::milliseconds(20)));
  }
};

}  // namespace lastcall::detail
