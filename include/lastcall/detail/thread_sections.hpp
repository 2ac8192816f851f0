// Sections: how a thread says, without one atomic read-modify-write, "I am inside that object now", and
// how another waits until nobody is.
//
// This is the read side of user-space RCU, cut down to what a WaitGroup needs. Each thread has a record
// of its own, which outlives it. A section is
//
//   S1  touching = object        a plain store
//   S2  is the object open?      a load of the object's word
//   S3  use the object           only if S2 said so
//   S4  touching = nullptr       a release store, and the last that the section does
//
// and who wants the object for itself does
//
//   W1  shut the object          an atomic change of its word
//   W2  fence every thread       membarrier(2), private and expedited
//   W3  wait until no record says `touching == object`
//
// After W3 no thread is in S3, and none will come: that is Dekker's argument with one side's fence paid
// by the other. When the kernel runs W2 on a thread's processor, that thread is somewhere in its program.
// Before S2: then its S2 comes after W1 and sees the object shut. After S2, hence after S1 (only the
// compiler could swap them, and is forbidden to): then S1 is in memory before W3 reads it. A thread that
// isn't running went through the scheduler, which fences too. What S3 wrote is seen after W3 because S1
// and S4 are release stores and W3 reads with acquire: whichever of this thread's later values W3 finds,
// all that came before it is visible.
//
// Where membarrier is missing (another system, an old kernel, a seccomp filter), and under
// ThreadSanitizer, which knows no such fence, S1 is a sequentially consistent exchange and W2 nothing:
// then S1, S2, W1 and W3 stand in the one order of all sequentially consistent operations, and the same
// argument holds without the kernel. It is decided once, when the first record is made.
//
// A section must be a few instructions without calls: whoever is at W3 waits for it. A thread that is
// preempted inside one holds W3 up until it runs again; one that ends (pthread_exit) is never inside.
#pragma once

#include <lastcall/detail/config.hpp>
#include <lastcall/detail/spin_bit.hpp>

#include <pthread.h>

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <new>

