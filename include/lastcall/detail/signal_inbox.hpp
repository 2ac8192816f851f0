// Where the handler leaves signals for one trap, and where the trap's reader finds them.
//
// The writing half (post) is for signal handlers, on any thread, several at once; it never blocks.
// The reading half is for one thread at a time. Between them are a pipe that carries whole records,
// and for each number one spill: the place for a record that found the pipe full. The invariants I1
// to I4 are at the head of <lastcall/signal_trap.hpp>.
#pragma once

#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/config.hpp>
#include <lastcall/detail/posix.hpp>
#include <lastcall/detail/signal_numbers.hpp>
#include <lastcall/detail/thread_cancellation.hpp>
#include <lastcall/signal_info.hpp>

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <memory>
#include <type_traits>

namespace lastcall::detail {

/// One signal on its way through the pipe. Number 0 is a bell: it says "look", and nothing else.
/// Without initialisers, so that an array of them is not written to before it is used; SignalRecord{} is
/// all zeros.
struct SignalRecord {
  Clock::rep received;
  std::int32_t code;
  pid_t sender_pid;
  uid_t sender_uid;
  std::uint16_t number;
  bool exclusive;       // no other trap of this registry got it
  std::uint8_t unused;  // where padding would be: no stray byte of the stack is written
};
static_assert(std::is_trivially_default_constructible_v<SignalRecord>);
// POSIX: writes up to PIPE_BUF (512 at least) are atomic, so records of many handlers never mix.
static_assert(sizeof(SignalRecord) <= 512);
static_assert(signal_limit <= 65536);

/// What the library's clock says, by an async-signal-safe call.
inline Clock::rep now_in_handler() noexcept {
#if defined(__APPLE__)
  return Clock::now().time_since_epoch().count();  // there it isn't CLOCK_MONOTONIC
#else
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  const auto since = std::chrono::seconds(now.tv_sec) + std::chrono::nanoseconds(now.tv_nsec);
  return std::chrono::duration_cast<Clock::duration>(since).count();
#endif
}

/// Signals that nobody has seen, each number once.
class UnseenSignals {
 public:
  bool has(int number) const noexcept { return numbers_.has(number); }
  bool empty() const noexcept { return numbers_.empty(); }

  /// In the order in which those of one number came.
  void add(int number, Clock::rep received) noexcept {
    if (!has(number)) first_[number] = received;
    last_[number] = received;
    numbers_.add(number);
  }
  void keep_only(const SignalSet& numbers) noexcept { numbers_ = numbers_ & numbers; }

  /// Takes out those that later ones have undone, as the kernel does with what is pending: SIGCONT a signal
  /// that stops the process, and such a one SIGCONT.
  void drop_undone() noexcept {
    if (!has(SIGCONT)) return;
    bool goes_on = true;
    for (const int stop : {SIGTSTP, SIGTTIN, SIGTTOU}) {
      if (!has(stop)) continue;
      if (last_[stop] > last_[SIGCONT]) {
        goes_on = false;
      } else {
        numbers_.remove(stop);
      }
    }
    if (!goes_on) numbers_.remove(SIGCONT);
  }

  /// Takes the one out that came first, or is more urgent if two came at once. There must be one.
  int pop() noexcept {
    int first = numbers_.most_urgent();
    for (int number = numbers_.next(0); number != 0; number = numbers_.next(number)) {
      if (first_[number] < first_[first]) first = number;
    }
    numbers_.remove(first);
    return first;
  }

 private:
  SignalSet numbers_;
  // Of those in the set. What found the pipe full has the time of the one that it joined.
  Clock::rep first_[signal_limit];
  Clock::rep last_[signal_limit];
};

/// See the head of the file. Made and destroyed while no handler knows it.
class SignalInbox {
 public:
  /// Throws std::system_error (EMFILE, ENFILE) or std::bad_alloc.
  SignalInbox() : pipe_(make_pipe("making the self-pipe of a signal trap", Place::out_of_the_way)) {
    std::size_t bytes = 65536;
#if defined(F_GETPIPE_SZ)
    const int size = ::fcntl(pipe_.read_end.get(), F_GETPIPE_SZ);
    if (size > 0) bytes = static_cast<std::size_t>(size);
#endif
    // As many as the pipe holds, so that one reading empties it, and one of each number beyond.
    roomy_ = bytes / sizeof(SignalRecord);
    // Not initialised: memory that no signal has needed is never touched.
    // NOLINTNEXTLINE(modernize-make-unique): that would
    entries_.reset(new Entry[roomy_ + static_cast<std::size_t>(signal_limit)]);
    // But for what the first one needs, in here and in the kernel: that one may be in a hurry.
    entries_[0].next = nobody;
    ring();
    gather();
  }
  SignalInbox(const SignalInbox&) = delete;
  SignalInbox& operator=(const SignalInbox&) = delete;

