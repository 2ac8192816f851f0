// The end of run() after drain(): the flush, for a bounded time, and the exit.
#pragma once

#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/engine_state.hpp>
#include <lastcall/detail/futex.hpp>
#include <lastcall/detail/last_rites.hpp>
#include <lastcall/detail/last_words.hpp>
#include <lastcall/detail/posix.hpp>
#include <lastcall/detail/thread.hpp>
#include <lastcall/detail/thread_cancellation.hpp>
#include <lastcall/detail/thread_id.hpp>
#include <lastcall/shutdown_report.hpp>
#include <lastcall/signal_info.hpp>

#include <pthread.h>
#include <sys/types.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>

namespace lastcall::detail {

/// The last rites, on a thread of their own, so that one that hangs keeps nobody from the exit.
class FlushThread {
 public:
  explicit FlushThread(bool everybody_out) noexcept : everybody_out_(everybody_out) {}
  FlushThread(const FlushThread&) = delete;
  FlushThread& operator=(const FlushThread&) = delete;

  bool begin() noexcept {
    over_.store(0, std::memory_order_relaxed);
    pthread_t unused{};
    const BlockAllSignals quiet;
    if (start_thread(unused, &FlushThread::thread_main, this) == 0) return true;
    over_.store(1, std::memory_order_relaxed);
    return false;
  }

  bool is_on() const noexcept { return over_.load(std::memory_order_acquire) == 0; }
  void wait_until(Clock::time_point until) noexcept {
    while (is_on() && Clock::now() < until) futex_wait_until(over_, 0, until);
  }
  /// To be asked while it is not on.
  bool is_complete() const noexcept { return rites_begun_ == last_rites; }
  pid_t thread_id() const noexcept { return thread_id_.load(std::memory_order_relaxed); }

 private:
  static void* thread_main(void* self) {
    auto& flush = *static_cast<FlushThread*>(self);
    struct Over {
      Word& word;
      ~Over() {
        word.store(1, std::memory_order_release);
        futex_wake_all(&word);
      }
    };
    const NoThreadCancellation own;
    const Over at_the_end{flush.over_};
    flush.thread_id_.store(current_thread_id(), std::memory_order_relaxed);
    while (flush.rites_begun_ < last_rites) {
      const unsigned rite = flush.rites_begun_++;
      const OpenToThreadCancellation to_cancels;
      perform_rite(rite, flush.everybody_out_);
      to_cancels.let_thread_end_here();
    }
    return nullptr;
  }

  const bool everybody_out_;
  unsigned rites_begun_ = 0;  // whoever sees that the thread is over sees it
  std::atomic<pid_t> thread_id_{0};
  Word over_{1};
};

/// Flushes, until the end that the drain has, for 100 ms at least, and ends the process.
[[noreturn]] inline void exit_after_drain(const EngineState& engine,
                                          const ShutdownReport& report) noexcept {
  enum class Words { not_begun, begun, said };
  static std::atomic<Words> words{Words::not_begun};
  const NoThreadCancellation whole;
  keep_exact_time();
  FlushThread flush(report.stragglers.empty());
  const Clock::time_point begun = Clock::now();
  const Clock::time_point until =
      std::max(engine.end_at.load(), begun + std::chrono::milliseconds(100));
  // A stream's buffer may end the thread that flushes it: another one goes on with the next.
  while (flush.begin()) {
    flush.wait_until(until);
    if (flush.is_on() || flush.is_complete()) break;
  }
  // Without a thread it is left out: nobody would end the process if it hung here.
  if (flush.is_on() || !flush.is_complete()) {
    Words seen = Words::not_begun;
    if (words.compare_exchange_strong(seen, Words::begun, std::memory_order_acq_rel)) {
      if (flush.is_on()) {
        write_flush_hangs(engine, begun, flush.thread_id());
      } else {
        write_not_flushed(engine);
      }
      words.store(Words::said, std::memory_order_release);
    } else {
      // Another caller of run() is saying it. Many that exit at once leave it without a processor, so they wait for
      // it; but not for ever, should it hang.
      const Clock::time_point patience = Clock::now() + std::chrono::milliseconds(50);
      while (words.load(std::memory_order_acquire) != Words::said && Clock::now() < patience) {
        nap(1'000'000);
      }
    }
  }
  if (engine.options.exit_by_signal) {
    if (const SignalInfo* const info = report.cause.signal()) exit_as_by_signal(info->number);
  }
  std::_Exit(engine.exit_code.load(std::memory_order_acquire));
}

}  // namespace lastcall::detail
