// The one timer thread that all deadlines share. (Shards stand 128 bytes apart: processors fetch lines in
// pairs.)
//
// It is started by the first arm() and sleeps while nothing is due. Links stand in the wheel of one of
// a few shards, chosen by thread, each with a lock of its own: threads that arm and disarm do not meet.
//
//  1. A link is in a wheel exactly while `armed`, and both change under its shard's lock only.
//  2. disarm() takes the lock. When it returns, the link is in no wheel; either due() was or will be
//     called for it (and hold() has kept its owner alive since under that same lock), or never will be.
//  3. No wake-up is lost. arm() publishes the shard's earliest tick, then reads `sleeping_until_`; the
//     timer thread publishes `sleeping_until_`, then reads the shards' earliest ticks. All four are
//     seq_cst, so at least one side sees the other: the thread looks again, or it is woken.
//  4. Nothing fires early: a deadline is rounded up to a tick, and a tick is reached when the clock is
//     at or past its start.
//  5. In a forked child the thread is gone; the next arm() there starts another. The locks are held
//     across the fork, so that the child finds them free and the wheels whole. If the parent had other
//     threads, or the timer thread was at work, the child forgets what is in the wheels: what hangs on
//     it may lie on stacks that are somebody else's now, or was being changed when the fork came. Links
//     of an earlier generation are in no wheel.
//
//  6. The handlers of forks are in place before anybody knows the service: no child finds its locks taken by
//     threads that it hasn't got.
//
// The service is made once and never destroyed: stragglers may use it until the process is gone.
#pragma once

#include <lastcall/detail/owned.hpp>
#include <lastcall/detail/posix.hpp>
#include <lastcall/detail/signal_pin.hpp>
#include <lastcall/detail/spin_bit.hpp>
#include <lastcall/detail/thread.hpp>
#include <lastcall/detail/throw_system_error.hpp>
#include <lastcall/detail/timer_wheel.hpp>

#include <sys/stat.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>

namespace lastcall::detail {

class TimerService {
 public:
  /// The process's own, or a shared object's with hidden symbols. Made on first use; std::bad_alloc if that
  /// fails.
  static TimerService& instance() {
    // acquire: it is whole. Pairs with the exchange in make().
    TimerService* const service = made.load(std::memory_order_acquire);
    return service != nullptr ? *service : make();
  }

  /// On the timer thread: while it lives no child is forked. But for who would wait for a second: two services'
  /// threads and a fork might wait for each other.
  class NoFork {
   public:
    explicit NoFork(TimerService& service) noexcept : lock_(service.no_fork_) { lock_.lock(); }
    NoFork(const NoFork&) = delete;
    NoFork& operator=(const NoFork&) = delete;
    ~NoFork() { lock_.unlock(); }

   private:
    SpinLock& lock_;
  };

  TimerService(const TimerService&) = delete;
  TimerService& operator=(const TimerService&) = delete;

  /// From now on `link` will be due at `when`. Starts the thread if there is none: std::system_error
  /// (EAGAIN) if that fails, and then nothing has changed. The link's hold and due must be set.
  /// `now` is a recent look at the clock.
  void arm(TimerLink* link, Clock::time_point when, Clock::time_point now = Clock::now()) {
    ensure_thread();
    const unsigned at = this_thread_number() % shard_count;
    Shard& shard = shards_[at];
    link->tick = tick_of(when);
    {
      const Held<SpinLock> lock(shard.lock);
      link->shard = static_cast<std::uint8_t>(at);
      link->armed = true;
      link->generation = generation_;
      link->service = this;
      shard.wheel.insert(link,
                         nanoseconds(now) / tick_length);  // not ahead of the clock: it has passed
      if (link->tick < shard.earliest.load(std::memory_order_relaxed)) {
        shard.earliest.store(link->tick, std::memory_order_seq_cst);  // invariant 3
      } else {
        return;  // somebody earlier in this shard has told the thread, or it will look by itself
      }
    }
    if (link_is_sooner(shard)) ring();
  }

  /// Whether `link`, which was armed here and is not due yet, will be due in this process. Sees to it that
  /// there is a thread, as arm() does. False in a forked child that has forgotten it.
  bool still_comes(const TimerLink& link) {
    ensure_thread();
    return link.generation == generation_;
  }

  /// Takes `link` out if it is in. True: it was in and due() will not be called.
  bool disarm(TimerLink* link) noexcept {
    Shard& shard = shards_[link->shard];
    const Held<SpinLock> lock(shard.lock);
    if (!link->armed) return false;
    take_out(shard, link);
    return true;
  }

  /// The same for who must not wait for ever: past `deadline` the link stays in. That harms nobody whose
  /// due() does nothing by then.
  void disarm_until(TimerLink* link, Clock::time_point deadline) noexcept {
    Shard& shard = shards_[link->shard];
    if (!shard.lock.lock_until(deadline)) return;
    if (link->armed) take_out(shard, link);
    shard.lock.unlock();
  }

