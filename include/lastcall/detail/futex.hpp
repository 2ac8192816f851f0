// Sleeping on a 32-bit word. Everything in the library that blocks on memory blocks here.
//
// A waker changes the word first and calls futex_wake_*() with its address afterwards. The waiter may
// be gone by then, and its memory with it: the address is only a key to the kernel (or to the table
// below) and is never read by the wake. A stray wake-up at a reused address is harmless, since every
// wait in the library stands in a loop that checks its word.
#pragma once

#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/config.hpp>
#include <lastcall/detail/thread_cancellation.hpp>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

#if LASTCALL_LINUX
#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#else
#include <pthread.h>

#include <condition_variable>
#include <mutex>
#include <new>
#endif

namespace lastcall::detail {

using Word = std::atomic<std::uint32_t>;
static_assert(sizeof(Word) == 4 && Word::is_always_lock_free);

#if LASTCALL_LINUX

inline long futex_call(const Word* word, int operation, std::uint32_t value,
                       const timespec* timeout) noexcept {
#if defined(SYS_futex_time64)
  constexpr long number = sizeof(timespec::tv_sec) == 8 ? SYS_futex_time64 : SYS_futex;
#else
  constexpr long number = SYS_futex;
#endif
  return ::syscall(number, word, operation | FUTEX_PRIVATE_FLAG, value, timeout, nullptr,
                   FUTEX_BITSET_MATCH_ANY);
}

/// Sleeps while `word` holds `expected`, until a wake, `deadline` or for no reason at all. Returns
/// false if the deadline has passed. Keeps errno. Where futex(2) is refused (a seccomp filter) it
/// sleeps for a millisecond instead: slower, never wrong.
inline bool futex_wait_until(const Word& word, std::uint32_t expected,
                             Clock::time_point deadline) noexcept {
  const int saved = errno;
#if defined(LASTCALL_TSAN)
  // A signal that finds a thread in a bare system call is kept by ThreadSanitizer until that thread's next
  // call that it intercepts. So there is one now and then, or a SIGTERM might wait for ever.
  const Clock::time_point whole = deadline;
  const Clock::time_point soon = Clock::now() + std::chrono::milliseconds(5);
  if (soon < deadline) deadline = soon;
#endif
  timespec at{};
  const bool bounded = deadline != Clock::time_point::max();
  if (bounded) at = to_timespec(deadline);
  bool in_time = true;
  if (futex_call(&word, FUTEX_WAIT_BITSET, expected, bounded ? &at : nullptr) != 0) {
    if (errno == ETIMEDOUT) {
      in_time = false;
    } else if (errno != EAGAIN && errno != EINTR) {
      nap(1'000'000);
      in_time = !bounded || Clock::now() < deadline;
    }
  }
#if defined(LASTCALL_TSAN)
  // Not a sleep of no time, which takes as long as the caller's timer slack.
  {
    const NoThreadCancellation not_here;
    ::poll(nullptr, 0, 0);
  }
  in_time = in_time || Clock::now() < whole;
#endif
  errno = saved;
  return in_time;
}

// A wake that is refused leaves somebody asleep for ever. The kernel has no cause for it; a filter or a
// tracer may have one, so it is tried again. (Where all are refused, waits are too, and only nap.)
inline void futex_wake_some(const Word* word, int most) noexcept {
  const int saved = errno;
  int attempts = 4;
  while (futex_call(word, FUTEX_WAKE, static_cast<std::uint32_t>(most), nullptr) < 0 &&
         --attempts > 0) {
  }
  errno = saved;
}
inline void futex_wake_one(const Word* word) noexcept { futex_wake_some(word, 1); }
inline void futex_wake_all(const Word* word) noexcept { futex_wake_some(word, INT_MAX); }

#else

// Without futex(2): a table of mutexes and condition variables that is never destroyed, so a waker
// never touches memory that the waiter owned. It costs no allocation, so that waking can't fail.
class ParkingTable {
 public:
  struct Bucket {
    std::mutex mutex;
    std::condition_variable changed;
  };

  static Bucket& bucket_of(const Word* word) noexcept {
    static const bool made = make();
    static_cast<void>(made);
    return table().buckets_[(reinterpret_cast<std::uintptr_t>(word) >> 4U) % size];
  }

 private:
  static bool make() noexcept {
    begin();
    // A child may have been forked while another thread, which it hasn't got, held one of the mutexes
    // or slept on it. If this fails for lack of memory, only such a child is the worse for it.
    ::pthread_atfork(nullptr, nullptr, &ParkingTable::begin);
    return true;
  }
  static void begin() noexcept { ::new (static_cast<void*>(room)) ParkingTable; }
  static ParkingTable& table() noexcept {
    return *std::launder(reinterpret_cast<ParkingTable*>(room));
  }

  static constexpr std::size_t size = 64;
  Bucket buckets_[size];

  // NOLINTNEXTLINE(readability-identifier-naming): private, if static
  alignas(std::max_align_t) static unsigned char room[];
};

alignas(std::max_align_t) inline unsigned char ParkingTable::room[sizeof(ParkingTable)];

// Made before main(): a child that is forked while another thread makes it would wait for that thread for ever.
inline const ParkingTable::Bucket& first_bucket = ParkingTable::bucket_of(nullptr);

inline bool futex_wait_until(const Word& word, std::uint32_t expected,
                             Clock::time_point deadline) noexcept {
  const NoThreadCancellation whole;  // futex(2) is no cancellation point either
  ParkingTable::Bucket& bucket = ParkingTable::bucket_of(&word);
  std::unique_lock<std::mutex> lock(bucket.mutex);
  if (word.load(std::memory_order_seq_cst) != expected) return true;
  if (deadline == Clock::time_point::max()) {
    bucket.changed.wait(lock);
    return true;
  }
  return bucket.changed.wait_until(lock, deadline) == std::cv_status::no_timeout;
}

// The bucket is shared between words, so everybody in it looks again.
inline void futex_wake_all(const Word* word) noexcept {
  ParkingTable::Bucket& bucket = ParkingTable::bucket_of(word);
  { const std::lock_guard<std::mutex> lock(bucket.mutex); }
  bucket.changed.notify_all();
}
inline void futex_wake_one(const Word* word) noexcept { futex_wake_all(word); }

#endif

inline void futex_wait(const Word& word, std::uint32_t expected) noexcept {
  futex_wait_until(word, expected, Clock::time_point::max());
}

}  // namespace lastcall::detail