  /// Polls readable while a signal is pending.
  int fd() const noexcept { return pipe_.read_end.get(); }

  // ---- The handler's half. Async-signal-safe.

  /// Leaves one record, in the pipe or else in the spill of its number (I1, I2).
  void post(const SignalRecord& record) noexcept {
    // The pipe orders the two threads in fact; this and its counterpart in gather() say so in the
    // language: what the interrupted thread did before happens before what the reader does after.
    posted_.fetch_add(1, std::memory_order_release);
    if (put(record)) return;
    spill(record);
    ring();
  }

  // ---- The reader's half. One thread at a time.

  /// Takes up to `most` pending signals, most urgent first. Never blocks, allocates nothing. The
  /// descriptor stays readable if any are left.
  std::size_t take(SignalInfo* out, std::size_t most) noexcept {
    const int saved = errno;
    gather();
    std::size_t taken = 0;
    while (taken < most && !queued_.empty()) {
      const SignalRecord record = pop(queued_.most_urgent());
      out[taken++] = SignalInfo{record.number, record.code, record.sender_pid, record.sender_uid,
                                Clock::time_point(Clock::duration(record.received))};
    }
    if (!queued_.empty()) ring();  // I3
    errno = saved;
    return taken;
  }

  /// Throws away what is pending of `numbers`; those of them that no other trap got.
  UnseenSignals discard(const SignalSet& numbers) noexcept {
    const int saved = errno;
    gather();
    UnseenSignals unseen;
    for (int number = numbers.next(0); number != 0; number = numbers.next(number)) {
      while (queued_.has(number)) {
        const SignalRecord record = pop(number);
        if (record.exclusive) unseen.add(number, record.received);
      }
    }
    if (!queued_.empty()) ring();  // I3
    errno = saved;
    return unseen;
  }

  /// In a forked child: the descriptors stop being the parent's pipe; their numbers stay taken, so
  /// that whoever closes them closes nobody else's. `nowhere` is a pipe that nobody writes to, or
  /// two times -1 if there was none to be had. Async-signal-safe.
  void cut_off(int nowhere_read, int nowhere_write) noexcept {
    // The write end of a pipe never polls readable either, and replacing needs no new descriptor.
    replace(pipe_.read_end.get(), nowhere_read >= 0 ? nowhere_read : pipe_.write_end.get());
    if (nowhere_write >= 0) replace(pipe_.write_end.get(), nowhere_write);
  }

 private:
  using Index = std::uint32_t;
  static constexpr Index nobody = UINT32_MAX;

  struct Entry {
    SignalRecord record;
    Index next;
  };
  struct Queue {
    Index first = nobody;
    Index last = nobody;
  };

  // A spill's state: the phase in the low two bits, and whether any record that merged into it was
  // exclusive. empty -> filling (the one handler that has it writes `record`) -> full -> empty (the
  // reader has copied it).
  static constexpr std::uint32_t empty = 0;
  static constexpr std::uint32_t filling = 1;
  static constexpr std::uint32_t full = 2;
  static constexpr std::uint32_t phase = 3;
  static constexpr std::uint32_t any_exclusive = 4;
  struct Spill {
    std::atomic<std::uint32_t> state{empty};
    SignalRecord record;
  };
  static_assert(std::atomic<std::uint32_t>::is_always_lock_free);

  static void replace(int fd, int by) noexcept {
#if LASTCALL_LINUX
    ::dup3(by, fd, O_CLOEXEC);
#else
    if (::dup2(by, fd) >= 0) ::fcntl(fd, F_SETFD, FD_CLOEXEC);
#endif
  }