  /// How many links are armed now; for tests.
  std::size_t armed_for_test() noexcept {
    std::size_t sum = 0;
    for (Shard& shard : shards_) {
      const Held<SpinLock> lock(shard.lock);
      sum += shard.wheel.size();
    }
    return sum;
  }

 private:
  static constexpr unsigned shard_count = 8;
  static constexpr std::uint64_t tick_length = 1'000'000;  // nanoseconds

  struct alignas(128) Shard {
    SpinLock lock;
    std::atomic<std::uint64_t> earliest{
        TimerWheel::never};  // a lower bound for what is in the wheel
    TimerWheel wheel;
  };

  // Under the shard's lock.
  void take_out(Shard& shard, TimerLink* link) const noexcept {
    if (link->generation == generation_) shard.wheel.remove(link);
    link->armed = false;
  }

  // With no memory for the handlers it has to do without: see is_running().
  TimerService() noexcept
      : watches_forks_(::pthread_atfork(&before_fork, &in_parent, &in_child) == 0) {}

  // Not by a static local: its guard would stay locked in a child that was forked meanwhile. Of several that
  // make one at the same time one wins; the handlers of the others stay, and so may be called more than once.
  [[gnu::cold, gnu::noinline]] static TimerService& make() {
    Owned<TimerService> candidate(new TimerService);
    TimerService* winner = nullptr;
    if (made.compare_exchange_strong(winner, candidate.get(), std::memory_order_acq_rel,
                                     std::memory_order_acquire)) {
      winner = candidate.release();
    }
    return *winner;
  }

  static std::uint64_t nanoseconds(Clock::time_point point) noexcept {
    const auto since =
        std::chrono::duration_cast<std::chrono::nanoseconds>(point.time_since_epoch());
    return since.count() > 0 ? static_cast<std::uint64_t>(since.count()) : 0U;
  }
  static std::uint64_t tick_of(Clock::time_point when) noexcept {
    return (nanoseconds(when) + (tick_length - 1)) / tick_length;  // up: invariant 4
  }
  static Clock::time_point time_of(std::uint64_t ticks) noexcept {
    if (ticks >= (std::uint64_t{1} << 62) / tick_length) return Clock::time_point::max();
    return Clock::time_point(std::chrono::duration_cast<Clock::duration>(
        std::chrono::nanoseconds(static_cast<std::int64_t>(ticks * tick_length))));
  }

  bool link_is_sooner(const Shard& shard) const noexcept {
    return shard.earliest.load(std::memory_order_seq_cst) <
           sleeping_until_.load(std::memory_order_seq_cst);
  }

  void ring() noexcept {
    // release: the thread that finds it rung sees what is in the wheel (it takes the lock, too).
    doorbell_.fetch_add(1, std::memory_order_release);
    futex_wake_one(&doorbell_);
  }

  // Whether the thread is there, in this process. Without fork handlers nobody has told a forked child
  // that it isn't; there the thread's process is asked for, each time.
  bool is_running() const noexcept {
    return running_.load(std::memory_order_acquire) &&
           (watches_forks_ || process_.load(std::memory_order_relaxed) == ::getpid());
  }

  void ensure_thread() {
    // acquire, and release below: whoever finds the thread running may rely on the service it was given.
    if (is_running()) return;
    // Before the lock, which a fork() takes that somebody makes while the loader has its own.
    pin_module_of(reinterpret_cast<const void*>(&thread_main));
    const Held<Mutex> lock(start_);
    if (is_running()) return;
    if (running_.load(std::memory_order_relaxed)) {
      forgets_ = true;
      become_child();
    }
    const BlockAllSignals quiet;
    pthread_attr_t attributes;
    ::pthread_attr_init(&attributes);
    ::pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_t thread{};
    const int error = ::pthread_create(&thread, &attributes, &thread_main, this);
    ::pthread_attr_destroy(&attributes);
    if (error != 0) throw_system_error(error, "starting the timer thread");
    process_.store(::getpid(), std::memory_order_relaxed);
    running_.store(true, std::memory_order_release);
  }

  static void* thread_main(void* self) {
    name_this_thread("lastcall-timer");
    keep_exact_time();
    const NoThreadCancellation always;  // nobody would come after it
    static_cast<TimerService*>(self)->run();
    return nullptr;
  }

  [[noreturn]] void run() noexcept {
    for (;;) {
      // acquire: before the shards are looked at, so that a ring after that look ends the sleep at once.
      const std::uint32_t rung = doorbell_.load(std::memory_order_acquire);
      const std::uint64_t now = nanoseconds(Clock::now()) / tick_length;
      std::uint64_t next = TimerWheel::never;
      for (Shard& shard : shards_) {
        const std::uint64_t wanted = fire_due(shard, now);
        if (wanted < next) next = wanted;
      }
      sleeping_until_.store(next, std::memory_order_seq_cst);  // invariant 3
      bool sooner = false;
      for (const Shard& shard : shards_) sooner = sooner || link_is_sooner(shard);
      if (!sooner) futex_wait_until(doorbell_, rung, time_of(next));
      // Awake: nobody needs to ring, since the shards are looked at before the next sleep.
      sleeping_until_.store(0, std::memory_order_seq_cst);
    }
  }

