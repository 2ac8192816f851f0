// Sections: how a thread says, without one atomic read-modify-write, "I am inside that object now", and
// how another waits until nobody is.
//
// This is the read side of user-space RCU, cut down to what a WaitGroup needs. Each thread has words of
// its own in each object, with a value that it alone writes and a stamp that is there while it is inside. A
// section of such a word is
//
//   S1  word = value | stamp     a plain store
//   S2  is the object open?      a load of the object's word
//   S3  word = a new value       only if S2 said so, else the old one; without the stamp. A release store,
//                                and the last that the section does
//
// and who wants the values for itself does
//
//   W1  shut the object          an atomic change of its word
//   W2  fence every thread       membarrier(2), private and expedited
//   W3  wait until no word has the stamp
//
// After W3 no word changes its value, and none will: that is Dekker's argument with one side's fence paid
// by the other. When the kernel runs W2 on a thread's processor, that thread is somewhere in its program.
// Before S2: then its S2 comes after W1 and sees the object shut. After S2, hence after S1 (only the
// compiler could swap them, and is forbidden to): then S1 is in memory before W3 reads it. A thread that
// isn't running went through the scheduler, which fences too. What the thread did before S3 is seen after
// W3, because S3 is a release store and W3 reads with acquire. S1 stores no new value: so a thread that comes
// too late changes nothing, and nobody else ever writes the word.
//
// Where membarrier is missing (another system, an old kernel, a seccomp filter), and under
// ThreadSanitizer, which knows no such fence, S1 is a sequentially consistent exchange and W2 nothing:
// then S1, S2, W1 and W3 stand in the one order of all sequentially consistent operations, and the same
// argument holds without the kernel. It is decided once, when the first thread gets its place.
//
// A section must be a few instructions without calls: whoever is at W3 waits for it. A thread that is
// preempted inside one holds W3 up until it runs again; one that ends is never inside (unless it allows its
// asynchronous cancellation). One that
// fork() left behind in the parent may be, for ever: so the stamp is the number of forks, and W3 looks for this
// process's only.
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

/// What a thread knows of its place.
struct ThreadState {
  ThreadSections* sections = nullptr;  // null: it has none
  ThreadSections* fenced = nullptr;    // the same if S1 is a plain store there, else null
  // Its place in a table of chunks, as two numbers that need no more arithmetic.
  std::size_t chunk = 0;
  std::size_t offset = 0;  // in lines of the cache, as bytes
  std::uintptr_t stamp = 0;
  bool ending = false;         // no place any more for what runs late in a thread's life
  std::uint16_t patience = 0;  // attempts to pass over after the table was found full
};

/// A word of one thread's in one object: the stamp below, above it a value that wraps.
struct SectionWord {
  static constexpr unsigned stamp_bits = sizeof(std::uintptr_t) >= 8 ? 16 : 4;
  static constexpr std::uintptr_t stamp_mask = (std::uintptr_t{1} << stamp_bits) - 1;
  static constexpr std::uintptr_t one = std::uintptr_t{1} << stamp_bits;

  std::atomic<std::uintptr_t> word{0};

  /// By its own thread. relaxed: nobody else writes it.
  std::uintptr_t value() const noexcept {
    return word.load(std::memory_order_relaxed) & ~stamp_mask;
  }
  /// S1 with W2's help. Sections don't nest. relaxed: it says nothing new, and W2 sees to the rest.
  void open_fenced(std::uintptr_t value, std::uintptr_t stamp) noexcept {
    word.store(value | stamp, std::memory_order_relaxed);
    std::atomic_signal_fence(std::memory_order_seq_cst);  // keeps the compiler from moving S2 up
  }
  /// S1 without.
  void open(std::uintptr_t value, std::uintptr_t stamp) noexcept {
    word.exchange(value | stamp, std::memory_order_seq_cst);
  }
  /// S3. The object may be gone the moment that this is seen.
  void close(std::uintptr_t value) noexcept { word.store(value, std::memory_order_release); }
};

// Trivially destroyed and constant-initialised, so that reading it is one instruction in an executable.
inline constinit thread_local ThreadState thread_state{};