  bool put(const SignalRecord& record) noexcept {
    ssize_t done = 0;
    do {
      // No cancellation point: a thread that is interrupted by our handler would unwind out of it, and I6 would
      // wait for it for ever.
      done = bare_write(pipe_.write_end.get(), &record, sizeof record);
    } while (done < 0 && errno == EINTR);
    return done >= 0;
  }

  // A full pipe needs no bell: it is readable, and who empties it looks at the spills afterwards
  // (I2).
  void ring() noexcept { put(SignalRecord{}); }

  void spill(const SignalRecord& record) noexcept {
    Spill& to = spills_[record.number];
    const std::uint32_t mine = record.exclusive ? any_exclusive : 0;
    // relaxed: a guess for the exchange.
    std::uint32_t seen = to.state.load(std::memory_order_relaxed);
    for (;;) {
      const bool take_it = (seen & phase) == empty;
      const std::uint32_t next = take_it ? filling | mine : seen | mine;
      // Also where it changes nothing: an exchange that succeeds has seen the latest value, so the
      // record that this one merges into is pending still. Acquire: the reader has copied the
      // record before; release: the reader of that record has seen all that came before this
      // signal.
      if (to.state.compare_exchange_weak(seen, next, std::memory_order_acq_rel,
                                         std::memory_order_relaxed)) {
        if (!take_it) return;
        break;
      }
    }
    to.record = record;
    // filling -> full, whatever was merged meanwhile. Release: the record is written.
    to.state.fetch_xor(filling ^ full, std::memory_order_release);
  }

  // Moves all that is pending into the queues: the pipe first, then the spills (I2 needs that
  // order).
  void gather() noexcept {
    SignalRecord batch[64];
    // No more than the pipe holds, so that a storm can't keep the reader here; what was in it when
    // the reader came is read in any case.
    for (std::size_t read = 0; read < roomy_;) {
      const ssize_t got = bare_read(pipe_.read_end.get(), batch, sizeof batch);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) break;
      static_cast<void>(posted_.load(std::memory_order_acquire));  // see post()
      const std::size_t count = static_cast<std::size_t>(got) / sizeof batch[0];
      for (std::size_t at = 0; at < count; ++at) push(batch[at]);
      if (static_cast<std::size_t>(got) < sizeof batch) break;  // that was all
      read += count;
    }
    for (int number = 1; number < signal_limit; ++number) {
      Spill& from = spills_[number];
      // acquire: the record is whole. The exchange acquires what those did that merged into it, and
      // releases the copying of the record to the next handler that fills it.
      if ((from.state.load(std::memory_order_acquire) & phase) != full) continue;
      SignalRecord record = from.record;
      const std::uint32_t state = from.state.exchange(empty, std::memory_order_acq_rel);
      record.exclusive = (state & any_exclusive) != 0;
      push(record);
    }
  }

  void push(const SignalRecord& record) noexcept {
    // A bell; or what somebody wrote who took the descriptor for another one.
    if (!is_signal_number(record.number)) return;
    Queue& queue = queues_[record.number];
    if (used_ >= roomy_ && queue.first != nobody) {
      // I4: the last places are kept for numbers that have none. This one merges.
      if (record.exclusive) entries_[queue.last].record.exclusive = true;
      return;
    }
    Index at = free_;
    if (at != nobody) {
      free_ = entries_[at].next;
    } else {
      at = fresh_++;
    }
    ++used_;
    entries_[at].record = record;
    entries_[at].next = nobody;
    if (queue.first == nobody) {
      queue.first = at;
      queued_.add(record.number);
    } else {
      entries_[queue.last].next = at;
    }
    queue.last = at;
  }

  SignalRecord pop(int number) noexcept {
    Queue& queue = queues_[number];
    const Index at = queue.first;
    const SignalRecord record = entries_[at].record;
    queue.first = entries_[at].next;
    if (queue.first == nobody) queued_.remove(number);
    entries_[at].next = free_;
    free_ = at;
    --used_;
    return record;
  }

  Pipe pipe_;
  std::atomic<std::uint32_t> posted_{0};
  Spill spills_[signal_limit];

  std::unique_ptr<Entry[]> entries_;
  std::size_t roomy_ = 0;  // so many are in use: only a number that has none gets another
  std::size_t used_ = 0;
  Index fresh_ = 0;  // entries from here on were never used
  Index free_ = nobody;
  Queue queues_[signal_limit];
  SignalSet queued_;
};

}  // namespace lastcall::detail