  // Returns the tick at which this shard wants to be looked at again.
  std::uint64_t fire_due(Shard& shard, std::uint64_t now) noexcept {
    if (shard.earliest.load(std::memory_order_seq_cst) == TimerWheel::never)
      return TimerWheel::never;
    TimerLink* due = nullptr;
    std::uint64_t next = 0;
    {
      const Held<SpinLock> lock(shard.lock);
      due = shard.wheel.advance(now);
      next = shard.wheel.next_tick();
      shard.earliest.store(next, std::memory_order_seq_cst);
      // Under the lock, which a fork takes: relaxed.
      if (due != nullptr) at_work_.store(true, std::memory_order_relaxed);
    }
    while (due != nullptr) {
      TimerLink* const link = due;
      due = link->next;  // the link may be gone after due()
      link->due(link);
    }
    // Release: a fork that sees it comes after all that was done.
    at_work_.store(false, std::memory_order_release);
    return next;
  }

  static void before_fork() noexcept {
    TimerService* const self = made.load(std::memory_order_acquire);
    if (self == nullptr) return;
    if (self->is_forking_here()) {
      ++self->fork_depth_;
      return;
    }
    // Before the shards' locks, which its holder may need.
    const bool no_other = self->no_fork_.lock_until(Clock::now() + std::chrono::seconds(1));
    self->start_.lock();
    self->has_no_fork_ = no_other;
    for (Shard& shard : self->shards_) shard.lock.lock();
    self->forgets_ = self->at_work_.load(std::memory_order_acquire) ||
                     !is_number_of_threads(self->running_.load(std::memory_order_relaxed) ? 2 : 1);
    self->fork_depth_ = 1;
    self->forking_.store(this_thread_mark(), std::memory_order_relaxed);
  }
  static void in_parent() noexcept {
    TimerService* const self = made.load(std::memory_order_acquire);
    // Made meanwhile by another thread, it isn't ours to unlock.
    if (self != nullptr && self->is_forking_here()) self->end_fork();
  }
  static void in_child() noexcept {
    TimerService* const self = made.load(std::memory_order_acquire);
    if (self == nullptr || !self->is_forking_here()) return;
    if (self->fork_depth_ == 1) self->become_child();
    self->end_fork();
  }
  // relaxed: this thread has written its own mark itself, or it is not there.
  bool is_forking_here() const noexcept {
    return forking_.load(std::memory_order_relaxed) == this_thread_mark();
  }
  void end_fork() noexcept {
    if (--fork_depth_ > 0) return;
    forking_.store(0, std::memory_order_relaxed);
    for (Shard& shard : shards_) shard.lock.unlock();
    const bool no_other = has_no_fork_;
    start_.unlock();
    if (no_other) no_fork_.unlock();
  }
  void become_child() noexcept {
    running_.store(false, std::memory_order_relaxed);
    sleeping_until_.store(0, std::memory_order_relaxed);
    at_work_.store(false, std::memory_order_relaxed);
    no_fork_.unlock();  // the timer thread may have it still
    if (!forgets_) return;
    ++generation_;
    for (Shard& shard : shards_) {
      shard.wheel = TimerWheel();
      shard.earliest.store(TimerWheel::never, std::memory_order_relaxed);
    }
  }
  // Where nobody tells: false.
  static bool is_number_of_threads(std::uint64_t wanted) noexcept {
#if LASTCALL_LINUX
    const int saved = errno;
    struct stat about {};
    const bool known = ::stat("/proc/self/task", &about) == 0;
    errno = saved;
    return known && about.st_nlink == wanted + 2;  // . and ..
#else
    static_cast<void>(wanted);
    return false;
#endif
  }

  // NOLINTNEXTLINE(readability-identifier-naming): private, if static
  static inline constinit std::atomic<TimerService*> made{nullptr};

  Shard shards_[shard_count];
  alignas(128) std::atomic<std::uint64_t> sleeping_until_{0};
  Word doorbell_{0};
  std::atomic<bool> running_{false};
  std::atomic<pid_t> process_{0};     // the thread's
  std::atomic<bool> at_work_{false};  // the timer thread is calling due()
  bool forgets_ = false;              // from before a fork to after it, under start_
  std::uint32_t generation_ = 0;      // changes in a forked child only, before it has other threads
  Mutex start_;
  std::atomic<ThreadMark> forking_{0};  // the thread that has the locks for a fork()
  int fork_depth_ = 0;                  // how many of its handlers have been called
  bool has_no_fork_ = false;            // it has that lock, too
  SpinLock no_fork_;
  const bool watches_forks_;  // last: the handlers may be called once it is set
};

}  // namespace lastcall::detail