#if LASTCALL_LINUX && !defined(LASTCALL_TSAN)
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lastcall::detail {

/// What no two threads should write in turn is this far apart.
inline constexpr std::size_t cache_line = 64;

/// Where number `index` is in a table that grows by chunks of 16, 32, 64, ...: nothing ever moves, and
/// small programs have small tables.
struct ChunkPlace {
  static constexpr std::uint32_t first_size = 16;
  static constexpr std::uint32_t chunks = 6;
  static constexpr std::uint32_t capacity = first_size * ((1U << chunks) - 1);  // 1008

  static constexpr std::uint32_t size_of(std::uint32_t chunk) noexcept {
    return first_size << chunk;
  }
  static constexpr ChunkPlace of(std::uint32_t index) noexcept {
    const auto chunk = static_cast<std::uint32_t>(std::bit_width(index / first_size + 1)) - 1;
    return {chunk, index - first_size * ((1U << chunk) - 1)};
  }

  std::uint32_t chunk;
  std::uint32_t offset;
};

/// Such a chunk on the heap, zeroed by T's constructor; null if there is no memory. Never throws.
template <class T>
T* make_chunk(std::uint32_t chunk) noexcept {
  static_assert(alignof(T) == cache_line);
  const std::size_t size = ChunkPlace::size_of(chunk);
  void* const room = ::operator new(size * sizeof(T), std::align_val_t(cache_line), std::nothrow);
  if (room == nullptr) return nullptr;
  T* const first = static_cast<T*>(room);
  for (std::size_t at = 0; at < size; ++at) ::new (static_cast<void*>(first + at)) T();
  return first;
}

template <class T>
void free_chunk(T* chunk) noexcept {
  static_assert(std::is_trivially_destructible_v<T>);
  ::operator delete(static_cast<void*>(chunk), std::align_val_t(cache_line));
}

class ThreadSections;

/// One thread's record. Never freed; when its thread ends, another thread takes it over.
struct alignas(cache_line) ThreadRecord {
  std::atomic<const void*> touching{nullptr};
  // The rest is constant once the record is published.
  ThreadSections* sections = nullptr;
  ChunkPlace place{0, 0};
  bool has_fence = false;

  /// S1. Sections don't nest.
  void open(const void* object) noexcept {
    if (has_fence) {
      touching.store(object, std::memory_order_release);
      std::atomic_signal_fence(std::memory_order_seq_cst);  // keeps the compiler from moving S2 up
    } else {
      touching.exchange(object, std::memory_order_seq_cst);
    }
  }
  /// S4. Touches the record only: the object may be gone the moment that this is seen.
  void close() noexcept { touching.store(nullptr, std::memory_order_release); }
};

struct ThreadState {
  ThreadRecord* record = nullptr;
  bool ending = false;         // no record any more for what runs late in a thread's life
  std::uint16_t patience = 0;  // attempts to pass over after the table was found full
};

// Trivially destroyed and constant-initialised, so that reading it is one instruction in an executable.
inline constinit thread_local ThreadState thread_state{};

/// The records of all threads. One in a process; but a shared object with hidden symbols has one of its
/// own, so an object remembers whose threads may use it (ThreadRecord::sections). Lives on the heap for
/// ever: it must survive the shared object that made it.
class ThreadSections {
 public:
  ThreadSections(const ThreadSections&) = delete;
  ThreadSections& operator=(const ThreadSections&) = delete;

  /// Null: no memory, no pthread key, or another thread is just making it. Ask again later.
  static ThreadSections* instance() noexcept {
    ThreadSections* const found = of_process.load(std::memory_order_acquire);
    return found != nullptr ? found : make();
  }

  /// The calling thread's record, made if need be. Null if it can have none: all are taken, there is no
  /// memory, or the thread is at its end.
  ThreadRecord* attach() noexcept {
    ThreadState& state = thread_state;
    if (state.record != nullptr) return state.record->sections == this ? state.record : nullptr;
    if (state.ending || !open_.load(std::memory_order_relaxed)) return nullptr;
    if (state.patience != 0) {
      --state.patience;
      return nullptr;
    }
    ThreadRecord* const record = claim();
    if (record == nullptr) {
      state.patience = 256;
      return nullptr;
    }
    state.record = record;
    return record;
  }

  /// W2 and W3, for an object that was shut (W1) by a sequentially consistent change. False if
  /// `deadline` passes while some thread is still inside.
  bool wait_out(const void* object, Clock::time_point deadline) noexcept {
    if (has_fence_) fence_every_thread();
    for (std::uint32_t chunk = 0; chunk < ChunkPlace::chunks; ++chunk) {
      // A chunk that isn't seen here was published after W2, by a thread whose S2 is later still.
      ThreadRecord* const records = chunks_[chunk].load(std::memory_order_seq_cst);
      if (records == nullptr) continue;
      for (std::uint32_t at = 0; at < ChunkPlace::size_of(chunk); ++at) {
        Backoff backoff;
        for (unsigned turn = 0; records[at].touching.load(std::memory_order_seq_cst) == object;
             ++turn) {
          backoff.pause();
          if (turn >= 100 && deadline != Clock::time_point::max() && Clock::now() >= deadline) {
            return false;
          }
        }
      }
    }
    return true;
  }

  /// Whether sections are free of read-modify-writes here. For tests and benchmarks.
  bool has_fence() const noexcept { return has_fence_; }

 private:
  ThreadSections() noexcept = default;

  // With the shared object that made the key its destructor would be gone too. At the end of the
  // process the same happens, and no thread gets a record after that.
  class KeyKeeper {
   public:
    explicit KeyKeeper(ThreadSections* owner) noexcept : owner_(owner) {}
    KeyKeeper(const KeyKeeper&) = delete;
    KeyKeeper& operator=(const KeyKeeper&) = delete;
    ~KeyKeeper() {
      owner_->open_.store(false, std::memory_order_relaxed);
      ::pthread_key_delete(owner_->key_);
    }

   private:
    ThreadSections* owner_;
  };

  [[gnu::cold, gnu::noinline]] static ThreadSections* make() noexcept {
    if (being_made.exchange(true, std::memory_order_acquire)) return nullptr;
    auto* made = of_process.load(std::memory_order_acquire);
    if (made == nullptr) {
      made = new (std::nothrow) ThreadSections();
      if (made != nullptr && ::pthread_key_create(&made->key_, &thread_ends) != 0) {
        delete made;
        made = nullptr;
      }
      if (made != nullptr && ::pthread_atfork(nullptr, nullptr, &child_begins) != 0) {
        ::pthread_key_delete(made->key_);
        delete made;
        made = nullptr;
      }
      if (made != nullptr) {
        made->has_fence_ = register_fence();
        static const KeyKeeper keeper(made);
        of_process.store(made, std::memory_order_release);
      }
    }
    being_made.store(false, std::memory_order_release);
    return made;
  }

  // A thread's end is noted by a pthread key and not by a thread_local destructor: registering one of
  // those allocates, and glibc ends the process if it can't.
  ThreadRecord* claim() noexcept {
    for (std::uint32_t word = 0; word < used_words; ++word) {
      std::uint64_t seen = used_[word].load(std::memory_order_relaxed);
      for (;;) {
        const auto bit = static_cast<std::uint32_t>(std::countr_one(seen));
        const std::uint32_t index = word * 64 + bit;
        if (bit == 64 || index >= ChunkPlace::capacity) break;
        // acquire: pairs with the release in give_up(). The last owner's plain stores, to its record
        // and to every group's slot of that number, come before ours.
        if (!used_[word].compare_exchange_weak(seen, seen | (std::uint64_t{1} << bit),
                                               std::memory_order_acquire,
                                               std::memory_order_relaxed)) {
          continue;
        }
        ThreadRecord* const record = record_at(ChunkPlace::of(index));
        if (record != nullptr && ::pthread_setspecific(key_, record) == 0) return record;
        give_up(index);
        return nullptr;
      }
    }
    return nullptr;
  }

  void give_up(std::uint32_t index) noexcept {
    used_[index / 64].fetch_and(~(std::uint64_t{1} << (index % 64)), std::memory_order_release);
  }

  static std::uint32_t index_of(ChunkPlace place) noexcept {
    return ChunkPlace::first_size * ((1U << place.chunk) - 1) + place.offset;
  }

  ThreadRecord* record_at(ChunkPlace place) noexcept {
    std::atomic<ThreadRecord*>& chunk = chunks_[place.chunk];
    ThreadRecord* records = chunk.load(std::memory_order_acquire);
    if (records == nullptr) {
      auto* const fresh = make_chunk<ThreadRecord>(place.chunk);
      if (fresh == nullptr) return nullptr;
      for (std::uint32_t at = 0; at < ChunkPlace::size_of(place.chunk); ++at) {
        fresh[at].sections = this;
        fresh[at].place = {place.chunk, at};
        fresh[at].has_fence = has_fence_;
      }
      // seq_cst: stands before its threads' S1 in the order that wait_out() relies on.
      if (chunk.compare_exchange_strong(records, fresh, std::memory_order_seq_cst)) {
        records = fresh;
      } else {
        free_chunk(fresh);
      }
    }
    return records + place.offset;
  }

  static void thread_ends(void* value) noexcept {
    auto* const record = static_cast<ThreadRecord*>(value);
    thread_state.record = nullptr;
    thread_state.ending = true;
    record->sections->give_up(index_of(record->place));
  }

  // In a forked child there is one thread. The others may have been copied in the middle of a section,
  // and would be waited for until the end of days.
  static void child_begins() noexcept {
    ThreadSections* const all = of_process.load(std::memory_order_relaxed);
    if (all == nullptr) return;
    const ThreadRecord* const mine = thread_state.record;
    for (auto& word : all->used_) word.store(0, std::memory_order_relaxed);
    if (mine != nullptr && mine->sections == all) {
      const std::uint32_t index = index_of(mine->place);
      all->used_[index / 64].store(std::uint64_t{1} << (index % 64), std::memory_order_relaxed);
    }
    for (std::uint32_t chunk = 0; chunk < ChunkPlace::chunks; ++chunk) {
      ThreadRecord* const records = all->chunks_[chunk].load(std::memory_order_relaxed);
      if (records == nullptr) continue;
      for (std::uint32_t at = 0; at < ChunkPlace::size_of(chunk); ++at) {
        if (records + at != mine) records[at].touching.store(nullptr, std::memory_order_relaxed);
      }
    }
  }

#if LASTCALL_LINUX && !defined(LASTCALL_TSAN) && defined(SYS_membarrier)
  static bool membarrier(int command) noexcept {
    return ::syscall(SYS_membarrier, command, 0) == 0;
  }

  static bool register_fence() noexcept {
    const int saved = errno;
    const bool granted = membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED);
    errno = saved;
    return granted;
  }

  // The kernel has granted it, so it works, but for a moment's lack of memory (ENOMEM) and a
  // registration that got lost (EPERM). What is left is a filter put up since: then we sleep for a
  // thousand times longer than any processor keeps a store to itself. This is the one line of the
  // library that leans on hardware instead of on a memory model, and it needs a sandbox that revokes.
  static void fence_every_thread() noexcept {
    const int saved = errno;
    for (int attempt = 0; attempt < 10; ++attempt) {
      if (membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED)) {
        errno = saved;
        return;
      }
      if (errno == EPERM) membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED);
      nap(1'000'000);
    }
    nap(20'000'000);
    errno = saved;
  }

  static void nap(long nanoseconds) noexcept {
    const timespec time{0, nanoseconds};
    ::nanosleep(&time, nullptr);
  }
#else
  static bool register_fence() noexcept { return false; }
  static void fence_every_thread() noexcept {}
#endif

  static constexpr std::uint32_t used_words = (ChunkPlace::capacity + 63) / 64;

  // NOLINTBEGIN(readability-identifier-naming): private, if static
  static inline constinit std::atomic<ThreadSections*> of_process{nullptr};
  static inline constinit std::atomic<bool> being_made{false};
  // NOLINTEND(readability-identifier-naming)

  std::atomic<ThreadRecord*> chunks_[ChunkPlace::chunks]{};
  std::atomic<std::uint64_t> used_[used_words]{};  // a bit for each record that a live thread has
  std::atomic<bool> open_{true};
  pthread_key_t key_{};
  bool has_fence_ = false;
};

}  // namespace lastcall::detail