/// The places of all threads. One in a process; but a shared object with hidden symbols has one of its
/// own, so an object remembers whose threads may use it (ThreadState::sections). Lives on the heap for
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

  /// Null too if nobody has made it yet.
  static ThreadSections* existing() noexcept { return of_process.load(std::memory_order_acquire); }

  /// Gives the calling thread a place if it has none. False if it can't: all are taken, or the thread is at
  /// its end. pthread_setspecific() may allocate, once a thread, for a key beyond the first 32 (glibc);
  /// without `may_allocate` such a thread has no place.
  bool attach(bool may_allocate) noexcept {
    ThreadState& state = thread_state;
    if (state.sections != nullptr) return state.sections == this;
    // In the middle of a fork nobody gets a place, or a thread that somebody else's hook starts in the child
    // would have one from before child_begins(). acquire: as seen by such a thread.
    if (state.ending || !open_.load(std::memory_order_relaxed) ||
        forking_.load(std::memory_order_acquire) != 0) {
      return false;
    }
    if (!may_allocate && key_ >= first_keys) return false;
    if (state.patience != 0) {
      --state.patience;
      return false;
    }
    if (!claim(state)) {
      state.patience = 256;
      return false;
    }
    return true;
  }

  /// W2, after the object was shut (W1) by a sequentially consistent change.
  void fence() const noexcept {
    if (has_fence_) fence_every_thread();
  }

  /// W3 for one word. False if `deadline` passes while the thread is still inside.
  bool wait_out(const SectionWord& slot, Clock::time_point deadline) const noexcept {
    // relaxed: only a fork changes it.
    const std::uintptr_t stamp = stamp_.load(std::memory_order_relaxed);
    Backoff backoff;
    for (unsigned turn = 0;
         (slot.word.load(std::memory_order_seq_cst) & SectionWord::stamp_mask) == stamp; ++turn) {
      backoff.pause();
      if (turn >= 60 && deadline != Clock::time_point::max() && Clock::now() >= deadline) {
        return false;
      }
    }
    return true;
  }

  /// Whether sections are free of read-modify-writes here. For tests and benchmarks.
  bool has_fence() const noexcept { return has_fence_; }

 private:
  ThreadSections() noexcept = default;

  // With the shared object that made the key its destructor would be gone too. At the end of the
  // process the same happens, and no thread gets a place after that.
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
      if (made != nullptr && ::pthread_atfork(&fork_begins, &fork_is_over, &child_begins) != 0) {
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
  bool claim(ThreadState& state) noexcept {
    for (std::uint32_t word = 0; word < used_words; ++word) {
      std::uint64_t seen = used_[word].load(std::memory_order_relaxed);
      for (;;) {
        const auto bit = static_cast<std::uint32_t>(std::countr_one(seen));
        const std::uint32_t index = word * 64 + bit;
        if (bit == 64 || index >= ChunkPlace::capacity) break;
        // acquire: pairs with the release in give_up(). The last owner's plain stores, to every object's
        // slot of that number, come before ours.
        if (!used_[word].compare_exchange_weak(seen, seen | (std::uint64_t{1} << bit),
                                               std::memory_order_acquire,
                                               std::memory_order_relaxed)) {
          continue;
        }
        if (::pthread_setspecific(key_, this) != 0) {
          give_up(index);
          return false;
        }
        const ChunkPlace place = ChunkPlace::of(index);
        state.chunk = place.chunk;
        state.offset = place.offset * cache_line;
        state.stamp = stamp_.load(std::memory_order_relaxed);
        state.fenced = has_fence_ ? this : nullptr;
        state.sections = this;
        return true;
      }
    }
    return false;
  }

  void give_up(std::uint32_t index) noexcept {
    used_[index / 64].fetch_and(~(std::uint64_t{1} << (index % 64)), std::memory_order_release);
  }

  static std::uint32_t index_of(const ThreadState& state) noexcept {
    return ChunkPlace::first_size * ((1U << state.chunk) - 1) +
           static_cast<std::uint32_t>(state.offset / cache_line);
  }

  static void thread_ends(void* value) noexcept {
    ThreadState& state = thread_state;
    state.sections = state.fenced = nullptr;
    state.ending = true;
    static_cast<ThreadSections*>(value)->give_up(index_of(state));
  }

  static void fork_begins() noexcept {
    ThreadSections* const all = of_process.load(std::memory_order_acquire);
    if (all != nullptr) all->forking_.fetch_add(1, std::memory_order_relaxed);
  }
  static void fork_is_over() noexcept {
    ThreadSections* const all = of_process.load(std::memory_order_acquire);
    // Not below zero: it may have been made while somebody forked.
    if (all != nullptr && all->forking_.load(std::memory_order_relaxed) > 0) {
      all->forking_.fetch_sub(1, std::memory_order_relaxed);
    }
  }

  // In a forked child there is one thread. The others may have been copied in the middle of a section,
  // and would be waited for until the end of days.
  static void child_begins() noexcept {
    ThreadSections* const all = of_process.load(std::memory_order_relaxed);
    if (all == nullptr) return;
    // Never zero, which is nobody's. Children of children, beyond the stamp's bits, begin again.
    std::uintptr_t stamp =
        (all->stamp_.load(std::memory_order_relaxed) + 1) & SectionWord::stamp_mask;
    if (stamp == 0) stamp = 1;
    all->stamp_.store(stamp, std::memory_order_relaxed);
    for (auto& word : all->used_) word.store(0, std::memory_order_relaxed);
    if (thread_state.sections == all) {
      thread_state.stamp = stamp;
      const std::uint32_t index = index_of(thread_state);
      all->used_[index / 64].store(std::uint64_t{1} << (index % 64), std::memory_order_relaxed);
    }
    // release: a thread that gets a place from now on gets one of this process.
    all->forking_.store(0, std::memory_order_release);
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
#else
  static bool register_fence() noexcept { return false; }
  static void fence_every_thread() noexcept {}
#endif

  static constexpr pthread_key_t first_keys = 32;
  static constexpr std::uint32_t used_words = (ChunkPlace::capacity + 63) / 64;

  // NOLINTBEGIN(readability-identifier-naming): private, if static
  static inline constinit std::atomic<ThreadSections*> of_process{nullptr};
  static inline constinit std::atomic<bool> being_made{false};
  // NOLINTEND(readability-identifier-naming)

  std::atomic<std::uint64_t> used_[used_words]{};  // a bit for each place that a live thread has
  std::atomic<std::uintptr_t> stamp_{1};
  std::atomic<bool> open_{true};
  std::atomic<int> forking_{0};
  pthread_key_t key_{};
  bool has_fence_ = false;
};

}  // namespace lastcall::detail
